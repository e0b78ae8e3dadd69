"""Kernel times of a JAX program, from the profiler's trace and the compiled program's text.

The trace says which kernel ran for how long and for which HLO instruction; the HLO text says which
operation of the program that instruction is, and in which Python functions it was written. The two
together put every kernel in one group. A fusion counts as what its root is; `fused` lists the
groups of all that is in it.
"""

import collections
import dataclasses
import gzip
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

GROUPS = (
    "fp8 GEMM",
    "bf16 GEMM",
    "attention fwd",
    "attention bwd",
    "quantise/cast/transpose",
    "norm",
    "swiglu",
    "rope",
    "embedding",
    "head/loss",
    "optimizer",
    "copies",
    "other",
)
_CONTROL_FLOW = ("while", "conditional", "call")
_MAX_STEPS_TO_SOURCE = 8
_COPIES = (
    "copy",
    "copy-start",
    "copy-done",
    "slice-start",
    "dynamic-update-slice",
    "dynamic-slice",
)
_COPY_OP_NAMES = ("/dynamic_update_slice", "/dynamic_slice")  # a scan's stacked arrays
_TRIVIAL = ("parameter", "constant", "bitcast", "tuple", "get-tuple-element", "iota", "broadcast")
# The first function, from the innermost caller outwards, that is found here names the group.
_FUNCTIONS = tuple(
    (re.compile(pattern), group)
    for pattern, group in (
        (r"flash_attention|dot_product_attention", "attention"),
        (r"RMSNorm\.|rms_?norm", "norm"),
        (r"rotate$|rotary|rope", "rope"),
        (r"SwiGLU\.__call__$|swiglu", "swiglu"),
        (r"^_?(cross_entropy|chunk_loss)", "head/loss"),
        (r"^_?embed", "embedding"),
        (r"quantize|^statistics$|amax|^_?health$|^_all_finite$|^_?update$", "quantise"),
        (r"^Linear\.__call__$|^_Dot\.|^dot_general$|^_(fp8|bf16)_(fwd|bwd)$", "quantise"),
        (r"update_fn$|^apply_updates$|^tree_norm$|train_step\.<locals>\.<lambda>", "optimizer"),
    )
)
_SCOPES = (
    ("fp8_dot/", "quantise"),
    ("bf16_dot/", "quantise"),
    ("/head/", "head/loss"),
    ("/optimizer/", "optimizer"),
    ("flash_attention", "attention"),
)
_GEMM_SCOPE = re.compile(r"(fp8|bf16)_dot/(fwd|dgrad|wgrad)")

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(
    r"^\s+(?:ROOT )?%?([\w.\-$]+) = (?:\(.*?\)(?= [a-z])|\S+) ([\w\-]+)\(([^)]*)"
)
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_FRAME_ID = re.compile(r"stack_frame_id=(\d+)")
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_OPERAND = re.compile(r"%([\w.\-$]+)")
_CALLS = re.compile(r"calls=%?([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One HLO instruction."""

    opcode: str
    target: str
    """The custom call's target, or ""."""
    op_name: str
    functions: tuple[str, ...]
    """The Python functions that wrote it, innermost first."""
    calls: str
    """The fused computation, or ""."""
    operand: str
    """The first operand, or ""."""


@dataclasses.dataclass(frozen=True)
class KernelTime:
    """All runs of one kernel for one HLO instruction."""

    name: str
    instruction: str
    group: str
    op_name: str
    count: int
    time_ms: float
    fused: tuple[str, ...]
    """Groups of what is fused into it."""


@dataclasses.dataclass(frozen=True)
class Program:
    """What the text of a compiled program says about its instructions."""

    instructions: dict[str, Instruction]
    computations: dict[str, list[str]]
    """Instruction names of each computation."""

    @classmethod
    def parse(cls, text: str) -> "Program":
        """Reads `jax.stages.Compiled.as_text()`."""
        functions = _functions_of_frames(text)
        instructions: dict[str, Instruction] = {}
        computations: dict[str, list[str]] = {}
        current: list[str] = []
        for line in text.splitlines():
            if header := _COMPUTATION.match(line):
                current = computations.setdefault(header[1], [])
            elif match := _INSTRUCTION.match(line):
                frame = _FRAME_ID.search(line)
                current.append(match[1])
                instructions[match[1]] = Instruction(
                    opcode=match[2],
                    target=_first(_TARGET, line),
                    op_name=_first(_OP_NAME, line),
                    functions=functions.get(int(frame[1]), ()) if frame else (),
                    calls=_first(_CALLS, line),
                    operand=_first(_OPERAND, match[3]),
                )
        return cls(instructions, computations)

    def described(self, name: str) -> Instruction:
        """An instruction with an op_name: if it has none, that of the last operation fused into it.

        What the compiler added has none either: a copy then takes that of what it copies.
        """
        own = self.instructions[name]
        source = own
        for _ in range(_MAX_STEPS_TO_SOURCE):
            if source.op_name:
                break
            inner = [self.instructions[n] for n in self.computations.get(source.calls, [])]
            named = [x for x in inner if x.op_name and x.opcode not in _TRIVIAL]
            if named:
                source = named[-1]
            elif source.operand in self.instructions:
                source = self.instructions[source.operand]
        return dataclasses.replace(own, op_name=source.op_name, functions=source.functions)

    def group(self, name: str) -> str:
        """The group of an instruction, one of `GROUPS`.

        A fusion whose root tells nothing counts as the last operation in it that does.
        """
        group = group_of(self.described(name))
        if group != "other":
            return group
        inner = self.computations.get(self.instructions[name].calls, [])
        groups = [group_of(self.instructions[n]) for n in inner]
        return next((g for g in reversed(groups) if g not in ("other", "copies")), "other")

    def fused(self, name: str) -> tuple[str, ...]:
        """The groups of what is fused into an instruction, in the order of `GROUPS`."""
        inner = [
            self.instructions[n] for n in self.computations.get(self.instructions[name].calls, [])
        ]
        found = {group_of(x) for x in inner if x.op_name and x.opcode not in _TRIVIAL}
        return tuple(group for group in GROUPS if group in found)


def group_of(instruction: Instruction) -> str:
    """One of `GROUPS`."""
    target, op_name = instruction.target, instruction.op_name
    is_backward = "transpose(" in op_name
    place = _place(instruction)
    if "fmha" in target or place == "attention":
        return "attention bwd" if is_backward or "Backward" in target else "attention fwd"
    if place == "head/loss":
        return place
    if target.startswith("__cublas") or instruction.opcode == "dot":
        return "fp8 GEMM" if "$f8" in target else "bf16 GEMM"
    gemm = _GEMM_SCOPE.search(op_name)
    if gemm and instruction.opcode == "custom-call":
        return f"{gemm[1]} GEMM"
    is_copy = instruction.opcode in _COPIES or op_name.endswith(_COPY_OP_NAMES)
    if is_copy and place not in ("quantise", "optimizer"):
        return "copies"
    return "quantise/cast/transpose" if place == "quantise" else place


def _place(instruction: Instruction) -> str:
    for function in instruction.functions:
        for pattern, group in _FUNCTIONS:
            if pattern.search(function.rsplit(".<locals>.", 1)[-1]) or pattern.search(function):
                return group
    return next((group for scope, group in _SCOPES if scope in instruction.op_name), "other")


def read_trace(path: Path) -> list[dict]:
    """The events of a `*.trace.json.gz`."""
    with gzip.open(path) as file:
        return json.load(file)["traceEvents"]


def kernel_events(events: Iterable[dict]) -> Iterator[dict]:
    """The events that are kernels: those on a GPU's streams; without a GPU, the CPU's HLO thunks.

    Raises:
      ValueError: if there are none of either.
    """
    events = list(events)
    processes = {e["pid"]: e["args"]["name"] for e in events if e.get("name") == "process_name"}
    threads = {
        (e["pid"], e["tid"]): e["args"]["name"] for e in events if e.get("name") == "thread_name"
    }
    complete = [e for e in events if e.get("ph") == "X"]
    on_gpu = [
        e
        for e in complete
        if "GPU" in processes.get(e["pid"], "")
        and "Stream" in threads.get((e["pid"], e["tid"]), "")
    ]
    thunks = [e for e in complete if "hlo_op" in (e.get("args") or {})]
    if not on_gpu and not thunks:
        raise ValueError("the trace holds no kernel: no event on a GPU stream, none with an hlo_op")
    yield from on_gpu or thunks


def kernel_times(events: Iterable[dict], program: Program, steps: int) -> list[KernelTime]:
    """Time of each kernel and instruction in one step, the largest first.

    Args:
      events: from `kernel_events`.
      program: the program that ran.
      steps: how often it ran during the trace.
    """
    control_flow = {n for n, x in program.instructions.items() if x.opcode in _CONTROL_FLOW}
    times: dict[tuple[str, str], float] = collections.defaultdict(float)
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    # Without an hlo_op: the kernel of a fusion is called like it, with "_" for "." and "-".
    by_kernel_name = {_kernel_name(name): name for name in program.instructions}
    for event in events:
        hlo_op = (event.get("args") or {}).get("hlo_op", "")
        if hlo_op in control_flow:  # what runs inside has its own events
            continue
        known = hlo_op if hlo_op in program.instructions else ""
        key = (event["name"], known or by_kernel_name.get(_kernel_name(event["name"]), ""))
        times[key] += event["dur"] / 1e3
        counts[key] += 1
    rows = [
        KernelTime(
            name=name,
            instruction=instruction,
            group=_group_of_kernel(name, instruction, program),
            op_name=program.described(instruction).op_name if instruction else "",
            count=round(counts[name, instruction] / steps),
            time_ms=time / steps,
            fused=program.fused(instruction) if instruction else (),
        )
        for (name, instruction), time in times.items()
    ]
    return sorted(rows, key=lambda row: -row.time_ms)


def _group_of_kernel(name: str, instruction: str, program: Program) -> str:
    if instruction:
        return program.group(instruction)
    return "copies" if re.match(r"(?i)mem(cpy|set)", name) else "other"


def group_times(kernels: Iterable[KernelTime]) -> dict[str, float]:
    """Milliseconds of one step in each group, in the order of `GROUPS`."""
    totals = dict.fromkeys(GROUPS, 0.0)
    for kernel in kernels:
        totals[kernel.group] += kernel.time_ms
    return totals


def busy_and_span_ms(events: Iterable[dict]) -> tuple[float, float]:
    """Time in which a kernel ran, and time from the first kernel's start to the last one's end."""
    intervals = sorted((e["ts"], e["ts"] + e["dur"]) for e in events)
    busy, end = 0.0, intervals[0][0]
    for start, stop in intervals:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return busy / 1e3, (end - intervals[0][0]) / 1e3


def _kernel_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "_", name)


def _first(pattern: re.Pattern[str], line: str) -> str:
    match = pattern.search(line)
    return match[1] if match else ""


def _functions_of_frames(text: str) -> dict[int, tuple[str, ...]]:
    """Frame id -> its function and that one's callers, from the tables at the head of the text."""
    tables: dict[str, dict[int, str]] = {}
    table: dict[int, str] = {}
    for line in text.splitlines():
        if line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
            table = tables.setdefault(line, {})
        elif match := re.match(r"(\d+) (.*)", line):
            table[int(match[1])] = match[2]
        elif line.startswith(("%", "ENTRY")):
            break
    names = {i: name.strip('"') for i, name in tables.get("FunctionNames", {}).items()}
    locations = {
        i: names.get(_field(line, "function_name_id"), "")
        for i, line in tables.get("FileLocations", {}).items()
    }
    frames = {
        i: (_field(line, "file_location_id"), _field(line, "parent_frame_id"))
        for i, line in tables.get("StackFrames", {}).items()
    }
    # The text writes a frame's parent plus one: the outermost frame, without parent, says 1.
    offset = 1 if frames.get(1, (0, 0))[1] == 1 else 0
    chains: dict[int, tuple[str, ...]] = {}
    for i, (location, parent) in sorted(frames.items()):
        chains[i] = (locations.get(location, ""), *chains.get(parent - offset, ()))
    return chains


def _field(line: str, name: str) -> int:
    match = re.search(rf"{name}=(\d+)", line)
    return int(match[1]) if match else 0

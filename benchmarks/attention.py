"""Checks and times the attention kernels beside their peers: same shapes, same device, one run.

    python -m benchmarks.attention --output benchmarks/results/attention.json

First the kernels are checked against a float32 oracle, feature by feature. Then every candidate
config is timed, interleaved with cuDNN (and tokamax, if it is installed), and PyTorch's attention
is timed if it is installed. Each part runs in a process of its own under its own time limit
(`attention_worker`), so that a kernel that hangs costs only its own rows. The file is rewritten
after each part.

TFLOP/s count 4 H for each visible pair of query and key and each query head in the forward, 10 H
in the backward, recomputation not counted.
"""

import argparse
import dataclasses
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import markdown_table, write_json

_DIRECTIONS = ("forward", "backward")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """One attention problem of the benchmark."""

    name: str
    """How tables call it."""
    b: int
    """Batch size."""
    t: int
    """Length of queries and keys."""
    n: int
    """Query heads."""
    k: int
    """Key/value heads."""
    h: int = 128
    """Head dim."""
    is_causal: bool = True
    """Whether a query sees only the keys up to its own position."""
    left: int | None = None
    """Size of the window on the left, or None."""

    def pairs(self) -> int:
        """Visible pairs of query and key in one head."""
        if not self.is_causal:
            return self.t * self.t
        # The usual convention: the diagonal counts half.
        if self.left is None:
            return self.t * self.t // 2
        return self.t * self.left - self.left * self.left // 2

    def flops(self, direction: str) -> int:
        """Operations of one call."""
        per_pair = 4 if direction == "forward" else 10
        return per_pair * self.h * self.b * self.n * self.pairs()


SHAPES = (
    Shape(name="causal 2x8192 16/16", b=2, t=8192, n=16, k=16),
    Shape(name="full 2x8192 16/16", b=2, t=8192, n=16, k=16, is_causal=False),
    Shape(name="causal 2x8192 32/8", b=2, t=8192, n=32, k=8),
    Shape(name="causal 8x2048 16/16", b=8, t=2048, n=16, k=16),
    Shape(name="causal 1x16384 16/16", b=1, t=16384, n=16, k=16),
    Shape(name="window 1024 2x8192 32/8", b=2, t=8192, n=32, k=8, left=1024),
    Shape(name="causal 2x8192 32/32 d64", b=2, t=8192, n=32, k=32, h=64),
    Shape(name="full 2x8192 32/32 d64", b=2, t=8192, n=32, k=32, h=64, is_causal=False),
    Shape(name="causal 2x8192 8/8 d256", b=2, t=8192, n=8, k=8, h=256),
    Shape(name="full 2x8192 8/8 d256", b=2, t=8192, n=8, k=8, h=256, is_causal=False),
)

_TUNED_ON = (
    "causal 2x8192 16/16",
    "full 2x8192 16/16",
    "causal 8x2048 16/16",
    "causal 2x8192 32/32 d64",
    "full 2x8192 32/32 d64",
    "causal 2x8192 8/8 d256",
    "full 2x8192 8/8 d256",
)


def fp8_tasks(directions: Sequence[str], max_configs: int, fast: bool) -> Iterator[dict[str, Any]]:
    """Yields what the FP8 workers are to do; arguments as those of `tasks`."""
    head_dims = (128,) if fast else (128, 64, 256)
    for direction in directions:
        yield {"kind": "fp8 check", "direction": direction, "timeout_s": 150}
        for head_dim in head_dims:
            if direction == "forward" or head_dim <= 128:
                yield _timing(direction, head_dim, None) | {"kind": "fp8 time"}
    yield {"kind": "fp8 accuracy", "timeout_s": 120}
    if "forward" in directions:  # the backward has one config
        for head_dim in head_dims:
            for index in range(max_configs):
                yield _timing("forward", head_dim, index) | {"kind": "fp8 time"}


def tasks(directions: Sequence[str], max_configs: int, fast: bool) -> Iterator[dict[str, Any]]:
    """Yields what the workers are to do, the most important first.

    Args:
      directions: "forward", "backward" or both.
      max_configs: candidates timed for each head dim, the shipped configs not counted.
      fast: head dim 128 alone.
    """
    head_dims = (128,) if fast else (128, 64, 256)
    for direction in directions:
        yield {"kind": "check", "direction": direction, "timeout_s": 150}
    for direction in directions:
        for head_dim in head_dims:
            yield _timing(direction, head_dim, None)
    yield {
        "kind": "torch",
        "directions": list(directions),
        "timeout_s": 120,
        "shapes": [dataclasses.asdict(s) for s in SHAPES],
    }
    for head_dim in head_dims:
        for direction in directions:
            for index in range(max_configs):
                yield _timing(direction, head_dim, index)


def _timing(direction: str, head_dim: int, candidate: int | None) -> dict[str, Any]:
    """A timing task: the shipped config of each shape, or candidate number `candidate` of some."""
    shapes = [s for s in SHAPES if s.h == head_dim and (candidate is None or s.name in _TUNED_ON)]
    return {
        "kind": "time",
        "direction": direction,
        "candidate": candidate,
        "timeout_s": 90,
        "shapes": [dataclasses.asdict(s) for s in shapes],
    }


def run_worker(task: dict[str, Any]) -> dict[str, Any]:
    """Runs one task in a process of its own; returns its rows and how it ended."""
    environment = os.environ | {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        # The peers are the same in every part: compile them once.
        "JAX_COMPILATION_CACHE_DIR": str(Path(tempfile.gettempdir()) / "attention_benchmark_cache"),
    }
    worker = "attention_fp8_worker" if task["kind"].startswith("fp8") else "attention_worker"
    command = [sys.executable, "-m", f"benchmarks.{worker}", json.dumps(task)]
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, stdout=out, stderr=errors, env=environment, start_new_session=True
        )
        try:
            code = process.wait(task["timeout_s"])
            ended = "ok" if code == 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            ended = f"stopped after {task['timeout_s']} s"
        out.seek(0)
        rows = [json.loads(line) for line in out if line.startswith("{")]
        errors.seek(0)
        log = errors.read()[-2000:] if ended != "ok" else ""
    return {
        "task": {name: value for name, value in task.items() if name != "shapes"},
        "ended": ended,
        "wall_s": round(time.monotonic() - started, 1),
        "rows": rows,
        "log": log,
    }


def report(parts: Sequence[dict[str, Any]]) -> str:
    """Returns the tables of all parts so far."""
    rows = [row for part in parts for row in part["rows"]]
    checks = [
        [
            r["direction"],
            r["case"],
            r["what"],
            f"{r['error']:.2e}",
            f"{r['bound']:.2e}",
            r["verdict"],
        ]
        for r in rows
        if r["kind"] == "check"
    ]
    times = [
        [
            r["direction"],
            r["shape"],
            r["contender"],
            f"{r['median_ms']:.3f}",
            f"{r['tflops']:.0f}",
            f"{r['speedup']:.3f}" if r.get("speedup") else "",
            r.get("note", ""),
        ]
        for r in sorted(
            (r for r in rows if r["kind"] == "time"),
            key=lambda r: (r["direction"], r["shape"], r["median_ms"]),
        )
    ]
    failures = [f"{p['task']}: {p['ended']}" for p in parts if p["ended"] != "ok"]
    failures += [
        f"{r['shape']} {r['contender']}: {r['error']}" for r in rows if r["kind"] == "fail"
    ]
    sections = []
    if checks:
        sections.append(
            markdown_table(["direction", "case", "of", "error", "bound", "verdict"], checks)
        )
    accuracy = [
        [r["case"], r["contender"], *(f"{r[what]:.4f}" for what in ("out", "dq", "dk", "dv"))]
        for r in rows
        if r["kind"] == "accuracy"
    ]
    if accuracy:
        header = ["inputs", "contender", "out", "dq", "dk", "dv"]
        sections.append(markdown_table(header, accuracy))
    if times:
        header = ["direction", "shape", "contender", "ms", "TFLOP/s", "vs cuDNN", "note"]
        sections.append(markdown_table(header, times))
    return "\n\n".join(sections + failures)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="result file (JSON)")
    parser.add_argument("--directions", nargs="+", choices=_DIRECTIONS, default=["forward"])
    parser.add_argument("--precision", choices=("bf16", "fp8"), default="bf16")
    parser.add_argument("--max-configs", type=int, default=20, help="candidates per head dim")
    parser.add_argument("--deadline-s", type=float, default=3600.0, help="start no part after this")
    parser.add_argument("--fast", action="store_true", help="head dim 128 alone")
    options = parser.parse_args(arguments)
    started = time.monotonic()
    result: dict[str, Any] = {"host": platform.node(), "python": platform.python_version()}
    parts = result["parts"] = []
    make_tasks = fp8_tasks if options.precision == "fp8" else tasks
    for task in make_tasks(options.directions, options.max_configs, options.fast):
        left = options.deadline_s - (time.monotonic() - started)
        if left <= 10:
            result["stopped_at_deadline"] = True
            break
        task["timeout_s"] = min(task["timeout_s"], left)
        part = run_worker(task)
        parts.append(part)
        write_json(options.output, result)
        print(f"{part['task']}: {part['ended']}, {part['wall_s']} s", flush=True)
    print(report(parts))


if __name__ == "__main__":
    main()

"""Where our training step spends the device's time: a table of kernels, from the profiler.

    python -m benchmarks.kernel_table --config configs/llama_8b_slice_fp8.toml --output FILE.json

Prints the time of each group of kernels and the largest kernels of one step; writes all of them to
FILE.json and the compiled program's text to FILE.hlo.txt.gz. Arguments that are not its own go to
`train.config.parse`, such as `--fp8.recipe current`.

Without a GPU it shows the CPU's own times, to try it out: they say nothing about a GPU.
"""

import argparse
import dataclasses
import gzip
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import trace
from benchmarks.common import markdown_table, write_json
from train.environment import prepare_environment

_STEPS = 2
_WARMUP = 3
# Kernels inside a CUDA graph are not told apart by HLO instruction; launched singly they are. Each
# takes as long, only the gaps between them grow.
_NO_CUDA_GRAPHS = "--xla_gpu_enable_command_buffer="
_NAME_WIDTH, _OP_NAME_WIDTH = 48, 72


def profile(config_arguments: list[str], directory: Path) -> tuple[list[dict], str, dict[str, Any]]:
    """Runs our step under the profiler.

    Args:
      config_arguments: for `train.config.parse`.
      directory: empty; the profiler writes here.

    Returns: the trace's events, the compiled program's text, and facts of the run for the result.
    """
    # Imported late: the flags must be set before JAX is.
    import jax

    from benchmarks.contenders import jax_device
    from benchmarks.contenders.ours import OurStep
    from train.config import parse

    step = OurStep(parse(config_arguments))
    for _ in range(_WARMUP):
        jax.block_until_ready(step.launch())
    started = time.perf_counter()
    with jax.profiler.trace(str(directory)):
        jax.block_until_ready([step.launch() for _ in range(_STEPS)])
    wall = (time.perf_counter() - started) / _STEPS
    text = step.steps.train.as_text() or ""
    events = [e for path in directory.rglob("*.trace.json.gz") for e in trace.read_trace(path)]
    facts = {"config_arguments": config_arguments, "wall_time_per_step_ms": 1e3 * wall}
    return events, text, facts | jax_device.describe()


def report(kernels: list[trace.KernelTime], largest: int) -> str:
    """Two markdown tables: the groups, and the largest kernels."""
    total = sum(kernel.time_ms for kernel in kernels)
    groups = [
        [
            group,
            f"{ms:.3f}",
            f"{ms / total:.1%}",
            str(sum(k.count for k in kernels if k.group == group)),
        ]
        for group, ms in trace.group_times(kernels).items()
    ]
    groups.append(["all kernels", f"{total:.3f}", "100.0%", str(sum(k.count for k in kernels))])
    rows = [
        [
            kernel.group,
            f"{kernel.time_ms:.3f}",
            str(kernel.count),
            kernel.name[:_NAME_WIDTH],
            _shortened(kernel.op_name),
            ", ".join(group for group in kernel.fused if group != kernel.group),
        ]
        for kernel in merged(kernels)[:largest]
    ]
    return "\n\n".join(
        [
            markdown_table(["group", "ms a step", "share", "kernels"], groups),
            markdown_table(["group", "ms a step", "count", "kernel", "op_name", "and"], rows),
        ]
    )


def merged(kernels: list[trace.KernelTime]) -> list[trace.KernelTime]:
    """The kernels, those of all layers added up: the same but for a number, with one op_name."""
    together: dict[tuple[str, str, str], trace.KernelTime] = {}
    for kernel in kernels:
        name = kernel.name.rstrip("0123456789").rstrip("_.")
        key = (name, kernel.group, kernel.op_name)
        before = together.get(key)
        together[key] = dataclasses.replace(
            kernel,
            name=name,
            count=kernel.count + (before.count if before else 0),
            time_ms=kernel.time_ms + (before.time_ms if before else 0.0),
        )
    return sorted(together.values(), key=lambda kernel: -kernel.time_ms)


def _shortened(op_name: str) -> str:
    """The end of an op_name, without the step's own name."""
    return op_name.removeprefix("jit(train_step)/")[-_OP_NAME_WIDTH:]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the profile and writes its results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernel_table")
    parser.add_argument("--config", default="configs/llama_8b_slice_fp8.toml")
    parser.add_argument("--tiny", action="store_true", help="a model for a CPU, for trying it out")
    parser.add_argument("--output", type=Path, required=True, help="the JSON file")
    parser.add_argument("--largest", type=int, default=40, help="kernels in the table")
    parsed, options = parser.parse_known_args(arguments)

    prepare_environment()
    os.environ["XLA_FLAGS"] += f" {_NO_CUDA_GRAPHS}"
    from benchmarks.train_step import config_arguments  # imports JAX

    base = config_arguments("tiny", "ours-delayed") if parsed.tiny else ["--config", parsed.config]
    with tempfile.TemporaryDirectory() as directory:
        events, text, facts = profile([*base, *options], Path(directory))
    program = trace.Program.parse(text)
    on_device = list(trace.kernel_events(events))
    kernels = trace.kernel_times(on_device, program, _STEPS)
    busy, span = (ms / _STEPS for ms in trace.busy_and_span_ms(on_device))
    result = facts | {
        "benchmark": "kernel_table",
        "steps": _STEPS,
        "busy_ms": busy,
        "span_ms": span,
        "groups_ms": trace.group_times(kernels),
        "kernels": [dataclasses.asdict(kernel) for kernel in kernels],
    }
    write_json(parsed.output, result)
    with gzip.open(parsed.output.with_suffix(".hlo.txt.gz"), "wt") as file:
        file.write(text)
    print(f"{facts['device']}, {' '.join(facts['config_arguments'])}\n")
    print(report(kernels, parsed.largest))
    print(f"\na kernel runs for {busy:.2f} ms of each step's {span:.2f} ms (without CUDA graphs)")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What the training-step benchmarks share: timing, result files and tables. Standard library only.

A contender runs in a process of its own, perhaps of another Python (PyTorch's), so nothing here may
need more than Python 3.11.
"""

import dataclasses
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class StepTimes:
    """Host-clock times of consecutive steps."""

    step_times_s: list[float]
    """From the end of one step on the device to the end of the next."""
    launch_times_s: list[float]
    """How long the host took to hand each step to the device; far below the step or it was idle."""


def time_steps(
    launch: Callable[[], Any],
    wait: Callable[[Any], None],
    *,
    warmup: int,
    steps: int,
    clock: Callable[[], float] = time.perf_counter,
) -> StepTimes:
    """Times steps as a training loop runs them: the host waits for one while the next is queued.

    The device never idles for the host, and there are never more than two steps in flight.

    Args:
      launch: queues one step on the device and returns a handle to it.
      wait: returns when the step of that handle has ended.
      warmup: steps before the first timed one.
      steps: timed steps.
      clock: in seconds.

    Raises:
      ValueError: if `warmup` or `steps` is less than 1.
    """
    if warmup < 1 or steps < 1:
        raise ValueError(f"warmup={warmup} and steps={steps} must be at least 1")
    for _ in range(warmup - 1):
        wait(launch())
    pending = launch()  # the last warm-up step, whose end starts the clock
    ends: list[float] = []
    launches: list[float] = []
    for _ in range(steps + 1):
        before = clock()
        following = launch()
        launches.append(clock() - before)
        wait(pending)
        ends.append(clock())
        pending = following
    wait(pending)
    return StepTimes([b - a for a, b in zip(ends[:-1], ends[1:], strict=True)], launches[1:])


def summarise(times_s: Sequence[float]) -> dict[str, float]:
    """Median, extremes and 10th and 90th percentile of times in seconds, as milliseconds."""
    ordered = sorted(1e3 * t for t in times_s)
    return {
        "median_ms": statistics.median(ordered),
        "min_ms": ordered[0],
        "p10_ms": ordered[math.floor(0.1 * (len(ordered) - 1))],
        "p90_ms": ordered[math.ceil(0.9 * (len(ordered) - 1))],
        "max_ms": ordered[-1],
    }


def write_json(path: Path, value: Any) -> None:
    """Writes `value` to `path` in one step, so that a killed benchmark leaves whole files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(partial, path)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with aligned columns, those of numbers to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    is_number = [
        all(not row[i] or row[i][0] in "0123456789-" for row in rows) for i in range(len(header))
    ]

    def line(cells: Sequence[str]) -> str:
        columns = zip(cells, widths, is_number, strict=True)
        return "| " + " | ".join(c.rjust(w) if n else c.ljust(w) for c, w, n in columns) + " |"

    columns = zip(widths, is_number, strict=True)
    rule = "|" + "|".join("-" * (w + 1) + (":" if n else "-") for w, n in columns) + "|"
    return "\n".join([line(header), rule, *map(line, rows)])

"""Compares runs: `python -m train.report RUN... [--output FILE.png] [--band RUN RUN]`.

Reads nothing but the runs' metrics.jsonl. The first run is the reference that gaps are relative to.
Runs with `--fp8.inspect-every` get a picture of their own each, with heat maps of every tensor.
"""

import dataclasses
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import tyro

from train.config import ConfigError
from train.heatmaps import plot_inspections
from train.metrics import Metrics, MetricsError, read_metrics
from train.plots import Curve, plot_loss

_NONE = "-"
_FORMATS = (".png", ".svg", ".pdf")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ReportConfig:
    """Prints the results of runs side by side and draws their loss curves."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories; the first is the reference."""
    output: Path = Path("report.png")
    """Where the picture goes: .png, .svg or .pdf."""
    band: tuple[Path, ...] = ()
    """Two or more runs that differ by their seed alone; the range of their losses is shaded."""


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    title: str
    """What it is, with its unit."""
    cells: list[str]
    """One for each run."""


def compare(runs: Sequence[Metrics]) -> list[Row]:
    """Returns the table, a column for each run; gaps in per cent of the first run.

    The gap of the training loss is taken at the last step that both logged, that of the validation
    loss at the last step at which both were validated.
    """
    return [
        Row("steps", [str(run.train[-1]["step"]) for run in runs]),
        Row("tokens", [f"{run.train[-1]['tokens']:,}" for run in runs]),
        Row("train loss, smoothed [nats]", _train_losses(runs)),
        Row("validation loss [nats]", _validation_losses(runs)),
        Row("tokens/s, median", _medians(runs, "tokens_per_s", lambda x: f"{x:,.0f}")),
        Row("step time, median [s]", _medians(runs, "step_time_s", lambda x: f"{x:.4g}")),
        Row("MFU, median", _medians(runs, "mfu", lambda x: f"{x:.1%}", with_gaps=False)),
        Row("peak memory [GiB]", [_last(run, "memory_gib", "{:.2f}") for run in runs]),
        Row("skipped steps", [_last(run, "skipped_steps", "{:.0f}") for run in runs]),
        Row("FP8 saturated, worst", [_worst(run, "saturated_fraction") for run in runs]),
        Row("FP8 underflowed, worst", [_worst(run, "underflowed_fraction") for run in runs]),
    ]


def format_table(names: Sequence[str], rows: Sequence[Row]) -> str:
    """Returns the table as text, columns aligned."""
    table = [["", *names], *([row.title, *row.cells] for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in table
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point.

    Args:
      arguments: what follows the program name; None takes them from the command line.

    Returns: 0, or 2 for runs that cannot be compared.
    """
    try:
        config = tyro.cli(ReportConfig, prog="python -m train.report", args=arguments)
        _check(config)
        runs = [read_metrics(path) for path in config.runs]
        plot_loss(config.runs, config.output, band=config.band)
        heat_maps = _plot_inspections(runs, config.output)
    except (ConfigError, MetricsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: the picture cannot be written: {error}", file=sys.stderr)
        return 2
    print(format_table([run.name for run in runs], compare(runs)))
    for run in runs:
        if run.torn_lines:
            print(f"note: {run.name}: {run.torn_lines} unreadable lines were passed over")
    print(f"loss curves: {config.output}")
    for path in heat_maps:
        print(f"tensors by layer and step: {path}")
    return 0


def _plot_inspections(runs: Sequence[Metrics], output: Path) -> list[Path]:
    """Draws the heat maps beside `output`; returns their paths."""
    paths = []
    for number, run in enumerate(runs):
        if run.inspections:
            # Runs of different folders may share a name.
            again = any(run.name == other.name for other in runs[:number])
            name = f"{output.stem}_{run.name}" + (f"_{number}" if again else "")
            paths.append(output.with_name(f"{name}{output.suffix}"))
            plot_inspections(run, paths[-1])
    return paths


def _check(config: ReportConfig) -> None:
    # Not in __post_init__: tyro would wrap these lines into a box of its own.
    if not config.runs:
        raise ConfigError("give one run directory or more, such as runs/tiny_cpu")
    if config.output.suffix not in _FORMATS:
        raise ConfigError(f"--output={config.output} must end in {', '.join(_FORMATS)}")
    if len(config.band) == 1:
        raise ConfigError(f"--band={config.band[0]} needs two runs or more: one has no range")


def _train_losses(runs: Sequence[Metrics]) -> list[str]:
    curves = [Curve.of(run) for run in runs]
    cells = []
    for curve in curves:
        _, gaps = curve.gap_to(curves[0])
        gap = gaps[-1] if len(gaps) and curve is not curves[0] else None
        smoothed = curve.smoothed()
        cells.append(_with_gap(f"{smoothed[-1]:.4f}", gap) if len(smoothed) else _NONE)
    return cells


def _validation_losses(runs: Sequence[Metrics]) -> list[str]:
    losses = [
        {
            record["tokens"]: record["validation_loss_nats"]
            for record in run.validation
            if record.get("validation_loss_nats") is not None
        }
        for run in runs
    ]
    cells = []
    for index, own in enumerate(losses):
        common = max(own.keys() & losses[0].keys(), default=None) if index else None
        gap = own[common] / losses[0][common] - 1 if common is not None else None
        cells.append(_with_gap(f"{own[max(own)]:.4f}", gap) if own else _NONE)
    return cells


def _medians(
    runs: Sequence[Metrics], name: str, show: Callable[[float], str], *, with_gaps: bool = True
) -> list[str]:
    medians = []
    for run in runs:
        values = [r[name] for r in run.train if r.get(name) is not None]
        medians.append(statistics.median(values) if values else None)
    cells = []
    for index, value in enumerate(medians):
        has_gap = index > 0 and with_gaps and value is not None and medians[0]
        gap = value / medians[0] - 1 if has_gap else None
        cells.append(_NONE if value is None else _with_gap(show(value), gap))
    return cells


def _with_gap(text: str, gap: float | None) -> str:
    return text if gap is None else f"{text} ({gap:+.2%})"


def _last(run: Metrics, name: str, form: str) -> str:
    value = run.train[-1].get(name)
    return _NONE if value is None else form.format(value)


def _worst(run: Metrics, quantity: str) -> str:
    """Returns the largest value of any tensor group over the run, and the group's name."""
    worst: tuple[float, str] | None = None
    for record in run.train:
        for name, value in record.items():
            if name.startswith("fp8/") and name.endswith(f"/{quantity}") and value is not None:
                group = name.removeprefix("fp8/").removesuffix(f"/{quantity}")
                worst = max(worst or (0.0, group), (value, group))
    return f"{worst[0]:.2e} ({worst[1]})" if worst else _NONE


if __name__ == "__main__":
    sys.exit(main())

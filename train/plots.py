"""Loss curves as a picture, from metrics.jsonl alone."""

import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from train.metrics import Metrics, read_metrics
from train.run_directory import atomic_write

SMOOTHING = 0.1
"""A smoothed loss is the mean over this share of the tokens so far, the latest ones."""
TOLERANCE = 0.0025
"""Relative gap to the reference that the lower panel marks."""

# Okabe and Ito's palette, which colour-blind readers tell apart; the reference run is near black.
_COLORS = ("#222222", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_BAND_COLOR = "#999999"


@dataclasses.dataclass(frozen=True)
class Curve:
    """The training losses of one run, without the non-finite ones."""

    label: str
    """Name of the run."""
    tokens: np.ndarray
    """Tokens trained on, float64 [records], rising."""
    loss: np.ndarray
    """Loss [nats per token], float64 [records]."""

    @classmethod
    def of(cls, metrics: Metrics) -> Self:
        """Takes the train records that have a loss."""
        points = [
            (record["tokens"], record["loss_nats"])
            for record in metrics.train
            if record.get("loss_nats") is not None
        ]
        tokens, loss = np.array(points, np.float64).reshape(-1, 2).T
        return cls(metrics.name, tokens, loss)

    def smoothed(self) -> np.ndarray:
        """Returns the mean loss over the latest tenth of the tokens up to each point, float64.

        The window grows with the tokens: it stays short where the loss falls steeply.
        """
        first = np.searchsorted(self.tokens, (1 - SMOOTHING) * self.tokens, side="right")
        sums = np.concatenate([[0.0], np.cumsum(self.loss)])
        last = np.arange(1, len(self.loss) + 1)
        return (sums[last] - sums[first]) / (last - first)

    def gap_to(self, reference: "Curve") -> tuple[np.ndarray, np.ndarray]:
        """Compares the smoothed losses of two runs.

        Only the points that both logged are averaged, so that the noise of single batches cancels
        in runs with the same data order, however often each was logged.

        Returns: tokens, float64 [points]; smoothed loss over the reference's, minus 1. Both empty
          if the runs have no point in common.
        """
        common, mine, theirs = self.smoothed_with(reference)
        return common, mine / theirs - 1

    def smoothed_with(self, reference: "Curve") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The points that both logged: tokens, own and the reference's smoothed loss, float64."""
        common, own, others = np.intersect1d(self.tokens, reference.tokens, return_indices=True)
        mine = Curve(self.label, common, self.loss[own]).smoothed()
        theirs = Curve(reference.label, common, reference.loss[others]).smoothed()
        return common, mine, theirs


class SeedPair(NamedTuple):
    """A further seed of a drawn run, with the reference's run of that seed."""

    index: int
    """Which of the drawn runs it repeats with other initial weights."""
    run: Path
    reference: Path


def plot_loss(
    run_directories: Sequence[Path],
    path: Path,
    *,
    band: Sequence[Path] = (),
    pairs: Sequence[SeedPair] = (),
) -> None:
    """Draws the loss curves of runs, and below them the gaps to the first run.

    Raw losses are faint, smoothed ones strong, validation losses are dots. A single run without a
    band gets no lower panel.

    Args:
      run_directories: at least one; the first is the reference.
      path: the picture to write; its ending says the format.
      band: runs that differ by their seed alone; the range of their losses is shaded.
      pairs: drawn as thin lines among the gaps.

    Raises:
      MetricsError: a run has no metrics.
      OSError: `path` cannot be written.
    """
    runs = [read_metrics(directory) for directory in run_directories]
    curves = [Curve.of(run) for run in runs]
    band_curves = [Curve.of(read_metrics(directory)) for directory in band]
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    if len(curves) + len(band_curves) > 1:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(5, 2))
        _draw_gaps(lower, curves, band_curves)
        for pair in pairs:
            own, other = (Curve.of(read_metrics(path)) for path in pair[1:])
            tokens, gap = own.gap_to(other)
            lower.plot(tokens, 100 * gap, color=_COLORS[pair.index % len(_COLORS)], lw=0.7)
        bottom = lower
    else:
        upper = bottom = figure.subplots()
    _draw_losses(upper, runs, curves, band_curves)
    bottom.set_xlabel("tokens")
    bottom.xaxis.set_major_formatter(EngFormatter(sep=""))
    _draw_caption(figure, runs[0], "; thin: other seeds" if pairs else "")
    buffer = io.BytesIO()
    figure.savefig(buffer, format=Path(path).suffix.lstrip(".") or "png", dpi=150)
    atomic_write(Path(path), buffer.getvalue())


def _draw_losses(axes: Axes, runs: list[Metrics], curves: list[Curve], band: list[Curve]) -> None:
    if band:
        grid = curves[0].tokens
        lines = [_on_grid(grid, curve.tokens, curve.smoothed()) for curve in band]
        names = ", ".join(curve.label for curve in band)
        _shade(axes, grid, lines, label=f"range of {names}")
    for index, (run, curve) in enumerate(zip(runs, curves, strict=True)):
        color = _COLORS[index % len(_COLORS)]
        axes.plot(curve.tokens, curve.loss, color=color, alpha=0.25, lw=0.8)
        axes.plot(curve.tokens, curve.smoothed(), color=color, lw=1.6, label=curve.label)
        measured = [r for r in run.validation if r.get("validation_loss_nats") is not None]
        axes.plot(
            [record["tokens"] for record in measured],
            [record["validation_loss_nats"] for record in measured],
            "o",
            color=color,
            ms=4,
            mec="white",
            mew=0.6,
        )
    axes.set_ylabel("loss [nats per token]")
    axes.set_ylim(_loss_limits(curves))
    axes.legend(frameon=False, loc="upper right")
    _style(axes)


def _draw_gaps(axes: Axes, curves: list[Curve], band: list[Curve]) -> None:
    reference = curves[0]
    if band:
        gaps = [_on_grid(reference.tokens, *curve.gap_to(reference)) for curve in band]
        _shade(axes, reference.tokens, [100 * gap for gap in gaps])
    largest = 0.0
    for index, curve in enumerate(curves):
        tokens, gap = curve.gap_to(reference)
        axes.plot(tokens, 100 * gap, color=_COLORS[index % len(_COLORS)], lw=1.6)
        # The first tenth, where losses fall steeply, may leave the panel.
        largest = max(largest, 100 * np.max(np.abs(gap[len(gap) // 10 :]), initial=0.0))
    for sign in (-1, 1):
        axes.axhline(sign * 100 * TOLERANCE, color="#666666", lw=0.9, ls=(0, (4, 3)))
    limit = 1.15 * max(largest, 200 * TOLERANCE)
    axes.set_ylim(-limit, limit)
    axes.set_ylabel(f"gap to\n{reference.label} [%]")
    _style(axes)


def _on_grid(grid: np.ndarray, tokens: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Returns `values` at the tokens of `grid`, NaN beyond the range of `tokens`."""
    if not len(tokens):
        return np.full_like(grid, np.nan)
    return np.interp(grid, tokens, values, left=np.nan, right=np.nan)


def _shade(axes: Axes, grid: np.ndarray, lines: list[np.ndarray], label: str | None = None) -> None:
    low, high = np.min(lines, axis=0), np.max(lines, axis=0)
    axes.fill_between(grid, low, high, color=_BAND_COLOR, alpha=0.45, lw=0, label=label)


def _loss_limits(curves: list[Curve]) -> tuple[float, float]:
    """Shows all of the smoothed curves, save the first twentieth of a long run."""
    smoothed = [curve.smoothed() for curve in curves]
    shown = np.concatenate([loss[len(loss) // 20 :] for loss in smoothed])
    raw = np.concatenate([curve.loss[len(curve.loss) // 2 :] for curve in curves])
    if not len(shown):
        return 0.0, 1.0
    low, high = min(shown.min(), raw.min()), shown.max()
    margin = 0.04 * (high - low) or 0.1
    return low - margin, high + margin


def _draw_caption(figure: Figure, run: Metrics, more: str) -> None:
    starts = [e["message"] for e in run.events if str(e.get("message")).startswith("start at")]
    device = [start.partition(";")[0] for start in starts[-1:]]
    legend = f"lines: mean over the latest {SMOOTHING:.0%} of the tokens; faint: single steps"
    figure.supxlabel(
        "\n".join([f"{legend}; dots: validation{more}", *device]), fontsize=7, color="#666666"
    )


def _style(axes: Axes) -> None:
    axes.grid(color="#dddddd", lw=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)

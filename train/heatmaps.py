"""Heat maps of a run's inspections: a row per tensor, a column per measure, layers over steps."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from train.metrics import Metrics
from train.run_directory import atomic_write

# Measure, its title, whether its logarithm is shown, colours. Losses look hot, SQNR cold where low.
_COLUMNS = (
    ("amax", "log2 amax", True, "viridis"),
    ("scale", "log2 scale", True, "viridis"),
    ("saturated_fraction", "saturated [%]", False, "inferno"),
    ("underflowed_fraction", "underflowed [%]", False, "inferno"),
    ("sqnr_db", "SQNR [dB]", False, "cividis"),
)


def plot_inspections(run: Metrics, path: Path) -> None:
    """Draws every measure of every tensor over layers and steps.

    A panel without colour holds no number: the SQNR of a tensor that is zero or held exactly.

    Args:
      run: with at least one inspection.
      path: the picture to write; its ending says the format.

    Raises:
      OSError: `path` cannot be written.
    """
    tensors = list(run.inspections[-1]["tensors"])
    figure = Figure(figsize=(3.0 * len(_COLUMNS), 1.15 * len(tensors)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(tensors), len(_COLUMNS), sharex=True, sharey=True, squeeze=False)
    for row, tensor in zip(panels, tensors, strict=True):
        for axes, (measure, title, is_logarithmic, colors) in zip(row, _COLUMNS, strict=True):
            steps, values = grid(run.inspections, tensor, measure)
            if is_logarithmic:
                values = np.log2(np.where(values > 0, values, np.nan))
            elif measure.endswith("fraction"):
                values = 100 * values
            _draw(figure, axes, steps, values, colors)
            if row is panels[0]:
                axes.set_title(title, fontsize=9)
            if row is panels[-1]:
                axes.set_xlabel("step", fontsize=8)
        row[0].set_ylabel(f"{tensor}\nlayer", fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=Path(path).suffix.lstrip(".") or "png", dpi=110)
    atomic_write(Path(path), buffer.getvalue())


def grid(
    inspections: Sequence[dict[str, Any]], tensor: str, measure: str
) -> tuple[np.ndarray, np.ndarray]:
    """One measure of one tensor: steps, int [n]; values, float64 [layers, n], NaN for none."""
    steps = np.array([record["step"] for record in inspections])
    columns = [record["tensors"][tensor][measure] for record in inspections]
    return steps, np.array(columns, np.float64).T


def _draw(figure: Figure, axes: Axes, steps: np.ndarray, values: np.ndarray, colors: str) -> None:
    # Inspections need not be evenly spaced, so each cell reaches half-way to its neighbours.
    middles = (steps[1:] + steps[:-1]) / 2
    half = (steps[1] - steps[0]) / 2 if len(steps) > 1 else 0.5
    edges = np.concatenate([[steps[0] - half], middles, [steps[-1] + half]])
    mesh = axes.pcolormesh(
        edges, np.arange(len(values) + 1) - 0.5, np.ma.masked_invalid(values), cmap=colors
    )
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=4))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    axes.tick_params(labelsize=7)
    figure.colorbar(mesh, ax=axes, pad=0.01, aspect=10).ax.tick_params(labelsize=7)

"""Heat maps of a run's inspections: a row per tensor, a column per measure, layers over steps."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from train.metrics import Metrics
from train.run_directory import atomic_write

# Measure, its title, colours, and the smallest range that the panels of its column share; None:
# each panel has its own range, of logarithms.
_COLUMNS = (
    ("amax", "log2 amax", "viridis", None),
    ("scale", "log2 scale", "viridis", None),
    ("saturated_fraction", "saturated [%]", "inferno", (0.0, 0.1)),
    ("underflowed_fraction", "underflowed [%]", "inferno", (0.0, 0.1)),
    ("sqnr_db", "SQNR [dB]", "cividis", (15.0, 33.0)),
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
    figure = Figure(figsize=(2.8 * len(_COLUMNS), 1.1 * len(tensors)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(tensors), len(_COLUMNS), sharex=True, sharey=True, squeeze=False)
    for column, (measure, title, colors, shared) in enumerate(_COLUMNS):
        shown = {name: _shown(run.inspections, name, measure) for name in tensors}
        limits = _limits(list(shown.values()), shared) if shared else (None, None)
        meshes = [
            _draw(axes, run.inspections, values, colors, limits)
            for axes, values in zip(panels[:, column], shown.values(), strict=True)
        ]
        if shared:
            bar = figure.colorbar(
                meshes[0], ax=panels[:, column], pad=0.01, aspect=80, fraction=0.05
            )
            bar.ax.tick_params(labelsize=7)
        else:
            for axes, mesh in zip(panels[:, column], meshes, strict=True):
                figure.colorbar(mesh, ax=axes, pad=0.01, aspect=8).ax.tick_params(labelsize=7)
        panels[0, column].set_title(title, fontsize=9)
        panels[-1, column].set_xlabel("step", fontsize=8)
    for axes, tensor in zip(panels[:, 0], tensors, strict=True):
        name = tensor.replace(".", "\n.")
        axes.set_ylabel(f"{name}\nlayer", fontsize=7, rotation=0, ha="right", va="center")
    buffer = io.BytesIO()
    figure.savefig(buffer, format=Path(path).suffix.lstrip(".") or "png", dpi=90)
    atomic_write(Path(path), buffer.getvalue())


def _shown(inspections: Sequence[dict[str, Any]], tensor: str, measure: str) -> np.ndarray:
    _, values = grid(inspections, tensor, measure)
    if measure.endswith("fraction"):
        return 100 * values
    if measure == "sqnr_db":
        return values
    return np.log2(np.where(values > 0, values, np.nan))


def _limits(values: list[np.ndarray], shared: tuple[float, float]) -> tuple[float, float]:
    """The range of all the numbers, widened to `shared`."""
    finite = np.concatenate([x[np.isfinite(x)] for x in values] + [np.array(shared)])
    return float(finite.min()), float(finite.max())


def grid(
    inspections: Sequence[dict[str, Any]], tensor: str, measure: str
) -> tuple[np.ndarray, np.ndarray]:
    """One measure of one tensor: steps, int [n]; values, float64 [layers, n], NaN for none."""
    steps = np.array([record["step"] for record in inspections])
    columns = [record["tensors"][tensor][measure] for record in inspections]
    return steps, np.array(columns, np.float64).T


def _draw(
    axes: Axes,
    inspections: Sequence[dict[str, Any]],
    values: np.ndarray,
    colors: str,
    limits: tuple[float | None, float | None],
) -> QuadMesh:
    steps = np.array([record["step"] for record in inspections])
    # Inspections need not be evenly spaced, so each cell reaches half-way to its neighbours.
    middles = (steps[1:] + steps[:-1]) / 2
    half = (steps[1] - steps[0]) / 2 if len(steps) > 1 else 0.5
    edges = np.concatenate([[steps[0] - half], middles, [steps[-1] + half]])
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=4))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    axes.tick_params(labelsize=7)
    borders = np.arange(len(values) + 1) - 0.5
    shown = np.ma.masked_invalid(values)
    return axes.pcolormesh(edges, borders, shown, cmap=colors, vmin=limits[0], vmax=limits[1])

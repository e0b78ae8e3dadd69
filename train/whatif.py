"""Another recipe on a run's own tensors: `python -m train.whatif RUN --recipe current`.

Takes the newest checkpoint and the batch that would have come next, runs forward and backward with
the run's recipe and with the other, and prints both losses and what quantisation costs each tensor.
Nothing of the run is changed.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import tyro

from train.config import ConfigError, RecipeName
from train.environment import prepare_environment


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class WhatIfConfig:
    """Evaluates another recipe on a run's newest checkpoint and its next batch."""

    run: tyro.conf.Positional[Path]
    """Run directory, such as runs/tiny_cpu."""
    recipe: RecipeName
    """What to try instead of the run's own recipe."""
    margin: int = 0
    """Of the tried recipe."""
    gradient_format: Literal["e5m2", "e4m3"] = "e5m2"
    """Of the tried recipe."""
    output: str = ""
    """Also write the numbers to this JSON file."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `python -m train.whatif`; 0, or 2 for bad input."""
    prepare_environment()
    # Imported late: the environment must be set before JAX is.
    from train.checkpoint_content import CheckpointError
    from train.compare_recipes import compare_recipes
    from train.data import DataError

    try:
        options = tyro.cli(WhatIfConfig, prog="python -m train.whatif", args=arguments)
        result = compare_recipes(
            options.run,
            recipe=options.recipe,
            margin=options.margin,
            gradient_format=options.gradient_format,
        )
        for line in format_result(result):
            print(line)
        if options.output:
            Path(options.output).write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    except (ConfigError, CheckpointError, DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def format_result(result: dict[str, Any]) -> list[str]:
    """The table: per tensor the mean SQNR over the layers, and the worst layer's."""
    own, tried = result["recipes"]
    names = [f"{r['recipe']} ({r['role']})" for r in (own, tried)]
    change = tried["loss_nats"] / own["loss_nats"] - 1
    lines = [
        f"step {result['step']}, the next batch: loss {own['loss_nats']:.5f} nats with {names[0]},"
        f" {tried['loss_nats']:.5f} with {names[1]} ({change:+.3%})",
        f"{'SQNR [dB]: mean (worst layer)':32}{names[0]:>24}{names[1]:>24}",
    ]
    for tensor in own["tensors"]:
        cells = [_cell(r["tensors"][tensor]["sqnr_db"]) for r in (own, tried)]
        lines.append(f"{tensor:32}{cells[0]:>24}{cells[1]:>24}")
    if "bf16" in (own["recipe"], tried["recipe"]):
        lines.append("bf16 quantises nothing: its column is what `current` would cost its tensors")
    return lines


def _cell(values: list[float | None]) -> str:
    numbers = [value for value in values if value is not None]
    return f"{sum(numbers) / len(numbers):.2f} ({min(numbers):.2f})" if numbers else "exact"


if __name__ == "__main__":
    sys.exit(main())

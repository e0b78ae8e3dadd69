"""Which tensor of a step was the first to hold an infinity or a NaN."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jfp8.diagnostics import QUANTITIES
from train.config import TrainConfig
from train.inspection import FORWARD_TENSORS, GRADIENT_TENSORS, TappedModel, by_tensor
from train.state import TrainState, make_recipe
from train.step import Batch, make_loss

_NONFINITE = QUANTITIES.index("nonfinite_count")


def first_bad_tensor(config: TrainConfig, state: TrainState, batch: Batch) -> str:
    """Runs a step's forward and backward again and names the tensor where things went wrong.

    Looked at in the order of computation: parameters, the batch, the tensors of each layer, the
    loss, the gradients from the last layer to the first, the gradients of the parameters. Compiles
    a program of its own; meant for the moment before a run gives up.

    Args:
      config: of the run.
      state: before the step; a skipped step leaves it as it was.
      batch: of the step.
    """
    report = jax.jit(_make_report(config, is_calibrated=int(state.applied_steps) > 0))
    count = config.optimizer.accumulation_steps
    total_weight = jnp.maximum(batch["loss_weights"].sum(), 1.0)
    for part in range(count):
        rows = jax.tree.map(lambda x, part=part: x[part::count], batch)
        found = jax.device_get(report(state.params, state.scaling, rows, total_weight))
        for name in _bad_tensors(found):
            return name + (f", in microbatch {part + 1} of {count}" if count > 1 else "")
    return "none: computed once more, everything is finite"


def _make_report(config: TrainConfig, *, is_calibrated: bool):
    recipe = make_recipe(config.fp8)
    model = TappedModel.of(config, recipe if is_calibrated else recipe.calibrating())
    loss = make_loss(config, model.graph)
    layers = config.model.num_layers if config.model.layer_loop == "scan" else 0

    def report(params: Any, scaling: Any, batch: Batch, total_weight: jax.Array):
        (value, _), (grads, seen) = jax.value_and_grad(loss, argnums=(0, 4), has_aux=True)(
            params, scaling, batch, total_weight, model.zeros()
        )
        return {
            "parameter": _count_nonfinite(params, layers),
            "weights": (~jnp.isfinite(batch["loss_weights"] / total_weight)).sum(),
            "tensors": {name: x[:, _NONFINITE] for name, x in by_tensor(seen).items()},
            "loss": ~jnp.isfinite(value),
            "gradient": _count_nonfinite(grads, layers),
        }

    return report


def _count_nonfinite(tree: Any, layers: int) -> dict[str, jax.Array]:
    """Non-finite elements of each leaf: {"blocks/ffn/down/kernel": [layers], "head": [1]}."""
    counts = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        leading = layers if layers and name.startswith("blocks/") else 1
        counts[name] = (~jnp.isfinite(leaf)).reshape(leading, -1).sum(axis=1)
    return counts


def _bad_tensors(found: dict[str, Any]) -> Iterator[str]:
    """Names of the tensors with non-finite elements, in the order of computation."""
    yield from _bad_leaves(found["parameter"], "parameter")
    if found["weights"]:
        yield "the loss weights of the batch"
    tensors = found["tensors"]
    layers = range(len(tensors[FORWARD_TENSORS[0]]))
    yield from _bad_layers(tensors, FORWARD_TENSORS, layers)
    if found["loss"]:
        yield "the loss (final norm, head or cross-entropy)"
    yield from _bad_layers(tensors, GRADIENT_TENSORS[::-1], layers[::-1])
    yield from _bad_leaves(found["gradient"], "gradient of")


def _bad_layers(tensors: dict[str, np.ndarray], names, layers) -> Iterator[str]:
    for layer in layers:
        for name in names:
            if tensors[name][layer]:
                yield f"{name} of layer {layer} (counted from 0)"


def _bad_leaves(counts: dict[str, np.ndarray], word: str) -> Iterator[str]:
    for name, count in counts.items():
        for layer in np.flatnonzero(count):
            where = f", layer {layer} (counted from 0)" if len(count) > 1 else ""
            yield f"{word} {name}{where}"

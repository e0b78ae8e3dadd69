"""Two recipes on the same weights and the same batch."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jfp8
from train.config import TrainConfig
from train.data import build_dataset
from train.inspection import make_inspection, to_record
from train.restore import restore_run
from train.state import TrainState, initial_state, make_graph, make_recipe
from train.step import Batch, make_loss

# With these equal, two recipes have the same FP8 state at the same step.
_STATE_FIELDS = ("margin", "gradient_format", "amax_history_length", "skip_layers")


def compare_recipes(directory: Path, **changes: Any) -> dict[str, Any]:
    """Loss and measurements of a run's own recipe and of another one.

    Args:
      directory: of the run; its newest checkpoint is read, and the batch that would come next.
      **changes: fields of `Fp8Config` that the other recipe has instead of the run's.

    Returns: {"step", "recipes": [the run's, the other]}, JSON-able; a recipe has its options,
      "loss_nats" and "tensors" (`train.inspection.to_record`).

    Raises:
      ConfigError: no run, no checkpoint, or a recipe that the model's sizes do not fit.
      CheckpointError, DataError: the checkpoint or the data cannot be read.
    """
    config, restored = restore_run(directory)
    # Made first: it checks the sizes that FP8 needs, which a bf16 run may not have.
    other = dataclasses.replace(config, fp8=dataclasses.replace(config.fp8, **changes))
    batches = build_dataset(config, log=lambda line: None).train_iterator()
    position = restored.data_state
    assert isinstance(position, dict)
    # From the batch before: delayed scales come from earlier steps.
    batches.set_state({**position, "next_batch": max(position["next_batch"] - 1, 0)})
    earlier, batch = (jax.tree.map(jnp.asarray, next(batches)) for _ in range(2))
    batches.close()
    recipes = []
    for role, tried in (("of the run", config), ("tried", other)):
        state = _with_scaling(restored.state, tried, config, earlier)
        measured = jax.device_get(jax.jit(make_inspection(tried))(state, batch))
        recipes.append(
            {
                "role": role,
                **dataclasses.asdict(tried.fp8),
                "loss_nats": float(measured["loss_nats"]),
                "tensors": to_record(measured["tensors"]),
            }
        )
    return {"step": restored.step, "recipes": recipes}


def _with_scaling(
    state: TrainState, config: TrainConfig, own: TrainConfig, earlier: Batch
) -> TrainState:
    """The state with the FP8 state that the recipe of `config` needs.

    The run's own where that has the same meaning; otherwise a history of one step, the exponents
    that the batch before needed.
    """
    if config.fp8.recipe == "bf16":
        return state._replace(scaling={})
    if own.fp8.recipe != "bf16" and all(
        getattr(own.fp8, name) == getattr(config.fp8, name) for name in _STATE_FIELDS
    ):
        return state
    fresh = jax.jit(lambda: initial_state(config, optax.identity()).scaling)()
    recipe = make_recipe(config.fp8)
    loss = make_loss(config, make_graph(config, recipe.calibrating()))
    weight = jnp.maximum(earlier["loss_weights"].sum(), 1.0)
    observe = jax.jit(jax.grad(loss, argnums=1, has_aux=True))
    observed, _ = observe(state.params, fresh, earlier, weight)
    return state._replace(scaling=jfp8.update(fresh, observed, recipe))

"""What one optimizer step carries to the next, and how it begins."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

import jfp8
import jfp8.nnx
from train.config import Fp8Config, TrainConfig
from train.mesh import parameter_shardings
from train.model import Transformer


class TrainState(NamedTuple):
    """All that training needs besides the data's position; saved and restored whole."""

    step: jax.Array  # int32 [], optimizer steps tried, skipped ones included
    applied_steps: jax.Array  # int32 [], steps that changed the parameters
    consecutive_skips: jax.Array  # int32 [], non-finite steps since the last applied one
    params: Any  # float32 tree
    opt_state: optax.OptState  # moments and counters
    scaling: Any  # tree of jfp8.ScalingState, {} without FP8


def make_recipe(config: Fp8Config) -> jfp8.Recipe:
    """The `jfp8.Recipe` of the trainer: step 0 calibrates, so no later step waits for an amax."""
    return jfp8.Recipe(
        name=config.recipe,
        amax_history_length=config.amax_history_length,
        margin=config.margin,
        gradient_format=config.gradient_format,
        calibration="explicit",
        quantize_implementation=config.quantize_implementation,
        gemm_implementation=config.gemm_implementation,
        weight_grad_dtype=config.weight_grad_dtype,
        skip=config.skip_layers if config.head else (*config.skip_layers, "head"),
    )


def make_graph(config: TrainConfig, recipe: jfp8.Recipe) -> nnx.GraphDef:
    """The model's structure without arrays; a recipe's and its `calibrating()` twin's agree."""
    model = nnx.eval_shape(lambda: Transformer(config.model, recipe, rngs=nnx.Rngs(0)))
    return nnx.split(model, nnx.Param, jfp8.nnx.Scaling)[0]


def merge(graph: nnx.GraphDef, params: Any, scaling: Any, *sinks: Any) -> Transformer:
    """The model with these arrays in it."""
    return nnx.merge(graph, params, scaling, *sinks)


def initial_state(config: TrainConfig, optimizer: optax.GradientTransformation) -> TrainState:
    """A fresh state; pure, to be jitted with output shardings or only evaluated for shapes."""
    recipe = make_recipe(config.fp8)
    model = Transformer(config.model, recipe, rngs=nnx.Rngs(config.run.seed))
    _, params, scaling = nnx.split(model, nnx.Param, jfp8.nnx.Scaling)
    params, scaling = nnx.to_pure_dict(params), nnx.to_pure_dict(scaling)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        applied_steps=jnp.zeros((), jnp.int32),
        consecutive_skips=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        scaling=scaling,
    )


def abstract_state(
    config: TrainConfig, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Shapes, dtypes and shardings of the state, for compiling and restoring without the arrays."""
    shapes = jax.eval_shape(lambda: initial_state(config, optimizer))
    shardings = parameter_shardings(shapes, mesh)
    return jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def create_state(
    config: TrainConfig, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """A fresh state on the devices of the mesh; the same values for any mesh."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(config, optimizer, mesh))
    return jax.jit(lambda: initial_state(config, optimizer), out_shardings=shardings)()


def parameter_count(params: Any) -> int:
    """Number of weights in a tree of arrays or shapes."""
    return sum(int(leaf.size) for leaf in jax.tree.leaves(params))

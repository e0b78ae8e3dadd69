"""A view into the numerics: what every tensor of every layer looks like to its 8-bit format.

A program of its own runs forward and backward on the first microbatch of a batch, with the scales
that the step is about to use, and hands out nothing but the measurements: no weight gradient is
computed, and the training program is the same with and without it.

Tensors, in the order of the forward pass: `qkv.input`, `qkv.kernel`, `attention.q`, `.k`, `.v`,
`out.input`, ..., `down.kernel`; then the gradients `<gemm>.output_grad` and `attention.output_grad`
(dO), which the backward pass meets in the opposite order.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

import jfp8
import jfp8.nnx
from jfp8.diagnostics import QUANTITIES
from train.config import TrainConfig
from train.mesh import replicated
from train.model import Transformer
from train.state import TrainState, abstract_state, make_recipe
from train.step import Batch, abstract_batch, make_loss
from train.taps import ATTENTION_TENSORS, GEMM_TENSORS, Sink

FORWARD_TENSORS = (
    *("qkv.input", "qkv.kernel", "attention.q", "attention.k", "attention.v"),
    *("out.input", "out.kernel", "gate_up.input", "gate_up.kernel", "down.input", "down.kernel"),
)
GRADIENT_TENSORS = (
    *("qkv.output_grad", "attention.output_grad", "out.output_grad"),
    *("gate_up.output_grad", "down.output_grad"),
)
TENSORS = FORWARD_TENSORS + GRADIENT_TENSORS
MEASURES = ("amax", "scale", "saturated_fraction", "underflowed_fraction", "sqnr_db")
"""What is logged of each tensor."""

Measurements = dict[str, jax.Array]  # tensor -> float32 [layers, len(QUANTITIES)]


@dataclasses.dataclass(frozen=True)
class TappedModel:
    """The structure of a model with taps, and its sinks."""

    graph: nnx.GraphDef
    sinks: Any
    """Tree of `jax.ShapeDtypeStruct`."""

    @classmethod
    def of(cls, config: TrainConfig, recipe: jfp8.Recipe) -> "TappedModel":
        """Takes the same parameters and FP8 state as the model without taps."""
        model = nnx.eval_shape(
            lambda: Transformer(config.model, recipe, rngs=nnx.Rngs(0), has_taps=True)
        )
        graph, _, _, sinks = nnx.split(model, nnx.Param, jfp8.nnx.Scaling, Sink)
        return cls(graph, nnx.to_pure_dict(sinks))

    def zeros(self) -> Any:
        """The sinks as arrays; their values never matter."""
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.sinks)


def make_inspection(
    config: TrainConfig, recipe: jfp8.Recipe | None = None
) -> Callable[[TrainState, Batch], dict[str, Any]]:
    """Builds (state, batch) -> {"loss_nats", "tensors"}; pure, to be jitted.

    Args:
      config: of the run.
      recipe: instead of the config's; what it reads of the FP8 state must be there.

    Returns: a function that gives the loss of the first microbatch, float32 `()`, and its
      `Measurements`.
    """
    model = TappedModel.of(config, recipe or make_recipe(config.fp8))
    loss = make_loss(config, model.graph)

    def inspection(state: TrainState, batch: Batch):
        part = first_microbatch(config, batch)
        weight = jnp.maximum(part["loss_weights"].sum(), 1.0)
        # Gradients of the mean over the whole batch, as the training step has them.
        total_weight = jnp.maximum(batch["loss_weights"].sum(), 1.0)
        (_, nll), seen = jax.value_and_grad(loss, argnums=4, has_aux=True)(
            state.params, state.scaling, part, total_weight, model.zeros()
        )
        return {"loss_nats": nll * total_weight / weight, "tensors": by_tensor(seen)}

    return inspection


def compile_inspection(
    config: TrainConfig, optimizer: optax.GradientTransformation, mesh: Mesh
) -> jax.stages.Compiled:
    """Compiles `make_inspection` for the mesh; nothing is donated, the results are replicated."""
    state, batch = abstract_state(config, optimizer, mesh), abstract_batch(config, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, (state, batch))
    function = jax.jit(
        make_inspection(config), in_shardings=shardings, out_shardings=replicated(mesh)
    )
    return function.lower(state, batch).compile()


def first_microbatch(config: TrainConfig, batch: Batch) -> Batch:
    """The rows that the training step takes first."""
    count = config.optimizer.accumulation_steps
    return jax.tree.map(lambda x: x[::count], batch)


def by_tensor(seen: Any) -> Measurements:
    """Sorts the cotangents of the sinks by tensor: {"qkv.input": [layers, quantities], ...}."""
    layers: dict[str, list[jax.Array]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(seen):
        name = path[-1].key
        tensors = ATTENTION_TENSORS if name == "attention" else GEMM_TENSORS
        assert leaf.shape[-2:] == (len(tensors), len(QUANTITIES)), (path, leaf.shape)
        stacked = leaf.reshape(-1, *leaf.shape[-2:])
        for index, tensor in enumerate(tensors):
            layers.setdefault(f"{name}.{tensor}", []).append(stacked[:, index])
    return {tensor: jnp.concatenate(layers[tensor]) for tensor in TENSORS}


def to_record(tensors: dict[str, Any]) -> dict[str, dict[str, list[float | None]]]:
    """The measurements as they are logged: {tensor: {measure: [a number per layer]}}, JSON-able.

    A number that is not finite is None: the SQNR of a tensor that is zero, or held exactly.
    """
    record = {}
    for tensor in TENSORS:
        values = dict(zip(QUANTITIES, np.asarray(tensors[tensor], np.float64).T, strict=True))
        with np.errstate(divide="ignore", invalid="ignore"):
            measures = {
                "amax": values["amax"],
                "scale": values["scale"],
                "saturated_fraction": values["saturated_count"] / values["count"],
                "underflowed_fraction": values["underflowed_count"] / values["count"],
                "sqnr_db": 10 * np.log10(values["signal"] / values["noise"]),
            }
        # Six digits are plenty, but a scale is a power of two and stays one.
        measures |= {name: _rounded(x) for name, x in measures.items() if name != "scale"}
        record[tensor] = {name: [_plain(x) for x in measures[name]] for name in MEASURES}
    return record


def _rounded(values: np.ndarray) -> np.ndarray:
    return np.array([float(f"{value:.6g}") for value in values])


def _plain(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None

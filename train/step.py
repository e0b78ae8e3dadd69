"""One optimizer step: pure functions (state, batch) -> (state, metrics), and their compilation.

A step whose loss or gradient norm is not finite changes nothing but its own counters: parameters,
moments and FP8 state stay as they were. Its batch is spent.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

import jfp8
import jfp8.nnx
from train.config import TrainConfig
from train.fp8_head import fp8_cross_entropy
from train.loss import cross_entropy
from train.mesh import batch_sharding
from train.optimizer import learning_rate_schedule
from train.state import TrainState, abstract_state, make_graph, make_recipe, merge

Batch = dict[str, jax.Array]  # tokens, targets, segment_ids, positions, loss_weights: [B, T]
BATCH_DTYPES = {
    "tokens": jnp.int32,
    "targets": jnp.int32,
    "segment_ids": jnp.int32,
    "positions": jnp.int32,
    "loss_weights": jnp.float32,
}
SLOTS = ("input", "kernel", "output_grad")
HEALTH = ("saturated_fraction", "underflowed_fraction", "amax", "scale")


def abstract_batch(config: TrainConfig, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings of one step's batch."""
    shape = (config.data.batch_size, config.data.sequence_length)
    sharding = batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        for name, dtype in BATCH_DTYPES.items()
    }


def make_loss(config: TrainConfig, graph: nnx.GraphDef) -> Callable:
    """Builds (params, scaling, batch, total_weight) -> (loss, nll), means over `total_weight`.

    With a graph that has taps (`train.inspection`), their sinks are a fifth argument. The keyword
    `casts` takes what `jfp8.nnx.cast_kernels` made of the same parameters.
    """

    def loss(
        params: Any,
        scaling: Any,
        batch: Batch,
        total_weight: jax.Array,
        *sinks: Any,
        casts: list[jfp8.CastKernel | None] | None = None,
    ):
        model = merge(graph, params, scaling, *sinks)
        if casts is not None:
            jfp8.nnx.attach_kernel_casts(model, casts)
        segment_ids = batch["segment_ids"] if config.data.document_mask else None
        hidden = model(batch["tokens"], batch["positions"], segment_ids)
        weights = batch["loss_weights"] / total_weight
        arguments = hidden, model.head_kernel(), batch["targets"], weights
        head, z_loss = model.logits, config.optimizer.z_loss
        if not head.recipe.quantizes:
            return cross_entropy(*arguments, z_loss=z_loss)
        return fp8_cross_entropy(*arguments, head.state, recipe=head.recipe, z_loss=z_loss)

    return loss


def make_train_step(
    config: TrainConfig, optimizer: optax.GradientTransformation, *, calibrating: bool
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """Builds the step.

    Args:
      config: the run's config.
      optimizer: from `make_optimizer`.
      calibrating: take FP8 scales from this step's own tensors. The first applied step of a run
        with delayed scaling must: it has no history yet.

    Returns: (state, batch) -> (state, metrics). Metrics are float32 or int32 scalars, and
      `fp8_health`, float32 [groups, 3, 4]: see `health_names`.
    """
    recipe = make_recipe(config.fp8)
    graph = make_graph(config, recipe.calibrating() if calibrating else recipe)
    gradients = jax.value_and_grad(make_loss(config, graph), argnums=(0, 1), has_aux=True)
    rate = learning_rate_schedule(
        config.optimizer, config.run.steps, config.optimizer.learning_rate
    )

    def cast_kernels(params: Any, scaling: Any) -> list[jfp8.CastKernel | None]:
        return jfp8.nnx.cast_kernels(merge(graph, params, scaling))

    def train_step(state: TrainState, batch: Batch):
        (_, nll), (grads, observed) = _accumulate(
            gradients, cast_kernels, state, batch, config.optimizer.accumulation_steps
        )
        grad_norm = optax.tree.norm(grads)
        # A cast to 8 bits clips an infinity, so the loss alone would not show it.
        finite = jnp.isfinite(nll) & jnp.isfinite(grad_norm) & _all_finite(observed, recipe)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        scaling = jfp8.update(state.scaling, observed, recipe)
        keep = lambda new, old: jax.tree.map(  # noqa: E731
            lambda n, o: jnp.where(finite, n, o), new, old
        )
        skipped = jnp.where(finite, 0, 1)
        new_state = TrainState(
            step=state.step + 1,
            applied_steps=state.applied_steps + 1 - skipped,
            consecutive_skips=(state.consecutive_skips + 1) * skipped,
            params=keep(params, state.params),
            opt_state=keep(opt_state, state.opt_state),
            scaling=keep(scaling, state.scaling),
        )
        metrics = {
            "loss_nats": nll,
            "grad_norm": grad_norm,
            "lr": jnp.asarray(rate(state.applied_steps), jnp.float32),
            "skipped_steps": new_state.step - new_state.applied_steps,
            "consecutive_skips": new_state.consecutive_skips,
        }
        if state.scaling:
            metrics["fp8_health"] = _health(observed, scaling, recipe)
        return new_state, metrics

    return train_step


def make_eval_step(config: TrainConfig) -> Callable[[TrainState, Batch], dict[str, jax.Array]]:
    """Builds (state, batch) -> {nll_sum, weight_sum}; the FP8 state is read, never updated."""
    loss = make_loss(config, make_graph(config, make_recipe(config.fp8)))

    def eval_step(state: TrainState, batch: Batch):
        _, nll = loss(state.params, state.scaling, batch, jnp.float32(1))
        return {"nll_sum": nll, "weight_sum": batch["loss_weights"].sum()}

    return eval_step


@dataclasses.dataclass(frozen=True)
class CompiledSteps:
    """The compiled programs of a run; `calibrate` is compiled when it is first needed."""

    train: jax.stages.Compiled
    train_lowered: jax.stages.Lowered
    evaluate: jax.stages.Wrapped
    calibrate: jax.stages.Wrapped


def compile_steps(
    config: TrainConfig, optimizer: optax.GradientTransformation, mesh: Mesh
) -> CompiledSteps:
    """Compiles the train step for the mesh; the state's buffers are donated to it."""
    state, batch = abstract_state(config, optimizer, mesh), abstract_batch(config, mesh)
    state_shardings = jax.tree.map(lambda x: x.sharding, state)
    batch_shardings = jax.tree.map(lambda x: x.sharding, batch)

    def jitted(calibrating: bool) -> jax.stages.Wrapped:
        return jax.jit(
            make_train_step(config, optimizer, calibrating=calibrating),
            in_shardings=(state_shardings, batch_shardings),
            out_shardings=(state_shardings, None),
            donate_argnums=0,
        )

    lowered = jitted(calibrating=False).lower(state, batch)
    evaluate = jax.jit(make_eval_step(config), in_shardings=(state_shardings, batch_shardings))
    return CompiledSteps(lowered.compile(), lowered, evaluate, jitted(calibrating=True))


def health_names(scaling: Any) -> list[str]:
    """The GEMM groups, in the order of the first axis of the metric `fp8_health`."""
    return sorted(_groups(scaling))


def health_metrics(names: list[str], health: Any) -> dict[str, float]:
    """Flattens `fp8_health` [groups, 3, 4] to {"fp8/<group>.<slot>/<quantity>": value}."""
    return {
        f"fp8/{name}.{slot}/{quantity}": float(health[i, j, k])
        for i, name in enumerate(names)
        for j, slot in enumerate(SLOTS)
        for k, quantity in enumerate(HEALTH)
    }


def _accumulate(
    gradients: Callable, cast_kernels: Callable, state: TrainState, batch: Batch, count: int
):
    """Loss and gradients of the whole batch, from `count` microbatches one after the other.

    Kernels are cast to 8 bits once, before the first one.

    Everything is a sum: each microbatch is already divided by the weight of the whole batch, and a
    sum of FP8 observations is their maximum.
    """
    total_weight = jnp.maximum(batch["loss_weights"].sum(), 1.0)
    if count == 1:
        return gradients(state.params, state.scaling, batch, total_weight)
    casts = cast_kernels(state.params, state.scaling)
    evaluate = lambda part: gradients(  # noqa: E731
        state.params, state.scaling, part, total_weight, casts=casts
    )
    # Microbatch i takes the rows i, count + i, ...: each device keeps the rows it has.
    parts = jax.tree.map(
        lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1),
        batch,
    )
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype),
        jax.eval_shape(evaluate, jax.tree.map(lambda x: x[0], parts)),
    )
    add = lambda sums, part: (jax.tree.map(jnp.add, sums, evaluate(part)), None)  # noqa: E731
    return jax.lax.scan(add, zeros, parts)[0]


def _all_finite(observed: Any, recipe: jfp8.Recipe) -> jax.Array:
    """Whether no GEMM saw an infinity or a NaN in any operand."""
    health = jax.tree.leaves(
        jfp8.health(observed, recipe), is_leaf=lambda x: isinstance(x, jfp8.Health)
    )
    return jnp.stack([(node.nonfinite == 0).all() for node in health] or [jnp.array(True)]).all()


def _groups(tree: Any, leaf_type: type = jfp8.ScalingState) -> dict[str, list[Any]]:
    """The nodes of each GEMM, all layers together: {"qkv": [...], ...}."""
    nodes = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: isinstance(x, leaf_type))
    groups: dict[str, list[Any]] = {}
    for path, node in nodes[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/").split("/")[-2]
        groups.setdefault(name, []).append(node)
    return groups


def _health(observed: Any, scaling: Any, recipe: jfp8.Recipe) -> jax.Array:
    """float32 [groups, 3, 4]: mean fractions, and the largest amax and scale over the layers."""
    seen, states = _groups(jfp8.health(observed, recipe), jfp8.Health), _groups(scaling)
    rows = []
    for name in sorted(states):
        layers = jax.tree.map(
            lambda *x: jnp.concatenate([y.reshape(-1, len(SLOTS)) for y in x]), *seen[name]
        )
        scales = jnp.concatenate([s.scale.reshape(-1, len(SLOTS)) for s in states[name]])
        rows.append(
            jnp.stack(
                [
                    layers.saturated_fraction.mean(0),
                    layers.underflowed_fraction.mean(0),
                    layers.amax_edge.max(0),
                    scales.max(0),
                ],
                axis=-1,
            )
        )
    return jnp.stack(rows)

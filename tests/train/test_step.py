"""One optimizer step: skipping, accumulation, devices, calibration."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.config import (
    DataConfig,
    Fp8Config,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)
from train.mesh import make_mesh
from train.optimizer import make_optimizer
from train.state import create_state
from train.step import (
    abstract_batch,
    compile_steps,
    health_metrics,
    health_names,
    make_train_step,
)

MODEL = ModelConfig(
    hidden_size=32, num_layers=2, ffn_size=64, num_heads=4, num_kv_heads=2, vocab_size=64
)
CONFIG = TrainConfig(
    run=RunConfig(steps=50),
    model=MODEL,
    data=DataConfig(sequence_length=16, batch_size=8),
    optimizer=OptimizerConfig(warmup_steps=0, schedule="constant", learning_rate=1e-2),
    mesh=MeshConfig(data=1),
)


def replace(config, **sections):
    return dataclasses.replace(
        config,
        **{name: dataclasses.replace(getattr(config, name), **v) for name, v in sections.items()},
    )


def make_batch(config, seed=0):
    rng = np.random.default_rng(seed)
    shape = config.data.batch_size, config.data.sequence_length
    tokens = rng.integers(0, MODEL.vocab_size, (shape[0], shape[1] + 1)).astype(np.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": np.ones(shape, np.int32),
        "positions": np.tile(np.arange(shape[1], dtype=np.int32), (shape[0], 1)),
        "loss_weights": (rng.random(shape) > 0.2).astype(np.float32),
    }


def run(config, steps=3, batches=None):
    """Trains `steps` steps from the initial state; returns the state and the losses."""
    optimizer = make_optimizer(config.optimizer, config.run.steps)
    devices = jax.devices()[: config.mesh.data * config.mesh.fsdp * config.mesh.tensor]
    mesh = make_mesh(config.mesh, devices)
    state = create_state(config, optimizer, mesh)
    programs = [
        jax.jit(make_train_step(config, optimizer, calibrating=calibrating))
        for calibrating in (True, False)
    ]
    shardings = jax.tree.map(lambda x: x.sharding, abstract_batch(config, mesh))
    losses = []
    for i in range(steps):
        batch = jax.device_put(batches[i] if batches else make_batch(config, i), shardings)
        state, metrics = programs[int(state.applied_steps) > 0](state, batch)
        losses.append(float(metrics["loss_nats"]))
    return state, losses


def assert_trees_equal(got, expected):
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize("recipe", ["bf16", "delayed", "current"])
def test_loss_starts_uniform_and_falls_on_one_batch(recipe):
    config = replace(CONFIG, fp8={"recipe": recipe})
    batch = make_batch(config)
    _, losses = run(config, steps=8, batches=[batch] * 8)
    assert abs(losses[0] - np.log(MODEL.vocab_size)) < 0.1
    assert losses[-1] < losses[0] - 0.5


def test_two_runs_are_bitwise_equal():
    assert_trees_equal(run(CONFIG), run(CONFIG))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_step_changes_only_counters(bad):
    batch = make_batch(CONFIG)
    poisoned = batch | {"loss_weights": batch["loss_weights"] * np.float32(bad)}
    before, _ = run(CONFIG, 1, [batch])
    after, losses = run(CONFIG, 3, [batch, poisoned, poisoned])
    assert not np.isfinite(losses[1:]).any()
    for name in ("params", "opt_state", "scaling"):
        assert_trees_equal(getattr(after, name), getattr(before, name))
    assert (int(after.step), int(after.applied_steps), int(after.consecutive_skips)) == (3, 1, 2)
    again, _ = run(CONFIG, 4, [batch, poisoned, poisoned, batch])
    assert int(again.consecutive_skips) == 0


def test_one_infinite_weight_is_skipped_although_a_cast_to_8_bits_saturates():
    optimizer = make_optimizer(CONFIG.optimizer, 50)
    state = create_state(CONFIG, optimizer, make_mesh(CONFIG.mesh, jax.devices()[:1]))
    batch = make_batch(CONFIG)
    state, _ = jax.jit(make_train_step(CONFIG, optimizer, calibrating=True))(state, batch)
    kernel = state.params["blocks"]["ffn"]["down"]["kernel"]
    state.params["blocks"]["ffn"]["down"]["kernel"] = kernel.at[0, 3, 5].set(jnp.inf)
    after, _ = jax.jit(make_train_step(CONFIG, optimizer, calibrating=False))(state, batch)
    assert int(after.consecutive_skips) == 1
    assert_trees_equal(after.scaling, state.scaling)


def test_accumulation_gives_the_same_fp8_state_and_nearly_the_same_loss():
    # The FP8 scales of step 0 come from each microbatch itself, so later steps see them differ
    # by rounding; the exponents that were observed in step 0 are a maximum and must be equal.
    whole, losses = run(CONFIG, 2)
    parts, accumulated = run(replace(CONFIG, optimizer={"accumulation_steps": 4}), 2)
    np.testing.assert_allclose(accumulated, losses, rtol=2e-3)
    for part, one in zip(
        jax.tree.leaves(run(replace(CONFIG, optimizer={"accumulation_steps": 4}), 1)[0].scaling),
        jax.tree.leaves(run(CONFIG, 1)[0].scaling),
        strict=True,
    ):
        # Forward slots: exactly. The gradient's amax may round over an exponent's edge.
        np.testing.assert_array_equal(part[..., :2], one[..., :2])
    assert int(parts.step) == int(whole.step) == 2


def test_accumulated_gradients_weigh_tokens_not_microbatches():
    config = replace(CONFIG, fp8={"recipe": "bf16"})
    batch = make_batch(config)
    batch["loss_weights"][:] = 0
    batch["loss_weights"][0, :3] = 1  # all weight in one microbatch
    losses = [
        run(replace(config, optimizer={"accumulation_steps": n}), 2, [batch] * 2)[1] for n in (1, 4)
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-3)


@pytest.mark.parametrize(
    "mesh", [{"data": 8}, {"data": 2, "fsdp": 4}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str
)
def test_eight_devices_train_like_one(mesh):
    state, losses = run(CONFIG, 3)
    sharded, sharded_losses = run(replace(CONFIG, mesh=mesh), 3)
    np.testing.assert_allclose(sharded_losses, losses, rtol=2e-3)
    first, first_sharded = run(CONFIG, 1)[0], run(replace(CONFIG, mesh=mesh), 1)[0]
    for one, many in zip(
        jax.tree.leaves(first.scaling), jax.tree.leaves(first_sharded.scaling), strict=True
    ):
        np.testing.assert_array_equal(one[..., :2], many[..., :2])
    assert int(sharded.applied_steps) == int(state.applied_steps)


def test_weights_and_moments_are_split_over_fsdp():
    state, _ = run(replace(CONFIG, mesh={"data": 2, "fsdp": 4}), 1)
    for kernel in (
        state.params["blocks"]["ffn"]["down"]["kernel"],
        state.opt_state[1][0].mu["blocks"]["ffn"]["down"]["kernel"],
    ):
        assert kernel.addressable_shards[0].data.size * 4 == kernel.size


def test_calibration_leaves_no_uncalibrated_scale_and_no_zero_gradient():
    config = replace(CONFIG, optimizer={"accumulation_steps": 1})
    state, _ = run(config, 1)
    scales = [leaf.scale for leaf in jax.tree.leaves(state.scaling, is_leaf=_is_scaling_state)]
    assert scales and all(np.isfinite(s).all() and (s > 0).all() for s in scales)
    moments = state.opt_state[1][0].mu["blocks"]
    assert all(np.abs(m).max() > 0 for m in jax.tree.leaves(moments))


def _is_scaling_state(node):
    return hasattr(node, "observation")


def test_health_metrics_name_every_gemm_and_slot():
    state, _ = run(CONFIG, 1)
    names = health_names(state.scaling)
    assert names == ["down", "gate_up", "out", "qkv"]
    health = np.arange(4 * 3 * 4).reshape(4, 3, 4)
    metrics = health_metrics(names, health)
    assert metrics["fp8/gate_up.kernel/amax"] == 12 + 4 + 2
    assert len(metrics) == 48


def test_compiled_step_donates_its_state():
    optimizer = make_optimizer(CONFIG.optimizer, 50)
    mesh = make_mesh(CONFIG.mesh, jax.devices()[:1])
    state = create_state(CONFIG, optimizer, mesh)
    steps = compile_steps(CONFIG, optimizer, mesh)
    batch = jax.device_put(make_batch(CONFIG))
    kernel = state.params["embedding"]
    new_state, _ = steps.calibrate(state, batch)
    assert kernel.is_deleted()
    before = jax.device_get(new_state)
    sums = steps.evaluate(new_state, batch)
    assert_trees_equal(jax.device_get(new_state), before)
    assert 0 < float(sums["nll_sum"]) / float(sums["weight_sum"]) < 10

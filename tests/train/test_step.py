"""One optimizer step: skipping, accumulation, devices, calibration."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.config import (
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)
from train.mesh import make_mesh
from train.optimizer import make_optimizer
from train.state import abstract_state, create_state
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


@functools.cache  # compiling costs far more than running
def programs(config):
    """The optimizer, mesh and jitted steps of a config; [calibrating] is the index of a step."""
    optimizer = make_optimizer(config.optimizer, config.run.steps)
    devices = jax.devices()[: config.mesh.data * config.mesh.fsdp * config.mesh.tensor]
    steps = {
        calibrating: jax.jit(make_train_step(config, optimizer, calibrating=calibrating))
        for calibrating in (True, False)
    }
    return optimizer, make_mesh(config.mesh, devices), steps


def run(config, steps=3, batches=None):
    """Trains `steps` steps from the initial state; returns the state and the losses."""
    optimizer, mesh, step = programs(config)
    state = create_state(config, optimizer, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, abstract_batch(config, mesh))
    losses = []
    for i in range(steps):
        batch = jax.device_put(batches[i] if batches else make_batch(config, i), shardings)
        state, metrics = step[int(state.applied_steps) == 0](state, batch)
        losses.append(float(metrics["loss_nats"]))
    return state, losses


def with_scales(state):
    """The state with scales that fit an untrained model, so that no step needs to calibrate."""

    def set_scale(node):
        exponents = np.broadcast_to([-7.0, -11.0, -24.0], node.scale.shape)
        return node._replace(scale=jnp.asarray(2.0**exponents, jnp.float32))

    return state._replace(scaling=jax.tree.map(set_scale, state.scaling, is_leaf=_is_scaling_state))


# Logits have the variance D * 2 / 5D at first, half of which comes on top of ln V.
FIRST_LOSS = np.log(MODEL.vocab_size) + 0.2


def assert_trees_equal(got, expected):
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize("recipe", ["bf16", "delayed", "current"])
def test_loss_starts_near_ln_v_and_falls_on_one_batch(recipe):
    config = replace(CONFIG, fp8={"recipe": recipe})
    batch = make_batch(config)
    _, losses = run(config, steps=8, batches=[batch] * 8)
    assert abs(losses[0] - FIRST_LOSS) < 0.1
    assert losses[-1] < losses[0] - 0.5


def test_fp8_head_trains_from_a_calibrated_state():
    config = replace(CONFIG, fp8={"head": True})
    batch = make_batch(config)
    state, losses = run(config, steps=8, batches=[batch] * 8)
    assert abs(losses[0] - FIRST_LOSS) < 0.1
    assert losses[-1] < losses[0] - 0.5
    scale = state.scaling["logits"]["scaling"].scale
    # Weights of 1 / 100 or so bound dlogits, and E5M2 holds 57344.
    assert np.isfinite(scale).all() and 2.0**-24 <= scale[2] <= 2.0**-22
    assert health_names(state.scaling) == ["down", "gate_up", "logits", "out", "qkv"]


def test_a_head_in_fp8_is_an_option_of_fp8_recipes_alone():
    for fp8, has_state in (({}, False), ({"head": True}, True)):
        for recipe in ("delayed", "bf16"):
            config = replace(CONFIG, fp8={"recipe": recipe, **fp8})
            state = abstract_state(config, *programs(config)[:2])
            assert ("logits" in state.scaling) == (has_state and recipe == "delayed")


def test_two_runs_are_bitwise_equal():
    assert_trees_equal(run(CONFIG), run(CONFIG))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_step_changes_only_counters(bad):
    batch = make_batch(CONFIG)
    weights = batch["loss_weights"].copy()
    weights[0, 0] = bad
    poisoned = batch | {"loss_weights": weights}
    before, _ = run(CONFIG, 1, [batch])
    after, losses = run(CONFIG, 3, [batch, poisoned, poisoned])
    assert not np.isfinite(losses[1:]).any()
    for name in ("params", "opt_state", "scaling"):
        assert_trees_equal(getattr(after, name), getattr(before, name))
    assert (int(after.step), int(after.applied_steps), int(after.consecutive_skips)) == (3, 1, 2)
    again, _ = run(CONFIG, 4, [batch, poisoned, poisoned, batch])
    assert int(again.consecutive_skips) == 0


def test_one_infinite_weight_is_skipped_although_a_cast_to_8_bits_saturates():
    batch = make_batch(CONFIG)
    state, _ = run(CONFIG, 1, [batch])
    kernel = state.params["blocks"]["ffn"]["down"]["kernel"]
    state.params["blocks"]["ffn"]["down"]["kernel"] = kernel.at[0, 3, 5].set(jnp.inf)
    after, _ = programs(CONFIG)[2][False](state, batch)
    assert int(after.consecutive_skips) == 1
    assert_trees_equal(after.scaling, state.scaling)


def test_accumulation_gives_the_same_fp8_state_and_nearly_the_same_loss():
    accumulating = replace(CONFIG, optimizer={"accumulation_steps": 4})
    (one, losses), (parts, accumulated) = run(CONFIG, 2), run(accumulating, 2)
    np.testing.assert_allclose(accumulated, losses, rtol=2e-3)
    assert int(one.step) == int(parts.step) == 2
    # The exponents observed in step 0 are a maximum over the tokens, however they are split. Only
    # the gradient's amax, rounded differently, may cross the edge of an exponent.
    assert_forward_scaling_equal(run(accumulating, 1)[0], run(CONFIG, 1)[0])


def assert_forward_scaling_equal(got, expected):
    pairs = zip(jax.tree.leaves(got.scaling), jax.tree.leaves(expected.scaling), strict=True)
    for a, b in pairs:
        # Leaves are [layers, slots, ...].
        np.testing.assert_array_equal(a[:, :2], b[:, :2])


def test_accumulated_gradients_weigh_tokens_not_microbatches():
    config = replace(CONFIG, fp8={"recipe": "bf16"})
    batch = make_batch(config)
    batch["loss_weights"][:] = 0
    batch["loss_weights"][0, :3] = 1  # all weight in one microbatch
    losses = [
        run(replace(config, optimizer={"accumulation_steps": n}), 2, [batch] * 2)[1] for n in (1, 4)
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-3)


ALL_AXES = {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize("mesh", [{"data": 8}, ALL_AXES], ids=str)
def test_eight_devices_train_like_one(mesh):
    state, losses = run(CONFIG, 3)
    sharded, sharded_losses = run(replace(CONFIG, mesh=mesh), 3)
    np.testing.assert_allclose(sharded_losses, losses, rtol=2e-3)
    assert int(sharded.applied_steps) == int(state.applied_steps) == 3
    assert_forward_scaling_equal(run(replace(CONFIG, mesh=mesh), 1)[0], run(CONFIG, 1)[0])


def test_weights_and_moments_are_split_over_fsdp():
    state, _ = run(replace(CONFIG, mesh=ALL_AXES), 1)
    for kernel in (
        state.params["blocks"]["ffn"]["down"]["kernel"],
        state.opt_state[1][0].mu["blocks"]["ffn"]["down"]["kernel"],
    ):
        assert kernel.addressable_shards[0].data.size * 4 == kernel.size  # fsdp x tensor


def test_calibration_leaves_no_uncalibrated_scale_and_no_zero_gradient():
    state, _ = run(CONFIG, 1)
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


def test_compiled_step_donates_its_state_and_evaluation_does_not():
    optimizer, mesh, _ = programs(CONFIG)
    steps = compile_steps(CONFIG, optimizer, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, abstract_batch(CONFIG, mesh))
    batch = jax.device_put(make_batch(CONFIG), shardings)
    state, _ = run(CONFIG, 1)
    new_state, _ = steps.train(state, batch)
    assert state.params["embedding"].is_deleted()
    before = jax.device_get(new_state)
    sums = steps.evaluate(new_state, batch)
    assert_trees_equal(jax.device_get(new_state), before)
    assert 0 < float(sums["nll_sum"]) / float(sums["weight_sum"]) < 10

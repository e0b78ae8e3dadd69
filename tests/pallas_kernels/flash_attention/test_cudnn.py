"""cuDNN attention as far as it goes without a GPU: refusals, lowering, the gradient of lse."""

import functools
import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import flash_attention, hardware
from pallas_kernels.flash_attention.config import RESIDUAL_NAMES
from pallas_kernels.flash_attention.cudnn import add_lse_gradient
from tests.pallas_kernels.cases import Case


@pytest.fixture(autouse=True)
def h200():
    with hardware.assume_device_kind("NVIDIA H200"):
        yield


def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def lower(function, *args):
    """Returns the StableHLO for CUDA of a jitted function."""
    return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def calls(text):
    """Returns the cuDNN call targets in order, and the backend configs."""
    targets = re.findall(r"@(__cudnn\$\w+)", text)
    configs = re.findall(r'backend_config = "((?:[^"\\]|\\.)*cudnn_fmha(?:[^"\\]|\\.)*)"', text)
    decoded = [json.loads(c.replace("\\22", '"').replace('\\"', '"')) for c in configs]
    return targets, [c["cudnn_fmha_backend_config"] for c in decoded]


def loss(out):
    return out.astype(jnp.float32).sum()


@pytest.mark.parametrize(
    ("options", "mask_type", "sliding_window"),
    [
        (dict(), "NO_MASK", 0),
        (dict(is_causal=True), "CAUSAL", 0),
        (dict(is_causal=True, local_window_size=7), "CAUSAL", 8),
        (dict(local_window_size=(7, 0)), "CAUSAL", 8),
        (dict(is_causal=True, local_window_size=1000), "CAUSAL", 0),
    ],
)
def test_lowers_to_one_forward_and_one_backward_call(options, mask_type, sliding_window):
    q, kv = array(2, 64, 4, 128), array(2, 64, 2, 128)

    def f(q, k, v):
        return loss(flash_attention(q, k, v, implementation="cudnn", softmax_scale=0.5, **options))

    targets, configs = calls(lower(jax.grad(f, argnums=(0, 1, 2)), q, kv, kv))
    assert targets == ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]
    for config in configs:
        assert config["mask_type"] == mask_type
        assert config["sliding_window_length"] == sliding_window
        assert config["fmha_scale"] == 0.5


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize(
    ("saved", "forward_calls"), [(RESIDUAL_NAMES, 1), (RESIDUAL_NAMES[:1], 2), ((), 2)]
)
def test_a_remat_policy_can_keep_what_the_backward_needs(saved, forward_calls, return_lse):
    q = array(2, 64, 4, 128)

    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(*saved))
    def f(q, k, v):
        out = flash_attention(
            2 * q, 2 * k, 2 * v, is_causal=True, implementation="cudnn", return_lse=return_lse
        )
        return loss(jnp.sin(out[0] if return_lse else out))

    targets, _ = calls(lower(jax.value_and_grad(f, argnums=(0, 1, 2)), q, q, q))
    expected = ["__cudnn$fmhaSoftmax"] * forward_calls + ["__cudnn$fmhaSoftmaxBackward"]
    assert targets == expected


def test_segment_ids_become_a_bias_without_gradient():
    q = array(2, 64, 4, 128)
    ids = array(2, 64, dtype=jnp.int32)

    def f(q, k, v, ids):
        out = flash_attention(
            q, k, v, is_causal=True, q_segment_ids=ids, kv_segment_ids=ids, implementation="cudnn"
        )
        return loss(out)

    text = lower(jax.grad(f, argnums=(0, 1, 2)), q, q, q, ids)
    targets, configs = calls(text)
    assert targets == ["__cudnn$fmhaScaleBiasSoftmax", "__cudnn$fmhaScaleBiasSoftmaxBackward"]
    assert all(config["mask_type"] == "CAUSAL" for config in configs)
    assert "tensor<2x1x64x64xbf16>" in text


def test_the_log_sum_exp_costs_extra_calls_only_where_its_gradient_is_used():
    q = array(1, 64, 2, 64)

    def f(q, k, v, uses_lse):
        out, lse = flash_attention(q, k, v, implementation="cudnn", return_lse=True)
        assert lse.dtype == jnp.float32 and lse.shape == (1, 64, 2)
        return loss(out) + (lse.sum() if uses_lse else 0.0)

    for uses_lse, number in ((False, 2), (True, 4)):
        grad = jax.grad(lambda q, k, v, u=uses_lse: f(q, k, v, u), argnums=(0, 1, 2))
        assert len(calls(lower(grad, q, q, q))[0]) == number


def test_gradient_of_the_log_sum_exp_matches_float64():
    case = Case(name="causal", is_causal=True)
    q, k, v, dout, dlse = case.arrays(jnp.float32)

    def without_lse_gradient(q, k, v):
        out, lse = flash_attention(q, k, v, is_causal=True, implementation="xla", return_lse=True)
        return out, jax.lax.stop_gradient(lse)

    attend = add_lse_gradient(without_lse_gradient, case.h**-0.5)

    @jax.jit
    def value_and_gradients(q, k, v):
        outputs, vjp = jax.vjp(attend, q, k, v)
        return outputs, vjp((dout, dlse))

    outputs, grads = value_and_gradients(q, k, v)
    expected = case.expected(q, k, v, dout, dlse)
    np.testing.assert_allclose(outputs[1], expected.lse, atol=1e-5)
    for got, name in zip(grads, ("dq", "dk", "dv"), strict=True):
        np.testing.assert_allclose(got, getattr(expected, name), atol=1e-4, err_msg=name)
    got = jax.jit(jax.grad(lambda q: (attend(q, k, v)[0] * dout).sum()))(q)
    np.testing.assert_allclose(got, case.expected(q, k, v, dout).dq, atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "dtype", "options", "message"),
    [
        ((1, 64, 2, 64), jnp.float32, {}, r"q\.dtype=float32 is not one of .*; cast"),
        ((1, 64, 2, 64), jnp.bfloat16, dict(deterministic=True), "needs implementation='mosaic'"),
        ((1, 64, 2, 60), jnp.bfloat16, {}, r"q\.shape\[3\]=60 must be a multiple of 8 and at most"),
        ((1, 64, 2, 264), jnp.bfloat16, {}, r"q\.shape\[3\]=264 must be .* pad the head dim"),
        ((1, 64, 2, 64), jnp.bfloat16, dict(local_window_size=3), "a window on the left of a"),
        ((1, 64, 2, 64), jnp.bfloat16, dict(local_window_size=(3, 63)), "a window on the left of"),
        ((1, 63, 2, 64), jnp.bfloat16, dict(segments=True), "T=63 and S=63 must be even"),
    ],
)
def test_refuses_with_the_reason(shape, dtype, options, message):
    x = jnp.zeros(shape, dtype)
    options = dict(options)
    if options.pop("segments", False):
        ids = jnp.zeros(shape[:2], jnp.int32)
        options |= dict(q_segment_ids=ids, kv_segment_ids=ids)
    with pytest.raises(
        NotImplementedError, match="implementation='cudnn' cannot run: .*" + message
    ):
        flash_attention(x, x, x, implementation="cudnn", **options)


def test_refuses_a_window_that_leaves_queries_without_keys():
    q, kv = jnp.zeros((1, 32, 2, 64), jnp.bfloat16), jnp.zeros((1, 8, 2, 64), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="leaves queries without a key .T=32, S=8."):
        flash_attention(q, kv, kv, implementation="cudnn", is_causal=True, local_window_size=4)


SHARDED = """
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from pallas_kernels import flash_attention, hardware
mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
sharding = NamedSharding(mesh, PartitionSpec("data", None, "tensor"))
x = jax.ShapeDtypeStruct((4, 64, 4, 64), jnp.bfloat16, sharding=sharding)

def loss(q, k, v):
    return flash_attention(q, k, v, is_causal=True, implementation="cudnn").sum()

with hardware.assume_device_kind("NVIDIA H200"):
    traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(x, x, x)
    print(traced.lower(lowering_platforms=("cuda",)).as_text())
"""


def test_lowers_with_batch_and_heads_sharded():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    done = subprocess.run(
        [sys.executable, "-c", SHARDED], env=environment, capture_output=True, text=True, check=True
    )
    # One partitioned call each way; the rule keeps batch (i) and heads sharded, length whole.
    assert done.stdout.count("@CustomSPMDPartitioning") == 2
    assert done.stdout.count("sdy.sharding_rule") == 2

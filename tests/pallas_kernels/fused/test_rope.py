"""Rotary positions on a fused QKV projection: against float64, by XLA and by the kernel."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

from pallas_kernels import hardware, rope_qkv
from pallas_kernels.fused import sm90_rope
from pallas_kernels.fused.sm90_rope import RopePlan
from pallas_kernels.interpreter import interpret_kernels
from tests.pallas_kernels.compile_gate import ptxas_report

# batch, length, kv heads, query heads of each, head dim
CASES = {
    "gqa": (2, 64, 2, 4, 128),
    "mha": (1, 128, 3, 1, 64),
    "mqa": (1, 64, 1, 3, 64),
}


def inputs(batch, length, kv_heads, group, head_dim, dtype="bfloat16"):
    rng = np.random.default_rng(4)
    qkv = rng.standard_normal((batch, length, kv_heads * (group + 2) * head_dim))
    angle = 50 * rng.standard_normal((batch, length, 1, head_dim // 2))
    shapes = [(batch, length, n, head_dim) for n in (kv_heads * group, kv_heads, kv_heads)]
    grads = [jnp.asarray(rng.standard_normal(shape)).astype(dtype) for shape in shapes]
    angles = [jnp.asarray(f(angle), jnp.float32) for f in (np.cos, np.sin)]
    return jnp.asarray(qkv).astype(dtype), angles, tuple(grads)


def rotation64(x, cos, sin, sign):
    x, cos, sin = (np.asarray(y, np.float64) for y in (x, cos, sin))
    plane = x.reshape(*x.shape[:-1], 2, -1)
    z = (plane[..., 0, :] + 1j * plane[..., 1, :]) * (cos + sign * 1j * sin)
    return np.concatenate([z.real, z.imag], axis=-1)


def exact(qkv, angles, grads, kv_heads):
    """q, k, v, and the gradient of qkv, in float64."""
    head_dim = grads[0].shape[-1]
    heads = np.asarray(qkv, np.float64).reshape(*qkv.shape[:2], kv_heads, -1, head_dim)
    q = heads[..., :-2, :].reshape(grads[0].shape)
    outs = [*(rotation64(x, *angles, 1) for x in (q, heads[..., -2, :])), heads[..., -1, :]]
    dq, dk = (rotation64(x, *angles, -1) for x in grads[:2])
    dq = dq.reshape(*qkv.shape[:2], kv_heads, -1, head_dim)
    dv = np.asarray(grads[2], np.float64)
    dqkv = np.concatenate([dq, dk[:, :, :, None], dv[:, :, :, None]], axis=3)
    return outs, dqkv.reshape(qkv.shape)


def assert_rounded_once(got, want, dtype):
    """Of a sum of two products: a last bit of the result, and of what cancelled."""
    epsilon = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=epsilon, atol=2**-21)


@pytest.mark.parametrize("implementation", ["xla", "mosaic"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_value_and_gradient(implementation, case, dtype):
    kv_heads, head_dim = case[2], case[4]
    qkv, angles, grads = inputs(*case, dtype)
    run = lambda qkv: rope_qkv(  # noqa: E731
        qkv, *angles, num_kv_heads=kv_heads, head_dim=head_dim, implementation=implementation
    )
    with interpret_kernels():
        outs, pullback = jax.vjp(jax.jit(run), qkv)
        (dqkv,) = pullback(grads)
    want, want_gradient = exact(qkv, angles, grads, kv_heads)
    assert dqkv.dtype == qkv.dtype and all(x.dtype == qkv.dtype for x in outs)
    for got, expected in zip((*outs, dqkv), (*want, want_gradient), strict=True):
        assert got.shape == expected.shape
        assert_rounded_once(got, expected, dtype)
    if implementation == "mosaic":
        assert not interpret_pallas_call.get_races().races_found


def test_nonfinite_gradients_stay_in_their_head():
    case = CASES["gqa"]
    qkv, angles, (dq, dk, dv) = inputs(*case)
    run = functools.partial(rope_qkv, num_kv_heads=2, head_dim=128, implementation="mosaic")
    with interpret_kernels():
        _, pullback = jax.vjp(lambda qkv: run(qkv, *angles), qkv)
        (dqkv,) = pullback((dq, dk, dv.at[1, 7, 0, 3].set(jnp.nan)))
    where = np.argwhere(np.isnan(np.asarray(dqkv, np.float32)))
    assert where.tolist() == [[1, 7, 5 * 128 + 3]]


@pytest.mark.parametrize(
    "plan",
    [
        RopePlan(tokens=16384, num_kv_heads=8, group=4, head_dim=128, dtype="bfloat16"),
        RopePlan(tokens=16384, num_kv_heads=16, group=1, head_dim=128, dtype="bfloat16"),
        RopePlan(tokens=32768, num_kv_heads=1, group=16, head_dim=64, dtype="bfloat16"),
    ],
    ids=["8b", "1b", "mqa"],
)
def test_compiles_for_sm90a_without_spills(plan):
    assert sm90_rope.unsupported_reason(plan) is None
    assert 3 * sm90_rope.smem_bytes(plan) <= 227 * 1024  # three CTAs share a multiprocessor
    width = plan.num_kv_heads * plan.head_dim
    struct = jax.ShapeDtypeStruct
    grads = [struct((plan.tokens, n * width), jnp.bfloat16) for n in (plan.group, 1, 1)]
    angles = [struct((plan.tokens, plan.head_dim // 2), jnp.float32)] * 2
    report = ptxas_report(functools.partial(sm90_rope.launch, plan), *grads, *angles)
    assert report.spilled_bytes == 0, report.text


@pytest.mark.parametrize(
    ("case", "dtype", "message"),
    [
        ((1, 64, 2, 2, 32), jnp.bfloat16, r"head_dim=32 must be one of \(64, 128\)"),
        ((1, 40, 2, 2, 64), jnp.bfloat16, "the 40 tokens must be a multiple of 64"),
        ((1, 64, 1, 17, 64), jnp.bfloat16, "17 query heads to a key/value head must be at most"),
        ((1, 64, 1, 2, 64), jnp.float32, "dtype float32 must have 16 bits"),
    ],
)
def test_kernel_refuses_with_the_reason(case, dtype, message):
    qkv, angles, _ = inputs(*case, dtype)
    with (
        hardware.assume_device_kind("NVIDIA H200"),
        pytest.raises(NotImplementedError, match=message),
    ):
        rope_qkv(qkv, *angles, num_kv_heads=case[2], head_dim=case[4], implementation="mosaic")


def test_rejects():
    qkv, (cos, sin), _ = inputs(*CASES["gqa"])
    with pytest.raises(ValueError, match=r"qkv.shape\[2\]=1536 must be num_kv_heads"):
        rope_qkv(qkv, cos, sin, num_kv_heads=5, head_dim=128)
    with pytest.raises(ValueError, match=r"sin.shape=\(2, 64, 1, 32\) must be \(2, 64, 1, 64\)"):
        rope_qkv(qkv, cos, sin[..., :32], num_kv_heads=2, head_dim=128)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gpu_gradient(case):
    qkv, angles, grads = inputs(*case)
    run = functools.partial(
        rope_qkv, num_kv_heads=case[2], head_dim=case[4], implementation="mosaic"
    )
    _, pullback = jax.vjp(lambda qkv: run(qkv, *angles), qkv)
    _, want = exact(qkv, angles, grads, case[2])
    assert_rounded_once(pullback(grads)[0], want, "bfloat16")

"""FP8 attention from a fused QKV projection: against float32 attention, by XLA and by kernels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

from pallas_kernels import (
    Fp8Options,
    flash_attention,
    hardware,
    rope_flash_attention,
    rope_qkv,
)
from pallas_kernels.flash_attention import fp8, fp8_xla, sm90_fp8
from pallas_kernels.interpreter import interpret_kernels
from tests.aot import kernel_launches

BY_KERNELS = Fp8Options(quantize_implementation="mosaic")
# batch, tokens, kv heads, query heads of each, head dim
SMALL = (1, 192, 1, 2, 64)


def inputs(batch, length, kv_heads, group, head_dim, dtype=jnp.bfloat16):
    """qkv, (cos, sin), dout."""
    rng = np.random.default_rng(3)
    qkv = rng.standard_normal((batch, length, kv_heads * (group + 2) * head_dim))
    angle = 50 * rng.standard_normal((batch, length, 1, head_dim // 2))
    dout = rng.standard_normal((batch, length, kv_heads * group, head_dim))
    angles = [jnp.asarray(f(angle), jnp.float32) for f in (np.cos, np.sin)]
    return jnp.asarray(qkv, dtype), angles, jnp.asarray(dout, dtype)


def value_and_gradient(attend, qkv, dout):
    out, pullback = jax.vjp(attend, qkv)
    return out, pullback(dout.astype(out.dtype))[0]


def exact(case, qkv, angles, dout, **options):
    """By attention in float32."""
    heads = dict(num_kv_heads=case[2], head_dim=case[4], implementation="xla")

    def attend(qkv):
        q, k, v = rope_qkv(qkv, *angles, **heads)
        return flash_attention(q, k, v, is_causal=True, implementation="xla", **options)

    return value_and_gradient(jax.jit(attend), qkv.astype(jnp.float32), dout)


def errors(got, want):
    """Relative, of out and of dqkv."""
    pairs = [[np.asarray(x, np.float64) for x in pair] for pair in zip(got, want, strict=True)]
    return [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs]


def test_interpreted_kernels_err_no_more_than_xla(monkeypatch):
    """Those of this path; the two of attention itself have tests of their own."""
    forward = jax.jit(fp8_xla.fp8_forward, static_argnums=3)
    backward = jax.jit(fp8_xla.fp8_backward, static_argnums=4)

    def backward_sums(inputs, gradients, *ids_and_spec, interpret):
        dq, dk, dv = backward(inputs, gradients, *ids_and_spec)
        factor = fp8.heads_last(gradients.dq_factor)
        return fp8.rotate(dq.astype(jnp.float32)) / (dq.shape[3] * factor), dk, dv

    monkeypatch.setattr(sm90_fp8, "fp8_forward", lambda *args, interpret: forward(*args))
    monkeypatch.setattr(sm90_fp8, "backward_sums", backward_sums)
    qkv, angles, dout = inputs(*SMALL)
    ids = jnp.asarray(np.arange(192)[None] >= 60, jnp.int32)
    results = []
    for implementation in ("mosaic", "xla"):
        attend = functools.partial(
            rope_flash_attention,
            cos=angles[0],
            sin=angles[1],
            num_kv_heads=1,
            head_dim=64,
            is_causal=True,
            segment_ids=ids,
            implementation=implementation,
        )
        # Kernels one after the other: the interpreter runs no two at a time.
        attend = attend if implementation == "mosaic" else jax.jit(attend)
        with interpret_kernels():
            results.append(value_and_gradient(attend, qkv, dout))
    assert not interpret_pallas_call.get_races().races_found
    (out, gradient), _ = results
    assert out.dtype == gradient.dtype == qkv.dtype and gradient.shape == qkv.shape
    want = exact(SMALL, qkv, angles, dout, q_segment_ids=ids, kv_segment_ids=ids)
    for error, reference in zip(*(errors(x, want) for x in results), strict=True):
        assert error <= 1.2 * reference <= 0.1


def test_xla_is_rope_and_then_attention():
    qkv, angles, _ = inputs(1, 23, 2, 2, 16, jnp.float32)
    heads = dict(num_kv_heads=2, head_dim=16)
    options = dict(is_causal=True, softmax_scale=0.3, local_window_size=(9, 0))
    got = jax.jit(functools.partial(rope_flash_attention, **heads, **options))(qkv, *angles)
    attend = functools.partial(flash_attention, precision="fp8", **options)
    want = jax.jit(lambda *arrays: attend(*rope_qkv(*arrays, **heads)))(qkv, *angles)
    np.testing.assert_array_equal(got, want)


def lowered(kv_heads, group, transform):
    """StableHLO of a call at 2 x 8192 tokens on the one H200 of a machine."""
    shape = jax.ShapeDtypeStruct
    width = kv_heads * (group + 2) * 128
    arrays = shape((2, 8192, width), jnp.bfloat16), *[shape((2, 8192, 1, 64), jnp.float32)] * 2
    run = functools.partial(
        rope_flash_attention, num_kv_heads=kv_heads, head_dim=128, is_causal=True
    )
    with hardware.assume_device_kind("NVIDIA H200"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "device_count", lambda: 1)
        traced = jax.jit(transform(run)).trace(*arrays)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(("kv_heads", "group"), [(8, 4), (16, 1)])
def test_lowers_for_cuda_without_keys_in_16_bits(kv_heads, group):
    text = lowered(kv_heads, group, lambda run: run)
    assert kernel_launches(text) == 4, "q, k, v and attention"
    # Attention's output is all that has heads and 16 bits: in its kernel, and where it is cut out.
    assert "x1x128xbf16>" not in text.replace("2x1x1x128xbf16", "")
    assert group == 1 or f"tensor<2x8192x{kv_heads}x128xbf16>" not in text


def test_gradient_lowers_for_cuda():
    def gradient(run):
        return jax.grad(lambda *arrays: (run(*arrays).astype(jnp.float32) ** 2).sum())

    text = lowered(8, 4, gradient)
    # As above; q, k and dO by columns, the backward, and its end.
    assert kernel_launches(text) == 4 + 5


@pytest.mark.parametrize(
    ("case", "options", "message"),
    [
        (SMALL, Fp8Options(), "XLA is to quantise; pass fp8_options"),
        (SMALL, Fp8Options(quantize_implementation="mosaic", backward="bf16"), "needs q, k and v"),
        ((1, 40, 1, 2, 64), BY_KERNELS, "the 40 tokens must be a multiple of 16; pad them"),
        ((1, 48, 1, 2, 32), BY_KERNELS, r"head_dim=32 is not one of \(64, 128\)"),
    ],
)
def test_kernels_refuse_with_the_reason(case, options, message):
    qkv, angles, _ = inputs(*case)
    run = functools.partial(
        rope_flash_attention,
        num_kv_heads=case[2],
        head_dim=case[4],
        fp8_options=options,
        implementation="mosaic",
    )
    with (
        hardware.assume_device_kind("NVIDIA H200"),
        pytest.raises(NotImplementedError, match=message),
    ):
        run(qkv, *angles)
    with pytest.raises(NotImplementedError, match="is for Hopper, but"):
        run(qkv, *angles)


def test_rejects():
    qkv, (cos, sin), _ = inputs(*SMALL)
    with pytest.raises(ValueError, match=r"qkv.shape\[2\]=256 must be num_kv_heads"):
        rope_flash_attention(qkv, cos, sin, num_kv_heads=3, head_dim=64)
    with pytest.raises(ValueError, match="q_segment_ids is int32"):
        ids = jnp.zeros((1, 12), jnp.int32)
        rope_flash_attention(qkv, cos, sin, num_kv_heads=1, head_dim=64, segment_ids=ids)
    with pytest.raises(ValueError, match="softmax_scale=-1"):
        rope_flash_attention(qkv, cos, sin, num_kv_heads=1, head_dim=64, softmax_scale=-1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [(2, 1024, 2, 4, 128), (1, 1040, 3, 1, 64)], ids=str)
@pytest.mark.parametrize("rotate", [True, False])
def test_kernels_err_no_more_than_xla(case, rotate):
    qkv, angles, dout = inputs(*case)
    options = Fp8Options(quantize_implementation="mosaic", rotate=rotate)
    run = functools.partial(
        rope_flash_attention,
        cos=angles[0],
        sin=angles[1],
        num_kv_heads=case[2],
        head_dim=case[4],
        is_causal=True,
        fp8_options=options,
    )
    by_kernels, by_xla = (
        value_and_gradient(functools.partial(run, implementation=name), qkv, dout)
        for name in ("mosaic", "xla")
    )
    want = exact(case, qkv, angles, dout)
    for error, reference in zip(errors(by_kernels, want), errors(by_xla, want), strict=True):
        assert error <= 1.2 * reference <= 0.1

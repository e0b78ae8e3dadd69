"""What FP8 attention on sm_90a does with a fused QKV projection: what it supports, its heads, and
the small numbers that the kernels need. The maths is `fp8`'s and `fused.rope`'s.
"""

# Shapes: B batch, T tokens, N query heads, K key/value heads, g = N / K, H head dim.

import functools

import jax.numpy as jnp
from jax import Array

from pallas_kernels.flash_attention import (
    fp8,
    fp8_quantize,
    sm90_fp8,
    sm90_quantize_fp8,
    sm90_rope_finish_fp8,
    sm90_rope_quantize_fp8,
)
from pallas_kernels.flash_attention.config import AttentionSpec
from pallas_kernels.flash_attention.sm90_quantize_fp8 import Part
from pallas_kernels.fused.rope import rotate
from pallas_kernels.quantize.contract import device_reason, sm_count

_TOKENS = 16
"""T is a multiple of this: whole groups of `fp8.permute_16`."""


def unsupported_reason(spec: AttentionSpec) -> str | None:
    """Why the kernels cannot take q, k and v from one projection; None if they can."""
    rules = (
        (
            spec.fp8.backward == "fp8",
            "a backward in bf16 needs q, k and v in 16 bits; use rope_qkv and flash_attention",
        ),
        (
            spec.fp8.quantize_implementation == "mosaic",
            "XLA is to quantise; pass fp8_options=Fp8Options(quantize_implementation='mosaic')",
        ),
        (
            spec.head_dim in sm90_quantize_fp8.HEAD_DIMS,
            f"head_dim={spec.head_dim} is not one of {sm90_quantize_fp8.HEAD_DIMS}; use rope_qkv"
            " and flash_attention",
        ),
        (
            spec.query_length % _TOKENS == 0,
            f"the {spec.query_length} tokens must be a multiple of {_TOKENS}; pad them",
        ),
    )
    reason = next((reason for holds, reason in rules if not holds), None)
    return device_reason() or reason or sm90_fp8.spec_unsupported_reason(spec)


def quantize_qkv(
    qkv: Array, cos: Array, sin: Array, spec: AttentionSpec, *, interpret: bool = False
) -> fp8.Inputs:
    """`fp8_vjp.Kernels.quantize_inputs` of what `rope_qkv` makes, which is never written.

    Args:
      qkv: `[B, T, K (g + 2) H]`.
      cos: float32 `[B, T, 1, H / 2]`.
      sin: like cos.
      spec: what to compute.
      interpret: run in the CPU interpreter.
    """
    group, h = spec.num_heads // spec.num_kv_heads, spec.head_dim
    x = qkv.reshape(*qkv.shape[:2], -1, h)
    q_part, k_part, v_part = (
        Part(group=group + 2, first=first, count=count)
        for first, count in ((0, group), (group, 1), (group + 1, 1))
    )

    def keys(stride: int, stop: int | None = None) -> Array:
        """Some of k, `[B, tokens, K, H]`, rotated."""
        few = slice(None, stop, stride)
        return rotate(x[:, few, group :: group + 2], cos[:, few], sin[:, few])

    mean = None
    if spec.fp8.center_keys:
        mean = keys(fp8_quantize.mean_stride(spec.key_length)).astype(jnp.float32).mean(axis=1)
    first = None
    if spec.fp8.exact_first_key:
        first = sm90_fp8.rotated(fp8_quantize.first_key_of(keys(1, 1), mean), spec)
        first = fp8_quantize.to_query_heads(first, spec)
    options = dict(sm_count=sm_count(), interpret=interpret)
    matrix = jnp.asarray(fp8.rotation(h), x.dtype) if spec.fp8.rotate else None
    run = functools.partial(
        sm90_rope_quantize_fp8.rope_quantize,
        x,
        cos[:, :, 0],
        sin[:, :, 0],
        matrix,
        **options,
    )
    q = run(None, first, part=q_part)
    k = run(None if mean is None else sm90_fp8.rotated(mean, spec), part=k_part)
    v = sm90_quantize_fp8.quantize(x, None, None, part=v_part, writes_columns=True, **options)
    return sm90_fp8.inputs_of(q, k, v, mean, spec)


def finish_dqkv(
    sums: tuple[Array, Array, Array],
    factor: Array,
    cos: Array,
    sin: Array,
    spec: AttentionSpec,
    *,
    interpret: bool = False,
) -> Array:
    """The gradient of the projection, `[B, T, K (g + 2) H]`.

    Args:
      sums: of `sm90_fp8.backward_sums`.
      factor: `fp8.Gradients.dq_factor`.
      cos: float32 `[B, T, 1, H / 2]`.
      sin: like cos.
      spec: what was computed.
      interpret: run in the CPU interpreter.
    """
    dq, dk, dv = sums
    matrix = sm90_fp8.inverse_rotation(spec) if spec.fp8.rotate else jnp.eye(spec.head_dim)
    dqkv = sm90_rope_finish_fp8.rope_finish(
        dq,
        sm90_fp8.pad_rows(factor, dq.shape[1], 0.0),
        dk,
        dv,
        cos[:, :, 0],
        sin[:, :, 0],
        jnp.asarray(matrix, dk.dtype),
        sm_count=sm_count(),
        interpret=interpret,
    )
    return dqkv.reshape(*dqkv.shape[:2], -1)

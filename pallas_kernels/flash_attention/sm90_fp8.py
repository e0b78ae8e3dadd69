"""The Pallas Mosaic GPU implementation of FP8 attention for sm_90a: what it supports, layouts,
padding. The maths is `fp8`'s, the kernels are in `sm90_fwd_fp8` and `sm90_bwd_fp8`.
"""

# Shapes: B batch, T query, S key, N query heads, K key/value heads, H head dim.

import sys

import jax.numpy as jnp
from jax import Array

from pallas_kernels import hardware
from pallas_kernels.flash_attention import fp8, sm90, sm90_fwd_fp8, tuning
from pallas_kernels.flash_attention.config import AttentionSpec, ForwardConfig
from pallas_kernels.flash_attention.sm90_fwd_plan import Plan


def unsupported_reason(spec: AttentionSpec) -> str | None:
    """Returns why the kernels cannot run `spec` on the default device, or None if they can."""
    is_hopper, found = hardware.require_sm90()
    rules = (
        (is_hopper, f"the kernel is for Hopper, but {found}; use implementation='xla'"),
        (
            spec.dtype in sm90.SUPPORTED_DTYPES,
            f"q.dtype={spec.dtype} is not one of {sm90.SUPPORTED_DTYPES}; cast q, k and v",
        ),
        (
            spec.head_dim in sm90.SUPPORTED_HEAD_DIMS,
            f"q.shape[3]={spec.head_dim} is not one of {sm90.SUPPORTED_HEAD_DIMS}; pad the head"
            " dim or use implementation='xla'",
        ),
    )
    return next((reason for holds, reason in rules if not holds), None)


def attention(
    q: Array,
    k: Array,
    v: Array,
    q_segment_ids: Array | None,
    kv_segment_ids: Array | None,
    spec: AttentionSpec,
) -> tuple[Array, Array]:
    """Computes out `[B, T, N, H]` and lse `[B, T, N]`, float32; differentiable."""
    kernels = sys.modules[__name__]
    return fp8.attention(q, k, v, q_segment_ids, kv_segment_ids, spec, kernels)


def fp8_forward(
    inputs: fp8.Inputs,
    q_segment_ids: Array | None,
    kv_segment_ids: Array | None,
    spec: AttentionSpec,
    *,
    config: ForwardConfig | None = None,
    interpret: bool = False,
) -> tuple[Array, fp8.Statistics]:
    """Implements `fp8.Kernels.fp8_forward`.

    Args:
      inputs: as `fp8.quantize_inputs` makes them.
      q_segment_ids: `[B, T]`, int32, or None.
      kv_segment_ids: `[B, S]`, int32, or None.
      spec: what to compute.
      config: how to cut the work; looked up if None.
      interpret: run in the CPU interpreter.
    """
    plan = Plan(
        spec=spec,
        config=config or tuning.forward_config(spec),
        sm_count=sm90.sm_count(),
        interpret=interpret,
    )
    segments = None
    if q_segment_ids is not None and kv_segment_ids is not None:
        segments = sm90.segment_operands(plan, q_segment_ids, kv_segment_ids)
    padding = plan.padded_key_length - spec.key_length
    v_t = jnp.pad(inputs.v, ((0, 0), (0, padding), (0, 0), (0, 0))).transpose(0, 2, 3, 1)
    out, statistics = sm90_fwd_fp8.launch(
        sm90.pad_length(inputs.q),
        sm90.pad_length(inputs.k),
        fp8.permute_16(v_t, 3),
        fp8.exponent_factor(inputs, spec),
        inputs.v_scale,
        segments,
        plan=plan,
    )
    length = spec.query_length
    return out[:, :length], fp8.Statistics(*(x[:, :, :length] for x in statistics))


def fp8_backward(
    inputs: fp8.Inputs,
    gradients: fp8.Gradients,
    q_segment_ids: Array | None,
    kv_segment_ids: Array | None,
    spec: AttentionSpec,
) -> tuple[Array, Array, Array]:
    """Implements `fp8.Kernels.fp8_backward`."""
    del inputs, gradients, q_segment_ids, kv_segment_ids, spec
    raise NotImplementedError(
        "precision='fp8' has no backward kernel yet; use implementation='xla' to differentiate"
    )


def bf16_backward(
    q: Array,
    k: Array,
    v: Array,
    q_segment_ids: Array | None,
    kv_segment_ids: Array | None,
    outputs: tuple[Array, Array],
    gradients: tuple[Array, Array],
    spec: AttentionSpec,
) -> tuple[Array, Array, Array]:
    """Implements `fp8.Kernels.bf16_backward`."""
    del q, k, v, q_segment_ids, kv_segment_ids, outputs, gradients, spec
    raise NotImplementedError(
        "backward='bf16' has no Mosaic kernel yet; use implementation='xla' to differentiate"
    )

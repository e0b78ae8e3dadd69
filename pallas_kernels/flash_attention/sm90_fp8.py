"""The Pallas Mosaic GPU implementation of FP8 attention for sm_90a: what it supports, layouts,
padding. The maths is `fp8`'s, the kernels are in `sm90_fwd_fp8` and `sm90_bwd_fp8`.
"""

# Shapes: B batch, T query, S key, N query heads, K key/value heads, H head dim.

import dataclasses
import functools
import sys
from typing import Any

import jax.numpy as jnp
from jax import Array

from pallas_kernels import hardware
from pallas_kernels.flash_attention import (
    fp8,
    fp8_quantize,
    fp8_vjp,
    sm90,
    sm90_bwd_fp8,
    sm90_bwd_fp8_plan,
    sm90_columns_fp8,
    sm90_finish_fp8,
    sm90_fwd_fp8,
    sm90_quantize_fp8,
    tuning,
)
from pallas_kernels.flash_attention.config import AttentionSpec, ForwardConfig, Fp8BackwardConfig
from pallas_kernels.flash_attention.masks import Band
from pallas_kernels.flash_attention.sm90_fwd_plan import Plan

BACKWARD_HEAD_DIMS = (64, 128)


def unsupported_reason(spec: AttentionSpec) -> str | None:
    """Returns why the kernels cannot run `spec` on the default device, or None if they can."""
    is_hopper, found = hardware.require_sm90()
    if not is_hopper:
        return f"the kernel is for Hopper, but {found}; use implementation='xla'"
    return spec_unsupported_reason(spec)


def spec_unsupported_reason(spec: AttentionSpec) -> str | None:
    """Returns why the kernels cannot run `spec` on any device, or None if they can."""
    rules = (
        (
            spec.dtype in sm90.SUPPORTED_DTYPES,
            f"q.dtype={spec.dtype} is not one of {sm90.SUPPORTED_DTYPES}; cast q, k and v",
        ),
        (
            spec.head_dim in sm90.SUPPORTED_HEAD_DIMS,
            f"q.shape[3]={spec.head_dim} is not one of {sm90.SUPPORTED_HEAD_DIMS}; pad the head"
            " dim or use implementation='xla'",
        ),
        (
            spec.fp8.quantize_implementation == "xla"
            or spec.head_dim in sm90_quantize_fp8.HEAD_DIMS,
            f"q.shape[3]={spec.head_dim} is not one of {sm90_quantize_fp8.HEAD_DIMS}; pass"
            " fp8_options=Fp8Options(quantize_implementation='xla')",
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
    return fp8_vjp.attention(q, k, v, q_segment_ids, kv_segment_ids, spec, kernels)


def quantize_inputs(
    q: Array, k: Array, v: Array, spec: AttentionSpec, *, interpret: bool = False
) -> fp8.Inputs:
    """Implements `fp8_vjp.Kernels.quantize_inputs`; `interpret` runs it in the CPU interpreter."""
    if spec.fp8.quantize_implementation == "xla":
        return fp8_quantize.quantize_inputs(q, k, v, spec)
    matrix = jnp.asarray(fp8.rotation(spec.head_dim), q.dtype) if spec.fp8.rotate else None
    mean = fp8_quantize.key_mean(k) if spec.fp8.center_keys else None
    rotated_mean = rotated(mean, spec) if mean is not None else None
    run = functools.partial(
        sm90_quantize_fp8.quantize, sm_count=sm90.sm_count(), interpret=interpret
    )
    first = None
    if spec.fp8.exact_first_key:
        first = rotated(fp8_quantize.first_key_of(k, mean), spec)
        first = fp8_quantize.to_query_heads(first, spec)
    q_parts = run(q, matrix, None, first, writes_columns=False)
    k_parts = run(k, matrix, rotated_mean, writes_columns=False)
    v_parts = run(v, None, None, writes_columns=True)
    return inputs_of(q_parts, k_parts, v_parts, mean, spec)


def inputs_of(
    q: sm90_quantize_fp8.Quantized,
    k: sm90_quantize_fp8.Quantized,
    v: sm90_quantize_fp8.Quantized,
    mean: Array | None,
    spec: AttentionSpec,
) -> fp8.Inputs:
    """The kernels' results; q's products are with the first key, k' M."""
    assert v.norm is not None, "asked for by writes_columns"
    inputs = fp8.Inputs(
        q=q.rows,
        k=k.rows,
        v=v.rows,
        q_scale=q.scale,
        k_scale=k.scale,
        v_scale=v.scale,
        v_norm=v.norm,
        key_mean=mean,
        v_columns=v.columns,
    )
    if q.products is None:
        return inputs
    first_key = q.products / fp8_quantize.first_key_scale(inputs, spec)
    return inputs._replace(first_key=first_key)


def rotated(x: Array, spec: AttentionSpec) -> Array:
    """x M of `[B, K, H]`, float32, if the options ask for it.

    No dot: XLA would make one of two, and hand slices of its result to the kernels.
    """
    if not spec.fp8.rotate:
        return x
    return (x[..., None] * jnp.asarray(fp8.rotation(spec.head_dim))).sum(axis=2)


def fp8_forward(
    inputs: fp8.Inputs,
    q_segment_ids: Array | None,
    kv_segment_ids: Array | None,
    spec: AttentionSpec,
    *,
    config: ForwardConfig | None = None,
    interpret: bool = False,
) -> tuple[Array, fp8.Statistics]:
    """Implements `fp8_vjp.Kernels.fp8_forward`.

    Args:
      inputs: as `fp8_quantize.quantize_inputs` makes them.
      q_segment_ids: `[B, T]`, int32, or None.
      kv_segment_ids: `[B, S]`, int32, or None.
      spec: what to compute.
      config: how to cut the work; looked up if None.
      interpret: run in the CPU interpreter.
    """
    plan = forward_plan(spec, config=config, interpret=interpret)
    operands = forward_operands(inputs, q_segment_ids, kv_segment_ids, plan)
    out, statistics = sm90_fwd_fp8.launch(*operands, plan=plan)
    length = spec.query_length
    return out[:, :length], fp8.Statistics(*(x[:, :, :length] for x in statistics))


def forward_plan(
    spec: AttentionSpec, *, config: ForwardConfig | None = None, interpret: bool = False
) -> Plan:
    """Returns the plan of the forward kernel; `config` is looked up if None."""
    config = config or tuning.forward_config(spec)
    return Plan(spec=spec, config=config, sm_count=sm90.sm_count(), interpret=interpret)


def forward_operands(
    inputs: fp8.Inputs, q_segment_ids: Array | None, kv_segment_ids: Array | None, plan: Plan
) -> tuple[Any, ...]:
    """Returns the arguments of `sm90_fwd_fp8.launch`: padded, and V transposed."""
    segments = None
    if q_segment_ids is not None and kv_segment_ids is not None:
        segments = sm90.segment_operands(plan, q_segment_ids, kv_segment_ids)
    v_t = inputs.v_columns
    if v_t is None:
        v_t = _columns(inputs.v, plan.padded_key_length, 16)
    return (
        sm90.pad_length(inputs.q),
        sm90.pad_length(inputs.k),
        v_t,
        fp8.exponent_factor(inputs, plan.spec),
        sm90_fwd_fp8.block_scales(inputs.k_scale, inputs.v_scale, plan),
        inputs.v_scale,
        _first_key(inputs, plan.padded_query_length),
        segments,
    )


def fp8_backward(
    inputs: fp8.Inputs,
    gradients: fp8.Gradients,
    q_segment_ids: Array | None,
    kv_segment_ids: Array | None,
    spec: AttentionSpec,
    *,
    config: Fp8BackwardConfig | None = None,
    interpret: bool = False,
) -> tuple[Array, Array, Array]:
    """Implements `fp8_vjp.Kernels.fp8_backward`; `config` says how to cut the work, `interpret`
    runs it in the CPU interpreter.
    """
    ids = q_segment_ids, kv_segment_ids
    dq, dk, dv = backward_sums(inputs, gradients, *ids, spec, config=config, interpret=interpret)
    dk, dv = dk[:, : spec.key_length], dv[:, : spec.key_length]
    if spec.fp8.quantize_implementation == "mosaic" and spec.fp8.rotate:
        factor = pad_rows(gradients.dq_factor, dq.shape[1], 0.0)
        dq = sm90_finish_fp8.scale_and_rotate(
            dq,
            factor,
            inverse_rotation(spec),
            dtype=spec.dtype,
            sm_count=sm90.sm_count(),
            interpret=interpret,
        )
        return dq[:, : spec.query_length], dk, dv
    return fp8_quantize.finish_dq(dq[:, : spec.query_length], gradients, spec), dk, dv


def backward_sums(
    inputs: fp8.Inputs,
    gradients: fp8.Gradients,
    q_segment_ids: Array | None,
    kv_segment_ids: Array | None,
    spec: AttentionSpec,
    *,
    config: Fp8BackwardConfig | None = None,
    interpret: bool = False,
) -> tuple[Array, Array, Array]:
    """`fp8_backward` as its kernel leaves it: lengths are padded, and dq is the sums of dS' k'."""
    reason = _backward_unsupported_reason(spec)
    if reason is not None:
        raise NotImplementedError(f"precision='fp8' cannot be differentiated here: {reason}")
    config = config or Fp8BackwardConfig()
    plan = sm90_bwd_fp8_plan.Plan(spec=spec, config=config, interpret=interpret)
    operands = backward_operands(inputs, gradients, q_segment_ids, kv_segment_ids, plan)
    return sm90_bwd_fp8.launch(operands, plan=plan)


def inverse_rotation(spec: AttentionSpec) -> Array:
    """M^T."""
    return jnp.asarray(fp8.rotation(spec.head_dim).T, spec.dtype)


def backward_operands(
    inputs: fp8.Inputs,
    gradients: fp8.Gradients,
    q_segment_ids: Array | None,
    kv_segment_ids: Array | None,
    plan: sm90_bwd_fp8_plan.Plan,
) -> sm90_bwd_fp8_plan.Inputs:
    """Returns the argument of `sm90_bwd_fp8.launch`: padded, and with transposed copies."""
    length = plan.num_q_blocks * sm90_bwd_fp8_plan.BLOCK_Q
    key_length = plan.num_kv_tiles * sm90_bwd_fp8_plan.TILE_KV
    queries = functools.partial(_pad, length=length)
    keys = functools.partial(_pad, length=key_length)
    dout, q_t, dout_t, k_t = _backward_factors(inputs, gradients, plan)
    factor = fp8.rows_of(fp8.exponent_factor(inputs, plan.spec), plan.spec.query_length)
    rows = [
        pad_rows(gradients.offset, length, fp8.NO_ROW),
        pad_rows(gradients.delta, length, 0.0),
        pad_rows(factor, length, 0.0),
    ]
    first_key = _first_key(inputs, length)
    rows = jnp.stack(rows if first_key is None else [*rows, first_key], axis=2)
    rows = rows.reshape(*rows.shape[:3], -1, sm90_bwd_fp8_plan.BLOCK_Q).swapaxes(2, 3)
    scalars = sm90_bwd_fp8_plan.Scalars(
        inputs.k_scale,
        gradients.slope,
        gradients.dk_factor[..., None],
        gradients.dv_factor[..., None],
    )
    scalars = jnp.stack(jnp.broadcast_arrays(*scalars), axis=3)
    ids = None, None
    if q_segment_ids is not None and kv_segment_ids is not None:
        ids = sm90.pad_ids(q_segment_ids, length), sm90.pad_ids(kv_segment_ids, key_length)
    ranges = query_block_ranges(plan, *ids)
    return sm90_bwd_fp8_plan.Inputs(
        q=queries(inputs.q),
        k=keys(inputs.k),
        v=keys(inputs.v),
        dout=queries(dout),
        q_t=q_t,
        dout_t=dout_t,
        k_t=k_t,
        rows=rows,
        scalars=scalars,
        block_ranges=ranges,
        matrix=inverse_rotation(plan.spec) if plan.spec.fp8.rotate else None,
        q_ids=ids[0],
        kv_ids=ids[1],
        turns=turns_of(plan, ranges) if plan.takes_turns else None,
    )


def _first_key(inputs: fp8.Inputs, length: int) -> Array | None:
    """`Inputs.first_key`, padded."""
    first_key = inputs.first_key
    return None if first_key is None else pad_rows(first_key, length, 0.0)


def _backward_factors(
    inputs: fp8.Inputs, gradients: fp8.Gradients, plan: sm90_bwd_fp8_plan.Plan
) -> tuple[Array, Array, Array, Array]:
    """Returns dO by rows, and by columns q, dO and k."""
    source = gradients.source
    if plan.spec.fp8.quantize_implementation == "xla":
        length = plan.num_q_blocks * sm90_bwd_fp8_plan.BLOCK_Q
        key_length = plan.num_kv_tiles * sm90_bwd_fp8_plan.TILE_KV
        return (
            gradients.dout,
            _columns(gradients.q_rows, length, 16),
            _columns(gradients.dout_rows, length, 16),
            _columns(gradients.k_rows, key_length, 28),
        )
    run = functools.partial(sm90_columns_fp8.columns_and_rows, interpret=plan.interpret)
    q_t, _ = run(inputs.q, source.q_factor, dtype=fp8.E4M3, order=16)
    k_t, _ = run(inputs.k, source.k_factor, dtype=fp8.E4M3, order=28)
    dout_t, dout = run(
        source.dout,
        source.dout_rows_factor,
        dtype=gradients.dout.dtype,
        order=16,
        row_factor=source.dout_factor,
    )
    assert dout is not None, "asked for by row_factor"
    return dout, q_t, dout_t, k_t


def query_block_ranges(
    plan: sm90_bwd_fp8_plan.Plan, q_ids: Array | None, kv_ids: Array | None
) -> Array:
    """Returns which query blocks each tile of keys needs, as `sm90.block_ranges` does the reverse.

    Args:
      plan: of the backward.
      q_ids: `[B, padded T]`, int32, or None.
      kv_ids: `[B, padded S]`, int32, or None.

    Returns:
      `[B, num_kv_tiles, 4]`, int32, B = 1 without ids.
    """
    spec = plan.spec
    if q_ids is None or kv_ids is None:
        q_ids = jnp.zeros((1, plan.num_q_blocks * sm90_bwd_fp8_plan.BLOCK_Q), jnp.int32)
        kv_ids = jnp.zeros((1, plan.num_kv_tiles * sm90_bwd_fp8_plan.TILE_KV), jnp.int32)
    mirrored = dataclasses.replace(
        spec,
        band=Band(left=spec.band.right, right=spec.band.left),
        query_length=spec.key_length,
        key_length=spec.query_length,
    )
    ranges = sm90.block_ranges(
        kv_ids.reshape(kv_ids.shape[0], plan.num_kv_tiles, -1),
        q_ids.reshape(q_ids.shape[0], plan.num_q_blocks, -1),
        mirrored,
    )
    if spec.key_length % sm90_bwd_fp8_plan.TILE_KV == 0:
        return ranges
    # The last tile reaches beyond the keys: all its blocks are masked.
    return ranges.at[:, -1, 2:].set(plan.num_q_blocks)


def turns_of(plan: sm90_bwd_fp8_plan.Plan, ranges: Array) -> Array:
    """Returns how many tiles of smaller keys add to dQ of each block of queries before each tile.

    Args:
      plan: of the backward.
      ranges: of `query_block_ranges`.

    Returns:
      `[B or 1, num_kv_tiles, num_q_blocks]`, int32.
    """
    block = jnp.arange(plan.num_q_blocks, dtype=jnp.int32)
    adds = ((ranges[:, :, :1] <= block) & (block < ranges[:, :, 1:2])).astype(jnp.int32)
    return jnp.cumsum(adds, axis=1) - adds


def _backward_unsupported_reason(spec: AttentionSpec) -> str | None:
    """Returns why the FP8 backward kernel cannot run `spec`, or None if it can."""
    if spec.head_dim not in BACKWARD_HEAD_DIMS:
        return (
            f"q.shape[3]={spec.head_dim} is not one of {BACKWARD_HEAD_DIMS}; pass"
            " fp8_options=Fp8Options(backward='bf16')"
        )
    return None


def _columns(x: Array, length: int, order: sm90_columns_fp8.Order) -> Array:
    """Transposes 8-bit `[B, L, heads, H]` to `[B, heads, H, length]`, zero beyond L, by XLA."""
    permute = fp8.permute_16 if order == 16 else fp8.permute_28
    return permute(_pad(x, length).transpose(0, 2, 3, 1), 3)


def _pad(x: Array, length: int) -> Array:
    """Appends zeros to `[B, length, heads, H]`."""
    return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0)))


def pad_rows(x: Array, length: int, value: float) -> Array:
    """Appends `value` to `[B, N, length]`."""
    return jnp.pad(x, ((0, 0), (0, 0), (0, length - x.shape[2])), constant_values=value)


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
    """Implements `fp8_vjp.Kernels.bf16_backward`."""
    spec = dataclasses.replace(spec, precision="bf16")
    ids = q_segment_ids, kv_segment_ids
    return sm90.backward(q, k, v, *ids, *outputs, *gradients, spec)

"""The Pallas Mosaic GPU implementation for sm_90a: what it supports, padding, masks of blocks, and
gradients.

The kernels themselves are in `sm90_fwd_bf16` and `sm90_bwd_bf16`; how they cut their work is in
`tuning`.
"""

# Shapes: B batch, T query, S key, N query heads, K key/value heads, H head dim.

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import hardware
from pallas_kernels.flash_attention import (
    partition,
    sm90_bwd_bf16,
    sm90_bwd_plan,
    sm90_fwd_bf16,
    sm90_fwd_plan,
    tuning,
)
from pallas_kernels.flash_attention.config import (
    RESIDUAL_NAMES,
    AttentionSpec,
    BackwardConfig,
    ForwardConfig,
)
from pallas_kernels.flash_attention.masks import Band
from pallas_kernels.flash_attention.sm90_bwd_rows import row_operands
from pallas_kernels.mosaic import GMEM_ROWS

SUPPORTED_DTYPES = ("bfloat16", "float16")
SUPPORTED_HEAD_DIMS = (64, 128, 256)


def unsupported_reason(spec: AttentionSpec) -> str | None:
    """Returns why the kernel cannot run `spec` on the default device, or None if it can."""
    is_hopper, found = hardware.require_sm90()
    rules = (
        (is_hopper, f"the kernel is for Hopper, but {found}; use implementation='xla'"),
        (
            spec.precision == "bf16",
            f"precision={spec.precision!r} has no kernel yet; use precision='bf16'",
        ),
        (
            spec.dtype in SUPPORTED_DTYPES,
            f"q.dtype={spec.dtype} is not one of {SUPPORTED_DTYPES}; cast q, k and v",
        ),
        (
            spec.head_dim in SUPPORTED_HEAD_DIMS,
            f"q.shape[3]={spec.head_dim} is not one of {SUPPORTED_HEAD_DIMS}; pad the head dim or"
            " use implementation='cudnn'",
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
    """Computes out `[B, T, N, H]` and lse `[B, T, N]`, float32."""
    return _attention(q, k, v, q_segment_ids, kv_segment_ids, spec)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attention(q, k, v, q_segment_ids, kv_segment_ids, spec):
    arrays, layouts = [q, k, v], ["btnh", "bskh", "bskh"]
    _append_ids(arrays, layouts, q_segment_ids, kv_segment_ids)
    return partition.call(_forward, layouts, ("btnh", "btn"), arrays, spec)


def _attention_fwd(q, k, v, q_segment_ids, kv_segment_ids, spec):
    outputs = _attention(q, k, v, q_segment_ids, kv_segment_ids, spec)
    out, lse = map(checkpoint_name, outputs, RESIDUAL_NAMES)
    return (out, lse), (q, k, v, q_segment_ids, kv_segment_ids, out, lse)


def _attention_bwd(spec, residuals, gradients):
    q, k, v, q_segment_ids, kv_segment_ids, out, lse = residuals
    arrays = [q, k, v, out, lse, *gradients]
    layouts = ["btnh", "bskh", "bskh", "btnh", "btn", "btnh", "btn"]
    _append_ids(arrays, layouts, q_segment_ids, kv_segment_ids)
    results = partition.call(_backward, layouts, ("btnh", "bskh", "bskh"), arrays, spec)
    return *results, None, None


_attention.defvjp(_attention_fwd, _attention_bwd)


def _append_ids(
    arrays: list[Array],
    layouts: list[str],
    q_segment_ids: Array | None,
    kv_segment_ids: Array | None,
) -> None:
    """Appends the segment ids, if there are any, to the arguments of a partitioned call."""
    if q_segment_ids is not None and kv_segment_ids is not None:
        arrays += [q_segment_ids, kv_segment_ids]
        layouts += ["bt", "bs"]


def _forward(q, k, v, *ids_and_spec):
    """Computes out and lse `[B, T, N]` of one device."""
    *ids, spec = ids_and_spec
    q_ids, kv_ids = ids or (None, None)
    out, lse = forward(q, k, v, q_ids, kv_ids, spec)
    return out, lse[:, :, : spec.query_length].transpose(0, 2, 1)


def _backward(q, k, v, out, lse, dout, dlse, *ids_and_spec):
    """Computes dq, dk and dv of one device."""
    *ids, spec = ids_and_spec
    q_ids, kv_ids = ids or (None, None)
    return backward(q, k, v, q_ids, kv_ids, out, lse, dout, dlse, spec)


def forward(
    q: Array,
    k: Array,
    v: Array,
    q_segment_ids: Array | None,
    kv_segment_ids: Array | None,
    spec: AttentionSpec,
    *,
    config: ForwardConfig | None = None,
    interpret: bool = False,
) -> tuple[Array, Array]:
    """Runs the forward kernel.

    Args:
      q: `[B, T, N, H]`.
      k: `[B, S, K, H]`.
      v: like k.
      q_segment_ids: `[B, T]`, int32, or None.
      kv_segment_ids: `[B, S]`, int32, or None.
      spec: what to compute.
      config: how to cut the work; looked up if None.
      interpret: run in the CPU interpreter.

    Returns:
      Output `[B, T, N, H]`, and log-sum-exp `[B, N, T rounded up]`, float32.
    """
    plan = sm90_fwd_plan.Plan(
        spec=spec,
        config=config or tuning.forward_config(spec),
        sm_count=sm_count(),
        interpret=interpret,
    )
    segments = None
    if q_segment_ids is not None and kv_segment_ids is not None:
        segments = segment_operands(plan, q_segment_ids, kv_segment_ids)
    q, k, v = (pad_length(x) for x in (q, k, v))
    out, lse = sm90_fwd_bf16.launch(q, k, v, segments, plan=plan)
    return out[:, : spec.query_length], lse


def backward(
    q: Array,
    k: Array,
    v: Array,
    q_segment_ids: Array | None,
    kv_segment_ids: Array | None,
    out: Array,
    lse: Array,
    dout: Array,
    dlse: Array,
    spec: AttentionSpec,
    *,
    config: BackwardConfig | None = None,
    interpret: bool = False,
) -> tuple[Array, Array, Array]:
    """Runs the backward kernel.

    Args:
      q: `[B, T, N, H]`.
      k: `[B, S, K, H]`.
      v: like k.
      q_segment_ids: `[B, T]`, int32, or None.
      kv_segment_ids: `[B, S]`, int32, or None.
      out: the forward's output, like q.
      lse: the forward's log-sum-exp, `[B, T, N]`, float32.
      dout: gradient of out.
      dlse: gradient of lse.
      spec: what to compute.
      config: how to cut the work; looked up if None.
      interpret: run in the CPU interpreter.

    Returns:
      Gradients of q, k and v.
    """
    plan = sm90_bwd_plan.Plan(
        spec=spec,
        config=config or tuning.backward_config(spec),
        sm_count=sm_count(),
        interpret=interpret,
    )
    segments = ()
    if q_segment_ids is not None and kv_segment_ids is not None:
        segments = _backward_segment_operands(plan, q_segment_ids, kv_segment_ids)
    q, k, v, dout, out = (pad_length(x) for x in (q, k, v, dout, out))
    # Beyond the end as if no key were seen.
    padding = ((0, 0), (0, 0), (0, plan.padded_query_length - spec.query_length))
    lse = jnp.pad(lse.transpose(0, 2, 1), padding, constant_values=-jnp.inf)
    dlse = jnp.pad(dlse.transpose(0, 2, 1), padding)
    length, sms = plan.padded_query_length, plan.sm_count
    lse, delta, dq = row_operands(
        out, dout, lse, dlse, padded_length=length, sm_count=sms, interpret=interpret
    )
    dq, dk, dv = sm90_bwd_bf16.launch(q, k, v, dout, lse, delta, segments, dq, plan=plan)
    dq = (dq[:, : spec.query_length] * spec.softmax_scale).astype(q.dtype)
    return dq, dk[:, : spec.key_length], dv[:, : spec.key_length]


def pad_length(x: Array) -> Array:
    """Rounds the length of `[B, length, heads, H]` up to what TMA's tiles need; mostly a no-op."""
    padding = -x.shape[1] % GMEM_ROWS
    return jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) if padding else x


def sm_count() -> int:
    """Multiprocessors of the default device; those of an H200 if it is not in the table."""
    facts = hardware.gpu_facts(hardware.current_device_kind())
    return facts.sm_count if facts else 132


def segment_operands(
    plan: sm90_fwd_plan.Plan, q_segment_ids: Array, kv_segment_ids: Array
) -> tuple[Array, Array, Array]:
    """Pads the ids to whole tiles and works out which blocks each tile needs."""

    q_ids = pad_ids(q_segment_ids, plan.padded_query_length)
    kv_ids = pad_ids(kv_segment_ids, plan.padded_key_length)
    ranges = block_ranges(
        q_ids.reshape(q_ids.shape[0], plan.num_q_tiles, plan.tile_q),
        kv_ids.reshape(kv_ids.shape[0], plan.num_kv_blocks, plan.config.block_kv),
        plan.spec,
    )
    return q_ids, kv_ids, ranges


def pad_ids(ids: Array, length: int) -> Array:
    """Pads `[B, ...]`; repeating the last id adds no document to the last tile."""
    return jnp.pad(ids, ((0, 0), (0, length - ids.shape[1])), mode="edge")


def _backward_segment_operands(
    plan: sm90_bwd_plan.Plan, q_segment_ids: Array, kv_segment_ids: Array
) -> tuple[Array, ...]:
    """Pads the ids to whole tiles and works out which query blocks each tile of keys needs, and in
    which order tiles add to dQ.
    """
    q_ids = pad_ids(q_segment_ids, plan.padded_query_length)
    kv_ids = pad_ids(kv_segment_ids, plan.padded_key_length)
    spec, band = plan.spec, plan.spec.band
    mirrored = dataclasses.replace(
        spec,
        query_length=spec.key_length,
        key_length=spec.query_length,
        band=Band(left=band.right, right=band.left),
    )
    ranges = block_ranges(
        kv_ids.reshape(kv_ids.shape[0], plan.num_kv_tiles, plan.config.block_kv),
        q_ids.reshape(q_ids.shape[0], plan.num_q_blocks, plan.config.block_q),
        mirrored,
    )
    if not plan.takes_turns:
        return q_ids, kv_ids, ranges
    block = jnp.arange(plan.num_q_blocks, dtype=jnp.int32)
    adds = (ranges[:, :, :1] <= block) & (block < ranges[:, :, 1:2])
    adds = adds.astype(jnp.int32)
    return q_ids, kv_ids, ranges, jnp.cumsum(adds, axis=1) - adds


def block_ranges(q_ids: Array, kv_ids: Array, spec: AttentionSpec) -> Array:
    """Returns which key blocks each tile of queries needs.

    Args:
      q_ids: `[B, query tiles, queries of a tile]`, int32.
      kv_ids: `[B, key blocks, keys of a block]`, int32.
      spec: gives the band.

    Returns:
      `[B, query tiles, 4]`, int32: first and last + 1 of the blocks with a visible pair, then first
      and last + 1 of a run of blocks without a masked one.
    """
    may_see, sees_all = _band_of_blocks(q_ids.shape, kv_ids.shape, spec)
    q_min, q_max = q_ids.min(axis=2)[:, :, None], q_ids.max(axis=2)[:, :, None]
    kv_min, kv_max = kv_ids.min(axis=2)[:, None, :], kv_ids.max(axis=2)[:, None, :]
    # Ranges of ids that meet may hold an equal pair; ranges that do not cannot.
    needed = may_see & (q_min <= kv_max) & (kv_min <= q_max)
    whole = sees_all & (q_min == q_max) & (kv_min == kv_max) & (q_min == kv_min)
    index = jnp.arange(needed.shape[2], dtype=jnp.int32)
    num_blocks = needed.shape[2]
    start = jnp.min(jnp.where(needed, index, num_blocks - 1), axis=2)
    # A tile that sees no key still runs one block, all masked, which makes its output 0.
    stop = jnp.maximum(jnp.max(jnp.where(needed, index + 1, 0), axis=2), start + 1)
    full_start = jnp.min(jnp.where(whole, index, num_blocks), axis=2)
    after = ~whole & (index > full_start[:, :, None])
    full_stop = jnp.min(jnp.where(after, index, num_blocks), axis=2)
    return jnp.stack([start, stop, full_start, full_stop], axis=2).astype(jnp.int32)


def _band_of_blocks(
    q_shape: tuple[int, ...], kv_shape: tuple[int, ...], spec: AttentionSpec
) -> tuple[Array, Array]:
    """Returns for each pair of tile and block whether some pair, and whether every pair, is
    visible.
    """
    first_q = jnp.arange(q_shape[1], dtype=jnp.int32)[:, None] * q_shape[2]
    first_k = jnp.arange(kv_shape[1], dtype=jnp.int32)[None, :] * kv_shape[2]
    last_q, last_k = first_q + q_shape[2] - 1, first_k + kv_shape[2] - 1
    left = spec.band.left if spec.band.left is not None else spec.query_length
    right = spec.band.right if spec.band.right is not None else spec.key_length
    some = (first_k <= last_q + right) & (last_k >= first_q - left)
    every = (last_k <= first_q + right) & (first_k >= last_q - left)
    return some, every & (last_k < spec.key_length)

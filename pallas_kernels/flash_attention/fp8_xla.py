"""The products of `fp8` in plain JAX, on any device: the reference of the FP8 kernels, rounding for
rounding, in float32.

XLA may drop a conversion to 8 bits that is undone at once (`xla_allow_excess_precision`, on by
default), on some devices even behind an optimization barrier: it would then compute in float32. So
every rounding here is float32 arithmetic, `round_like`, and that of an operand is done once more.
"""

# Shapes: B batch, T query, S key, N query heads, K key/value heads, G = N // K, H head dim; in
# letters of einsum b t s n k g h.

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.flash_attention import fp8, fp8_quantize
from pallas_kernels.flash_attention.config import AttentionSpec
from pallas_kernels.flash_attention.fp8 import (
    BLOCK,
    E4M3,
    MAX_RISE,
    P_BITS,
    Gradients,
    Inputs,
    Statistics,
    exponent_factor,
    heads_last,
    round_like,
    rows_of,
    widen,
)
from pallas_kernels.flash_attention.masks import dense_mask
from pallas_kernels.reference import attention_reference

_F32 = jnp.float32
MAX_LOGITS_BYTES = 2**28
"""Float32 logits held at once; the backward holds about six such arrays."""
_MIN_CHUNK = 64


def quantize_inputs(q: Array, k: Array, v: Array, spec: AttentionSpec) -> Inputs:
    """Implements `fp8_vjp.Kernels.quantize_inputs`."""
    return fp8_quantize.quantize_inputs(q, k, v, spec)


def fp8_forward(
    inputs: Inputs,
    q_segment_ids: Array | None,
    kv_segment_ids: Array | None,
    spec: AttentionSpec,
) -> tuple[Array, Statistics]:
    """Implements `fp8_vjp.Kernels.fp8_forward`."""
    padding = -spec.key_length % BLOCK
    v = widen(inputs.v) * heads_last(rows_of(inputs.v_scale, spec.key_length))
    v = _heads_first(_pad(v, padding))

    def chunk(first: Array, q: Any, ids: Array | None) -> tuple[Array, Array, Array]:
        x = _masked_logits(inputs, q, first, ids, kv_segment_ids, spec)
        x = jnp.pad(x, ((0, 0),) * 4 + ((0, padding),), constant_values=-jnp.inf)
        x = x.reshape(*x.shape[:4], -1, BLOCK)
        local = x.max(axis=-1)
        running = lax.cummax(local, axis=local.ndim - 1, reverse=True)
        reference = jnp.maximum(local, running - MAX_RISE)
        total = running[..., :1]
        is_empty = total == -jnp.inf
        finite = jnp.where(reference == -jnp.inf, 0.0, reference)
        p = jnp.exp2(x - finite[..., None] + P_BITS)
        weight = jnp.where(is_empty, 0.0, jnp.exp2(reference - jnp.where(is_empty, 0.0, total)))
        row_sum = (p.sum(axis=-1) * weight).sum(axis=-1)
        p = round_like(p, E4M3) * weight[..., None]
        p = p.reshape(*p.shape[:4], -1)
        safe_sum = jnp.where(is_empty[..., 0], 1.0, row_sum)
        out = _dot("bkgts,bksh->bkgth", p, v) / safe_sum[..., None]
        lse2 = jnp.where(is_empty[..., 0], -jnp.inf, total[..., 0] + jnp.log2(safe_sum) - P_BITS)
        return _heads_last(out).astype(spec.dtype), _merge(lse2), _merge(total[..., 0])

    out, lse2, row_max = _over_chunks(chunk, spec, _queries(inputs, spec), q_segment_ids)
    return out, Statistics(lse2.transpose(0, 2, 1), row_max.transpose(0, 2, 1))


def fp8_backward(
    inputs: Inputs,
    gradients: Gradients,
    q_segment_ids: Array | None,
    kv_segment_ids: Array | None,
    spec: AttentionSpec,
) -> tuple[Array, Array, Array]:
    """Implements `fp8_vjp.Kernels.fp8_backward`."""
    k, v = (_heads_first(widen(x)) for x in (gradients.k_rows, inputs.v))
    slope = rows_of(gradients.slope, spec.key_length)[:, :, None, None, :]
    rows = [x.transpose(0, 2, 1) for x in (gradients.offset, gradients.delta)]

    def chunk(first: Array, operands: Any, ids: Array | None) -> tuple[Array, Array, Array]:
        q, dout, dout_rows, q_rows, offset, delta = operands
        dout, dout_rows, q_rows = (_group(widen(x), spec) for x in (dout, dout_rows, q_rows))
        offset, delta = (_group(x[..., None], spec) for x in (offset, delta))
        x = _masked_logits(inputs, q, first, ids, kv_segment_ids, spec)
        p = jnp.exp2(x - offset)
        ds = p * (_dot("bkgth,bksh->bkgts", dout, v) * slope - delta)
        # What is masked stays 0 even where the gradient is not finite.
        ds = jnp.where(x == -jnp.inf, 0.0, ds)
        p, ds = (round_like(x, E4M3) for x in (p, ds))
        dq = _dot("bkgts,bksh->bkgth", ds, k)
        dk = _dot("bkgts,bkgth->bksh", ds, q_rows)
        return _heads_last(dq), dk, _dot("bkgts,bkgth->bksh", p, dout_rows)

    factors = (gradients.dout, gradients.dout_rows, gradients.q_rows)
    operands = (_queries(inputs, spec), *factors, *rows)
    dq, dk, dv = _over_chunks(chunk, spec, operands, q_segment_ids, num_sums=2)
    dk, dv = (
        (x.transpose(0, 2, 1, 3) * factor[:, None, :, None]).astype(spec.dtype)
        for x, factor in ((dk, gradients.dk_factor), (dv, gradients.dv_factor))
    )
    dk = fp8.rotate(dk, inverse=True) if spec.fp8.rotate else dk
    return fp8_quantize.finish_dq(dq, gradients, spec), dk, dv


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
    """Implements `fp8_vjp.Kernels.bf16_backward`: the gradient in q's own precision."""
    del outputs  # recomputed

    def chunk(first: Array, operands: Any, ids: Array | None) -> tuple[Array, Array, Array]:
        q, dout, dlse = operands

        def run(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
            return attention_reference(
                q,
                k,
                v,
                softmax_scale=spec.softmax_scale,
                band=spec.band,
                q_segment_ids=ids,
                kv_segment_ids=kv_segment_ids,
                first_query_position=first,
            )

        dq, dk, dv = jax.vjp(run, q, k, v)[1]((dout, dlse))
        return dq, dk.astype(_F32), dv.astype(_F32)

    dq, dk, dv = _over_chunks(chunk, spec, (q, *gradients), q_segment_ids, num_sums=2)
    return dq, dk.astype(k.dtype), dv.astype(v.dtype)


def _queries(inputs: Inputs, spec: AttentionSpec) -> tuple[Array, Array, Array | None]:
    """q8, and for each row, `[B, T, N]`, the factor c / k_scale and `Inputs.first_key`."""
    factor = rows_of(exponent_factor(inputs, spec), spec.query_length).transpose(0, 2, 1)
    first_key = inputs.first_key
    return inputs.q, factor, None if first_key is None else first_key.transpose(0, 2, 1)


def _masked_logits(
    inputs: Inputs,
    queries: tuple[Array, Array, Array | None],
    first: Array,
    q_ids: Array | None,
    kv_ids: Array | None,
    spec: AttentionSpec,
) -> Array:
    """x of some queries, `[B, K, G, T, S]`, -inf where masked."""
    q, factor, first_key = queries
    s = _dot("bkgth,bksh->bkgts", _group(widen(q), spec), _heads_first(widen(inputs.k)))
    if first_key is not None:
        s = s.at[..., 0].set(_group(first_key[..., None], spec)[..., 0])
    s *= _group(factor[..., None], spec)
    s *= rows_of(inputs.k_scale, spec.key_length)[:, :, None, None, :]
    positions = jnp.arange(q.shape[1], dtype=jnp.int32) + first
    keys = jnp.arange(spec.key_length, dtype=jnp.int32)
    mask = dense_mask(spec.band, positions, keys, q_ids, kv_ids)
    return s if mask is None else jnp.where(mask[:, None, None], s, -jnp.inf)


def _over_chunks(
    run: Callable[..., tuple[Array, ...]],
    spec: AttentionSpec,
    operands: Any,
    ids: Array | None,
    num_sums: int = 0,
) -> tuple[Array, ...]:
    """Calls `run(first, operands, ids)` for chunks of the queries; joins its results, `[B, T,
    ...]`, except the last `num_sums`, which it adds.
    """
    rows = MAX_LOGITS_BYTES // (4 * spec.batch_size * spec.num_heads * spec.key_length)
    size = min(spec.query_length, max(_MIN_CHUNK, rows))
    if size == spec.query_length:
        return run(jnp.int32(0), operands, ids)
    count = -(-spec.query_length // size)
    padding = count * size - spec.query_length

    def split(x: Array) -> Array:
        x = _pad(x, padding)
        return jnp.moveaxis(x.reshape(x.shape[0], count, size, *x.shape[2:]), 1, 0)

    firsts = jnp.arange(count, dtype=jnp.int32) * size
    chunks = firsts, jax.tree.map(split, operands), None if ids is None else split(ids)
    shapes = jax.eval_shape(run, *jax.tree.map(lambda x: x[0], chunks))
    num_joined = len(shapes) - num_sums

    def step(sums: tuple[Array, ...], chunk: Any) -> tuple[Any, Any]:
        results = run(*chunk)
        added = results[num_joined:]
        return tuple(x + y for x, y in zip(sums, added, strict=True)), results[:num_joined]

    zeros = tuple(jnp.zeros(x.shape, x.dtype) for x in shapes[num_joined:])
    sums, parts = lax.scan(step, zeros, chunks)

    def join(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], count * size, *x.shape[3:])[:, : spec.query_length]

    return *(join(x) for x in parts), *sums


def _dot(equation: str, lhs: Array, rhs: Array) -> Array:
    return jnp.einsum(equation, lhs, rhs, precision=lax.Precision.HIGHEST)


def _pad(x: Array, rows: int) -> Array:
    """Appends zeros along axis 1."""
    return jnp.pad(x, ((0, 0), (0, rows)) + ((0, 0),) * (x.ndim - 2))


def _heads_first(x: Array) -> Array:
    """`[B, S, K, H]` to `[B, K, S, H]`."""
    return x.transpose(0, 2, 1, 3)


def _group(x: Array, spec: AttentionSpec) -> Array:
    """`[B, T, N, H]` to `[B, K, G, T, H]`."""
    x = x.reshape(*x.shape[:2], spec.num_kv_heads, -1, x.shape[3])
    return x.transpose(0, 2, 3, 1, 4)


def _heads_last(x: Array) -> Array:
    """`[B, K, G, T, H]` to `[B, T, N, H]`."""
    x = x.transpose(0, 3, 1, 2, 4)
    return x.reshape(*x.shape[:2], -1, x.shape[4])


def _merge(x: Array) -> Array:
    """`[B, K, G, T]` to `[B, T, N]`."""
    return x.transpose(0, 3, 1, 2).reshape(x.shape[0], x.shape[3], -1)

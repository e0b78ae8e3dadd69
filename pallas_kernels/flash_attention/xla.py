"""Attention by XLA alone, on any device: the reference, cut along T when its logits are large."""

# Shapes: B batch, T query, S key, N query heads, K key/value heads, H head dim.

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.flash_attention import fp8_vjp, fp8_xla
from pallas_kernels.flash_attention.config import RESIDUAL_NAMES, AttentionSpec
from pallas_kernels.reference import attention_reference

SUPPORTED_DTYPES = ("bfloat16", "float16", "float32")
MAX_LOGITS_BYTES = 2**30
"""Float32 logits held at once; larger problems are cut along T and recomputed in the backward."""
_MIN_CHUNK = 64  # Below this many query rows the matrix products waste the machine.


def unsupported_reason(spec: AttentionSpec) -> str | None:
    """Returns why this implementation cannot run `spec`, or None if it can."""
    if spec.precision == "int8":
        return f"precision={spec.precision!r} has no XLA implementation; use precision='bf16'"
    if spec.dtype not in SUPPORTED_DTYPES:
        return f"q.dtype={spec.dtype} is not one of {SUPPORTED_DTYPES}; cast q, k and v"
    return None


def query_chunk(spec: AttentionSpec) -> int:
    """Returns how many query rows are computed at once: T, unless that exceeds the bound."""
    bytes_per_row = 4 * spec.batch_size * spec.num_heads * spec.key_length
    rows = max(_MIN_CHUNK, MAX_LOGITS_BYTES // bytes_per_row)
    return min(spec.query_length, rows)


def attention(
    q: Array,
    k: Array,
    v: Array,
    q_segment_ids: Array | None,
    kv_segment_ids: Array | None,
    spec: AttentionSpec,
) -> tuple[Array, Array]:
    """Computes `(out, lse)` as `attention_reference` does, holding a chunk of the logits; in FP8 as
    `fp8` does.
    """
    out, lse = _attention(q, k, v, q_segment_ids, kv_segment_ids, spec)
    # The layer after this one needs `out` in its backward, whoever made it.
    return checkpoint_name(out, RESIDUAL_NAMES[0]), lse


def _attention(
    q: Array,
    k: Array,
    v: Array,
    q_segment_ids: Array | None,
    kv_segment_ids: Array | None,
    spec: AttentionSpec,
) -> tuple[Array, Array]:
    if spec.precision == "fp8":
        return fp8_vjp.attention(q, k, v, q_segment_ids, kv_segment_ids, spec, fp8_xla)
    run = functools.partial(attention_reference, softmax_scale=spec.softmax_scale, band=spec.band)
    chunk = query_chunk(spec)
    if chunk == spec.query_length:
        return run(q, k, v, q_segment_ids=q_segment_ids, kv_segment_ids=kv_segment_ids)
    num_chunks = -(-spec.query_length // chunk)
    padding = num_chunks * chunk - spec.query_length

    @jax.checkpoint
    def run_chunk(first: Array, q_chunk: Array, ids_chunk: Array | None) -> tuple[Array, Array]:
        return run(
            q_chunk,
            k,
            v,
            q_segment_ids=ids_chunk,
            kv_segment_ids=kv_segment_ids,
            first_query_position=first,
        )

    def split(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], num_chunks, chunk, *x.shape[2:]), 1, 0)

    def join(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, 1).reshape(x.shape[1], num_chunks * chunk, *x.shape[3:])
        return x[:, : spec.query_length]

    firsts = jnp.arange(num_chunks, dtype=jnp.int32) * chunk
    ids = None if q_segment_ids is None else split(q_segment_ids)
    out, lse = lax.map(lambda args: run_chunk(*args), (firsts, split(q), ids))
    return join(out), join(lse)

"""Embedding lookup whose gradient is bitwise repeatable on a GPU.

The gradient sums, for every vocabulary row, the output gradients of the tokens that took it. As a
scatter-add a GPU does that with atomics, in an order that changes from run to run; XLA's own
repeatable scatter sorts every element. Here only the token ids are sorted:

    order      = argsort(ids)                                  equal ids are now neighbours
    partial    = onehot(segment within a chunk of 128) . grad  one small GEMM per chunk
    first/last = the segments that may go on in another chunk, summed over the chunks by one GEMM
    table[id]  = each sum                                      a scatter with unique indices

All products are with 0 or 1, so the sums are those of float32 accumulation.

Shapes: M tokens, D hidden, V vocabulary, C chunks, S positions of a chunk.
"""

import functools

import jax
import jax.numpy as jnp

_CHUNK = 128


def embed(
    table: jax.Array, ids: jax.Array, dtype: jax.typing.DTypeLike, *, multiplier: float = 1.0
) -> jax.Array:
    """Rows of `table` times `multiplier`, rounded once.

    Args:
      table: float32 [V, D].
      ids: int32 of any shape, in [0, V).
      dtype: of the result; the gradient arrives in it.
      multiplier: of the rows.

    Returns: `dtype` [*ids.shape, D].
    """
    return _embed(table, ids, jnp.dtype(dtype), multiplier)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _embed(table, ids, dtype, multiplier):
    return (jnp.take(table, ids, axis=0) * multiplier).astype(dtype)


def _embed_fwd(table, ids, dtype, multiplier):
    # An array without elements carries the number of rows.
    return _embed(table, ids, dtype, multiplier), (ids, table[:, :0])


def _embed_bwd(dtype, multiplier, residuals, grad):
    del dtype
    ids, rows = residuals
    grads = sum_rows(grad.reshape(-1, grad.shape[-1]), ids.reshape(-1), len(rows))
    return multiplier * grads, None


_embed.defvjp(_embed_fwd, _embed_bwd)


def sum_rows(values: jax.Array, ids: jax.Array, count: int) -> jax.Array:
    """For every id, the sum of the rows of `values` with it, in a fixed order.

    Args:
      values: [M, D], bfloat16 or float32.
      ids: int32 [M], in [0, count).
      count: V.

    Returns: float32 [V, D]; rows of ids that do not occur are zero.
    """
    padding = -len(ids) % _CHUNK
    # Padding sorts last and is dropped by the scatter, as its id is out of range.
    ids = jnp.pad(ids, (0, padding), constant_values=count)
    order = jnp.argsort(ids, stable=True)
    ids = ids[order].reshape(-1, _CHUNK)
    values = jnp.pad(values, ((0, padding), (0, 0)))[order].reshape(*ids.shape, -1)

    starts = jnp.diff(ids, axis=1, prepend=ids[:, :1]) != 0
    segment = jnp.cumsum(starts, axis=1)  # [C, S], from 0
    position = jnp.arange(_CHUNK)
    onehot = (segment[:, None, :] == position[:, None]).astype(values.dtype)
    partial = jnp.einsum(
        "cis,csd->cid",
        onehot,
        values,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    # Segment i of a chunk has the id of its first token; segments that do not exist are dropped.
    segment_ids = jnp.max(jnp.where(segment[:, None, :] == position[:, None], ids[:, None], -1), 2)
    last = segment[:, -1:]
    is_edge = (position == 0) | (position == last)
    inner_ids = jnp.where(is_edge | (position > last), count, segment_ids)

    edge_ids = jnp.concatenate([segment_ids[:, 0], ids[:, -1]])
    one_segment = last[:, 0] == 0  # first and last are the same: count it once
    edge_ids = edge_ids.at[len(ids) :].set(jnp.where(one_segment, count, ids[:, -1]))
    last_sums = jnp.take_along_axis(partial, last[..., None], axis=1)[:, 0]
    edges = jnp.concatenate([partial[:, 0], last_sums])
    same = edge_ids[:, None] == edge_ids[None, :]
    sums = jnp.dot(same.astype(jnp.float32), edges, precision=jax.lax.Precision.HIGHEST)
    is_leader = jnp.argmax(same, axis=1) == jnp.arange(len(edge_ids))
    edge_ids = jnp.where(is_leader, edge_ids, count)

    # One scatter of all sums. The dropped ones need different ids too, for the promise to hold.
    all_ids = jnp.concatenate([inner_ids.reshape(-1), edge_ids])
    all_ids = jnp.where(all_ids < count, all_ids, count + jnp.arange(len(all_ids)))
    all_sums = jnp.concatenate([partial.reshape(-1, partial.shape[-1]), sums])
    table = jnp.zeros((count, values.shape[-1]), jnp.float32)
    return table.at[all_ids].set(all_sums, mode="drop", unique_indices=True)

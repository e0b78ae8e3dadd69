"""Attention written out in plain JAX: the oracle of every kernel, and the implementation that runs
on any device.

One function serves as both. Given float32 inputs it is the oracle; given bfloat16 inputs it is the
same-precision twin, which rounds where a flash kernel rounds (the probabilities, before they meet
V) and nowhere else. A kernel is right if its error against the oracle is at most twice the twin's
(the rule of FlashAttention's own tests).
"""

# Shapes: B batch, T query, S key, N query heads, K key/value heads, G = N // K, H head dim.

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.flash_attention.masks import Band, dense_mask

_F32 = jnp.float32


def attention_reference(
    q: Array,
    k: Array,
    v: Array,
    *,
    softmax_scale: float,
    band: Band = Band(),  # noqa: B008  (frozen)
    q_segment_ids: Array | None = None,
    kv_segment_ids: Array | None = None,
    first_query_position: Array | int = 0,
) -> tuple[Array, Array]:
    """Computes softmax(softmax_scale * q k^T + mask) v and the log-sum-exp of the logits;
    differentiable.

    Logits, softmax and accumulation are float32. A query that sees no key gets output 0,
    log-sum-exp -inf and zero gradients. What stands at a masked key never reaches an output, not
    even a NaN; a non-finite q, k or v that *is* seen makes all channels of that output NaN.

    Args:
      q: `[B, T, N, H]`, float32, bfloat16 or float16.
      k: `[B, S, K, H]`, same dtype; N is a multiple of K.
      v: like k.
      softmax_scale: factor on the logits.
      band: causal and window mask.
      q_segment_ids: `[B, T]`, int32, or None; a query sees the keys of its own segment.
      kv_segment_ids: `[B, S]`, int32, or None.
      first_query_position: position of q[:, 0] in its sequence, for a caller that cuts q into
        chunks.

    Returns:
      Output `[B, T, N, H]` in q's dtype, and natural-log log-sum-exp `[B, T, N]`, float32.
    """
    batch, t, n, h = q.shape
    s, num_kv_heads = k.shape[1:3]
    group = n // num_kv_heads
    mask = dense_mask(
        band,
        jnp.arange(t, dtype=jnp.int32) + first_query_position,
        jnp.arange(s, dtype=jnp.int32),
        q_segment_ids,
        kv_segment_ids,
    )
    q, q_is_bad = _finite(q)
    k, k_is_bad = _finite(k)
    v, v_is_bad = _finite(v)
    # All heads of a group share one matrix product with their K and V: [B, K, G * T, H] x [B, K, S,
    # H].
    q_rows = q.reshape(batch, t, num_kv_heads, group, h).transpose(0, 2, 3, 1, 4)
    q_rows = q_rows.reshape(batch, num_kv_heads, group * t, h)
    logits = _dot("bkth,bksh->bkts", q_rows, k.transpose(0, 2, 1, 3)) * softmax_scale
    logits = logits.reshape(batch, num_kv_heads, group, t, s)
    if mask is not None:
        logits = jnp.where(mask[:, None, None], logits, -jnp.inf)
    row_max = lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    row_max = jnp.where(row_max == -jnp.inf, 0.0, row_max)
    p = jnp.exp(logits - row_max)
    row_sum = p.sum(axis=-1, keepdims=True)
    is_empty = row_sum == 0.0
    row_sum = jnp.where(is_empty, 1.0, row_sum)
    p = p.astype(v.dtype).reshape(batch, num_kv_heads, group * t, s)
    out = _dot("bkts,bksh->bkth", p, v.transpose(0, 2, 1, 3))
    out = out.reshape(batch, num_kv_heads, group, t, h) / row_sum
    lse = jnp.where(is_empty, -jnp.inf, row_max + jnp.log(row_sum))[..., 0]
    out = out.transpose(0, 3, 1, 2, 4).reshape(batch, t, n, h)
    lse = lse.transpose(0, 3, 1, 2).reshape(batch, t, n)
    sees_bad_key = _sees_any(k_is_bad, mask, group)
    lse_is_nan = (q_is_bad | sees_bad_key) & (lse > -jnp.inf)
    out_is_nan = (lse_is_nan | _sees_any(v_is_bad, mask, group)) & (lse > -jnp.inf)
    # A product, not a select, so that the gradients of such an output are NaN too.
    lse = jnp.where(lse_is_nan, jnp.nan, 1.0) * lse
    out = jnp.where(out_is_nan, jnp.nan, 1.0)[..., None] * out
    return out.astype(q.dtype), lse


def _dot(equation: str, lhs: Array, rhs: Array) -> Array:
    """Contracts in the inputs' dtype with float32 accumulation; float32 inputs are not rounded to
    TF32.
    """
    precision = lax.Precision.HIGHEST if lhs.dtype == _F32 else None
    return jnp.einsum(equation, lhs, rhs, preferred_element_type=_F32, precision=precision)


def _finite(x: Array) -> tuple[Array, Array]:
    """Replaces non-finite elements by 0 and tells which heads of which rows had one, `[B, T or S, N
    or K]`.
    """
    is_finite = jnp.isfinite(x)
    return jnp.where(is_finite, x, 0), ~is_finite.all(axis=-1)


def _sees_any(is_bad: Array, mask: Array | None, group: int) -> Array:
    """Tells which queries see a marked key: `[B, S, K]` and mask `[1 or B, T, S]` to `[B, T or 1,
    N]`, bool.
    """
    if mask is None:
        sees = is_bad.any(axis=1, keepdims=True)
    else:
        sees = jnp.matmul(mask.astype(_F32), is_bad.astype(_F32)) > 0
    return jnp.repeat(sees, group, axis=-1)

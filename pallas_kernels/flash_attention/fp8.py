"""Attention with 8-bit factors: what is rounded where; every implementation follows this.

A tensor x is held as x ~= q * scale, q in float8 (E4M3 unless said otherwise) and scale a power of
two for each block of BLOCK = 128 rows of a head, so that who reads a block once can quantise it. A
power of two changes no bit of the significand: finer scales would only move the point where numbers
underflow, 15 binades below the largest.

Inputs    k' = k - m,  q8 ~ (q M) / sq,  k8 ~ (k' M) / sk,  v8 ~ v / sv, a scale for each block;
  M is a Hadamard matrix with random signs, M M^T = H, and m near the mean key (any m does).
  c = softmax_scale / H * log2(e) * sq * sk
Forward, over blocks j of keys from the last to the first, x_ij = c q8_i . k8_j:
  u = max(u, rowmax_j(x)),  r_j = max(rowmax_j(x), u - MAX_RISE)   the block's own maximum
  P = exp2(x - r_j + P_BITS), rounded to E4M3 for P v8,   l += rowsum(P) before that rounding
  but x_i0 = c H q_i . k'_0 / (sq sk): where the first key is an attention sink, no other key's
  errors average out those of its logit
  O and l are kept relative to r_j, O also to sv_j: * exp2(r_{j+1} - r_j) from a block to the next
  out = O / l,   lse2 = r + log2(l) - P_BITS,   lse = lse2 ln 2 + softmax_scale q . m
The block's own maximum lets P use the full range of E4M3 in every block, so that one key with a
huge logit (an attention sink) does not flush the others to zero.
Backward, all normalisers powers of two (integers E, R for each row, t, g, z for each head):
  E = floor(lse2 - u),  2^R >= (|dO| max_j |v_j| + |dlse|) 256 / 448,  g <= 256 max_j |v_j|
  dO8 ~ dO 2^-R g,  D = rowsum(dO8 * out) 2^R / g - dlse  from what the products take
  P' = exp2(x - lse2 + E + P_BITS) in [0, 256],   dS' = P' (sv/g dO8 . v8 - D 2^-R) <= 448 or so
  dV = z 2^-P_BITS P'^T (dO 2^-E / z),   dK = softmax_scale 2^(t - P_BITS) dS'^T (q 2^(R - E - t))
  dQ = softmax_scale 2^(R - E - P_BITS) dS' k'
  with P', dS' and all factors rounded to 8 bits; bounds of P', dS' and dO8 are known ahead
  dq = dQ M^T + softmax_scale dlse m,   dk = dK M^T;  D contains dlse already

A NaN or infinity in q, k or v makes NaN of everything that shares its scale, masked or not.
(Hadamard: Tseng et al. 2024, arXiv:2402.04396; key mean: Zhang et al. 2024, arXiv:2410.02367.)
"""

# Shapes: B batch, T query, S key, N query heads, K key/value heads, G = N // K, H head dim.

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from pallas_kernels.flash_attention.config import AttentionSpec
from pallas_kernels.numerics import E4M3_MAX, LOG2E

E4M3 = jnp.float8_e4m3fn
E5M2 = jnp.float8_e5m2
BLOCK = 128
"""Rows that share a scale, and keys that share a reference maximum."""
P_BITS = 8
"""Probabilities are scaled by 2**P_BITS, to just below the largest E4M3 number."""
MAX_RISE = 40.0
"""Bits by which a block's reference maximum may lie below the running one: bounds the sums."""
NO_ROW = 1e30
"""Stands for lse2 of a row that sees no key: exp2(x - NO_ROW) is 0."""
MIN_SCALE_EXPONENT = -40
MIN_SCALE = 2.0**MIN_SCALE_EXPONENT
"""Smallest scale of a block: bounds the ratio of two, by which the forward multiplies."""
E4M3_EXPONENT, E5M2_EXPONENT = 8, 15
"""The largest numbers are 1.75 * 2**8 and 1.75 * 2**15."""
SCALE_CARRY = 0x1FFFFF
"""Added to the bits of a float32, it raises the exponent if the significand is more than 1.75."""

_F32 = jnp.float32


class Inputs(NamedTuple):
    """q, k and v in 8 bits, with what belongs to them; L / BLOCK is rounded up."""

    q: Array  # [B, T, N, H], E4M3: q M / q_scale
    k: Array  # [B, S, K, H], E4M3: (k - key_mean) M / k_scale
    v: Array  # [B, S, K, H], E4M3
    q_scale: Array  # [B, N, T / BLOCK], float32, powers of two
    k_scale: Array  # [B, K, S / BLOCK]
    v_scale: Array  # [B, K, S / BLOCK]
    v_norm: Array  # [B, K], float32: largest Euclidean length of a row of v
    key_mean: Array | None  # [B, K, H], float32: m
    first_key: Array | None = None  # [B, N, T], float32: for q8 . k8 of key 0
    v_columns: Array | None = None  # [B, K, H, S or more]: v transposed, if the kernel made it


class Statistics(NamedTuple):
    """The forward's softmax, base 2, of the logits that it computed."""

    lse2: Array  # [B, N, T], float32: log2 of the sum of exp2(x)
    row_max: Array  # [B, N, T], float32: u, the largest x


class Source(NamedTuple):
    """What the 8-bit factors of `Gradients` are made of, for who makes them in one pass."""

    dout: Array  # [B, T, N, H], spec.dtype
    dout_factor: Array  # [B, N, T], float32: Gradients.dout is dout times this
    dout_rows_factor: Array  # [B, N, T], float32: Gradients.dout_rows is dout times this
    q_factor: Array  # [B, N, T], float32: Gradients.q_rows is Inputs.q times this
    k_factor: Array  # [B, K, S], float32: Gradients.k_rows is Inputs.k times this


class Gradients(NamedTuple):
    """What the backward kernels multiply, beside `Inputs`."""

    dout: Array  # [B, T, N, H], 8 bits: dO 2^-R g
    dout_rows: Array  # [B, T, N, H], 8 bits: dO 2^-E / z
    q_rows: Array  # [B, T, N, H], E4M3: q 2^(R - E - t)
    k_rows: Array  # [B, S, K, H], E4M3: k' by one scale for the head
    offset: Array  # [B, N, T], float32: lse2 - E - P_BITS, so that P' = exp2(x - offset)
    delta: Array  # [B, N, T], float32: D 2^-R
    slope: Array  # [B, K, S / BLOCK], float32: dS' = P' (slope (dout . v) - delta)
    dq_factor: Array  # [B, N, T], float32: the sums times these are dQ, dK, dV
    dk_factor: Array  # [B, K], float32
    dv_factor: Array  # [B, K], float32
    source: Source


def logits_scale(spec: AttentionSpec) -> float:
    """The factor on the product of the rotated q and k: softmax_scale without M's own growth."""
    return spec.softmax_scale / (spec.head_dim if spec.fp8.rotate else 1)


def exponent_factor(inputs: Inputs, spec: AttentionSpec) -> Array:
    """c / k_scale, `[B, N, T / BLOCK]`."""
    return (logits_scale(spec) * LOG2E) * inputs.q_scale


def scale_of(amax: Array, largest: float, smallest: float = 2.0**-126) -> Array:
    """The smallest power of two, from `smallest` on, with amax / scale <= largest; NaN if amax is
    not finite. `largest` is that of E4M3 or E5M2.
    """
    bits = lax.bitcast_convert_type(amax.astype(_F32), jnp.int32) + SCALE_CARRY
    top = E4M3_EXPONENT if largest == E4M3_MAX else E5M2_EXPONENT
    exponent = lax.shift_right_logical(bits, jnp.int32(23)) - 127 - top
    scale = jnp.maximum(pow2(exponent), smallest)
    return jnp.where(amax < jnp.inf, scale, jnp.nan)


def to_8_bits(
    x: Array, scale: Array | float, dtype: jnp.dtype | type = E4M3, largest: float = E4M3_MAX
) -> Array:
    """Rounds x / scale to the nearest 8-bit number, ties to even; saturates."""
    scaled = x.astype(_F32) * (1.0 / scale)
    return jnp.clip(scaled, -largest, largest).astype(dtype)


def blocks_of(x: Array) -> Array:
    """Cuts `[B, length, heads, H]` to `[B, blocks, BLOCK, heads, H]`, zero in the padding."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % BLOCK), (0, 0), (0, 0)))
    return x.reshape(x.shape[0], -1, BLOCK, *x.shape[2:])


def rows_of(scale: Array, length: int) -> Array:
    """Repeats the numbers of blocks, `[B, heads, blocks]`, for their rows: `[B, heads, length]`."""
    return jnp.repeat(scale, BLOCK, axis=2)[:, :, :length]


def heads_last(x: Array) -> Array:
    """Gives `[B, heads, length]` the axes of a tensor: `[B, length, heads, 1]`."""
    return x.transpose(0, 2, 1)[..., None]


def dot_with_mean(q: Array, key_mean: Array) -> Array:
    """q . mean(k), `[B, T, N]`, float32."""
    mean = jnp.repeat(key_mean, q.shape[2] // key_mean.shape[1], axis=1)
    return jnp.einsum("btnh,bnh->btn", q.astype(_F32), mean, precision=lax.Precision.HIGHEST)


@functools.cache
def rotation(head_dim: int) -> np.ndarray:
    """M: Sylvester's Hadamard matrix with random row signs, `[H, H]`, entries +-1, M M^T = H.

    The signs are the same in every run.
    """
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < head_dim:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    assert len(matrix) == head_dim, f"{head_dim=} is no power of two"
    return np.sign(np.random.default_rng(0).random((head_dim, 1), np.float32) - 0.5) * matrix


def rotate(x: Array, *, inverse: bool = False) -> Array:
    """x M, or x M^T, of `[..., H]`, in x's dtype."""
    matrix = jnp.asarray(rotation(x.shape[-1]), x.dtype)
    return lax.dot_general(
        x,
        matrix,
        (((x.ndim - 1,), (1 if inverse else 0,)), ((), ())),
        precision=lax.Precision.HIGHEST if x.dtype == _F32 else None,
        preferred_element_type=x.dtype,
    )


def round_like(x: Array, dtype: Any) -> Array:
    """Rounds float32 to the nearest number of an 8-bit `dtype`, ties to even; saturates."""
    info = jnp.finfo(dtype)
    x = jnp.clip(x, -float(info.max), float(info.max))
    normal = lax.reduce_precision(x, 8, info.nmant)
    unit = float(info.smallest_subnormal)
    subnormal = jnp.round(x * (1 / unit)) * unit
    return jnp.where(jnp.abs(x) < float(info.tiny), subnormal, normal)


def widen(x: Array) -> Array:
    """Converts 8 bits to float32; rounds again, in case that XLA dropped the first time."""
    return round_like(x.astype(_F32), x.dtype)


def permute_16(x: Array, axis: int) -> Array:
    """Puts element 8a + 2t + b of every 16 at position 4t + 2a + b: the order in which the
    registers of an accumulator are the registers of an 8-bit operand.
    """
    axis %= x.ndim
    split = x.reshape(*x.shape[:axis], -1, 2, 4, 2, *x.shape[axis + 1 :])
    return jnp.swapaxes(split, axis + 1, axis + 2).reshape(x.shape)


def permute_28(x: Array, axis: int) -> Array:
    """Puts element 8a + g of every 16 at position 2g + a: the order in which pairs of rows 8 apart
    are stored as 16-bit units.
    """
    axis %= x.ndim
    split = x.reshape(*x.shape[:axis], -1, 2, 8, *x.shape[axis + 1 :])
    return jnp.swapaxes(split, axis + 1, axis + 2).reshape(x.shape)


def pow2(exponent: Array) -> Array:
    """2**exponent of whole numbers, exactly, as `jnp.exp2` may not be; clipped to -126..127."""
    biased = jnp.clip(exponent, -126, 127).astype(jnp.int32) + 127
    return lax.bitcast_convert_type(biased << 23, _F32)


def ceil_log2(x: Array) -> Array:
    """ceil(log2 x) of positive numbers, exactly."""
    mantissa, exponent = jnp.frexp(x)
    return jnp.where(mantissa == 0.5, exponent - 1, exponent).astype(_F32)

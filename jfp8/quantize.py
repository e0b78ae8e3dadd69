"""Casting a tensor to 8 bits and back, and observing what the cast needs."""

import math

import jax
import jax.numpy as jnp
from jax import lax

from jfp8.formats import Format
from jfp8.scaling import BINS, EXPONENT_MIN, EXPONENTS, NONFINITE, power_of_two, scale_exponent

_INFINITY_BITS = 0x7F800000
# Rows are reduced in this many groups, so that each device of a sharded tensor reduces its own groups alone.
_MAX_ROW_GROUPS = 128
_SAMPLE_STRIDE = 16


def quantize(x: jax.Array, scale: jax.Array, format: Format) -> jax.Array:
    """Rounds x / scale to the nearest value of an 8-bit format, clipped to its largest value.

    Args:
      x: float32 or bfloat16 of any shape.
      scale: float32 `()`, a power of two, so that the division is exact.
      format: of the result.

    Returns: `format.dtype`, shape of `x`. An infinity or a NaN of `x` becomes NaN: clipping would hide it.
    """
    scaled = x.astype(jnp.float32) * (1 / scale)
    clipped = jnp.clip(scaled, -format.max_value, format.max_value)
    return jnp.where(jnp.isfinite(x), clipped, jnp.nan).astype(format.dtype)


def dequantize(q: jax.Array, scale: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """q * scale in `dtype`; the inverse of `quantize` up to its rounding."""
    return (q.astype(jnp.float32) * scale).astype(dtype)


def group_amax_bits(x: jax.Array) -> jax.Array:
    """The bits of the amax of each group of rows.

    As integers the bits of non-negative floats sort like the floats, subnormals included, with infinity and NaN on
    top: one integer maximum finds both the amax and the non-finite values.

    Args:
      x: `[rows, columns]`, float32 or bfloat16.

    Returns: int32 `[groups]`; groups divides rows.
    """
    groups = math.gcd(x.shape[0], _MAX_ROW_GROUPS)
    magnitude = lax.bitcast_convert_type(jnp.abs(x.astype(jnp.float32)), jnp.int32)
    return magnitude.reshape(groups, -1, x.shape[1]).max(axis=(1, 2))


def current_scale(amax_bits: jax.Array, format: Format) -> jax.Array:
    """The smallest power-of-two scale that holds the tensor; 1 for an all-zero or non-finite one. float32 `()`."""
    amax_bits = amax_bits.max()
    exponent = scale_exponent(amax_bits, format)
    usable = (amax_bits > 0) & (amax_bits < _INFINITY_BITS)
    return power_of_two(jnp.where(usable, exponent, 0))


def observe(x: jax.Array, amax_bits: jax.Array, scale: jax.Array, format: Format) -> jax.Array:
    """The observation of a tensor that is quantised with `scale`; see `jfp8.scaling`.

    Every group of rows contributes a one-hot and its counters, and the sum over the groups comes last: for a sharded
    tensor XLA then needs one all-reduce of sums per observation, which it can merge with those of the gradients.

    Args:
      x: `[rows, columns]`.
      amax_bits: `group_amax_bits(x)`.
      scale: float32 `()`.
      format: that `x` is quantised to.

    Returns: float32 `[BINS]`. Saturation and underflow are counted on every 16th row, or on all rows of a tensor
      with fewer than 16 rows per group.
    """
    groups = amax_bits.shape[0]
    exponent_bin = scale_exponent(amax_bits, format) - EXPONENT_MIN
    bin_index = jnp.where(amax_bits >= _INFINITY_BITS, NONFINITE, exponent_bin)
    bin_index = jnp.where(amax_bits > 0, bin_index, -1)  # an all-zero tensor needs no scale
    one_hot = bin_index[:, None] == jnp.arange(EXPONENTS + 1)
    rows = x.reshape(groups, -1, x.shape[1])
    stride = _SAMPLE_STRIDE if rows.shape[1] >= _SAMPLE_STRIDE else 1
    sample = rows[:, ::stride]
    magnitude = jnp.abs(sample.astype(jnp.float32)) * (1 / scale)
    count = lambda where: jnp.sum(where, axis=(1, 2), dtype=jnp.float32)[:, None]
    counters = [
        count(magnitude > format.max_value),
        # Half the smallest subnormal is a tie, which rounds to even: to zero.
        count((magnitude <= format.min_subnormal / 2) & (sample != 0)),
        jnp.full((groups, 1), sample.shape[1] * sample.shape[2], jnp.float32),
    ]
    observation = jnp.concatenate([one_hot.astype(jnp.float32), *counters], axis=1).sum(axis=0)
    assert observation.shape == (BINS,)
    return observation

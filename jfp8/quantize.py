"""Casting a tensor to 8 bits and back, and the statistics that say which scale it needs."""

import math

import jax
import jax.numpy as jnp
from jax import lax

from jfp8.formats import Format
from jfp8.scaling import (
    BINS,
    EXPONENT_MIN,
    EXPONENTS,
    INFINITY_BITS,
    NONFINITE,
    power_of_two,
    scale_exponent,
)

GROUPS = 128
"""Rows are reduced in up to this many groups, so that each device of a sharded tensor reduces its
own groups alone and the sum over the groups is the only thing that crosses devices."""


def quantize(x: jax.Array, scale: jax.Array, format: Format) -> jax.Array:
    """Rounds x / scale to the nearest value of an 8-bit format, clipped to its largest value.

    Args:
      x: float32 or bfloat16 of any shape.
      scale: float32 `()`, a power of two, so that the division is exact.
      format: of the result.

    Returns: `format.dtype`, shape of `x`. An infinity or a NaN becomes NaN: clipping would hide it.
    """
    scaled = x.astype(jnp.float32) * (1 / scale)
    clipped = jnp.clip(scaled, -format.max_value, format.max_value)
    # inf - inf is NaN. A select on isfinite would say the same, but XLA then transposes its
    # predicate in a pass of its own where the transpose of the result is wanted.
    return (clipped + (scaled - scaled)).astype(format.dtype)


def dequantize(q: jax.Array, scale: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """q * scale in `dtype`; the inverse of `quantize` up to its rounding."""
    return (q.astype(jnp.float32) * scale).astype(dtype)


def group_amax_bits(x: jax.Array) -> jax.Array:
    """The bits of the amax of each group of rows.

    As integers the bits of non-negative floats sort like the floats, subnormals included, with
    infinity and NaN on top: one integer maximum finds the amax and the non-finite values.

    Args:
      x: `[rows, columns]`, float32 or bfloat16.

    Returns: int32 `[groups]`; groups is the largest power of two up to 128 that divides rows.
    """
    magnitude = lax.bitcast_convert_type(jnp.abs(x.astype(jnp.float32)), jnp.int32)
    return _grouped(magnitude).max(axis=(1, 2))


def _grouped(x: jax.Array) -> jax.Array:
    return x.reshape(math.gcd(x.shape[0], GROUPS), -1, x.shape[1])


def current_scale(amax_bits: jax.Array, format: Format) -> jax.Array:
    """The smallest power-of-two scale that holds a tensor.

    Args:
      amax_bits: int32 of any shape, the bits of the amax of its parts.
      format: that the tensor is quantised to.

    Returns: float32 `()`; 1 for an all-zero or a non-finite tensor.
    """
    amax_bits = amax_bits.max()
    usable = (amax_bits > 0) & (amax_bits < INFINITY_BITS)
    exponent = scale_exponent(amax_bits, format.max_exponent)
    return power_of_two(jnp.where(usable, exponent, 0))


def statistics(x: jax.Array, amax_bits: jax.Array, scale: jax.Array, format: Format) -> jax.Array:
    """What `observe` needs to know of a tensor that is quantised with `scale`.

    Saturation and underflow are counted on one row of each group: on all rows of a small tensor, on
    128 of a large one, which costs next to nothing.

    Args:
      x: `[rows, columns]`.
      amax_bits: `group_amax_bits(x)`, or the bits of the amax of any up to 128 parts of x.
      scale: float32 `()`.
      format: that `x` is quantised to.

    Returns: int32 `[GROUPS, 3]`: bits of the amax, saturated, underflowed sampled elements of each
      group; groups that `x` does not have are zero.
    """
    return sample_statistics(sample_rows(x), amax_bits, scale, format)


def sample_statistics(
    sample: jax.Array, amax_bits: jax.Array, scale: jax.Array, format: Format
) -> jax.Array:
    """`statistics` of a tensor of which `sample` are the `sample_rows`."""
    magnitude = jnp.abs(sample.astype(jnp.float32)) * (1 / scale)
    saturated = magnitude > format.max_value
    # Half the smallest subnormal is a tie and rounds to even: to zero.
    underflowed = (magnitude <= format.min_subnormal / 2) & (sample != 0)
    columns = [
        amax_bits,
        saturated.sum(axis=1, dtype=jnp.int32),
        underflowed.sum(axis=1, dtype=jnp.int32),
    ]
    padded = [jnp.pad(column, (0, GROUPS - len(column))) for column in columns]
    return jnp.stack(padded, axis=1)


def sample_rows(x: jax.Array) -> jax.Array:
    """One row of each group of `x`, `[rows, columns]`: `[groups, columns]`."""
    groups = _grouped(x)
    # The first row of a group may be the start of a document.
    return groups[:, groups.shape[1] // 2]


def sampled_elements(rows: int, columns: int) -> int:
    """How many elements of a matrix `statistics` counts."""
    return math.gcd(rows, GROUPS) * columns


def observe(seen: jax.Array, counted: tuple[int, ...], formats: tuple[Format, ...]) -> jax.Array:
    """The observation of all the tensors of a dot; see `jfp8.scaling` for what it means.

    Every group of rows adds a one-hot and its counters. The sum over the groups comes last and is
    one for all slots: for sharded tensors XLA needs one all-reduce, a sum like the gradients'.

    Args:
      seen: int32 `[slots, GROUPS, 3]`, the `statistics` of each tensor.
      counted: their `sampled_elements`.
      formats: that they are quantised to.

    Returns: float32 `[slots, BINS]`.
    """
    amax_bits, saturated, underflowed = jnp.moveaxis(seen, -1, 0)
    max_exponents = jnp.asarray([[f.max_exponent] for f in formats], jnp.int32)
    exponent_bin = scale_exponent(amax_bits, max_exponents) - EXPONENT_MIN
    bin_index = jnp.where(amax_bits >= INFINITY_BITS, NONFINITE, exponent_bin)
    bin_index = jnp.where(amax_bits > 0, bin_index, -1)  # an all-zero tensor needs no scale
    one_hot = bin_index[..., None] == jnp.arange(EXPONENTS + 1)
    per_group = jnp.asarray(counted, jnp.float32)[:, None] / GROUPS  # exact: a power of two
    counters = jnp.stack(
        [
            saturated.astype(jnp.float32),
            underflowed.astype(jnp.float32),
            jnp.broadcast_to(per_group, saturated.shape),
        ],
        axis=-1,
    )
    observation = jnp.concatenate([one_hot.astype(jnp.float32), counters], axis=-1).sum(axis=1)
    assert observation.shape == (len(formats), BINS)
    return observation

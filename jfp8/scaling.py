"""The scaling state of an FP8 dot and its update, correct by construction.

Scales are powers of two. What a step sees of a tensor is an *observation*: a vector with a one in
the bin of the scale exponent that the tensor needs, and a few counters. It leaves the backward pass
as the cotangent of `ScalingState.observation`, and JAX adds cotangents. The highest nonzero bin of
a sum of one-hots is the highest of them all, so the sum *is* the maximum: over two uses of a layer,
microbatches (summed or averaged), `vmap`, `scan`, sharded and `shard_map` devices. No observation
at all (an unused branch) leaves the state as it was; non-finite values have a bin of their own and
never reach the history.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jfp8.recipe import Recipe

# Exponents of scales. The limits keep every scale, its inverse and the product of two of them
# normal float32 numbers; a tensor with an amax below 448 * 2**-63 = 5e-17 gets the smallest scale.
EXPONENT_MIN, EXPONENT_MAX = -63, 63
EXPONENTS = EXPONENT_MAX - EXPONENT_MIN + 1
# Bins of an observation: one for each exponent, then
NONFINITE = EXPONENTS  # parts of the tensor that held an infinity or a NaN,
SATURATED = EXPONENTS + 1  # sampled elements clipped to the largest value of the format,
UNDERFLOWED = EXPONENTS + 2  # sampled elements that are not zero but became zero,
COUNTED = EXPONENTS + 3  # sampled elements.
BINS = EXPONENTS + 4

LHS, RHS, GRAD = 0, 1, 2  # slots
SLOTS = 3

INFINITY_BITS = 0x7F800000  # of float32; a NaN's are above


class ScalingState(NamedTuple):
    """Scaling state of one dot, or of many stacked along leading axes.

    The slots are lhs, rhs and the gradient of the output.
    """

    scale: jax.Array
    """float32 `[..., 3]`: x ~= q * scale, powers of two; NaN until calibrated."""
    history: jax.Array
    """float32 `[..., 3, H]`: scale exponents of the last H steps, newest first; -inf: none."""
    observation: jax.Array
    """float32 `[..., 3, BINS]`: always zero; its *cotangent* is the observation of the step."""


class Health(NamedTuple):
    """What one step saw of the tensors of a dot, per slot: float32 `[..., 3]` each."""

    saturated_fraction: jax.Array
    """Share of the sampled elements that were clipped."""
    underflowed_fraction: jax.Array
    """Share of the sampled elements that are not zero but were quantised to zero."""
    nonfinite: jax.Array
    """Row groups with an infinity or a NaN; 0 is healthy. A mean where gradients are averaged."""
    amax_edge: jax.Array
    """Upper edge of the amax: the largest value that the scale it needs can hold; 0: not seen."""


def init_state(recipe: Recipe) -> ScalingState:
    """The state of a dot that has seen nothing: scale NaN, empty history."""
    return ScalingState(
        scale=jnp.full((SLOTS,), jnp.nan, jnp.float32),
        history=jnp.full((SLOTS, recipe.amax_history_length), -jnp.inf, jnp.float32),
        observation=jnp.zeros((SLOTS, BINS), jnp.float32),
    )


def scale_exponent(amax_bits: jax.Array, max_exponent: jax.Array | int) -> jax.Array:
    """The smallest e in [EXPONENT_MIN, EXPONENT_MAX] with amax <= 1.75 * 2**max_exponent * 2**e.

    That is the exponent of amax less `max_exponent`, and one more if its mantissa is above 1.75.
    On the bits it is exact for every finite float32, subnormals included (`jnp.frexp` is not).

    Args:
      amax_bits: int32, the bits of a float32 >= 0.
      max_exponent: of the format, whose largest value is 1.75 * 2**max_exponent.

    Returns: int32 of the broadcast shape.
    """
    above = (amax_bits & 0x7FFFFF) > 0x600000
    exponent = (amax_bits >> 23) - 127 - max_exponent + above
    return jnp.clip(exponent, EXPONENT_MIN, EXPONENT_MAX)


def power_of_two(exponent: jax.Array) -> jax.Array:
    """2**exponent as float32, exactly (`jnp.exp2` may be off by an ulp).

    Args:
      exponent: a whole number in [-126, 127] of any dtype and shape.
    """
    return lax.bitcast_convert_type((exponent.astype(jnp.int32) + 127) << 23, jnp.float32)


def update(states: Any, observed: Any, recipe: Recipe) -> Any:
    """The scaling states of the next optimizer step. Pure; call it once per optimizer step.

    A slot with an observation pushes its exponent onto the history, and its scale becomes
    2**(max(history) + margin). A slot without one (an unused layer, or a tensor without a finite
    value other than zero) stays as it was.

    Args:
      states: any pytree of `ScalingState`, also with leading axes stacked by `scan` or `vmap`.
      observed: the gradient of the loss with respect to `states`; same structure. Sums and means
        over microbatches and devices are fine.
      recipe: the one that the dots ran with (its `calibrating()` twin gives the same result).

    Returns: the new states; same structure, shapes and dtypes.
    """
    return jax.tree.map(
        lambda state, seen: _update(state, seen.observation, recipe.margin),
        states,
        observed,
        is_leaf=lambda node: isinstance(node, ScalingState),
    )


def _update(state: ScalingState, observation: jax.Array, margin: int) -> ScalingState:
    exponent, seen = _highest_exponent(observation)
    pushed = jnp.concatenate([exponent[..., None], state.history[..., :-1]], axis=-1)
    history = jnp.where(seen[..., None], pushed, state.history)
    top = jnp.where(seen, history.max(axis=-1), 0)  # without an observation it may be -inf
    top = jnp.clip(top + margin, EXPONENT_MIN, EXPONENT_MAX)
    scale = jnp.where(seen, power_of_two(top), state.scale)
    return ScalingState(scale, history, jnp.zeros_like(state.observation))


def _highest_exponent(observation: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Highest exponent (float32) whose bin is above zero, and whether there is one."""
    hit = observation[..., :EXPONENTS] > 0  # false for a NaN
    exponent = EXPONENT_MAX - jnp.argmax(hit[..., ::-1], axis=-1)
    return exponent.astype(jnp.float32), hit.any(axis=-1)


def health(observed: Any, recipe: Recipe) -> Any:
    """Reads the observations of a step as numbers for people.

    Args:
      observed: the gradient of the loss with respect to a pytree of `ScalingState`.
      recipe: the one that the dots ran with.

    Returns: the same tree with a `Health` in place of every `ScalingState`.
    """
    return jax.tree.map(
        lambda seen: _health(seen.observation, recipe),
        observed,
        is_leaf=lambda node: isinstance(node, ScalingState),
    )


def _health(observation: jax.Array, recipe: Recipe) -> Health:
    exponent, seen = _highest_exponent(observation)
    largest = jnp.asarray([f.max_value for f in recipe.formats], jnp.float32)
    count = observation[..., COUNTED]
    safe_count = jnp.where(count > 0, count, 1)
    return Health(
        saturated_fraction=observation[..., SATURATED] / safe_count,
        underflowed_fraction=observation[..., UNDERFLOWED] / safe_count,
        nonfinite=observation[..., NONFINITE],
        amax_edge=jnp.where(seen, largest * power_of_two(exponent), 0),
    )

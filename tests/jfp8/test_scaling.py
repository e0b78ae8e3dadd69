"""Scaling state against exact arithmetic: exponents, update, health."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import jfp8
from jfp8.scaling import (
    BINS,
    COUNTED,
    EXPONENTS,
    NONFINITE,
    SATURATED,
    UNDERFLOWED,
    power_of_two,
    scale_exponent,
)

FORMATS = {"e4m3": jfp8.E4M3, "e5m2": jfp8.E5M2}
RECIPE = jfp8.Recipe(amax_history_length=4)


def one_hot(*exponents: int | None) -> jax.Array:
    """An observation [3, BINS] whose slots need the given exponents."""
    observation = np.zeros((3, BINS), np.float32)
    for slot, exponent in enumerate(exponents):
        if exponent is not None:
            observation[slot, exponent + 63] = 1
    return jnp.asarray(observation)


def observed(state: jfp8.ScalingState, *exponents: int | None) -> jfp8.ScalingState:
    return jax.tree.map(jnp.zeros_like, state)._replace(observation=one_hot(*exponents))


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_scale_exponent_of_every_bfloat16(format):
    amax = np.arange(0x7F80, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)
    exponent = np.asarray(scale_exponent(jnp.asarray(amax.view(np.int32)), format.max_exponent))
    holds = np.ldexp(format.max_value, exponent) >= amax.astype(np.float64)
    one_less_does_not = np.ldexp(format.max_value, exponent - 1) < amax.astype(np.float64)
    assert exponent.min() == -63 and exponent.max() == 63
    assert (holds | (exponent == 63)).all()
    assert (one_less_does_not | (exponent == -63)).all()


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
@settings(max_examples=200, deadline=None)
@given(st.floats(0, width=32, allow_infinity=False))
@example(1e-45)
@example(2.0**-126)
@example(448.0)
@example(448.00003)
@example(57344.0)
@example(57344.004)
def test_scale_exponent_is_the_smallest_that_holds(format, amax):
    bits = np.float32(amax).view(np.int32)
    exponent = int(scale_exponent_on_cpu(format)(bits))
    largest = Fraction(format.max_value)
    amax = Fraction(float(np.float32(amax)))
    assert amax <= largest * Fraction(2) ** exponent or exponent == 63
    assert amax > largest * Fraction(2) ** (exponent - 1) or exponent == -63


_jitted = {
    format.name: jax.jit(lambda bits, n=format.max_exponent: scale_exponent(bits, n))
    for format in FORMATS.values()
}


def scale_exponent_on_cpu(format):
    return _jitted[format.name]


def test_power_of_two_is_exact():
    exponents = np.arange(-126, 128)
    assert np.array_equal(power_of_two(jnp.asarray(exponents)), np.ldexp(np.float32(1), exponents))


def test_products_of_scales_are_normal_numbers():
    smallest = power_of_two(jnp.asarray(-63)) * power_of_two(jnp.asarray(-63))
    largest = power_of_two(jnp.asarray(63)) * power_of_two(jnp.asarray(63))
    assert float(smallest) == 2.0**-126 and float(largest) == 2.0**126


def test_initial_state_is_uncalibrated():
    state = jfp8.init_state(RECIPE)
    assert state.scale.shape == (3,) and np.isnan(state.scale).all()
    assert state.history.shape == (3, 4) and np.isneginf(state.history).all()
    assert state.observation.shape == (3, BINS) and not state.observation.any()


def test_update_pushes_and_takes_the_largest_of_the_history():
    state = jfp8.init_state(RECIPE)
    for exponent in (3, -2, 5, 0):
        state = jfp8.update(state, observed(state, exponent, exponent - 1, -20), RECIPE)
    assert state.history[0].tolist() == [0, 5, -2, 3]
    assert state.scale.tolist() == [2.0**5, 2.0**4, 2.0**-20]
    for _ in range(2):  # the 5 and then nothing above 0 but the 3 has gone
        state = jfp8.update(state, observed(state, -1, -1, -1), RECIPE)
    assert state.history[0].tolist() == [-1, -1, 0, 5]
    state = jfp8.update(state, observed(state, -1, -1, -1), RECIPE)
    assert state.scale.tolist() == [2.0**0, 2.0**-1, 2.0**-1]


def test_update_adds_the_margin_and_stays_in_range():
    recipe = jfp8.Recipe(margin=2)
    state = jfp8.init_state(recipe)
    state = jfp8.update(state, observed(state, 1, 63, -63), recipe)
    assert state.scale.tolist() == [2.0**3, 2.0**63, 2.0**-61]
    assert state.history[:, 0].tolist() == [1, 63, -63]


def test_update_of_stacked_states_is_that_of_each():
    state = jfp8.init_state(RECIPE)

    def stack(*trees):
        return jax.tree.map(lambda *x: jnp.stack(x), *trees)

    observations = [observed(state, 1, 2, 3), observed(state, None, -5, None)]
    together = jfp8.update(stack(state, state), stack(*observations), RECIPE)
    each = stack(*(jfp8.update(state, o, RECIPE) for o in observations))
    for a, b in zip(together, each, strict=True):
        assert np.array_equal(a, b, equal_nan=True)


def test_update_keeps_structure_shapes_and_dtypes():
    states = {"a": jfp8.init_state(RECIPE), "b": [jfp8.init_state(RECIPE)]}
    seen = jax.tree.map(lambda x: x.astype(jnp.bfloat16), states)  # as from a cast gradient
    new = jax.eval_shape(lambda s, o: jfp8.update(s, o, RECIPE), states, seen)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(
        lambda x: (x.shape, x.dtype), states
    )


def test_health_reads_the_counters():
    observation = np.zeros((3, BINS), np.float32)
    observation[0, [SATURATED, UNDERFLOWED, COUNTED]] = [5, 10, 1000]
    observation[1, NONFINITE] = 2
    observation[2, 3 + 63] = 1
    state = jfp8.init_state(RECIPE)._replace(observation=jnp.asarray(observation))
    health = jfp8.health({"layer": state}, RECIPE)["layer"]
    assert health.saturated_fraction.tolist() == [np.float32(0.005), 0, 0]
    assert health.underflowed_fraction.tolist() == [np.float32(0.01), 0, 0]
    assert health.nonfinite.tolist() == [0, 2, 0]
    assert health.amax_edge.tolist() == [0, 0, 57344 * 8]


def test_bins_hold_exponents_and_counters():
    assert EXPONENTS == 127 and BINS == 131
    assert sorted([NONFINITE, SATURATED, UNDERFLOWED, COUNTED]) == [127, 128, 129, 130]

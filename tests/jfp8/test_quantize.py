"""Casts bit for bit against ml_dtypes, statistics against NumPy."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jfp8
from jfp8.quantize import (
    GROUPS,
    current_scale,
    group_amax_bits,
    observe,
    sampled_elements,
    statistics,
)
from jfp8.scaling import COUNTED, NONFINITE, SATURATED, UNDERFLOWED
from tests.jfp8 import reference

FORMATS = {"e4m3": jfp8.E4M3, "e5m2": jfp8.E5M2}
by_format = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
EVERY_BF16 = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16)


@by_format
@pytest.mark.parametrize("exponent", [-63, -7, 0, 20])
def test_every_bfloat16_is_cast_as_ml_dtypes_does(format, exponent):
    x = EVERY_BF16[np.isfinite(EVERY_BF16.astype(np.float32))]
    # float32 overflows where x / scale does: far outside of any tensor that the scale is for.
    x = x[np.abs(x.astype(np.float64)) < 2.0 ** (127 + exponent)]
    q = jax.jit(jfp8.quantize, static_argnums=2)(x, jnp.float32(2.0**exponent), format)
    assert q.dtype == format.dtype
    expected = reference.quantize(x, exponent, format.name)
    assert np.array_equal(reference.f64(q) * 2.0**exponent, expected)


@by_format
def test_nonfinite_values_become_nan(format):
    x = jnp.asarray([jnp.inf, -jnp.inf, jnp.nan, 1.0], jnp.bfloat16)
    q = jax.jit(jfp8.quantize, static_argnums=2)(x, jnp.float32(1), format)
    assert np.isnan(reference.f64(q)).tolist() == [True, True, True, False]


@by_format
def test_a_nan_scale_is_loud(format):
    assert np.isnan(reference.f64(jfp8.quantize(jnp.zeros(4), jnp.float32(jnp.nan), format))).all()


def test_dequantize_is_exact():
    values = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
    x = jfp8.dequantize(jnp.asarray(values), jnp.float32(2.0**-30), jnp.bfloat16)
    expected = values.astype(np.float64) * 2.0**-30
    assert np.array_equal(reference.f64(x), expected, equal_nan=True)


@pytest.mark.parametrize("rows", [16, 48, 256, 2048 + 16])
def test_group_amax_bits_sees_every_row(rows):
    rng = np.random.default_rng(rows)
    x = rng.normal(size=(rows, 16)).astype(np.float32)
    x[rng.integers(rows), 3] = -1000.5
    bits = np.asarray(group_amax_bits(jnp.asarray(x)))
    assert rows % bits.size == 0 and bits.size <= GROUPS
    expected = np.abs(x).reshape(bits.size, -1).max(axis=1)
    assert np.array_equal(bits.view(np.float32), expected)


def test_group_amax_bits_of_subnormals():
    # XLA:CPU compares subnormal floats as zeros; a maximum of floats would see none of this.
    x = np.full((16, 16), 1e-42, np.float32)
    assert np.asarray(group_amax_bits(jnp.asarray(x))).view(np.float32).max() == np.float32(1e-42)


@by_format
@pytest.mark.parametrize("amax", [1.0, 448.0, 448.5, 57344.0, 1e-30, 3e38, 0.0, np.inf, np.nan])
def test_current_scale(format, amax):
    x = jnp.full((16, 16), amax, jnp.float32)
    scale = float(current_scale(group_amax_bits(x), format))
    if amax == 0 or not np.isfinite(amax):
        assert scale == 1.0
    else:
        assert scale == 2.0 ** reference.smallest_exponent(float(np.float32(amax)), format.name)


@pytest.mark.parametrize("rows, sampled_rows", [(32, 32), (1024, 128), (4096 + 128, 128)])
def test_statistics_count_a_sample_of_the_rows(rows, sampled_rows):
    x = jnp.full((rows, 48), 1000.0, jnp.bfloat16)
    assert sampled_elements(*x.shape) == sampled_rows * 48
    seen = statistics(x, group_amax_bits(x), jnp.float32(1), jfp8.E4M3)
    assert seen[:, 1].sum() == sampled_rows * 48


@by_format
def test_statistics_and_observation_against_numpy(format):
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(64, 48)) * 10.0 ** rng.uniform(-12, 3, (64, 48))).astype(np.float32)
    x[5, :7] = 0
    exponent = reference.smallest_exponent(np.abs(x).max() / 8, format.name)  # some saturate
    scale = jnp.float32(2.0**exponent)
    seen = statistics(jnp.asarray(x), group_amax_bits(jnp.asarray(x)), scale, format)
    observation = np.asarray(observe(seen[None], (x.size,), (format,)))[0]
    q = reference.quantize(x, exponent, format.name)
    assert (
        observation[SATURATED]
        == (np.abs(x) > reference.MAX_VALUE[format.name] * 2.0**exponent).sum()
    )
    assert observation[SATURATED] > 0
    assert observation[UNDERFLOWED] == ((q == 0) & (x != 0)).sum() > 0
    assert observation[COUNTED] == x.size
    assert reference.top_exponent(observation) == reference.amax_exponent(format.name, x)


def test_underflow_of_a_tie_is_counted():
    # Half the smallest subnormal rounds to even, to zero; the next float32 does not.
    tie = jfp8.E4M3.min_subnormal / 2
    x = jnp.full((16, 16), tie).at[0, 0].set(np.nextafter(np.float32(tie), np.float32(1)))
    seen = statistics(x, group_amax_bits(x), jnp.float32(1), jfp8.E4M3)
    assert int(seen[:, 2].sum()) == 255 == int((jfp8.quantize(x, 1.0, jfp8.E4M3) == 0).sum())


def test_a_zero_tensor_is_no_observation_and_a_nonfinite_one_is_counted():
    zero = jnp.zeros((32, 16))
    bad = jnp.ones((32, 16)).at[3, 3].set(jnp.nan).at[4, 4].set(-jnp.inf)
    seen = jnp.stack(
        [statistics(x, group_amax_bits(x), jnp.float32(1), jfp8.E4M3) for x in (zero, bad)]
    )
    of_zero, of_bad = np.asarray(observe(seen, (512, 512), (jfp8.E4M3, jfp8.E4M3)))
    assert reference.top_exponent(of_zero) is None and of_zero[NONFINITE] == 0
    assert of_bad[NONFINITE] == 2  # row groups

"""NumPy float64 references for FP8 dots, from the definitions and ml_dtypes alone."""

import math

import jax
import ml_dtypes
import numpy as np

MAX_VALUE = {"e4m3": 448.0, "e5m2": 57344.0}
DTYPE = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}


def smallest_exponent(amax: float, format: str) -> int:
    """The smallest e in [-63, 63] with amax <= max * 2**e, found by trying them."""
    return next(e for e in range(-63, 64) if e == 63 or amax <= math.ldexp(MAX_VALUE[format], e))


def amax_exponent(format: str, *tensors: jax.Array) -> int:
    """The exponent that the largest magnitude of all the tensors needs."""
    return smallest_exponent(max(float(np.abs(f64(x)).max()) for x in tensors), format)


def quantize(x: jax.Array, exponent: int, format: str) -> np.ndarray:
    """float64 values of x cast to the format with the scale 2**exponent, times that scale."""
    largest = MAX_VALUE[format]
    scaled = np.clip(f64(x) * math.ldexp(1.0, -exponent), -largest, largest)
    return scaled.astype(DTYPE[format]).astype(np.float64) * math.ldexp(1.0, exponent)


def normal(seed: int, *shape: int, dtype: jax.typing.DTypeLike = np.float32) -> jax.Array:
    """Standard normal numbers; NumPy's, because JAX would compile a generator for every shape."""
    return jax.device_put(np.random.default_rng(seed).normal(size=shape).astype(dtype))


def f64(x: jax.Array) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def sqnr_db(reference: np.ndarray, value: jax.Array) -> float:
    noise = ((reference - f64(value)) ** 2).sum()
    return float(10 * np.log10((reference**2).sum() / noise)) if noise else np.inf


def top_exponent(observation: jax.Array) -> int | None:
    """The exponent of the highest nonzero bin of one slot; the first bin stands for 2**-63."""
    seen = np.flatnonzero(np.asarray(observation)[:127] > 0)
    return int(seen.max()) - 63 if seen.size else None

"""Operands whose products have an exact sum, and that sum."""

import jax.numpy as jnp
import numpy as np

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2


def integers(seed, rows, columns, dtype):
    """Whole numbers up to 8 in magnitude: both formats hold them, float32 any sum of products."""
    values = np.random.default_rng(seed).integers(-8, 9, (rows, columns))
    return jnp.asarray(values, jnp.float32).astype(dtype)


def normal(seed, rows, columns, dtype):
    """Like what is trained on: most bits of the mantissa in use."""
    values = np.random.default_rng(seed).standard_normal((rows, columns))
    return jnp.asarray(values, jnp.float32).astype(dtype)


def product(lhs, rhs_t, scale):
    """scale * (lhs . rhs_t^T) in float64."""
    lhs, rhs_t = (np.asarray(x, np.float64) for x in (lhs, rhs_t))
    return float(scale) * (lhs @ rhs_t.T)


def rounded(x, dtype):
    """float64 rounded to a shorter type once."""
    return np.asarray(x, np.float64).astype(jnp.dtype(dtype))

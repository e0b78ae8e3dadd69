"""The two 8-bit floats of Hopper's tensor cores (Micikevicius et al. 2022, arXiv:2209.05433)."""

import dataclasses

import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True, slots=True)
class Format:
    """An 8-bit float: its JAX dtype and the numbers that quantisation needs.

    The largest value of both formats is 1.75 * 2**max_exponent, so one rule finds the smallest
    power-of-two scale of either (`jfp8.scaling.scale_exponent`).
    """

    name: str
    dtype: np.dtype
    max_exponent: int
    """Exponent of the largest finite value."""
    min_subnormal: float
    """Smallest positive value."""

    @property
    def max_value(self) -> float:
        """Largest finite value."""
        return 1.75 * 2.0**self.max_exponent


E4M3 = Format("e4m3", jnp.dtype(jnp.float8_e4m3fn), max_exponent=8, min_subnormal=2.0**-9)
"""4 exponent and 3 mantissa bits, largest value 448, no infinity: activations and weights."""
E5M2 = Format("e5m2", jnp.dtype(jnp.float8_e5m2), max_exponent=15, min_subnormal=2.0**-16)
"""5 exponent and 2 mantissa bits, largest value 57344: gradients, whose tails are heavier."""

"""`quantize`: checks the arguments, picks an implementation, and calls it."""

# Shapes: M rows, K columns.

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.quantize import sm90
from pallas_kernels.quantize.contract import (
    Implementation,
    Layouts,
    Quantized,
    check_matrix,
    check_options,
    quantize_xla,
    uses_mosaic,
)

SUPPORTED_DTYPES = ("bfloat16", "float16", "float32")


def quantize(
    x: jax.Array,
    scale: jax.Array,
    *,
    dtype: jax.typing.DTypeLike = jnp.float8_e4m3fn,
    layouts: Layouts = "both",
    implementation: Implementation | None = None,
) -> Quantized:
    """Casts a matrix to 8 bits, transposes it and takes its amax, in one pass over memory.

    q = round(x / scale) to the nearest value of `dtype`, ties to even, clipped to its largest. An
    infinity or a NaN becomes NaN.

    Args:
      x: `[M, K]`, bfloat16, float16 or float32.
      scale: float32 `()`, a power of two (so that the division is exact): x ~= q * scale.
      dtype: float8_e4m3fn or float8_e5m2.
      layouts: "both" writes q and its transpose, "rows" q alone, "columns" the transpose alone.
      implementation: "xla" runs on any device. "mosaic" needs a Hopper GPU, K a multiple of 64, and
        M a multiple of 128 (16 with "rows"); of a sharded x each device quantises its own part,
        for which the same holds, and nothing is gathered. None takes "mosaic" where it can run, but
        "xla" if the partitioner is to split the arrays among several devices.

    Returns: the two casts and the amax; the same bits from both implementations, but for those of
      NaN and for how the amax is spread over its parts.

    Raises:
      ValueError: if an argument has the wrong shape, dtype or value.
      NotImplementedError: if `implementation` cannot run this call on this device; says why.

    Reference: Micikevicius et al. 2022, arXiv:2209.05433.
    """
    check_matrix("x", x, SUPPORTED_DTYPES)
    check_options(scale=scale, dtype=dtype, layouts=layouts)
    reason = functools.partial(unsupported_reason, x, dtype=dtype, layouts=layouts)
    if uses_mosaic(implementation, reason):
        return sm90.quantize(x, scale, dtype=dtype, layouts=layouts)
    return quantize_xla(x, scale, dtype=dtype, layouts=layouts)


def unsupported_reason(
    x: jax.Array | jax.ShapeDtypeStruct, *, dtype: jax.typing.DTypeLike, layouts: Layouts = "both"
) -> str | None:
    """Why "mosaic" cannot `quantize` x, one device's part, on this device; None if it can."""
    return sm90.unsupported_reason(sm90.make_plan(x, dtype=dtype, layouts=layouts))

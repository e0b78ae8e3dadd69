"""RMSNorm whose result is cast for the dots that read it as it is computed.

y = x rsqrt(mean(x^2) + eps) weight -> 8-bit y and y^T. The dots read nothing else of y, so y in 16
bits is never written; the gradient goes through it nevertheless.
"""

# Shapes: M rows, K columns.

from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from jfp8.gemms import CastInput
from jfp8.quantize import sample_rows, sample_statistics
from jfp8.recipe import Recipe
from jfp8.scaling import LHS, ScalingState
from pallas_kernels.fused.rmsnorm import rmsnorm_and_cast


def rmsnorm_cast(
    x: jax.Array,
    weight: jax.Array,
    state: ScalingState,
    *,
    eps: float,
    recipe: Recipe,
    gradient_implementation: Literal["xla", "mosaic"] | None = None,
) -> tuple[jax.Array, jax.Array, CastInput]:
    """Normalises x and casts the result to be the lhs of a dot; differentiable.

    Args:
      x: `[..., K]`, bfloat16.
      weight: float32 `[K]`.
      state: of the dot.
      eps: added to the mean of squares.
      recipe: of the dot: `delayed` with explicit calibration, because the scale must be known
        before the result is, and `quantize_implementation="mosaic"`: "auto" is settled by the dot,
        later.
      gradient_implementation: as in `pallas_kernels.rmsnorm`.

    Returns: y `[..., K]` and `CastInput` of it, for `jfp8.dot_general(y, ..., lhs_cast=)`; in
      between x itself, for a residual connection.

    Raises:
      ValueError: for another recipe, or what the kernel cannot take.
    """
    if not can_cast_norm(recipe):
        raise ValueError(
            f"{recipe.name=}, {recipe.calibration=} and {recipe.quantize_implementation=} must be"
            " 'delayed', 'explicit' and 'mosaic'; use pallas_kernels.rmsnorm, and let the dot cast"
        )
    format, scale = recipe.formats[LHS], state.scale[LHS]
    y, x, quantized = rmsnorm_and_cast(
        x,
        weight,
        scale,
        eps=eps,
        dtype=format.dtype,
        implementation="mosaic",
        gradient_implementation=gradient_implementation,
    )
    sample = sample_rows(lax.stop_gradient(x).reshape(-1, x.shape[-1])).astype(jnp.float32)
    rstd = lax.rsqrt(jnp.mean(sample * sample, axis=1, keepdims=True) + eps)
    seen = sample_statistics(sample * rstd * weight, quantized.amax_bits, scale, format)
    assert quantized.q is not None
    return y, x, CastInput(quantized.q, quantized.q_t, scale, seen)


def can_cast_norm(recipe: Recipe) -> bool:
    """Whether `rmsnorm_cast` takes a recipe."""
    is_known = recipe.name == "delayed" and recipe.calibration == "explicit"
    return is_known and recipe.quantize_implementation == "mosaic"

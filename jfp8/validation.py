"""What every dot checks before it computes anything."""

import jax
import jax.numpy as jnp
import numpy as np

from jfp8.recipe import Recipe
from jfp8.scaling import BINS, GRAD, SLOTS, ScalingState

ALIGNMENT = 16
"""cuBLASLt and wgmma take 8-bit operands in units of 16 bytes."""

_DTYPES = (jnp.bfloat16, jnp.float32)


def validate_operands(lhs: jax.Array, rhs: jax.Array, recipe: Recipe, **sizes: int) -> None:
    """Raises ValueError for a dtype, or a size M, K or N, that the recipe cannot take."""
    for name, operand in (("lhs", lhs), ("rhs", rhs)):
        if operand.dtype not in _DTYPES:
            raise ValueError(
                f"{name}.dtype={operand.dtype} must be bfloat16 or float32 (float16 cannot hold the"
                f" sums of FP8 products); cast {name} first"
            )
    for name, size in sizes.items():
        if recipe.quantizes and (size == 0 or size % ALIGNMENT):
            raise ValueError(
                f"{name.upper()}={size} must be a positive multiple of {ALIGNMENT} for recipe"
                f" {recipe.name!r} (one of the three FP8 GEMMs contracts it),"
                f" with lhs.shape={lhs.shape} and rhs.shape={rhs.shape}; pad it, or keep this layer"
                " in bf16 (Recipe.skip)"
            )


def validated_state(state: ScalingState | None, recipe: Recipe) -> ScalingState:
    """The state of one dot; raises ValueError if it is not one, or not calibrated."""
    if not isinstance(state, ScalingState):
        raise ValueError(
            f"state={type(state).__name__} must be a jfp8.ScalingState for recipe {recipe.name!r};"
            " make one with jfp8.init_state(recipe)"
        )
    if state.scale.shape != (SLOTS,) or state.observation.shape != (SLOTS, BINS):
        raise ValueError(
            f"state.scale.shape={state.scale.shape} must be ({SLOTS},), and"
            f" state.observation.shape={state.observation.shape} must be ({SLOTS}, {BINS});"
            " take one layer of a stacked state (scan, vmap)"
        )
    if (
        recipe.name == "delayed"
        and recipe.calibration == "explicit"
        and not isinstance(state.scale, jax.core.Tracer)
        and np.isnan(state.scale[:GRAD]).any()
    ):
        raise ValueError(
            f"state.scale={np.asarray(state.scale)} is not calibrated; run the first step with"
            " recipe.calibrating(), or use Recipe(calibration='inline')"
        )
    return state

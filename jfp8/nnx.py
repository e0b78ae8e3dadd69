"""FP8 layers for Flax NNX; thin shells over `jfp8.dot_general`."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jfp8.dot_general import dot_general
from jfp8.recipe import Recipe
from jfp8.scaling import ScalingState, init_state


class Scaling(nnx.Variable[ScalingState]):
    """Holds the `ScalingState` of one dot; a type of its own, so that no optimizer touches it.

    Split it from the parameters, `nnx.split(model, nnx.Param, jfp8.nnx.Scaling, ...)`, differentiate with respect to
    both, and give the second to `jfp8.update`.
    """


class Linear(nnx.Module):
    """y = x . kernel (+ bias) with the GEMMs of a `jfp8.Recipe`.

    Attributes:
      kernel: `nnx.Param` `[in_features, out_features]`, `param_dtype`.
      bias: `nnx.Param` `[out_features]`, or None.
      scaling: `Scaling`; None only for the bf16 recipe, so that a model under `recipe` and one under
        `recipe.calibrating()` have the same state structure.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        recipe: Recipe,
        rngs: nnx.Rngs,
        dtype: jax.typing.DTypeLike = jnp.bfloat16,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        use_bias: bool = False,
        kernel_init: nnx.Initializer = nnx.initializers.lecun_normal(),
        bias_init: nnx.Initializer = nnx.initializers.zeros_init(),
        kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
    ):
        """Creates the parameters; `rngs.params` seeds them. `kernel_metadata` goes to the `nnx.Param` of the kernel."""
        self.kernel = nnx.Param(
            kernel_init(rngs.params(), (in_features, out_features), param_dtype), **kernel_metadata
        )
        self.bias = nnx.data(
            nnx.Param(bias_init(rngs.params(), (out_features,), param_dtype)) if use_bias else None
        )
        self.scaling = nnx.data(Scaling(init_state(recipe)) if recipe.quantizes else None)
        self.recipe = recipe
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[..., in_features]` to `[..., out_features]` in `dtype`."""
        dimension_numbers = (((x.ndim - 1,), (0,)), ((), ()))
        state = None if self.scaling is None else self.scaling.get_value()
        y = dot_general(
            x.astype(self.dtype),
            self.kernel.get_value(),
            dimension_numbers,
            state,
            recipe=self.recipe,
        )
        return y if self.bias is None else y + self.bias.get_value().astype(y.dtype)

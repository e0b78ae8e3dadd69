"""FP8 for Flax Linen: a `dot_general_cls` for `flax.linen.Dense`, `DenseGeneral` and others.

    recipe = jfp8.Recipe()
    dense = nn.Dense(64, dot_general_cls=functools.partial(Fp8DotGeneral, recipe=recipe))
    variables = dense.init(key, x)
    params, fp8 = variables["params"], variables["fp8"]

    def loss(params, fp8, batch):
        y = dense.apply({"params": params, "fp8": fp8}, x)
        ...

    grads, observed = jax.grad(loss, argnums=(0, 1))(params, fp8, batch)
    fp8 = jfp8.update(fp8, observed, recipe)              # optax sees params alone

The state is in a collection of its own, "fp8", and is never written by `apply`. Lifted transforms
carry it like parameters: `nn.scan(..., variable_axes={"params": 0, "fp8": 0})` for layers with
weights of their own, `variable_broadcast=("params", "fp8")` for one layer used at every step, and
`nn.vmap` and `nn.remat` likewise. A layer that is used twice has one state, and needs nothing.
"""

from typing import Any

import jax
from flax import linen as nn

from jfp8.dot_general import DotDimensionNumbers, dot_general
from jfp8.recipe import Recipe
from jfp8.scaling import init_state

COLLECTION = "fp8"
"""Name of the variable collection that holds the `ScalingState`s."""


class Fp8DotGeneral(nn.Module):
    """Takes the place of `jax.lax.dot_general` in a Linen layer.

    Linen casts the kernel to the layer's `dtype` before the dot; `nn.Dense(dtype=jnp.bfloat16)` is
    the usual choice.

    Attributes:
      recipe: of the three GEMMs.
    """

    recipe: Recipe

    @nn.compact
    def __call__(
        self,
        lhs: jax.Array,
        rhs: jax.Array,
        dimension_numbers: DotDimensionNumbers,
        precision: Any = None,
        preferred_element_type: Any = None,
        out_sharding: Any = None,
    ) -> jax.Array:
        """As `jax.lax.dot_general`; see `jfp8.dot_general`.

        Raises:
          ValueError: for a `precision`, `preferred_element_type` or `out_sharding`, which the
            recipe decides, and what `jfp8.dot_general` refuses.
        """
        for name, value, decided in (
            ("precision", precision, None),
            ("preferred_element_type", preferred_element_type, lhs.dtype),
            ("out_sharding", out_sharding, None),
        ):
            if value is not None and value != decided:
                raise ValueError(
                    f"{name}={value} must be left at None: jfp8.Recipe decides the precision, and"
                    " the result has the dtype of lhs"
                )
        state = None
        if self.recipe.quantizes:
            state = self.variable(COLLECTION, "scaling", init_state, self.recipe).value
        return dot_general(lhs, rhs, dimension_numbers, state, recipe=self.recipe)

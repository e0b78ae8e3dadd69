"""FP8 layers for Flax NNX; thin shells over `jfp8.dot_general`.

graph, params, scaling = nnx.split(model, nnx.Param, jfp8.nnx.Scaling)

def loss(params, scaling, batch):
    model = nnx.merge(graph, params, scaling)
    ...

grads, observed = jax.grad(loss, argnums=(0, 1))(params, scaling, batch)
scaling = jfp8.update(scaling, observed, recipe)      # the optimizer sees params alone
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Initializer

from jfp8.dot_general import DotDimensionNumbers, dot_general
from jfp8.gemms import CastInput, CastKernel, cast_kernel
from jfp8.recipe import Recipe
from jfp8.scaling import ScalingState, init_state
from jfp8.swiglu_mlp import swiglu_mlp as jfp8_swiglu_mlp

_NO_METADATA: Mapping[str, Any] = MappingProxyType({})
_lecun_normal = nnx.initializers.lecun_normal()


class Scaling(nnx.Variable[ScalingState]):
    """Holds the `ScalingState` of one dot; a type of its own, so that no optimizer touches it."""


class KernelCast(nnx.Variable[CastKernel]):
    """Holds a kernel that was cast before the dots of a step; see `cast_kernels`."""


class _Dot(nnx.Module):
    """Parameters and state of one dot with a kernel."""

    def __init__(
        self,
        kernel: jax.Array,
        bias: jax.Array | None,
        *,
        recipe: Recipe,
        dtype: jax.typing.DTypeLike,
        kernel_metadata: Mapping[str, Any],
    ):
        self.kernel = nnx.Param(kernel, **kernel_metadata)
        self.bias = nnx.data(None if bias is None else nnx.Param(bias))
        self.scaling = nnx.data(Scaling(init_state(recipe)) if recipe.quantizes else None)
        self.kernel_cast: KernelCast | None = nnx.data(None)
        self.recipe = recipe
        self.dtype = dtype

    def _prepared(self) -> CastKernel | None:
        return None if self.kernel_cast is None else self.kernel_cast.get_value()

    def _dot(
        self,
        x: jax.Array,
        dimension_numbers: DotDimensionNumbers,
        x_cast: CastInput | None = None,
    ) -> jax.Array:
        state = None if self.scaling is None else self.scaling.get_value()
        kernel = self.kernel.get_value()
        return dot_general(
            x.astype(self.dtype),
            kernel,
            dimension_numbers,
            state,
            recipe=self.recipe,
            kernel_cast=self._prepared(),
            lhs_cast=x_cast,
        )


class Linear(_Dot):
    """y = x . kernel (+ bias), with the GEMMs of a `jfp8.Recipe`.

    Attributes:
      kernel: `nnx.Param` `[in_features, out_features]`, `param_dtype`.
      bias: `nnx.Param` `[out_features]`, or None.
      scaling: `Scaling`; None only for the bf16 recipe, so that models under `recipe` and under
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
        kernel_init: Initializer = _lecun_normal,
        kernel_metadata: Mapping[str, Any] = _NO_METADATA,
    ):
        """Creates the parameters.

        Args:
          in_features: size of the last dimension of the input; multiple of 16 in FP8.
          out_features: size of the last dimension of the output; multiple of 16 in FP8.
          recipe: of the three GEMMs (`Recipe.for_layer` gives that of a named layer).
          rngs: `rngs.params` seeds the kernel.
          dtype: the input is cast to it, and the output has it.
          param_dtype: of kernel and bias.
          use_bias: adds a bias, at first zero.
          kernel_init: as in `flax.nnx.Linear`.
          kernel_metadata: of the `nnx.Param` of the kernel, such as its sharding.
        """
        super().__init__(
            kernel_init(rngs.params(), (in_features, out_features), param_dtype),
            jnp.zeros((out_features,), param_dtype) if use_bias else None,
            recipe=recipe,
            dtype=dtype,
            kernel_metadata=kernel_metadata,
        )

    def __call__(self, x: jax.Array, x_cast: CastInput | None = None) -> jax.Array:
        """Maps `[..., in_features]` to `[..., out_features]`, in `dtype`.

        Args:
          x: the input.
          x_cast: of x, as in `jfp8.dot_general`.
        """
        y = self._dot(x, (((x.ndim - 1,), (0,)), ((), ())), x_cast)
        return y if self.bias is None else y + self.bias.get_value().astype(y.dtype)


def swiglu_mlp(
    gate_up: Linear, down: Linear, x: jax.Array, *, group: int, x_cast: CastInput | None = None
) -> jax.Array:
    """`jfp8.swiglu_mlp` with the parameters and the state of two layers.

    Args:
      gate_up: to twice the hidden size: groups of columns of gate, then of up. No bias.
      down: from the hidden size; of the same recipe, which is not bf16. No bias.
      x: `[..., gate_up's in_features]`.
      group: columns of a group.
      x_cast: of x, as in `jfp8.dot_general`.

    Raises:
      ValueError: if the layers have biases or do not share a recipe.
    """
    if gate_up.recipe != down.recipe or gate_up.bias is not None or down.bias is not None:
        raise ValueError(
            f"{gate_up.recipe=} must equal {down.recipe=}, and neither layer may have a bias;"
            " apply one layer after the other instead"
        )
    return jfp8_swiglu_mlp(
        x.astype(gate_up.dtype),
        gate_up.kernel.get_value(),
        down.kernel.get_value(),
        None if gate_up.scaling is None else gate_up.scaling.get_value(),
        None if down.scaling is None else down.scaling.get_value(),
        group=group,
        recipe=gate_up.recipe,
        kernel_casts=(gate_up._prepared(), down._prepared()),
        x_cast=x_cast,
    )


def cast_kernels(model: nnx.Module) -> list[CastKernel | None]:
    """Casts the kernels of all `Linear` layers of a model, to be used by several forward passes.

    The kernels of layers that are stacked along a leading axis (scan) are cast one by one.

    Returns: for `attach_kernel_casts`; None for layers whose recipe does not quantise.
    """
    casts: list[CastKernel | None] = []
    for layer in _linears(model):
        if layer.scaling is None:
            casts.append(None)
            continue
        run = functools.partial(cast_kernel, recipe=layer.recipe)
        kernel, state = layer.kernel.get_value(), layer.scaling.get_value()
        for _ in range(kernel.ndim - 2):
            run = jax.vmap(run)
        casts.append(run(kernel, state))
    return casts


def attach_kernel_casts(model: nnx.Module, casts: list[CastKernel | None]) -> None:
    """Makes the layers of a model use the casts that `cast_kernels` made of the same kernels."""
    for layer, prepared in zip(_linears(model), casts, strict=True):
        layer.kernel_cast = nnx.data(None if prepared is None else KernelCast(prepared))


def _linears(model: nnx.Module) -> list[Linear]:
    return [module for _, module in nnx.iter_modules(model) if isinstance(module, Linear)]


class Einsum(_Dot):
    """y = einsum(equation, x, kernel), with the GEMMs of a `jfp8.Recipe`.

    Attributes:
      kernel: `nnx.Param` of `kernel_shape`, `param_dtype`.
      scaling: as in `Linear`; one scale for the whole kernel.
    """

    def __init__(
        self,
        equation: str,
        kernel_shape: tuple[int, ...],
        *,
        recipe: Recipe,
        rngs: nnx.Rngs,
        dtype: jax.typing.DTypeLike = jnp.bfloat16,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        kernel_init: Initializer = _lecun_normal,
        kernel_metadata: Mapping[str, Any] = _NO_METADATA,
    ):
        """Creates the kernel.

        Args:
          equation: of two operands, input and kernel, without "..."; every letter occurs in two of
            the three terms, or in all (a batch dimension). "btd,dnh->btnh", for example.
          kernel_shape: its size along each letter of the second term.
          recipe: of the three GEMMs.
          rngs: `rngs.params` seeds the kernel.
          dtype: the input is cast to it, and the output has it.
          param_dtype: of the kernel.
          kernel_init: called with the shape `[contracted, free]` of the kernel as a matrix (with
            the batch dimensions in front), so that a fan-in initialiser sees the true fan-in.
          kernel_metadata: of the `nnx.Param` of the kernel, such as its sharding.

        Raises:
          ValueError: if the equation is not of that kind, or does not fit `kernel_shape`.
        """
        self.equation = _Equation.parse(equation)
        kernel = self.equation.init_kernel(kernel_init, rngs.params(), kernel_shape, param_dtype)
        super().__init__(kernel, None, recipe=recipe, dtype=dtype, kernel_metadata=kernel_metadata)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the einsum; the result is in `dtype`."""
        if x.ndim != len(self.equation.lhs):
            raise ValueError(
                f"x.shape={x.shape} must have the {len(self.equation.lhs)} dimensions of"
                f" {self.equation.lhs!r} in {self.equation.text!r}"
            )
        return self._dot(x, self.equation.dimension_numbers).transpose(self.equation.permutation)


@dataclasses.dataclass(frozen=True)
class _Equation:
    """An einsum of two operands that is one `dot_general` and a transpose of its result."""

    text: str
    lhs: str
    rhs: str
    batch: tuple[str, ...]
    contract: tuple[str, ...]
    rhs_free: tuple[str, ...]
    permutation: tuple[int, ...]
    """Of the dimensions of the result of the dot: batch, free lhs, free rhs."""

    @classmethod
    def parse(cls, text: str) -> "_Equation":
        operands, arrow, out = text.replace(" ", "").partition("->")
        lhs, comma, rhs = operands.partition(",")
        terms = (lhs, rhs, out)
        letters = set("".join(terms))
        if (
            not (arrow and comma)
            or not all(letter.isalpha() for letter in letters)
            or any(len(set(term)) != len(term) for term in terms)
            or any(sum(letter in term for term in terms) < 2 for letter in letters)
        ):
            raise ValueError(
                f"equation={text!r} must be two operands of distinct letters, '->' and a result,"
                " with every letter in two of the three terms or in all, such as"
                " 'btd,dnh->btnh'; reduce or repeat other dimensions outside"
            )
        batch = tuple(c for c in lhs if c in rhs and c in out)
        contract = tuple(c for c in lhs if c in rhs and c not in out)
        rhs_free = tuple(c for c in rhs if c not in lhs)
        natural = (*batch, *(c for c in lhs if c not in rhs), *rhs_free)
        permutation = tuple(natural.index(c) for c in out)
        return cls(text, lhs, rhs, batch, contract, rhs_free, permutation)

    @property
    def dimension_numbers(self) -> DotDimensionNumbers:
        def positions(term: str, letters: tuple[str, ...]) -> tuple[int, ...]:
            return tuple(term.index(c) for c in letters)

        return (
            (positions(self.lhs, self.contract), positions(self.rhs, self.contract)),
            (positions(self.lhs, self.batch), positions(self.rhs, self.batch)),
        )

    def init_kernel(
        self,
        kernel_init: Initializer,
        key: jax.Array,
        shape: tuple[int, ...],
        dtype: jax.typing.DTypeLike,
    ) -> jax.Array:
        if len(shape) != len(self.rhs):
            raise ValueError(
                f"kernel_shape={shape} must have one size for each letter of {self.rhs!r}"
                f" in {self.text!r}"
            )
        size = dict(zip(self.rhs, shape, strict=True))
        order = [*self.batch, *self.contract, *self.rhs_free]
        matrix = kernel_init(
            key,
            (
                *(size[c] for c in self.batch),
                math.prod(size[c] for c in self.contract),
                math.prod(size[c] for c in self.rhs_free),
            ),
            dtype,
        )
        return matrix.reshape([size[c] for c in order]).transpose(
            [order.index(c) for c in self.rhs]
        )

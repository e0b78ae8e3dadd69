"""SwiGLU's activation and its gradient, plain or quantised as computed (arXiv:2002.05202).

  forward    h = silu(gate) up                     -> h, or 8-bit h and h^T
  backward   dgate = dh up s (1 + gate (1 - s)),
             dup = dh gate s,   s = sigmoid(gate)  -> d(gate_up), or 8-bit and its transpose

in float32. Gate and up are the two halves of one matrix, in which groups of columns alternate.
"""

# Shapes: M rows, F hidden columns, g columns of a group.

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.fused import sm90_swiglu
from pallas_kernels.quantize.contract import (
    Implementation,
    Layouts,
    Quantized,
    check_matrix,
    check_options,
    quantize_xla,
    uses_mosaic,
)
from pallas_kernels.quantize.sm90_plan import TilePlan

SUPPORTED_DTYPES = ("bfloat16", "float16")
_XLA_DTYPES = (*SUPPORTED_DTYPES, "float32")


def swiglu(
    gate_up: Array, *, group: int = 128, implementation: Implementation | None = None
) -> Array:
    """Computes silu(gate) * up in float32; differentiable.

    The backward keeps gate_up alone and computes the sigmoid again: left to itself, autodiff writes
    float32 copies of the hidden layer to memory.

    Args:
      gate_up: `[..., 2 F]`, bfloat16 or float16 (float32 too with "xla"), as `[..., F / g, 2, g]`:
        groups of columns of gate, then of up.
      group: g.
      implementation: "xla" runs on any device. "mosaic" needs a Hopper GPU, g = 128, and the
        product M of the leading sizes a multiple of 16; sharded arrays, and None, as in
        `pallas_kernels.quantize`.

    Returns: `[..., F]` in the dtype of gate_up. Implementations differ by the rounding of float32.

    Raises:
      ValueError: if an argument has the wrong shape, dtype or value.
      NotImplementedError: if `implementation` cannot run this call on this device; says why.
    """
    rows = gate_up.reshape(-1, gate_up.shape[-1])
    _check(rows, group)
    if uses_mosaic(implementation, functools.partial(unsupported_reason, rows, group)):
        return _swiglu_mosaic(rows).reshape(*gate_up.shape[:-1], -1)
    return _swiglu_xla(gate_up, group)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _swiglu_xla(gate_up: Array, group: int) -> Array:
    return activation(gate_up, group).astype(gate_up.dtype)


def _swiglu_xla_bwd(group: int, gate_up: Array, grad: Array) -> tuple[Array]:
    # Without the barrier XLA would find the forward pass's sigmoid here, and keep it in memory.
    gate_up, grad = lax.optimization_barrier((gate_up, grad))
    return (gradient(gate_up, grad, group).astype(gate_up.dtype),)


_swiglu_xla.defvjp(lambda gate_up, group: (_swiglu_xla(gate_up, group), gate_up), _swiglu_xla_bwd)


@jax.custom_vjp
def _swiglu_mosaic(gate_up: Array) -> Array:
    return sm90_swiglu.forward_plain(gate_up)


def _swiglu_mosaic_bwd(gate_up: Array, grad: Array) -> tuple[Array]:
    return (sm90_swiglu.backward_plain(gate_up, grad),)


_swiglu_mosaic.defvjp(lambda gate_up: (_swiglu_mosaic(gate_up), gate_up), _swiglu_mosaic_bwd)


def swiglu_quantize(
    gate_up: Array,
    scale: Array,
    *,
    group: int = 128,
    dtype: jax.typing.DTypeLike = jnp.float8_e4m3fn,
    layouts: Layouts = "both",
    implementation: Implementation | None = None,
) -> Quantized:
    """Computes silu(gate) * up and casts it to 8 bits, in one pass over memory.

    Args:
      gate_up: `[M, 2 F]`, bfloat16 or float16 (float32 too with "xla"), as `[M, F / g, 2, g]`:
        groups of columns of gate, then of up.
      scale: float32 `()`, a power of two, of the result.
      group: g.
      dtype: float8_e4m3fn or float8_e5m2.
      layouts: as in `pallas_kernels.quantize`.
      implementation: "xla" runs on any device. "mosaic" needs a Hopper GPU, g = 128, and M a
        multiple of 128 (16 with layouts="rows"); sharded arrays, and None, as in
        `pallas_kernels.quantize`.

    Returns: `[M, F]` in 8 bits, its transpose and its amax. Implementations differ by the rounding
      of float32.

    Raises:
      ValueError: if an argument has the wrong shape, dtype or value.
      NotImplementedError: if `implementation` cannot run this call on this device; says why.
    """
    _check(gate_up, group, scale=scale, dtype=dtype, layouts=layouts)
    plan = functools.partial(sm90_swiglu.forward_plan, gate_up, dtype=dtype, layouts=layouts)
    if uses_mosaic(implementation, lambda: sm90_swiglu.unsupported_reason(plan(), gate_up, group)):
        return sm90_swiglu.forward(gate_up, scale, dtype=dtype, layouts=layouts)
    return quantize_xla(activation(gate_up, group), scale, dtype=dtype, layouts=layouts)


def swiglu_grad_quantize(
    gate_up: Array,
    grad: Array,
    scale: Array,
    *,
    group: int = 128,
    dtype: jax.typing.DTypeLike = jnp.float8_e5m2,
    layouts: Layouts = "both",
    plain: bool = False,
    implementation: Implementation | None = None,
) -> tuple[Quantized, Array | None]:
    """Computes the gradient of silu(gate) * up and casts it to 8 bits, in one pass over memory.

    Args:
      gate_up: as in `swiglu_quantize`.
      grad: `[M, F]`, the gradient of the activation; dtype of gate_up.
      scale: float32 `()`, a power of two, of the result.
      group: as in `swiglu_quantize`.
      dtype: float8_e4m3fn or float8_e5m2.
      layouts: as in `pallas_kernels.quantize`.
      plain: return the unquantised gradient too.
      implementation: as in `swiglu_quantize`.

    Returns: the gradient of gate_up, `[M, 2 F]`, in 8 bits, its transpose and its amax; and the
      gradient in the dtype of gate_up, or None.

    Raises:
      ValueError: if an argument has the wrong shape, dtype or value.
      NotImplementedError: if `implementation` cannot run this call on this device; says why.
    """
    _check(gate_up, group, scale=scale, dtype=dtype, layouts=layouts)
    check_matrix("grad", grad, (gate_up.dtype.name,))
    if (grad.shape[0], 2 * grad.shape[1]) != gate_up.shape:
        raise ValueError(
            f"grad.shape={grad.shape} must be the rows of gate_up.shape={gate_up.shape} and half"
            " its columns"
        )
    options = dict(dtype=dtype, layouts=layouts, plain=plain)
    plan = functools.partial(sm90_swiglu.backward_plan, gate_up, **options)
    if uses_mosaic(implementation, lambda: sm90_swiglu.unsupported_reason(plan(), gate_up, group)):
        return sm90_swiglu.backward(gate_up, grad, scale, **options)
    # Without the barrier XLA would find the forward pass's sigmoid here, and keep it in memory.
    gate_up, grad = lax.optimization_barrier((gate_up, grad))
    result = gradient(gate_up, grad, group)
    quantized = quantize_xla(result, scale, dtype=dtype, layouts=layouts)
    return quantized, result.astype(gate_up.dtype) if plain else None


def unsupported_reason(gate_up: Array | jax.ShapeDtypeStruct, group: int) -> str | None:
    """Why "mosaic" cannot run `swiglu` and its gradient on `[M, 2 F]`, one device's part, on the
    default device; None if it can.
    """
    plans = sm90_swiglu.forward_plan(gate_up), sm90_swiglu.backward_plan(gate_up)
    return _first_reason(plans, gate_up, group)


def quantize_unsupported_reason(
    gate_up: Array | jax.ShapeDtypeStruct, group: int, *, dtype: jax.typing.DTypeLike
) -> str | None:
    """`unsupported_reason` of `swiglu_quantize` and `swiglu_grad_quantize` in both layouts."""
    options: Any = dict(dtype=dtype, layouts="both")
    plans = (
        sm90_swiglu.forward_plan(gate_up, **options),
        sm90_swiglu.backward_plan(gate_up, plain=False, **options),
    )
    return _first_reason(plans, gate_up, group)


def _first_reason(
    plans: tuple[TilePlan, ...], gate_up: Array | jax.ShapeDtypeStruct, group: int
) -> str | None:
    reasons = (sm90_swiglu.unsupported_reason(plan, gate_up, group) for plan in plans)
    return next((reason for reason in reasons if reason is not None), None)


def activation(gate_up: Array, group: int) -> Array:
    """silu(gate) * up by XLA, float32: `[..., 2 F]` to `[..., F]`."""
    gate, up = _split(gate_up, group)
    return (gate * jax.nn.sigmoid(gate) * up).reshape(*gate_up.shape[:-1], -1)


def gradient(gate_up: Array, grad: Array, group: int) -> Array:
    """The gradient of `activation` by XLA, float32: `[..., 2 F]` and `[..., F]` to `[..., 2 F]`."""
    gate, up = _split(gate_up, group)
    grad = grad.reshape(gate.shape).astype(jnp.float32)
    sigmoid = jax.nn.sigmoid(gate)
    dgate = grad * up * sigmoid * (1 + gate * (1 - sigmoid))
    # The same sigmoid, written differently: what both halves of the concatenation share XLA writes
    # to memory first, and each half may as well compute its own.
    dup = grad * gate * (0.5 + 0.5 * jnp.tanh(0.5 * gate))
    return jnp.concatenate([dgate, dup], axis=-2).reshape(gate_up.shape)


def _split(gate_up: Array, group: int) -> list[Array]:
    """Gate and up, float32 `[..., F / g, 1, g]`."""
    pairs = gate_up.reshape(*gate_up.shape[:-1], -1, 2, group)
    return [x.astype(jnp.float32) for x in jnp.split(pairs, 2, axis=-2)]


def _check(gate_up: Array, group: int, **options: Any) -> None:
    """Raises ValueError unless gate_up and the options are what both functions take."""
    check_matrix("gate_up", gate_up, _XLA_DTYPES)
    if options:
        check_options(**options)
    if group < 1 or gate_up.shape[1] % (2 * group):
        raise ValueError(
            f"gate_up.shape[1]={gate_up.shape[1]} must be a multiple of 2 * group={2 * group}:"
            " groups of gate and up columns alternate"
        )

"""RMSNorm, plain or quantised as it is computed (Zhang & Sennrich 2019, arXiv:1910.07467).

rstd = rsqrt(mean(x^2) + eps),   y = x rstd weight   -> y, or 8-bit y and y^T
"""

# Shapes: M rows, K columns.

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.fused import sm90_rmsnorm, sm90_rmsnorm_grad
from pallas_kernels.interpreter import is_interpreting
from pallas_kernels.quantize.contract import (
    Implementation,
    Quantized,
    check_matrix,
    check_options,
    device_reason,
    fold_amax,
    quantize_xla,
    sm_count,
    uses_mosaic,
)
from pallas_kernels.quantize.partition import per_device

SUPPORTED_DTYPES = ("bfloat16", "float16")
RESIDUAL_NAME = "rmsnorm_rstd"
"""`checkpoint_name` of what `rmsnorm_and_cast` keeps besides x: a remat policy that saves it does
not run the kernel again."""


def rmsnorm(
    x: Array, weight: Array, *, eps: float, implementation: Implementation | None = None
) -> tuple[Array, Array]:
    """Normalises the rows of x, in float32; differentiable.

    Args:
      x: `[..., K]`, bfloat16 or float16 (float32 too with "xla").
      weight: float32 `[K]`.
      eps: added to the mean of squares.
      implementation: of the gradient; the forward pass is always XLA's. "xla" runs on any device.
        "mosaic" needs a Hopper GPU and K a multiple of 1024 up to 4096; of an x that is split over
        devices each has whole rows. None as in `pallas_kernels.quantize`.

    Returns: y, `[..., K]` in the dtype of x, and x itself, for a residual connection: a kernel then
      adds the gradients of both uses of x in one pass.

    Raises:
      ValueError: if an argument has the wrong shape, dtype or value.
      NotImplementedError: if `implementation` cannot run this call on this device; says why.
    """
    _check_weight(x, weight)
    if uses_mosaic(implementation, functools.partial(unsupported_reason, x)):
        return _rmsnorm_mosaic(x, weight, eps)
    return _normalise(x, weight, eps)[0], x


def unsupported_reason(x: Array | jax.ShapeDtypeStruct) -> str | None:
    """Why "mosaic" cannot run the gradient of `rmsnorm` on x, one device's part, on the default
    device; None if it can.
    """
    rows = jax.ShapeDtypeStruct((x.size // x.shape[-1], x.shape[-1]), x.dtype)
    return device_reason() or sm90_rmsnorm_grad.unsupported_reason(_grad_plan(rows))


def _normalise(x: Array, weight: Array, eps: float) -> tuple[Array, Array]:
    """y, and rstd float32 `[..., 1]`."""
    y = x.astype(jnp.float32)
    rstd = lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * rstd * weight).astype(x.dtype), rstd


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rmsnorm_mosaic(x: Array, weight: Array, eps: float) -> tuple[Array, Array]:
    return _normalise(x, weight, eps)[0], x


def _rmsnorm_mosaic_fwd(x: Array, weight: Array, eps: float):
    y, rstd = _normalise(x, weight, eps)
    return (y, x), (x, rstd, weight)


def _rmsnorm_mosaic_bwd(eps: float, residuals, grads):
    del eps
    return _gradient_mosaic(*residuals, *grads)


def _gradient_mosaic(x: Array, rstd: Array, weight: Array, dy: Array, g: Array):
    """dx, with g added, and dweight; rstd is `[..., 1]`."""
    rows = [a.reshape(-1, a.shape[-1]) for a in (x, dy, g, rstd)]
    dx, dweight = per_device(
        _launch_grad,
        rows,
        weight,
        ["whole_rows", "sum"],
        widths=(None,) * len(rows),
        result_width=1,
    )
    return dx.reshape(x.shape), dweight


_rmsnorm_mosaic.defvjp(_rmsnorm_mosaic_fwd, _rmsnorm_mosaic_bwd)


def _gradient_xla(x: Array, rstd: Array, weight: Array, dy: Array, g: Array):
    """`_gradient_mosaic` by XLA."""
    normed, dy = x.astype(jnp.float32) * rstd, dy.astype(jnp.float32)
    dy_weight = dy * weight
    c = jnp.mean(dy_weight * normed, axis=-1, keepdims=True)
    dx = g.astype(jnp.float32) + rstd * (dy_weight - normed * c)
    return dx.astype(x.dtype), (dy * normed).reshape(-1, x.shape[-1]).sum(axis=0)


def rmsnorm_and_cast(
    x: Array,
    weight: Array,
    scale: Array,
    *,
    eps: float,
    dtype: jax.typing.DTypeLike,
    implementation: Implementation,
    gradient_implementation: Implementation | None,
) -> tuple[Array, Array, Quantized]:
    """`rmsnorm` and `rmsnorm_quantize` of the same x; differentiable.

    Who uses the 8-bit results alone pays for no 16-bit norm: XLA drops what nobody reads. The
    gradient comes through y; that of the 8-bit results is nothing.

    Args:
      x: `[..., K]`; its rows are all but the last dimension.
      weight: as in `rmsnorm_quantize`.
      scale: as in `rmsnorm_quantize`.
      eps: as in `rmsnorm_quantize`.
      dtype: as in `rmsnorm_quantize`.
      implementation: of the cast, as in `rmsnorm_quantize`.
      gradient_implementation: as in `rmsnorm`.

    Returns: y and x, as from `rmsnorm`; and the cast of y's rows, q and q_t as uint8.

    Raises:
      ValueError: as the two functions.
      NotImplementedError: as the two functions.
    """
    is_mosaic = uses_mosaic(gradient_implementation, functools.partial(unsupported_reason, x))
    static = eps, jnp.dtype(dtype), implementation, is_mosaic
    y, x, q, q_t, amax_bits = _rmsnorm_and_cast(static, x, weight, scale)
    return y, x, Quantized(q, q_t, amax_bits)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rmsnorm_and_cast(static, x, weight, scale):
    return _rmsnorm_and_cast_fwd(static, x, weight, scale)[0]


def _rmsnorm_and_cast_fwd(static, x, weight, scale):
    eps, dtype, implementation, _ = static
    rows = x.reshape(-1, x.shape[-1])
    cast, rstd = rmsnorm_quantize(
        rows, weight, scale, eps=eps, dtype=dtype, implementation=implementation
    )
    rstd = checkpoint_name(rstd.reshape(*x.shape[:-1], 1), RESIDUAL_NAME)
    y = (x.astype(jnp.float32) * rstd * weight).astype(x.dtype)
    assert cast.q is not None and cast.q_t is not None
    # As bytes they have no gradient; one of 8 bits would be no number to add.
    q, q_t = (lax.bitcast_convert_type(a, jnp.uint8) for a in (cast.q, cast.q_t))
    return (y, x, q, q_t, cast.amax_bits), (x, rstd, weight)


def _rmsnorm_and_cast_bwd(static, residuals, grads):
    gradient = _gradient_mosaic if static[3] else _gradient_xla
    return *gradient(*residuals, *grads[:2]), None


_rmsnorm_and_cast.defvjp(_rmsnorm_and_cast_fwd, _rmsnorm_and_cast_bwd)


def _launch_grad(x: Array, dy: Array, g: Array, rstd: Array, weight: Array) -> tuple[Array, Array]:
    dx, dweight = sm90_rmsnorm_grad.launch(_grad_plan(x), x, dy, g, rstd[:, 0], weight)
    return dx, dweight.sum(axis=0)


def _grad_plan(x: Array | jax.ShapeDtypeStruct) -> sm90_rmsnorm_grad.RmsNormGradPlan:
    return sm90_rmsnorm_grad.RmsNormGradPlan(
        rows=x.shape[0],
        columns=x.shape[1],
        dtype=x.dtype,
        sm_count=sm_count(),
        interpret=is_interpreting(),
    )


def rmsnorm_quantize(
    x: Array,
    weight: Array,
    scale: Array,
    *,
    eps: float,
    dtype: jax.typing.DTypeLike = jnp.float8_e4m3fn,
    implementation: Implementation | None = None,
) -> tuple[Quantized, Array]:
    """Normalises the rows of a matrix and casts the result to 8 bits, reading it once.

    Args:
      x: `[M, K]`, bfloat16 or float16 (float32 too with "xla").
      weight: float32 `[K]`.
      scale: float32 `()`, a power of two, of the result.
      eps: added to the mean of squares.
      dtype: float8_e4m3fn or float8_e5m2.
      implementation: "xla" runs on any device. "mosaic" needs a Hopper GPU, M a multiple of 128 and
        K a multiple of 64; of an x that is split over devices each has whole rows, and M is that of
        its part. None as in `pallas_kernels.quantize`.

    Returns: the result in 8 bits, its transpose and its amax; and rstd, float32 `[M]`, for the
      backward pass. Implementations differ by the rounding of float32.

    Raises:
      ValueError: if an argument has the wrong shape, dtype or value.
      NotImplementedError: if `implementation` cannot run this call on this device; says why.
    """
    check_matrix("x", x, (*SUPPORTED_DTYPES, "float32"))
    check_options(scale=scale, dtype=dtype, layouts="both")
    _check_weight(x, weight)
    if uses_mosaic(implementation, functools.partial(quantize_unsupported_reason, x, dtype=dtype)):
        q, q_t, rstd, amax_bits = per_device(
            functools.partial(_launch_quantize, eps, dtype),
            (x,),
            jnp.concatenate([weight, scale[None]]),
            ["whole_rows", "whole_columns", "row_values", "parts"],
            widths=(None,),
            result_width=1,
        )
        return Quantized(q, q_t, amax_bits), rstd
    x = x.astype(jnp.float32)
    rstd = lax.rsqrt(jnp.mean(x * x, axis=1) + eps)
    return quantize_xla(x * rstd[:, None] * weight, scale, dtype=dtype, layouts="both"), rstd


def quantize_unsupported_reason(
    x: Array | jax.ShapeDtypeStruct, *, dtype: jax.typing.DTypeLike
) -> str | None:
    """Why "mosaic" cannot run `rmsnorm_quantize` on x, one device's part, on the default device;
    None if it can.
    """
    # eps is a number of the kernel, not of its shape.
    return device_reason() or sm90_rmsnorm.unsupported_reason(make_plan(x, eps=1.0, dtype=dtype))


def _check_weight(x: Array, weight: Array) -> None:
    if weight.shape != (x.shape[-1],) or weight.dtype != jnp.float32:
        raise ValueError(
            f"weight is {weight.dtype}{list(weight.shape)}, must be float32[{x.shape[-1]}] for"
            f" x.shape={x.shape}"
        )


def make_plan(
    x: Array | jax.ShapeDtypeStruct,
    *,
    eps: float,
    dtype: jax.typing.DTypeLike,
    config: sm90_rmsnorm.RmsNormConfig | None = None,
) -> sm90_rmsnorm.RmsNormPlan:
    """The kernel's plan for x, `[M, K]`."""
    return sm90_rmsnorm.RmsNormPlan(
        rows=x.shape[0],
        columns=x.shape[1],
        eps=eps,
        input_dtype=x.dtype,
        dtype=dtype,
        config=config or sm90_rmsnorm.config_for(x.shape[1]),
        sm_count=sm_count(),
        interpret=is_interpreting(),
    )


def _launch_quantize(
    eps: float, dtype: jax.typing.DTypeLike, x: Array, weight_and_scale: Array
) -> tuple[Array, Array, Array, Array]:
    plan = make_plan(x, eps=eps, dtype=dtype)
    reason = sm90_rmsnorm.unsupported_reason(plan)
    if reason is not None:
        raise NotImplementedError(f"implementation='mosaic' cannot run one device's part: {reason}")
    q, q_t, rstd, amax = sm90_rmsnorm.launch(plan, x, weight_and_scale[:-1], weight_and_scale[-1])
    return q, q_t, rstd, fold_amax(amax)

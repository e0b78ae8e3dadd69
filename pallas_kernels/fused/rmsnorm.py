"""RMSNorm, quantised as it is computed (Zhang & Sennrich 2019, arXiv:1910.07467).

rstd = rsqrt(mean(x^2) + eps),   y = x rstd weight   -> 8-bit y and y^T
"""

# Shapes: M rows, K columns.

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AxisType

from pallas_kernels.fused import sm90_rmsnorm
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

SUPPORTED_DTYPES = ("bfloat16", "float16")


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
        K a multiple of 64; with several devices call it under `jax.shard_map`, because a row must
        be whole. None leaves the choice.

    Returns: the result in 8 bits, its transpose and its amax; and rstd, float32 `[M]`, for the
      backward pass. Implementations differ by the rounding of float32.

    Raises:
      ValueError: if an argument has the wrong shape, dtype or value.
      NotImplementedError: if `implementation` cannot run this call on this device; says why.
    """
    check_matrix("x", x, (*SUPPORTED_DTYPES, "float32"))
    check_options(scale=scale, dtype=dtype, layouts="both")
    if weight.shape != (x.shape[1],) or weight.dtype != jnp.float32:
        raise ValueError(
            f"weight is {weight.dtype}{list(weight.shape)}, must be float32[{x.shape[1]}] for"
            f" x.shape={x.shape}"
        )
    reason = plan = None
    if implementation == "mosaic":
        plan = make_plan(x, eps=eps, dtype=dtype)
        reason = _unsupported_reason(plan)
    if uses_mosaic(implementation, reason):
        assert plan is not None
        q, q_t, rstd, amax = sm90_rmsnorm.launch(plan, x, weight, scale)
        return Quantized(q, q_t, fold_amax(amax)), rstd
    x = x.astype(jnp.float32)
    rstd = lax.rsqrt(jnp.mean(x * x, axis=1) + eps)
    return quantize_xla(x * rstd[:, None] * weight, scale, dtype=dtype, layouts="both"), rstd


def make_plan(
    x: Array,
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


def _unsupported_reason(plan: sm90_rmsnorm.RmsNormPlan) -> str | None:
    reason = device_reason() or sm90_rmsnorm.unsupported_reason(plan)
    is_manual = AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types
    if reason is None and jax.device_count() > 1 and not (is_manual or is_interpreting()):
        return (
            f"x may be split over {jax.device_count()} devices, and XLA would gather it on each;"
            " call it under jax.shard_map"
        )
    return reason

"""`fp8_matmul`: checks the arguments, picks an implementation, and calls it."""

# Shapes: M rows of lhs, N rows of rhs_t, K contracted.

from typing import get_args

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.interpreter import is_interpreting
from pallas_kernels.matmul import config as matmul_config
from pallas_kernels.matmul import sm90
from pallas_kernels.matmul.config import Accumulation, MatmulConfig, MatmulPlan
from pallas_kernels.matmul.partition import per_device
from pallas_kernels.quantize.contract import (
    FORMATS,
    Implementation,
    check_matrix,
    device_reason,
    sm_count,
    uses_mosaic,
)

OUT_DTYPES = ("bfloat16", "float32")


def fp8_matmul(
    lhs: Array,
    rhs_t: Array,
    scale: Array,
    *,
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
    accumulation: Accumulation = "fast",
    implementation: Implementation | None = None,
) -> Array:
    """Multiplies two matrices of 8-bit floats: scale * (lhs . rhs_t^T).

    The result is rounded once.

    Args:
      lhs: `[M, K]`, float8_e4m3fn or float8_e5m2.
      rhs_t: `[N, K]`, the same; not both E5M2.
      scale: float32 `()`, the product of both operands' scales; a power of two, so that it rounds
        nothing.
      out_dtype: bfloat16 or float32.
      accumulation: "fast" leaves sums to the tensor cores, which keep about 14 bits of them
        (`lax.Precision.DEFAULT` of a dot on a Hopper GPU); "exact" adds partial sums in float32
        (`lax.Precision.HIGHEST`).
      implementation: "xla" runs on any device; on a Hopper GPU it is cuBLASLt. "mosaic" needs a
        Hopper GPU, K a multiple of 128 (exact: 256), M of 8, and N of 64 for bfloat16 or of 32 for
        float32; of sharded matrices each device multiplies its own parts, for which the same holds.
        None leaves the choice, which is XLA until the kernel has been measured on a GPU.

    Returns: `[M, N]`.

    Raises:
      ValueError: if an argument has the wrong shape, dtype or value.
      NotImplementedError: if `implementation` cannot run this call on this device; says why.

    Reference: Micikevicius et al. 2022, arXiv:2209.05433.
    """
    _check(lhs, rhs_t, scale, out_dtype)
    if accumulation not in get_args(Accumulation):
        raise ValueError(f"{accumulation=} must be one of {get_args(Accumulation)}")
    if uses_mosaic(implementation or "xla", device_reason):
        return matmul_mosaic(lhs, rhs_t, scale, out_dtype=out_dtype, accumulation=accumulation)
    return matmul_xla(lhs, rhs_t, scale, out_dtype=out_dtype, accumulation=accumulation)


def matmul_xla(
    lhs: Array,
    rhs_t: Array,
    scale: Array,
    *,
    out_dtype: jax.typing.DTypeLike,
    accumulation: Accumulation = "fast",
) -> Array:
    """The product by XLA, which folds the scale into cuBLASLt's call."""
    precision = lax.Precision.DEFAULT if accumulation == "fast" else lax.Precision.HIGHEST
    numbers = (((1,), (1,)), ((), ()))
    out = lax.dot_general(
        lhs, rhs_t, numbers, precision=precision, preferred_element_type=out_dtype
    )
    return out * scale.astype(out_dtype)


def matmul_mosaic(
    lhs: Array,
    rhs_t: Array,
    scale: Array,
    *,
    out_dtype: jax.typing.DTypeLike,
    accumulation: Accumulation = "fast",
    config: MatmulConfig | None = None,
) -> Array:
    """The product by the kernel, on each device's part of sharded matrices."""

    def local(lhs: Array, rhs_t: Array, scale: Array) -> Array:
        plan = make_plan(lhs, rhs_t, out_dtype, accumulation, config)
        reason = matmul_config.unsupported_reason(plan)
        if reason is not None:
            raise NotImplementedError(f"implementation='mosaic' cannot run: {reason}")
        return sm90.launch(plan, lhs, rhs_t, scale)

    return per_device(local, lhs, rhs_t, scale)


def make_plan(
    lhs: Array,
    rhs_t: Array,
    out_dtype: jax.typing.DTypeLike,
    accumulation: Accumulation = "fast",
    config: MatmulConfig | None = None,
) -> MatmulPlan:
    """The plan for lhs `[M, K]` and rhs_t `[N, K]`."""
    (m, k), n = lhs.shape, rhs_t.shape[0]
    return MatmulPlan(
        m=m,
        n=n,
        k=k,
        lhs_dtype=lhs.dtype,
        rhs_dtype=rhs_t.dtype,
        out_dtype=jnp.dtype(out_dtype),
        config=config or matmul_config.config_for(m, n, k, out_dtype, accumulation),
        accumulation=accumulation,
        sm_count=sm_count(),
        interpret=is_interpreting(),
    )


def _check(lhs: Array, rhs_t: Array, scale: Array, out_dtype: jax.typing.DTypeLike) -> None:
    check_matrix("lhs", lhs, FORMATS)
    check_matrix("rhs_t", rhs_t, FORMATS)
    if lhs.shape[1] != rhs_t.shape[1]:
        raise ValueError(
            f"lhs.shape={lhs.shape} and rhs_t.shape={rhs_t.shape} must agree in their last"
            " dimension, which is contracted; transpose the operand that has it first"
        )
    if lhs.dtype == rhs_t.dtype == jnp.float8_e5m2:
        raise ValueError(
            "lhs.dtype and rhs_t.dtype must not both be float8_e5m2, which cuBLASLt does not"
            " multiply; cast one to float8_e4m3fn"
        )
    if scale.shape != () or scale.dtype != jnp.float32:
        raise ValueError(
            f"scale is {scale.dtype}{list(scale.shape)}, must be float32[]: the product of both"
            " operands' scales"
        )
    if jnp.dtype(out_dtype).name not in OUT_DTYPES:
        raise ValueError(f"out_dtype={jnp.dtype(out_dtype).name} must be one of {OUT_DTYPES}")

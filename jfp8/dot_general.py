"""The differentiable FP8 dot; the one place where scaling state rides a cotangent.

lhs [M, K] and rhs [K, N] (or [B, M, K] and [B, K, N]) are cast to 8 bits once, and three GEMMs use
the casts:

    fwd    out [M, N] = lhs  . rhs       contracts K   fast accumulation
    dgrad  dlhs[M, K] = grad . rhs^T     contracts N   exact accumulation
    wgrad  drhs[K, N] = lhs^T . grad     contracts M   exact accumulation; M is all the tokens

Each is a direct FP8 `lax.dot_general` times a scalar. XLA would also accept a 16-bit dot of
dequantised values, but where its pattern does not match it *silently* runs in 16 bits. Scales are
powers of two, so the multiplication after the GEMM is exact in the dtype of its output; XLA folds
it into the GEMM.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding

from jfp8.gemms import (
    DGRAD,
    FAST,
    FWD,
    WGRAD,
    CastInput,
    CastKernel,
    cast,
    decided,
    dgrad_gemm,
    explicit_sharding,
    forward_gemm,
    from_bytes,
    gemm,
    lhs_of,
    matrix_shape,
    replicated,
    rhs_of,
    same_varying,
    save_for_dgrad,
    save_for_wgrad,
    wgrad_dtype,
    wgrad_gemm,
)
from jfp8.quantize import observe, sampled_elements
from jfp8.recipe import Recipe
from jfp8.scaling import GRAD, LHS, RHS, ScalingState
from jfp8.validation import validate_operands, validated_state

RESIDUAL_NAMES = ("fp8_lhs", "fp8_rhs", "fp8_statistics")
"""`checkpoint_name`s of what the backward pass needs; with a remat policy that saves them, such as
`jax.checkpoint_policies.save_only_these_names(*RESIDUAL_NAMES)`, it recomputes no GEMM."""

type DotDimensionNumbers = tuple[
    tuple[Sequence[int], Sequence[int]], tuple[Sequence[int], Sequence[int]]
]


@dataclasses.dataclass(frozen=True, slots=True)
class _Static:
    """What the custom_vjp knows at trace time."""

    recipe: Recipe
    lhs_dtype: np.dtype
    rhs_dtype: np.dtype
    # Of a mesh with explicit axes, where JAX asks how a contraction over a sharded dimension ends.
    lhs_sharding: NamedSharding | None
    rhs_sharding: NamedSharding | None


def dot_general(
    lhs: jax.Array,
    rhs: jax.Array,
    dimension_numbers: DotDimensionNumbers,
    state: ScalingState | None,
    *,
    recipe: Recipe,
    kernel_cast: CastKernel | None = None,
    lhs_cast: CastInput | None = None,
) -> jax.Array:
    """Multiplies `lhs` and `rhs` in FP8; differentiable.

    out ~= quantize(lhs) . quantize(rhs) * (scale_lhs * scale_rhs); the backward GEMMs use the same
    casts and the quantised gradient. The gradient with respect to `state` is the *observation* of
    the step for `jfp8.update`; add or average it like any other gradient.

    Args:
      lhs: bfloat16 or float32; an activation.
      rhs: bfloat16 or float32, not necessarily as lhs: a float32 master weight is quantised
        directly.
      dimension_numbers: as in `jax.lax.dot_general`. For an FP8 recipe the contracted size K and
        the products M and N of the free sizes of lhs and rhs are multiples of 16.
      state: of this dot (`jfp8.init_state`), unstacked. The bf16 recipe ignores it, and takes None.
      recipe: static.
      kernel_cast: `jfp8.cast_kernel(rhs, state, recipe)`, to cast a kernel once for several dots.
        rhs, `[K, N]`, is then read for its gradient's sake alone.
      lhs_cast: of lhs, `[..., K]`, contracted in its last dimension, as `jfp8.rmsnorm_cast` makes
        it; lhs is then there for its gradient alone.

    Returns: batch, free lhs and free rhs dimensions, as `jax.lax.dot_general`, in `lhs.dtype`. The
      derivatives have the dtypes of lhs and rhs, straight from the accumulators of the GEMMs unless
      `recipe.weight_grad_dtype` rounds that of rhs.

    Raises:
      ValueError: for a dtype, a size or a state that the recipe cannot take.

    Reference: Micikevicius et al. 2022, arXiv:2209.05433.
    """
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = dimension_numbers
    lhs_free = _free(lhs, lhs_contract, lhs_batch)
    rhs_free = _free(rhs, rhs_contract, rhs_batch)
    batch, free_m = _sizes(lhs, lhs_batch), _sizes(lhs, lhs_free)
    free_n = _sizes(rhs, rhs_free)
    m, k, n = math.prod(free_m), math.prod(_sizes(lhs, lhs_contract)), math.prod(free_n)
    validate_operands(lhs, rhs, recipe, m=m, k=k, n=n)
    if kernel_cast is not None and (rhs.ndim != 2 or tuple(rhs_contract) != (0,) or rhs_batch):
        raise ValueError(
            f"kernel_cast is for rhs [K, N], contracted in its dimension 0; rhs.shape={rhs.shape}"
            f" and dimension_numbers={dimension_numbers}: leave it out"
        )
    if lhs_cast is not None and (tuple(lhs_contract) != (lhs.ndim - 1,) or lhs_batch):
        raise ValueError(
            f"lhs_cast is for lhs [..., K], contracted in its last dimension; lhs.shape={lhs.shape}"
            f" and dimension_numbers={dimension_numbers}: leave it out"
        )
    leading = (math.prod(batch),) if batch else ()
    # cuBLASLt's FP8 GEMM has one contracted and one free dimension per operand.
    lhs = lhs.transpose(*lhs_batch, *lhs_free, *lhs_contract).reshape(*leading, m, k)
    rhs = rhs.transpose(*rhs_batch, *rhs_contract, *rhs_free).reshape(*leading, k, n)
    shardings = explicit_sharding(lhs), explicit_sharding(rhs)
    grad = jax.ShapeDtypeStruct((*leading, m, n), lhs.dtype)
    if recipe.quantize_implementation == "auto" and lhs_cast is not None:
        # A kernel made it: wgrad contracts its columns with those of the gradient.
        recipe = dataclasses.replace(recipe, quantize_implementation="mosaic")
    recipe = decided(recipe, lhs, rhs, grad)
    static = _Static(recipe, lhs.dtype, rhs.dtype, *shardings)
    if recipe.quantizes:
        state = validated_state(state, recipe)
        leaves, structure = jax.tree.flatten((kernel_cast, lhs_cast))
        lhs, rhs, scale, probe, *leaves = same_varying(
            lhs, rhs, state.scale, state.observation, *leaves
        )
        casts = jax.tree.unflatten(structure, leaves)
        out = _fp8_matmul(static, lhs, rhs, scale, probe, *casts)
    else:
        out = _bf16_matmul(static, *same_varying(lhs, rhs))
    return out.reshape(*batch, *free_m, *free_n)


def _free(operand: jax.Array, contract: Sequence[int], batch: Sequence[int]) -> list[int]:
    return [d for d in range(operand.ndim) if d not in contract and d not in batch]


def _sizes(operand: jax.Array, dimensions: Sequence[int]) -> tuple[int, ...]:
    return tuple(operand.shape[d] for d in dimensions)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fp8_matmul(
    static: _Static,
    lhs: jax.Array,
    rhs: jax.Array,
    scale: jax.Array,
    probe: jax.Array,
    kernel_cast: CastKernel | None,
    lhs_cast: CastInput | None,
) -> jax.Array:
    del probe
    # Without a backward pass each operand is needed in one layout.
    cast_lhs = lhs_of(lhs, lhs_cast, scale[LHS], static.recipe, layouts="rows")
    if kernel_cast is None:
        cast_rhs = cast(rhs, scale[RHS], RHS, static.recipe, layouts="columns")
    else:
        cast_rhs = rhs_of(rhs, kernel_cast, scale[RHS], static.recipe)
    implementation = static.recipe.gemm_implementation
    return forward_gemm(cast_lhs, cast_rhs, static.lhs_dtype, implementation)


def _fp8_fwd(
    static: _Static,
    lhs: jax.Array,
    rhs: jax.Array,
    scale: jax.Array,
    probe: jax.Array,
    kernel_cast: CastKernel | None,
    lhs_cast: CastInput | None,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    del probe  # only its cotangent matters
    with jax.named_scope("fp8_dot/quantize_lhs"):
        cast_lhs = lhs_of(lhs, lhs_cast, scale[LHS], static.recipe)
    with jax.named_scope("fp8_dot/quantize_rhs"):
        cast_rhs = rhs_of(rhs, kernel_cast, scale[RHS], static.recipe)
    cast_lhs, saved_lhs = save_for_wgrad(cast_lhs, "fp8_lhs")
    cast_rhs, saved_rhs = save_for_dgrad(cast_rhs, "fp8_rhs")
    # Two small arrays, not six: each costs a kernel of its own in a scan.
    seen = checkpoint_name(
        jnp.stack([replicated(cast_lhs.seen), replicated(cast_rhs.seen)]), "fp8_statistics"
    )
    scale = checkpoint_name(
        jnp.stack([cast_lhs.scale, cast_rhs.scale, scale[GRAD]]), "fp8_statistics"
    )
    with jax.named_scope("fp8_dot/fwd"):
        implementation = static.recipe.gemm_implementation
        out = forward_gemm(cast_lhs, cast_rhs, static.lhs_dtype, implementation)
    return out, (saved_lhs, saved_rhs, scale, seen)


def _fp8_bwd(
    static: _Static, residuals: tuple[jax.Array, ...], grad: jax.Array
) -> tuple[jax.Array, jax.Array, None, jax.Array, None, None]:
    saved_lhs, saved_rhs, scale, seen = residuals
    recipe = static.recipe
    q_lhs, q_rhs = from_bytes(saved_lhs, LHS, recipe), from_bytes(saved_rhs, RHS, recipe)
    with jax.named_scope("fp8_dot/quantize_grad"):
        cast_grad = cast(grad, scale[GRAD], GRAD, recipe)
    with jax.named_scope("fp8_dot/dgrad"):
        dlhs = dgrad_gemm(
            cast_grad,
            q_rhs,
            scale[RHS],
            static.lhs_dtype,
            static.lhs_sharding,
            recipe.gemm_implementation,
        )
    with jax.named_scope("fp8_dot/wgrad"):
        dtype = wgrad_dtype(recipe, static.rhs_dtype)
        drhs = wgrad_gemm(
            q_lhs, scale[LHS], cast_grad, dtype, static.rhs_sharding, recipe.gemm_implementation
        )
        drhs = drhs.astype(static.rhs_dtype)
    with jax.named_scope("fp8_dot/observe"):
        counted = (
            sampled_elements(*matrix_shape(q_lhs, transposed=cast_grad.columns is not None)),
            sampled_elements(*matrix_shape(q_rhs)),
            sampled_elements(*matrix_shape(grad)),
        )
        seen = jnp.concatenate([seen, replicated(cast_grad.seen)[None]])
        observation = observe(seen, counted, recipe.formats)
    return dlhs, drhs, None, observation, None, None


_fp8_matmul.defvjp(_fp8_fwd, _fp8_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _bf16_matmul(static: _Static, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    return _bf16_fwd(static, lhs, rhs)[0]


def _bf16_fwd(
    static: _Static, lhs: jax.Array, rhs: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    with jax.named_scope("bf16_dot/fwd"):
        out = gemm(lhs, rhs.astype(lhs.dtype), FWD, static.lhs_dtype, FAST)
    return out, (lhs, rhs)


def _bf16_bwd(
    static: _Static, residuals: tuple[jax.Array, jax.Array], grad: jax.Array
) -> tuple[jax.Array, jax.Array]:
    lhs, rhs = residuals
    with jax.named_scope("bf16_dot/dgrad"):
        dlhs = gemm(
            grad, rhs.astype(grad.dtype), DGRAD, static.lhs_dtype, FAST, static.lhs_sharding
        )
    with jax.named_scope("bf16_dot/wgrad"):
        dtype = wgrad_dtype(static.recipe, static.rhs_dtype)
        drhs = gemm(lhs, grad, WGRAD, dtype, FAST, static.rhs_sharding)
        drhs = drhs.astype(static.rhs_dtype)
    return dlhs, drhs


_bf16_matmul.defvjp(_bf16_fwd, _bf16_bwd)

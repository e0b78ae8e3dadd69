"""The three GEMMs of a dot on 8-bit operands, and the casts that make those.

Hopper's tensor cores read 8-bit operands along the contracted dimension only, so an operand is
needed as it is for one GEMM and transposed for another:

    fwd    lhs rows,   rhs columns        dgrad   grad rows, rhs rows
    wgrad  lhs columns, grad columns

With `Recipe.quantize_implementation="mosaic"` one kernel writes both layouts. With "xla" a cast has
rows alone, and XLA transposes the 8-bit rows where a GEMM needs columns. All operands of a dot are
cast by the same of the two: `decided` settles which before the first one is.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType, NamedSharding, PartitionSpec, reshard

import pallas_kernels
from jfp8.formats import E4M3
from jfp8.quantize import current_scale, group_amax_bits, quantize, statistics
from jfp8.recipe import GemmImplementation, Recipe
from jfp8.scaling import LHS, RHS, ScalingState
from pallas_kernels.matmul.config import Accumulation
from pallas_kernels.quantize.api import unsupported_reason as mosaic_cast_reason
from pallas_kernels.quantize.contract import Layouts, sees_parts

# Contracted dimension of each operand as [.., rows, columns], and accumulation of FP8 GEMMs.
FWD, DGRAD, WGRAD = (-1, -2), (-1, -1), (-2, -2)
FAST, EXACT = lax.Precision.DEFAULT, lax.Precision.HIGHEST
_LAST = (-1, -1)  # of operands that are already as the tensor cores read them

Matrix = jax.Array | jax.ShapeDtypeStruct


def decided(recipe: Recipe, *operands: Matrix, unsupported_reason: str | None = None) -> Recipe:
    """The recipe with a `quantize_implementation` that is not "auto".

    Args:
      recipe: of a dot.
      operands: what the dot casts, both layouts of each; of a stack of matrices "auto" is "xla",
        for a kernel would start once for each of them.
      unsupported_reason: another reason against "mosaic".
    """
    if recipe.quantize_implementation != "auto":
        return recipe
    is_mosaic = recipe.quantizes and unsupported_reason is None and sees_parts()
    for x in operands if is_mosaic else ():
        # The format of a slot makes no difference to the kernel.
        is_mosaic &= x.ndim == 2 and mosaic_cast_reason(x, dtype=E4M3.dtype) is None
    return dataclasses.replace(recipe, quantize_implementation="mosaic" if is_mosaic else "xla")


class Cast(NamedTuple):
    """An 8-bit tensor, `[M, K]` or `[B, M, K]`."""

    rows: jax.Array | None
    """As the tensor."""
    columns: jax.Array | None
    """Transposed, `[.., K, M]`; None with XLA."""
    scale: jax.Array
    """float32 `()`: x ~= q * scale."""
    seen: jax.Array
    """Its `jfp8.quantize.statistics`."""


def cast(
    x: jax.Array, scale: jax.Array, slot: int, recipe: Recipe, *, layouts: Layouts = "both"
) -> Cast:
    """Casts x, `[M, K]` or `[B, M, K]`, to the format of its slot.

    Args:
      x: bfloat16 or float32.
      scale: float32 `()`, of the state; NaN if it is not calibrated.
      slot: LHS, RHS or GRAD.
      recipe: says which scale is used, and who casts; `decided`.
      layouts: the kernel writes only these; XLA ignores it.
    """
    assert recipe.quantize_implementation != "auto", "nobody decided who casts"
    format = recipe.formats[slot]
    rows = _rows(x)
    scale, amax_bits = chosen_scale(rows, scale, slot, recipe)
    if recipe.quantize_implementation == "mosaic":
        run = lambda x: pallas_kernels.quantize(  # noqa: E731
            x, scale, dtype=format.dtype, layouts=layouts, implementation="mosaic"
        )
        q = run(x) if x.ndim == 2 else jax.vmap(run)(x)
        amax_bits = q.amax_bits if x.ndim == 2 else q.amax_bits.max(axis=0)
        return Cast(q.q, q.q_t, scale, statistics(rows, amax_bits, scale, format))
    if amax_bits is None:
        amax_bits = group_amax_bits(rows)
    q = _materialize(quantize(x, scale, format))
    return Cast(q, None, scale, statistics(rows, amax_bits, scale, format))


class CastKernel(NamedTuple):
    """A kernel cast once for several dots; 8-bit values as bytes (see `as_bytes`)."""

    rows: jax.Array
    """uint8 `[K, N]`."""
    columns: jax.Array | None
    """uint8 `[N, K]`; None with XLA."""
    scale: jax.Array
    """float32 `()`."""
    seen: jax.Array
    """Its `jfp8.quantize.statistics`."""


def cast_kernel(kernel: jax.Array, state: ScalingState, recipe: Recipe) -> CastKernel:
    """Casts a kernel before the dots that use it, such as those of several microbatches.

    Args:
      kernel: `[K, N]`, bfloat16 or float32.
      state: of the dot; the scale is that of its rhs.
      recipe: of the dot; not bf16.
    """
    q = cast(kernel, state.scale[RHS], RHS, decided(recipe, kernel))
    assert q.rows is not None
    columns = None if q.columns is None else as_bytes(q.columns)
    return CastKernel(as_bytes(q.rows), columns, q.scale, q.seen)


class CastInput(NamedTuple):
    """A dot's lhs that was cast as it was computed; 8-bit values as bytes (see `as_bytes`)."""

    rows: jax.Array
    """uint8 `[M, K]`."""
    columns: jax.Array | None
    """uint8 `[K, M]`; None with XLA."""
    scale: jax.Array
    """float32 `()`."""
    seen: jax.Array
    """Its `jfp8.quantize.statistics`."""


def lhs_of(
    lhs: jax.Array,
    prepared: CastInput | None,
    scale: jax.Array,
    recipe: Recipe,
    *,
    layouts: Layouts = "both",
) -> Cast:
    """The cast of a dot's lhs: the prepared one, or a new one."""
    if prepared is None:
        return cast(lhs, scale, LHS, recipe, layouts=layouts)
    columns = None if prepared.columns is None else from_bytes(prepared.columns, LHS, recipe)
    return Cast(from_bytes(prepared.rows, LHS, recipe), columns, prepared.scale, prepared.seen)


def rhs_of(
    kernel: jax.Array, prepared: CastKernel | None, scale: jax.Array, recipe: Recipe
) -> Cast:
    """The cast of a dot's rhs: the prepared one, or a new one."""
    if prepared is None:
        return cast(kernel, scale, RHS, recipe)
    columns = None if prepared.columns is None else from_bytes(prepared.columns, RHS, recipe)
    rows = from_bytes(prepared.rows, RHS, recipe)
    return Cast(rows, columns, prepared.scale, prepared.seen)


def chosen_scale(
    rows: jax.Array, scale: jax.Array, slot: int, recipe: Recipe
) -> tuple[jax.Array, jax.Array | None]:
    """The scale to cast with, and `group_amax_bits(rows)` if choosing it took them."""
    if recipe.name != "current" and recipe.calibration == "explicit":
        return scale, None
    # Keeps XLA from taking the maximum of the groups' maxima as one more reduction of x.
    amax_bits = lax.optimization_barrier(group_amax_bits(rows))
    own_scale = current_scale(amax_bits, recipe.formats[slot])
    if recipe.name == "current":
        return own_scale, amax_bits
    return jnp.where(jnp.isnan(scale), own_scale, scale), amax_bits


def forward_gemm(
    lhs: Cast, rhs: Cast, dtype: np.dtype, implementation: GemmImplementation = "xla"
) -> jax.Array:
    """lhs . rhs, `[.., M, N]`, by what `Recipe.gemm_implementation` says."""
    assert lhs.rows is not None
    if implementation != "xla":
        scale = lhs.scale * rhs.scale
        return _mosaic_gemm(lhs.rows, _columns(rhs), scale, dtype, "fast")
    if rhs.columns is None:
        assert rhs.rows is not None
        out = gemm(lhs.rows, rhs.rows, FWD, dtype, FAST)
    else:
        out = gemm(lhs.rows, rhs.columns, _LAST, dtype, FAST)
    return out * (lhs.scale * rhs.scale).astype(dtype)


def _mosaic_gemm(
    lhs: jax.Array,
    rhs_t: jax.Array,
    scale: jax.Array,
    dtype: np.dtype,
    accumulation: Accumulation,
    sharding: NamedSharding | None = None,
) -> jax.Array:
    def run(lhs: jax.Array, rhs_t: jax.Array) -> jax.Array:
        return pallas_kernels.fp8_matmul(
            lhs, rhs_t, scale, out_dtype=dtype, accumulation=accumulation, implementation="mosaic"
        )

    out = run(lhs, rhs_t) if lhs.ndim == 2 else jax.vmap(run)(lhs, rhs_t)
    return out if sharding is None else reshard(out, sharding)


def _columns(operand: Cast) -> jax.Array:
    """The transpose, `[.., K, M]`; where nobody has written it, XLA does, in 8 bits."""
    if operand.columns is not None:
        return operand.columns
    assert operand.rows is not None
    return operand.rows.swapaxes(-1, -2)


def dgrad_gemm(
    grad: Cast,
    q_rhs: jax.Array,
    rhs_scale: jax.Array,
    dtype: np.dtype,
    sharding: NamedSharding | None = None,
    implementation: GemmImplementation = "xla",
) -> jax.Array:
    """grad . rhs^T, `[.., M, K]`; `q_rhs` as `save_for_dgrad` left it."""
    assert grad.rows is not None
    if implementation == "mosaic":
        scale = grad.scale * rhs_scale
        return _mosaic_gemm(grad.rows, q_rhs, scale, dtype, "exact", sharding)
    out = gemm(grad.rows, q_rhs, DGRAD, dtype, EXACT, sharding)
    return out * (grad.scale * rhs_scale).astype(dtype)


def wgrad_gemm(
    q_lhs: jax.Array,
    lhs_scale: jax.Array,
    grad: Cast,
    dtype: np.dtype,
    sharding: NamedSharding | None = None,
    implementation: GemmImplementation = "xla",
) -> jax.Array:
    """lhs^T . grad, `[.., K, N]`; `q_lhs` as `save_for_wgrad` left it."""
    if implementation == "mosaic":
        columns = q_lhs.swapaxes(-1, -2) if grad.columns is None else q_lhs
        scale = lhs_scale * grad.scale
        return _mosaic_gemm(columns, _columns(grad), scale, dtype, "exact", sharding)
    if grad.columns is None:
        assert grad.rows is not None
        out = gemm(q_lhs, grad.rows, WGRAD, dtype, EXACT, sharding)
    else:
        out = gemm(q_lhs, grad.columns, _LAST, dtype, EXACT, sharding)
    return out * (lhs_scale * grad.scale).astype(dtype)


def wgrad_dtype(recipe: Recipe, rhs_dtype: np.dtype) -> np.dtype:
    """What the GEMM of the gradient of rhs writes."""
    is_narrow = recipe.weight_grad_dtype == "bfloat16"
    return np.dtype(jnp.bfloat16) if is_narrow else rhs_dtype


def gemm(
    a: jax.Array,
    b: jax.Array,
    contract: tuple[int, int],
    dtype: np.dtype,
    precision: lax.Precision,
    sharding: NamedSharding | None = None,
) -> jax.Array:
    """Contracts one dimension of each of two matrices (or stacks), accumulating in float32."""
    batch = tuple(range(a.ndim - 2))
    return lax.dot_general(
        a,
        b,
        (((a.ndim + contract[0],), (b.ndim + contract[1],)), (batch, batch)),
        precision=precision,
        preferred_element_type=dtype,
        out_sharding=sharding,
    )


def save_for_wgrad(lhs: Cast, name: str) -> tuple[Cast, jax.Array]:
    """Names what wgrad needs of lhs, as bytes; returns lhs made of that, and it."""
    if lhs.columns is not None:
        return lhs, checkpoint_name(as_bytes(lhs.columns), name)
    return save_for_dgrad(lhs, name)


def save_for_dgrad(operand: Cast, name: str) -> tuple[Cast, jax.Array]:
    """Like `save_for_wgrad`, for what dgrad needs of rhs: its rows."""
    assert operand.rows is not None
    saved = checkpoint_name(as_bytes(operand.rows), name)
    return operand._replace(rows=lax.bitcast_convert_type(saved, operand.rows.dtype)), saved


def as_bytes(q: jax.Array) -> jax.Array:
    """What is kept for the backward pass.

    `jax.checkpoint` passes every float that it saves through lax.reduce_precision, which takes E4M3
    for a format with an infinity and so makes a NaN of each value above 240 (JAX 0.11.2).
    """
    return lax.bitcast_convert_type(q, jnp.uint8)


def from_bytes(saved: jax.Array, slot: int, recipe: Recipe) -> jax.Array:
    """The inverse of `as_bytes`."""
    return lax.bitcast_convert_type(saved, recipe.formats[slot].dtype)


def matrix_shape(x: jax.Array, *, transposed: bool = False) -> tuple[int, int]:
    """Rows, those of a stack together, and columns of x or of its transpose."""
    *_, rows, columns = x.shape
    if transposed:
        rows, columns = columns, rows
    return x.size // columns, columns


def same_varying(*operands: jax.Array) -> tuple[jax.Array, ...]:
    """Under shard_map makes every operand vary over the same mesh axes.

    The transpose of that cast is a psum of the cotangent: of an observation, the maximum over the
    devices.
    """
    axes = frozenset[str]().union(*map(_varying, operands))
    return tuple(
        lax.pcast(x, tuple(sorted(axes - _varying(x))), to="varying") if axes - _varying(x) else x
        for x in operands
    )


def _varying(x: jax.Array) -> frozenset[str]:
    aval = jax.typeof(x)
    # JAX 0.11.2 keeps the axes under `.mat`; releases before and after it say `.vma`.
    return aval.mat.varying if hasattr(aval, "mat") else aval.vma


def explicit_sharding(x: jax.Array) -> NamedSharding | None:
    """The sharding of x on a mesh with explicit axes; None on any other."""
    sharding = jax.typeof(x).sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None


def replicated(x: jax.Array) -> jax.Array:
    """x, whole on every device of a mesh with explicit axes."""
    sharding = explicit_sharding(x)
    return x if sharding is None else reshard(x, NamedSharding(sharding.mesh, PartitionSpec()))


def _rows(x: jax.Array) -> jax.Array:
    return x.reshape(-1, x.shape[-1])


def _materialize(q: jax.Array) -> jax.Array:
    """Makes XLA:GPU store q row-major, and transpose the 8-bit q where a GEMM needs it so.

    Left alone, XLA moves the transpose through the cast: it transposes the whole stack of float32
    weights of a scan, and then cannot fuse the amax with the cast (docs/fp8_state.md has the
    passes). For gradients it casts and transposes in one kernel, which on an H200 ran at 1.2 TB/s,
    and takes the amax in another; cast with amax, then an 8-bit transpose at 2.5 TB/s, is faster.
    """
    return lax.optimization_barrier(with_layout_constraint(q, Layout(tuple(range(q.ndim)))))

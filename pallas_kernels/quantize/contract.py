"""What the quantising kernels share: their result, its XLA reference, and which of the two runs."""

# Shapes: M rows, K columns.

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType

from pallas_kernels import hardware
from pallas_kernels.interpreter import is_interpreting

Implementation = Literal["mosaic", "xla"]
Layouts = Literal["both", "rows", "columns"]
FORMATS = ("float8_e4m3fn", "float8_e5m2")
AMAX_PARTS = 128
"""Numbers that an amax is returned as. Sharded tensors divide them among their devices."""


class Quantized(NamedTuple):
    """An 8-bit tensor, its transpose, and its amax."""

    q: Array | None
    """`[M, K]`, or None if `layouts="columns"`: operand of a GEMM that contracts K."""
    q_t: Array | None
    """`[K, M]`, exactly `q.T`, or None if `layouts="rows"`: operand of a GEMM that contracts M."""
    amax_bits: Array
    """int32 `[128]`: their maximum is the bits of amax as float32. Infinities and NaN are on top:
    it is at least 0x7F800000 if the tensor holds one. Before quantisation, so not divided by
    scale."""


def quantize_rows(x: Array, scale: Array, dtype: Any) -> Array:
    """Rounds x / scale to 8 bits, saturating; infinities and NaN become NaN, and -0 becomes 0."""
    largest = float(jnp.finfo(dtype).max)
    scaled = x.astype(jnp.float32) * (1 / scale)
    # inf - inf is NaN: clipping alone would hide an infinity.
    return (jnp.clip(scaled, -largest, largest) + (scaled - scaled)).astype(dtype)


def quantize_xla(x: Array, scale: Array, *, dtype: Any, layouts: Layouts) -> Quantized:
    """Quantises `[M, K]` with XLA, on any device."""
    q = quantize_rows(x, scale, dtype)
    # Pinned: XLA would cast and transpose in one slow kernel, and take the amax in another.
    q = lax.optimization_barrier(with_layout_constraint(q, Layout((0, 1))))
    return Quantized(
        q=None if layouts == "columns" else q,
        q_t=None if layouts == "rows" else q.T,
        amax_bits=amax_bits(x),
    )


def amax_bits(x: Array) -> Array:
    """`Quantized.amax_bits` of `[M, K]`.

    As integers the bits of non-negative floats sort like the floats, NaN on top.
    """
    magnitude = lax.bitcast_convert_type(jnp.abs(x.astype(jnp.float32)), jnp.int32)
    groups = math.gcd(x.shape[0], AMAX_PARTS)
    parts = magnitude.reshape(groups, -1, x.shape[1]).max(axis=(1, 2))
    return jnp.pad(parts, (0, AMAX_PARTS - groups))


def fold_amax(partial: Array) -> Array:
    """`Quantized.amax_bits` from the maxima, float32 `[P]`, of the programs of a kernel."""
    bits = lax.bitcast_convert_type(jnp.abs(partial), jnp.int32)
    return jnp.pad(bits, (0, -bits.size % AMAX_PARTS)).reshape(-1, AMAX_PARTS).max(axis=0)


def device_reason() -> str | None:
    """Why no sm_90 kernel runs on the default device; None if one does."""
    is_hopper, found = hardware.require_sm90()
    if is_hopper or is_interpreting():
        return None
    return f"the kernel is for Hopper, but {found}; use implementation='xla'"


def sm_count() -> int:
    """Multiprocessors of the default device; those of an H200 if it is not in the table."""
    if is_interpreting():
        return 2  # so that one of them walks through several tiles
    facts = hardware.gpu_facts(hardware.current_device_kind())
    return facts.sm_count if facts else 132


def sees_parts() -> bool:
    """Whether an array being traced is what one device has: on one device, or inside shard_map."""
    # The interpreter's callbacks cannot be partitioned; it is for single devices' tests.
    axis_types = jax.sharding.get_abstract_mesh().axis_types
    return AxisType.Manual in axis_types or is_interpreting() or jax.device_count() == 1


def uses_mosaic(
    implementation: Implementation | None, unsupported_reason: Callable[[], str | None]
) -> bool:
    """Whether the kernel runs.

    Args:
      implementation: asked for. None takes the kernel where it can run and `sees_parts`: how the
        partitioner will split an array, and so whether the kernel takes its parts, is not known
        while it is traced.
      unsupported_reason: says why the kernel cannot run, or None; not asked for "xla".

    Raises:
      ValueError: for another name.
      NotImplementedError: if the kernel is asked for and cannot run; says why.
    """
    if implementation not in (*get_args(Implementation), None):
        raise ValueError(f"{implementation=} must be one of {(*get_args(Implementation), None)}")
    if implementation is None:
        return sees_parts() and unsupported_reason() is None
    if implementation == "xla":
        return False
    reason = unsupported_reason()
    if reason is not None:
        raise NotImplementedError(f"implementation='mosaic' cannot run: {reason}")
    return True


def check_options(*, scale: Array, dtype: Any, layouts: str) -> None:
    """Raises ValueError for a scale, a format or layouts that no implementation takes."""
    if scale.shape != () or scale.dtype != jnp.float32:
        raise ValueError(
            f"scale is {scale.dtype}{list(scale.shape)}, must be float32[]: one power of two for"
            " the tensor"
        )
    if jnp.dtype(dtype).name not in FORMATS:
        raise ValueError(f"dtype={jnp.dtype(dtype).name} must be one of {FORMATS}")
    if layouts not in get_args(Layouts):
        raise ValueError(f"{layouts=} must be one of {get_args(Layouts)}")


def check_matrix(name: str, x: jax.Array, dtypes: tuple[str, ...]) -> None:
    """Raises ValueError unless x is a matrix of one of the dtypes."""
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"{name}.shape={x.shape} must be [rows, columns], not empty; reshape it")
    if x.dtype.name not in dtypes:
        raise ValueError(f"{name}.dtype={x.dtype} must be one of {dtypes}; cast it")

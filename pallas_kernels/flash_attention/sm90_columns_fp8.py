"""Operands of the FP8 attention kernels for sm_90a: rows and columns from one read of a tensor.

For each head of x `[B, L, heads, H]`:
  rows[l] = round8(x[l] * row_factor[l]),        columns[:, p] = round8(x[l] * factor[l])
with position p of l as `fp8.permute_16` or `fp8.permute_28` puts it. Without this kernel XLA casts,
and then transposes 8-bit numbers in a pass of its own.

A CTA of one warpgroup takes 128 rows and up to 128 channels of a head, as two halves of 64 rows in
the registers of a wgmma accumulator. Two rows make one of 16-bit units, which stmatrix transposes:
  permute_28  a half is 64 rows in a row; a thread holds rows g and g + 8 of every 16: a unit
  permute_16  the halves are the even and the odd rows, the unit a row of each; units 4a + t of
              every 8 must go to 2t + a, which is a shuffle between the lanes of a warp
Several CTAs share an SM, so that loads, conversions and stores of different tiles overlap.

Not supported: head dims other than 64, 128, 256; taking the maximum, which scales need beforehand.
"""

# Shapes: B batch, L length, H head dim.

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from pallas_kernels.flash_attention import fp8
from pallas_kernels.mosaic import (
    MATRIX,
    PER_ROW,
    ROWS,
    launcher,
    smem_tile,
    store_transposed_8_bits,
)
from pallas_kernels.quantize.sm90_tiles import pack_pairs

TILE_ROWS = 2 * ROWS
"""Rows of one CTA."""
Order = Literal[16, 28]
"""`fp8.permute_16` or `fp8.permute_28`."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Everything static about one launch."""

    shape: tuple[int, ...]
    """Of x: B, L, heads, H; L a multiple of 16."""
    input_dtype: Any
    """Of x: 16 or 8 bits."""
    dtype: Any
    """Of the results: 8 bits."""
    order: Order
    """In which the columns are."""
    writes_rows: bool
    """Whether rows are wanted too."""
    interpret: bool = False
    """Run in the CPU interpreter."""

    @property
    def channels(self) -> int:
        """Of one tile: more would not fit the registers."""
        return min(self.shape[3], 128)

    @property
    def num_tiles(self) -> int:
        """Tiles along L; the last may reach beyond it."""
        return pl.cdiv(self.shape[1], TILE_ROWS)


def _unit_positions(units: Array) -> Array:
    """Moves row 4a + t of every 8 rows of units to row 2t + a: a shuffle among lanes."""

    @plgpu.inline_mgpu(
        arg_types=(MATRIX,),
        return_type=plgpu.ShapeDtypeStruct(units.shape, units.dtype, MATRIX),
    )
    def shuffle(_: Any, units: Any) -> Any:
        i32 = ir.IntegerType.get_signless(32)
        # Lane 4g + c holds row g of every 8: row 2t + a comes from 4a + t.
        source = """{
            .reg .b32 lane, row, from, column;
            mov.u32 lane, %laneid;
            shr.u32 row, lane, 2;
            and.b32 from, row, 1;
            shl.b32 from, from, 2;
            shr.u32 row, row, 1;
            add.u32 from, from, row;
            shl.b32 from, from, 2;
            and.b32 column, lane, 3;
            add.u32 $0, from, column;
            }"""
        lane: Any = llvm.inline_asm(i32, [], source, "=r")
        registers = units.registers.copy()
        for index in np.ndindex(*registers.shape):
            pair = registers[index]
            word = mgpu.utils.bitcast(pair, i32)
            moved: Any = llvm.inline_asm(
                i32,
                [word, lane],
                "shfl.sync.idx.b32 $0, $1, $2, 0x1f, 0xffffffff;",
                "=r,r,r",
                has_side_effects=True,
            )
            registers[index] = mgpu.utils.bitcast(moved, pair.type)
        return mgpu.FragmentedArray(_registers=registers, _layout=units.layout, _is_signed=None)

    return shuffle(units)


def store_columns(
    halves: tuple[Array, Array], columns: Any, dtype: Any, order: Order, *, interpret: bool
) -> None:
    """Rounds the two halves of a tile, `[ROWS, H]` float32, and stores them transposed.

    Args:
      halves: rows 0 to 63 and the others for order 28, even and odd rows for order 16.
      columns: shared memory of `columns_type`.
      dtype: 8 bits.
      order: of the columns.
      interpret: use the twin in plain JAX.
    """
    targets = columns if interpret else columns[0][0]
    if order == 28:
        for a, value in enumerate(halves):
            store_transposed_8_bits(value, targets.at[a], dtype, interpret=interpret)
    elif interpret:
        natural = jnp.stack(halves, axis=1).reshape(TILE_ROWS, -1)
        targets.at[0][...] = round_saturating(fp8.permute_16(natural, 0).T, dtype, interpret=True)
    else:
        units = _unit_positions(pack_pairs(halves[0], halves[1], dtype))
        targets.at[0].transpose((1, 0))[...] = units


def send_columns(columns: Any, target: Any, tile: Array, order: Order, *, interpret: bool) -> None:
    """Starts the TMA stores of what `store_columns` stored to `target`, `[H, L]`."""
    sources = columns if interpret else columns[1][0]
    parts = 2 if order == 28 else 1
    width = TILE_ROWS // parts
    for a in range(parts):
        positions = pl.ds(tile * TILE_ROWS + a * width, width)
        plgpu.copy_smem_to_gmem(sources.at[a], target.at[:, positions])


def columns_type(channels: int, dtype: Any, order: Order, *, interpret: bool) -> Any:
    """Shared memory of a tile's columns, as bytes and as units of 16 bits."""
    # permute_28 fills two halves, permute_16 one whole.
    parts, width = (2, ROWS) if order == 28 else (1, TILE_ROWS)
    as_bytes = smem_tile((parts, channels, width), dtype)
    as_units = smem_tile((parts, channels, width // 2), jnp.bfloat16)
    return as_bytes if interpret else plgpu.RefUnion((as_units,), (as_bytes,))


def _scratch_types(plan: Plan) -> dict[str, Any]:
    """The shared-memory plan."""
    h = plan.channels

    types = {
        "x": smem_tile((2, ROWS, h), plan.input_dtype),
        "factors": plgpu.SMEM((1 + plan.writes_rows, 2, ROWS), jnp.float32),
        "columns": columns_type(h, plan.dtype, plan.order, interpret=plan.interpret),
        "full": plgpu.Barrier(num_arrivals=3),  # TMA -> this warpgroup: x, factors
    }
    if plan.writes_rows:
        types["rows"] = smem_tile((2, ROWS, h), plan.dtype)
    return types


def _kernel(
    *refs: Any, plan: Plan, x: Any, factors: Any, columns: Any, full: Any, rows: Any = None
):
    """One tile."""
    x_gmem, factors_gmem, columns_gmem, *rows_gmem = refs
    heads = jnp.int32(plan.shape[2])
    tile, index = lax.axis_index("tile"), lax.axis_index("head")
    batch, head = lax.div(index, heads), lax.rem(index, heads)
    channels = pl.ds(lax.axis_index("channels") * plan.channels, plan.channels)

    def half(ref: Any, a: int) -> Any:
        """The 64 rows of a half in `[B, L / 2, 2, heads, H]`, or in `[B, L, heads, H]`."""
        if plan.order == 16:
            return ref.at[batch, pl.ds(tile * ROWS, ROWS), a, head, channels]
        return ref.at[batch, pl.ds(tile * TILE_ROWS + a * ROWS, ROWS), head, channels]

    for a in (0, 1):
        plgpu.copy_gmem_to_smem(half(x_gmem, a), x.at[a], full)
    plgpu.copy_gmem_to_smem(factors_gmem.at[batch, head, tile], factors, full)
    plgpu.barrier_wait(full)

    def times(value: Array, which: int, a: int) -> Array:
        factor = plgpu.load(factors.at[which, a], layout=PER_ROW)
        return value * lax.broadcast_in_dim(factor, value.shape, [0])

    values = [plgpu.load(x.at[a], layout=MATRIX).astype(jnp.float32) for a in (0, 1)]
    if plan.writes_rows:
        for a, value in enumerate(values):
            rows.at[a][...] = round_saturating(
                times(value, 1, a), plan.dtype, interpret=plan.interpret
            )
    scaled = times(values[0], 0, 0), times(values[1], 0, 1)
    store_columns(scaled, columns, plan.dtype, plan.order, interpret=plan.interpret)
    plgpu.commit_smem()
    if plan.writes_rows:
        for a in (0, 1):
            plgpu.copy_smem_to_gmem(rows.at[a], half(rows_gmem[0], a))
    target = columns_gmem.at[batch, head, channels]
    send_columns(columns, target, tile, plan.order, interpret=plan.interpret)
    plgpu.wait_smem_to_gmem(0)


def round_saturating(x: Array, dtype: Any, *, interpret: bool) -> Array:
    """Rounds to 8 bits; on the GPU the conversion itself saturates."""
    if interpret:
        largest = float(jnp.finfo(dtype).max)
        x = jnp.clip(x, -largest, largest)
    return x.astype(dtype)


@launcher("dtype", "order", "interpret")
def columns_and_rows(
    x: Array,
    factor: Array,
    *,
    dtype: Any,
    order: Order,
    row_factor: Array | None = None,
    interpret: bool = False,
) -> tuple[Array, Array | None]:
    """Runs the kernel.

    Args:
      x: `[B, L, heads, H]`, bfloat16, float16 or 8 bits.
      factor: `[B, heads, L]`, float32: on each row of the columns.
      dtype: of the results: float8_e4m3fn or float8_e5m2.
      order: of the columns.
      row_factor: like factor, on the rows; None if these are not wanted.
      interpret: run in the CPU interpreter.

    Returns:
      Columns `[B, heads, H, L rounded up to 128]`, zero beyond L, and rows like x or None.
    """
    batch, length, heads, h = x.shape
    padding = -length % 16  # whole groups of the permutations
    x = jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) if padding else x
    plan = Plan(
        shape=x.shape,
        input_dtype=x.dtype,
        dtype=jnp.dtype(dtype),
        order=order,
        writes_rows=row_factor is not None,
        interpret=interpret,
    )
    padded = plan.num_tiles * TILE_ROWS
    factors = jnp.stack([factor] if row_factor is None else [factor, row_factor], axis=2)
    factors = jnp.pad(factors, ((0, 0), (0, 0), (0, 0), (0, padded - length)))
    factors = factors.reshape(*factors.shape[:3], plan.num_tiles, TILE_ROWS).swapaxes(2, 3)
    if order == 16:  # even rows, then odd ones
        factors = factors.reshape(*factors.shape[:4], ROWS, 2).swapaxes(4, 5)
    factors = factors.reshape(*factors.shape[:4], 2, ROWS)
    view = (batch, x.shape[1] // 2, 2, heads, h) if order == 16 else x.shape
    out_type = [jax.ShapeDtypeStruct((batch, heads, h, padded), plan.dtype)]
    if row_factor is not None:
        out_type.append(jax.ShapeDtypeStruct(view, plan.dtype))
    columns, *rows = plgpu.kernel(
        functools.partial(_kernel, plan=plan),
        out_type=tuple(out_type),
        scratch_types=_scratch_types(plan),
        # The last axis is the fastest: heads lie side by side in memory.
        grid=(plan.num_tiles, batch * heads, h // plan.channels),
        grid_names=("tile", "head", "channels"),
        kernel_name=f"fp8_columns_{order}",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
    )(x.reshape(view), factors)
    if row_factor is None:
        return columns, None
    return columns, rows[0].reshape(x.shape)[:, :length]

"""What a kernel of the tile loop computes and how it cuts its work: shapes, memory, limits."""

# Shapes: M rows, K columns, C columns of a tile, W warpgroups, S stages, P programs (CTAs).

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hardware import SM90_SMEM_BYTES_PER_BLOCK
from pallas_kernels.mosaic import (
    GMEM_ROWS,
    ROWS,
    SMEM_ALIGNMENT,
    SMEM_OVERHEAD,
    tile_transforms,
)
from pallas_kernels.quantize.contract import Layouts

TILE_ROWS = 2 * ROWS
"""Rows of a tile: even and odd ones, a wgmma's worth of each."""
PAIR_GROUP = 128
"""Gate and up columns alternate in groups of this many."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TileConfig:
    """How a kernel cuts its work; changes no bit of the result."""

    tile_columns: int = 128
    """Columns of a tile."""
    warpgroups: int = 2
    """Warpgroups of a CTA, each with its own tiles and buffers."""
    ctas_per_sm: int = 1
    """CTAs that share a multiprocessor."""
    stages: int = 1
    """Tiles of input in flight per warpgroup."""
    out_slots: int = 1
    """Tiles of output in flight per warpgroup."""

    def __post_init__(self) -> None:
        if self.tile_columns not in (64, 128):
            raise ValueError(
                f"{self.tile_columns=} must be 64 or 128, the widths of 8-bit swizzles"
            )
        for name in ("warpgroups", "ctas_per_sm", "stages", "out_slots"):
            if getattr(self, name) < 1:
                raise ValueError(f"TileConfig.{name}={getattr(self, name)} must be at least 1")


class Slab(NamedTuple):
    """Which columns of an array a tile stands for."""

    array: int = 0
    """Index among the arrays."""
    half: int | None = None
    """None: the tile's own columns. 0 or 1: those of gate or up in an array of twice the width, in
    which groups of `PAIR_GROUP` columns of each alternate."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TilePlan:
    """Shapes, types and semantics of one kernel."""

    name: str
    """Of the kernel, in profiles."""
    rows: int
    """M."""
    columns: int
    """K, the width of what is computed."""
    inputs: tuple[Slab, ...]
    """Where the arguments of the computation are."""
    input_dtype: Any
    """Of all arrays."""
    halves: tuple[int | None, ...] = (None,)
    """Where its results go: `Slab.half` of each."""
    dtype: Any
    """8-bit type of q and q_t."""
    layouts: Layouts | Literal["none"] = "both"
    """Which of q ("rows") and q_t ("columns") are written; with "none" no amax is taken either."""
    plain_dtype: Any = None
    """Type of the unquantised result, or None if it is not written."""
    config: TileConfig
    """How the work is cut."""
    sm_count: int = 132
    """Multiprocessors."""
    interpret: bool = False
    """Run in the CPU interpreter."""

    @property
    def programs(self) -> int:
        """P: persistent CTAs, no more than there are tiles."""
        tiles = -(-self.num_tiles // self.config.warpgroups)
        return min(self.sm_count * self.config.ctas_per_sm, tiles)

    @property
    def num_tiles(self) -> int:
        """Tiles of 128 rows and C columns."""
        return -(-self.rows // TILE_ROWS) * (self.columns // self.config.tile_columns)

    @property
    def row_multiple(self) -> int:
        """M must be a multiple of it: global arrays are made of whole tiles of shared memory."""
        return TILE_ROWS if self.layouts in ("both", "columns") else 2 * GMEM_ROWS

    @property
    def outputs(self) -> dict[str, jax.ShapeDtypeStruct]:
        """What the kernel writes; arrays of rows as [M / 2, 2, columns]."""
        width = self.columns * len(self.halves)
        struct = jax.ShapeDtypeStruct
        types = {}
        if self.layouts != "none":
            types["amax"] = struct((self.programs,), jnp.float32)
        if self.layouts in ("both", "rows"):
            types["q"] = struct((self.rows // 2, 2, width), self.dtype)
        if self.layouts in ("both", "columns"):
            types["q_t"] = struct((width, self.rows), self.dtype)
        if self.plain_dtype is not None:
            types["plain"] = struct((self.rows // 2, 2, width), self.plain_dtype)
        return types


def scratch_types(plan: TilePlan) -> dict[str, Any]:
    """The shared-memory plan: the single source of the allocation and of `smem_bytes`."""
    config, columns = plan.config, plan.config.tile_columns
    wgs, stages, slots = config.warpgroups, config.stages, config.out_slots
    count = len(plan.halves)
    width = jnp.dtype(plan.input_dtype).itemsize

    def rows_buffer(*leading: int, dtype: Any) -> Any:
        itemsize = jnp.dtype(dtype).itemsize
        transforms = tile_transforms(itemsize)
        if itemsize == 1:
            transforms = (plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(columns))
        return plgpu.SMEM((*leading, 2, ROWS, columns), dtype, transforms=transforms)

    types = {
        "x": rows_buffer(len(plan.inputs), wgs, stages, dtype=plan.input_dtype),
        "full": plgpu.Barrier(num_arrivals=2 * len(plan.inputs), num_barriers=wgs * stages),
    }
    if "amax" in plan.outputs:
        types["row_max"] = plgpu.SMEM((wgs, ROWS), jnp.float32)
        types["reduced"] = plgpu.Barrier(num_arrivals=wgs)
    if "q" in plan.outputs:
        types["q"] = rows_buffer(count, wgs, slots, dtype=plan.dtype)
    if "plain" in plan.outputs:
        types["plain"] = rows_buffer(count, wgs, slots, dtype=plan.plain_dtype)
    if "q_t" in plan.outputs:
        types["q_t"] = _transposed_buffer(plan, (count, wgs, slots))
    assert width in (2, 4), f"{plan.input_dtype=} has no kernel"
    return types


def _transposed_buffer(plan: TilePlan, leading: tuple[int, ...]) -> Any:
    """[C, 128] bytes, and the same bytes as [C, 64] units of 16 bits."""
    columns = plan.config.tile_columns
    as_bytes = plgpu.SMEM((*leading, columns, TILE_ROWS), plan.dtype, transforms=tile_transforms(1))
    if plan.interpret:
        return as_bytes
    as_units = plgpu.SMEM((*leading, columns, ROWS), jnp.bfloat16, transforms=tile_transforms(2))
    return plgpu.RefUnion((as_units,), (as_bytes,))


def smem_bytes(plan: TilePlan) -> int:
    """Shared memory of one CTA, barriers included."""
    buffers = barriers = 0
    for entry in scratch_types(dataclasses.replace(plan, interpret=True)).values():
        if isinstance(entry, plgpu.Barrier):
            barriers += 8 * int(np.prod(entry.num_barriers))
        else:
            size = math.prod(entry.shape) * jnp.dtype(entry.dtype).itemsize
            buffers += -(-size // SMEM_ALIGNMENT) * SMEM_ALIGNMENT
    return buffers + barriers + SMEM_OVERHEAD


def unsupported_reason(plan: TilePlan) -> str | None:
    """Why the kernel cannot run this shape or config; None if it can."""
    columns = plan.config.tile_columns
    smem = smem_bytes(plan) * plan.config.ctas_per_sm
    # Offsets in TMA descriptors and Mosaic's indices are int32.
    widest = max(len(plan.halves), 1 + max(slab.half is not None for slab in plan.inputs))
    rules = (
        (
            plan.rows % plan.row_multiple == 0,
            f"the {plan.rows} rows must be a multiple of {plan.row_multiple}; pad them",
        ),
        (
            plan.columns % columns == 0,
            f"the {plan.columns} columns must be a multiple of {columns}; pad them",
        ),
        (
            plan.rows * plan.columns * widest < 2**31,
            f"{plan.rows} x {plan.columns * widest} elements do not fit int32; split the rows",
        ),
        (
            smem <= SM90_SMEM_BYTES_PER_BLOCK,
            f"{plan.config} needs {smem} bytes of shared memory; there are"
            f" {SM90_SMEM_BYTES_PER_BLOCK}",
        ),
    )
    return next((reason for holds, reason in rules if not holds), None)

"""The cast to 8 bits for sm_90a: q = round8(x / scale), q_t = q^T and amax |x|, x read once.

The tile loop of `sm90_tiles` without any computation in between. Measured as a prototype on an
H200: 84 % of the copy bandwidth at 16384 x 4096, where XLA's cast and transpose reach 37 %.
"""

# Shapes: M rows, K columns.

import functools
from typing import Any

import jax
from jax import Array

from pallas_kernels.interpreter import is_interpreting
from pallas_kernels.quantize import sm90_plan, sm90_tiles
from pallas_kernels.quantize.contract import (
    Layouts,
    Quantized,
    device_reason,
    sm_count,
)
from pallas_kernels.quantize.sm90_plan import Slab, TileConfig, TilePlan


def config_for(columns: int, itemsize: int) -> TileConfig:
    """How to cut a matrix of that many columns and bytes an element."""
    if columns % 128:
        return TileConfig(tile_columns=64, warpgroups=3)
    return TileConfig(tile_columns=128)


def candidates(itemsize: int) -> list[TileConfig]:
    """Configs worth timing; the benchmark checks and times them all."""
    wide = [
        TileConfig(tile_columns=128, warpgroups=2),
        TileConfig(tile_columns=128, warpgroups=1, ctas_per_sm=2),
        TileConfig(tile_columns=64, warpgroups=3),
    ]
    if itemsize == 2:
        wide += [TileConfig(tile_columns=128, warpgroups=2, stages=2)]
    return wide


def make_plan(
    x: Array | jax.ShapeDtypeStruct,
    *,
    dtype: Any,
    layouts: Layouts,
    config: TileConfig | None = None,
) -> TilePlan:
    """The plan for quantising x, `[M, K]`."""
    rows, columns = x.shape
    return TilePlan(
        name="quantize",
        rows=rows,
        columns=columns,
        inputs=(Slab(),),
        input_dtype=x.dtype,
        dtype=dtype,
        layouts=layouts,
        config=config or config_for(columns, x.dtype.itemsize),
        sm_count=sm_count(),
        interpret=is_interpreting(),
    )


def unsupported_reason(plan: TilePlan) -> str | None:
    """Why the kernel cannot run the plan on the default device; None if it can."""
    return device_reason() or sm90_plan.unsupported_reason(plan)


def quantize(
    x: Array, scale: Array, *, dtype: Any, layouts: Layouts, config: TileConfig | None = None
) -> Quantized:
    """Runs the kernel, on each device's part of a sharded x."""
    plan_of = functools.partial(make_plan, dtype=dtype, layouts=layouts, config=config)
    return sm90_tiles.run(plan_of, _unchanged, (x,), scale)[0]


def _unchanged(tile: Array) -> tuple[Array]:
    """Returns what is to be quantised: x itself."""
    return (tile,)

"""What the sm_90 kernels share: memory layouts, and steps that Pallas has no word for.

Each step that is written in the Mosaic GPU dialect has a twin in plain JAX, because the CPU
interpreter runs no dialect code; the GPU tests compare both.
"""

# Shapes: M rows, N columns of a wgmma accumulator.

from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

ROWS = 64
"""Rows of a wgmma instruction: M is a multiple of this."""
SWIZZLE_BYTES = 128
"""One row of a shared-memory tile, and the widest swizzle of TMA and wgmma."""
GMEM_ROWS = 8
"""Lengths of tiled arrays in global memory are multiples of this: the rows of a tile."""
SMEM_ALIGNMENT = 1024
"""Bytes that Mosaic GPU aligns each buffer to: one swizzle pattern."""
SMEM_OVERHEAD = 2048 + 128
"""Bytes that Mosaic GPU adds to the buffers and barriers of a kernel, at most."""
MATRIX = plgpu.Layout.WGMMA
"""Registers of an accumulator: lane l of warp w holds rows 16w + l/4 (+ 8), columns 2 (l % 4) + 8j
(+ 1).
"""
PER_ROW = plgpu.Layout.WGMMA.reduce(1)
"""One value for each row of an accumulator."""
PER_COLUMN = plgpu.Layout.WGMMA.reduce(0)
"""One value for each column of an accumulator."""

_NEG_INF = float("-inf")


def tile_transforms(itemsize: int) -> tuple[Any, Any]:
    """Returns the shared-memory layout that TMA writes and wgmma reads, for elements of `itemsize`
    bytes.
    """
    return (
        plgpu.TilingTransform((8, SWIZZLE_BYTES // itemsize)),
        plgpu.SwizzleTransform(SWIZZLE_BYTES),
    )


def keep_columns(s: Array, first: Array, last: Array, *, interpret: bool) -> Array:
    """Sets s[i, j] to -inf unless first[i] <= j <= last[i].

    Written by hand so that each element costs a comparison with an immediate: column indices made
    with iota are loop invariants, which the compiler keeps in 32 registers or more.

    Args:
      s: `[M, N]`, float32, layout `MATRIX`.
      first: `[M]`, int32, layout `PER_ROW`.
      last: like first.
      interpret: use the twin in plain JAX.
    """
    if interpret:
        column = lax.broadcasted_iota(jnp.int32, s.shape, 1)
        return jnp.where((first[:, None] <= column) & (column <= last[:, None]), s, _NEG_INF)

    @plgpu.inline_mgpu(
        arg_types=(MATRIX, PER_ROW, PER_ROW),
        return_type=plgpu.ShapeDtypeStruct(s.shape, s.dtype, MATRIX),
    )
    def keep(_: Any, s: Any, first: Any, last: Any) -> Any:
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        lane_column = arith.muli(
            arith.remui(mgpu.utils.thread_idx(), mgpu.utils.c(4, i32)), mgpu.utils.c(2, i32)
        )

        def scalars(x: Any) -> list[Any]:
            """The values of this thread's two rows in each 64, relative to its first column."""
            return [arith.subi(vector.extract(r, [], [0]), lane_column) for r in x.registers.flat]

        firsts, lasts = scalars(first), scalars(last)
        neg_inf = mgpu.utils.c(_NEG_INF, f32)
        registers = s.registers.reshape(s.shape[0] // ROWS, s.shape[1] // 8, 2).copy()
        for m, j, half in [
            (m, j, h)
            for m in range(registers.shape[0])
            for j in range(registers.shape[1])
            for h in (0, 1)
        ]:
            low, high = firsts[2 * m + half], lasts[2 * m + half]
            pair = registers[m, j, half]
            for b in (0, 1):
                column = mgpu.utils.c(8 * j + b, i32)
                seen = arith.andi(
                    arith.cmpi(arith.CmpIPredicate.sle, low, column),
                    arith.cmpi(arith.CmpIPredicate.sle, column, high),
                )
                value = arith.select(seen, vector.extract(pair, [], [b]), neg_inf)
                pair = vector.insert(value, pair, [], [b])
            registers[m, j, half] = pair
        return mgpu.FragmentedArray(
            _registers=registers.reshape(s.registers.shape), _layout=s.layout, _is_signed=None
        )

    return keep(s, first, last)

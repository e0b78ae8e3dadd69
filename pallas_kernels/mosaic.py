"""What the sm_90 kernels share: memory layouts, and steps that Pallas has no word for.

Each step that is written in the Mosaic GPU dialect has a twin in plain JAX, because the CPU
interpreter runs no dialect code; the GPU tests compare both.
"""

# Shapes: M rows, N columns of a wgmma accumulator.

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

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


def launcher[F: Callable[..., Any]](*static: str) -> Callable[[F], F]:
    """Jits a function that launches a kernel, with these arguments static.

    So equal calls, one in each layer of a model, share one lowered module. Modules of their own
    would differ in a running number in their names, which makes Mosaic compile each of them.
    """
    return cast(Callable[[F], F], functools.partial(jax.jit, static_argnames=static))


def tile_transforms(itemsize: int, columns: int | None = None) -> tuple[Any, Any]:
    """Returns the shared-memory layout that TMA writes and wgmma reads, for elements of `itemsize`
    bytes; `columns` is the length of a row if it may be shorter than the widest swizzle.
    """
    width = SWIZZLE_BYTES if columns is None else min(SWIZZLE_BYTES, columns * itemsize)
    return plgpu.TilingTransform((8, width // itemsize)), plgpu.SwizzleTransform(width)


def smem_tile(shape: tuple[int, ...], dtype: Any) -> Any:
    """Returns shared memory `[..., rows, columns]` in the layout of `tile_transforms`."""
    transforms = tile_transforms(jnp.dtype(dtype).itemsize, shape[-1])
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def accumulator_as_8_bit_operand(p: Array, dtype: Any, *, interpret: bool) -> Array:
    """Rounds an accumulator to 8 bits as the A operand of the next product, without moving data.

    Thread t of a quad holds columns 8a + 2t + b (a, b = 0, 1) of every 16 as an accumulator, but
    contracts positions 4t .. 4t + 3 of an operand. So position 4t + 2a + b of the result is column
    8a + 2t + b, and the B operand must have its rows in that order (`fp8.permute_16`).

    Args:
      p: `[M, N]`, float32, layout `MATRIX`.
      dtype: of the result, 8 bits.
      interpret: use the twin in plain JAX.
    """
    if interpret:
        split = p.reshape(p.shape[0], -1, 2, 4, 2).swapaxes(2, 3)
        return _saturate(split.reshape(p.shape), dtype)

    @plgpu.inline_mgpu(
        arg_types=(MATRIX,),
        return_type=plgpu.ShapeDtypeStruct(p.shape, p.dtype, plgpu.Layout.WGMMA_8BIT),
    )
    def relabel(_: Any, p: Any) -> Any:
        layout = mgpu.WGMMA_LAYOUT_8BIT
        registers = np.empty(layout.registers_shape(p.shape), dtype=object)
        for index in np.ndindex(registers.shape):
            m, j, *rest = index
            halves = [p.registers[(m, 2 * j + a, *rest)] for a in (0, 1)]
            registers[index] = mgpu.utils.vector_concat(halves)
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return relabel(p).astype(dtype)


_PAIRS_OF_ROWS = plgpu.Layout.TILED(
    plgpu.Tiling(((32, 8), (8, 8), (2,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
)
"""Registers of `[M / 2, N]` units of 16 bits that pair the rows of an accumulator 8 apart."""


def store_transposed_8_bits(x: Array, target: Any, dtype: Any, *, interpret: bool) -> None:
    """Rounds an accumulator to 8 bits and stores it transposed, without moving data between
    threads.

    Rows 8a + g (a = 0, 1) of every 16 rows go to columns 2g + a (`fp8.permute_28`): a thread holds
    both, so they make one 16-bit unit, and stmatrix transposes matrices of such units.

    Args:
      x: `[M, N]`, float32, layout `MATRIX`.
      target: shared memory, `[N, M / 2]` typed bfloat16, or if `interpret` `[N, M]` in `dtype`.
      dtype: of the bytes.
      interpret: use the twin in plain JAX.
    """
    if interpret:
        split = x.reshape(-1, 2, 8, x.shape[1]).swapaxes(1, 2)
        target[...] = _saturate(split.reshape(x.shape).T, dtype)
        return
    name = "e4m3" if jnp.dtype(dtype) == jnp.float8_e4m3fn else "e5m2"
    convert = f"""{{
        .reg .b16 first, second;
        cvt.rn.satfinite.{name}x2.f32 first, $2, $1;
        cvt.rn.satfinite.{name}x2.f32 second, $4, $3;
        mov.b32 $0, {{first, second}};
        }}"""
    shape = (x.shape[0] // 2, x.shape[1])

    @plgpu.inline_mgpu(
        arg_types=(MATRIX,),
        return_type=plgpu.ShapeDtypeStruct(shape, jnp.bfloat16, _PAIRS_OF_ROWS),
    )
    def pack(_: Any, x: Any) -> Any:
        layout = _PAIRS_OF_ROWS.to_mgpu()
        unit_pair = ir.VectorType.get((2,), ir.BF16Type.get())
        source = x.registers.reshape(-1, 2)  # of 8 rows, and of those 8 further down
        units = []
        for low, high in source:
            values = [vector.extract(pair, [], [b]) for b in (0, 1) for pair in (low, high)]
            packed: Any = llvm.inline_asm(
                ir.IntegerType.get_signless(32), values, convert, "=r,f,f,f,f"
            )
            units.append(mgpu.utils.bitcast(packed, unit_pair))
        registers = np.asarray(units, dtype=object).reshape(layout.registers_shape(shape))
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    target.transpose((1, 0))[...] = pack(x)


def _saturate(x: Array, dtype: Any) -> Array:
    """Rounds to 8 bits as the GPU's conversion does."""
    largest = float(jnp.finfo(dtype).max)
    return jnp.clip(x, -largest, largest).astype(dtype)


def divmod_traced(x: Array, divisor: Array) -> tuple[Array, Array]:
    """Divides int32 by a number that the compiler does not know; -1 counts as 0 and rest -1.

    Dozens of instructions fewer than a division of integers, and as exact for x below 2^21: the
    quotient is half a divisor's inverse or more from any integer, more than float32 is off by.
    """
    inverse = 1 / divisor.astype(jnp.float32)
    quotient = ((x.astype(jnp.float32) + 0.5) * inverse).astype(jnp.int32)
    return quotient, x - quotient * divisor


def scratch_bytes(entries: Iterable[Any]) -> int:
    """Returns the shared memory of scratch buffers, unions and barriers; None costs nothing."""

    def size(entry: Any) -> int:
        if entry is None:
            return 0
        if isinstance(entry, plgpu.Barrier):
            return 8 * int(np.prod(entry.num_barriers))
        if isinstance(entry, plgpu.RefUnion):
            return max(sum(map(size, refs)) for refs in entry.refs)
        if isinstance(entry, tuple):
            return sum(map(size, entry))
        buffer = math.prod(entry.shape) * jnp.dtype(entry.dtype).itemsize
        return -(-buffer // SMEM_ALIGNMENT) * SMEM_ALIGNMENT

    return sum(map(size, entries)) + SMEM_OVERHEAD


def keep_columns(s: Array, first: Array | None, last: Array, *, interpret: bool) -> Array:
    """Sets s[i, j] to -inf unless first[i] <= j <= last[i].

    Written by hand so that each element costs a comparison with an immediate: column indices made
    with iota are loop invariants, which the compiler keeps in 32 registers or more.

    Args:
      s: `[M, N]`, float32, layout `MATRIX`.
      first: `[M]`, int32, layout `PER_ROW`; None for no bound, which saves its registers.
      last: like first, never None.
      interpret: use the twin in plain JAX.
    """
    if interpret:
        column = lax.broadcasted_iota(jnp.int32, s.shape, 1)
        seen = column <= last[:, None]
        seen = seen if first is None else seen & (first[:, None] <= column)
        return jnp.where(seen, s, _NEG_INF)
    bounds = (last,) if first is None else (last, first)

    @plgpu.inline_mgpu(
        arg_types=(MATRIX, *(PER_ROW,) * len(bounds)),
        return_type=plgpu.ShapeDtypeStruct(s.shape, s.dtype, MATRIX),
    )
    def keep(_: Any, s: Any, last: Any, first: Any = None) -> Any:
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        lane_column = arith.muli(
            arith.remui(mgpu.utils.thread_idx(), mgpu.utils.c(4, i32)), mgpu.utils.c(2, i32)
        )

        def scalars(x: Any) -> list[Any]:
            """The values of this thread's two rows in each 64, relative to its first column."""
            return [arith.subi(vector.extract(r, [], [0]), lane_column) for r in x.registers.flat]

        lasts = scalars(last)
        firsts = None if first is None else scalars(first)
        neg_inf = mgpu.utils.c(_NEG_INF, f32)
        registers = s.registers.reshape(s.shape[0] // ROWS, s.shape[1] // 8, 2).copy()
        for m, j, half in [
            (m, j, h)
            for m in range(registers.shape[0])
            for j in range(registers.shape[1])
            for h in (0, 1)
        ]:
            pair = registers[m, j, half]
            for b in (0, 1):
                column = mgpu.utils.c(8 * j + b, i32)
                seen = arith.cmpi(arith.CmpIPredicate.sle, column, lasts[2 * m + half])
                if firsts is not None:
                    low = arith.cmpi(arith.CmpIPredicate.sle, firsts[2 * m + half], column)
                    seen = arith.andi(seen, low)
                value = arith.select(seen, vector.extract(pair, [], [b]), neg_inf)
                pair = vector.insert(value, pair, [], [b])
            registers[m, j, half] = pair
        return mgpu.FragmentedArray(
            _registers=registers.reshape(s.registers.shape), _layout=s.layout, _is_signed=None
        )

    return keep(s, *bounds)


def keep_equal(s: Array, row_ids: Array, column_ids: Array, *, interpret: bool) -> Array:
    """Sets s[i, j] to -inf unless row_ids[i] == column_ids[j].

    Written by hand so that each comparison is used at once: as a matrix of its own, the mask is
    kept in registers.

    Args:
      s: `[M, N]`, float32, layout `MATRIX`.
      row_ids: `[M]`, int32, layout `PER_ROW`.
      column_ids: `[N]`, int32, layout `PER_COLUMN`.
      interpret: use the twin in plain JAX.
    """
    if interpret:
        return jnp.where(row_ids[:, None] == column_ids[None, :], s, _NEG_INF)

    @plgpu.inline_mgpu(
        arg_types=(MATRIX, PER_ROW, PER_COLUMN),
        return_type=plgpu.ShapeDtypeStruct(s.shape, s.dtype, MATRIX),
    )
    def keep(_: Any, s: Any, row_ids: Any, column_ids: Any) -> Any:
        neg_inf = mgpu.utils.c(_NEG_INF, ir.F32Type.get())
        rows = [vector.extract(r, [], [0]) for r in row_ids.registers.flat]
        columns = list(column_ids.registers.flat)
        registers = s.registers.reshape(s.shape[0] // ROWS, s.shape[1] // 8, 2).copy()
        for m, j, half in np.ndindex(*registers.shape):
            pair = registers[m, j, half]
            for b in (0, 1):
                same = arith.cmpi(
                    arith.CmpIPredicate.eq, rows[2 * m + half], vector.extract(columns[j], [], [b])
                )
                value = arith.select(same, vector.extract(pair, [], [b]), neg_inf)
                pair = vector.insert(value, pair, [], [b])
            registers[m, j, half] = pair
        return mgpu.FragmentedArray(
            _registers=registers.reshape(s.registers.shape), _layout=s.layout, _is_signed=None
        )

    return keep(s, row_ids, column_ids)


def set_first_column(s: Array, x: Array, *, interpret: bool) -> Array:
    """Sets s[i, 0] to x[i], unless one of both is -inf.

    Args:
      s: `[M, N]`, float32, layout `MATRIX`.
      x: `[M]`, float32, layout `PER_ROW`.
      interpret: use the twin in plain JAX.
    """
    if interpret:
        x, is_first = x[:, None], lax.broadcasted_iota(jnp.int32, s.shape, 1) == 0
        return jnp.where(is_first & (x != _NEG_INF) & (s != _NEG_INF), x, s)

    @plgpu.inline_mgpu(
        arg_types=(MATRIX, PER_ROW), return_type=plgpu.ShapeDtypeStruct(s.shape, s.dtype, MATRIX)
    )
    def put(_: Any, s: Any, x: Any) -> Any:
        rows = [vector.extract(r, [], [0]) for r in x.registers.flat]
        registers = s.registers.reshape(s.shape[0] // ROWS, s.shape[1] // 8, 2).copy()
        is_first = _lane_is_below(4, 1)
        for m, half in np.ndindex(registers.shape[0], 2):
            pair = registers[m, 0, half]
            registers[m, 0, half] = _put_if(is_first, pair, 0, rows[2 * m + half])
        return mgpu.FragmentedArray(
            _registers=registers.reshape(s.registers.shape), _layout=s.layout, _is_signed=None
        )

    return put(s, x)


def set_first_row(s: Array, x: Array, *, interpret: bool) -> Array:
    """Sets s[0, j] to x[j], unless one of both is -inf.

    Args:
      s: `[M, N]`, float32, layout `MATRIX`.
      x: `[N]`, float32, layout `PER_COLUMN`.
      interpret: use the twin in plain JAX.
    """
    if interpret:
        x, is_first = x[None, :], lax.broadcasted_iota(jnp.int32, s.shape, 0) == 0
        return jnp.where(is_first & (x != _NEG_INF) & (s != _NEG_INF), x, s)

    @plgpu.inline_mgpu(
        arg_types=(MATRIX, PER_COLUMN), return_type=plgpu.ShapeDtypeStruct(s.shape, s.dtype, MATRIX)
    )
    def put(_: Any, s: Any, x: Any) -> Any:
        registers = s.registers.reshape(s.shape[0] // ROWS, s.shape[1] // 8, 2).copy()
        is_first = _lane_is_below(mgpu.utils.WARPGROUP_SIZE, 4)
        for j, values in enumerate(x.registers.flat):
            for b in (0, 1):
                value = vector.extract(values, [], [b])
                registers[0, j, 0] = _put_if(is_first, registers[0, j, 0], b, value)
        return mgpu.FragmentedArray(
            _registers=registers.reshape(s.registers.shape), _layout=s.layout, _is_signed=None
        )

    return put(s, x)


def _lane_is_below(group: int, count: int) -> Any:
    """Whether this thread is one of the first `count` of its `group`."""
    i32 = ir.IntegerType.get_signless(32)
    lane = arith.remui(mgpu.utils.thread_idx(), mgpu.utils.c(group, i32))
    return arith.cmpi(arith.CmpIPredicate.ult, lane, mgpu.utils.c(count, i32))


def _put_if(condition: Any, pair: Any, index: int, value: Any) -> Any:
    """Replaces one element of a register if `condition` holds, and neither it nor value is -inf."""
    neg_inf = mgpu.utils.c(_NEG_INF, ir.F32Type.get())
    old = vector.extract(pair, [], [index])
    for x in (old, value):
        condition = arith.andi(condition, arith.cmpf(arith.CmpFPredicate.UNE, x, neg_inf))
    return vector.insert(arith.select(condition, value, old), pair, [], [index])


def partial_row_sums(x: Array, *, interpret: bool) -> Array:
    """Returns what this thread's elements of each row add up to; see `total_row_sums`.

    A sum that a loop carries in parts costs the loop no exchange between threads: on an H200 that
    made the forward attention kernel 8 % faster.

    Args:
      x: `[ROWS, N]`, float32, layout `MATRIX`.
      interpret: use the twin in plain JAX, which returns whole sums.

    Returns:
      `[ROWS]`, float32, layout `PER_ROW`, though the four threads of a row hold four values: good
      for sums and products alone, until `total_row_sums`.
    """
    if interpret:
        return x.sum(axis=1)

    @plgpu.inline_mgpu(
        arg_types=(MATRIX,),
        return_type=plgpu.ShapeDtypeStruct((x.shape[0],), jnp.float32, PER_ROW),
    )
    def add(_: Any, x: Any) -> Any:
        registers = x.registers.reshape(x.shape[1] // 8, 2)
        sums = []
        for half in (0, 1):
            values = [vector.extract(r, [], [b]) for r in registers[:, half] for b in (0, 1)]
            # Four independent chains: one would wait for each addition.
            chains = [functools.reduce(arith.addf, values[i::4]) for i in range(4)]
            sums.append(arith.addf(arith.addf(*chains[:2]), arith.addf(*chains[2:])))
        return per_row(sums)

    return add(x)


def total_row_sums(x: Array, *, interpret: bool) -> Array:
    """Returns the sums of rows, given what `partial_row_sums` made; `[ROWS]` to `[ROWS]`."""
    if interpret:
        return x

    @plgpu.inline_mgpu(
        arg_types=(PER_ROW,), return_type=plgpu.ShapeDtypeStruct(x.shape, jnp.float32, PER_ROW)
    )
    def add(_: Any, x: Any) -> Any:
        sums = []
        for register in x.registers.flat:
            value = vector.extract(register, [], [0])
            for lane in (1, 2):
                value = arith.addf(value, mgpu.utils.shfl_bfly(value, lane))
            sums.append(value)
        return per_row(sums)

    return add(x)


def per_row(values: list[Any]) -> Any:
    """Makes an array of layout `PER_ROW` of this thread's two values, each float32."""
    layout = PER_ROW.to_mgpu()
    one = ir.VectorType.get((1,), ir.F32Type.get())
    registers = np.empty(layout.registers_shape((ROWS,)), dtype=object)
    registers.flat[:] = [vector.broadcast(one, x) for x in values]
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

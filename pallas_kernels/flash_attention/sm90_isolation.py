"""Keeps what is not finite from reaching positions that may not see it, on SM90.

A masked pair has the weight P = 0, but a matrix product also multiplies that 0 with the row of the
other operand, and 0 * NaN is NaN. So a row that is not finite has to become zeros before it meets
a mask, and its weight NaN where it is seen:

  forward   Only V is multiplied with weights. A CTA looks at its outputs for numbers that are not
            finite (a row of V spoils all queries of a tile), and then computes all of its tiles
            again, with such rows of V as zeros and these keys as NaN: so are their logits, until
            the mask takes away those that nobody may see. If all is finite, this costs a look at
            some registers for each tile.

  backward  `sm90` gives a query whose log-sum-exp or delta is not finite the log-sum-exp BAD_LSE.
            Then P is +inf where a key is seen, and exp2(-inf) = 0 where it is masked. In blocks
            with a mask its rows of Q and dO become zeros, as they do if it sees no key. In tiles
            that meet a mask K and V are made finite: whoever sees such a key has BAD_LSE anyway,
            because its output or log-sum-exp is not finite either.

An infinite key whose logit is -inf has the weight 0 in the forward, as any other such logit, and in
the backward, where it counts as the largest finite number.
"""

# Shapes: R rows, H head dim.

from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, math, vector

from pallas_kernels.mosaic import MATRIX, ROWS, tile_transforms

NAN = float("nan")
BAD_LSE = -1e30
"""log2 of the softmax's denominator of a bad query: finite, so that exp2(-inf - BAD_LSE) is 0."""
_TILE = plgpu.RefType(tile_transforms(2))
_LANES = 8  # threads that share a row of a tile: each has 16 bytes of every 128
_CHUNK = 8  # elements in these 16 bytes
_SEGMENT = _LANES * _CHUNK  # columns of a tile
_ROWS_AT_ONCE = 128 // _LANES


def note_bad_output(out: Array, flag: Any, *, interpret: bool) -> None:
    """Sets a flag if an output is not finite.

    Each thread looks at one of its two rows: a bad row of V spoils them all.

    Args:
      out: `[ROWS, H]`, float32, layout `MATRIX`.
      flag: shared memory, `[1]`, int32.
      interpret: use the twin in plain JAX.
    """
    if interpret:
        flag[...] = jnp.where(jnp.isfinite(out).all(), flag[...], 1)
        return

    @plgpu.inline_mgpu(arg_types=(MATRIX, plgpu.RefType()))
    def note(_: Any, out: Any, flag: Any) -> None:
        zero = mgpu.utils.c(0.0, ir.F32Type.get())
        pairs = out.registers.reshape(out.shape[0] // ROWS, out.shape[1] // 8, 2)[0, :, 0]
        chains = [zero] * 4
        for i, pair in enumerate(pairs):
            for b in (0, 1):
                chain = 2 * (i % 2) + b
                chains[chain] = math.fma(vector.extract(pair, [], [b]), zero, chains[chain])
        total = arith.addf(arith.addf(*chains[:2]), arith.addf(*chains[2:]))
        with mgpu.utils.when(_is_nan(total)):
            one = vector.broadcast(_vector(1, ir.IntegerType.get_signless(32)), _i32(1))
            first: Any = mgpu.utils.c(0, ir.IndexType.get())
            vector.store(one, flag, [first])

    note(out, flag)


def find_bad_rows(tiles: tuple[Any, ...], flags: Any, *, interpret: bool) -> None:
    """Writes for each row 0, or NaN if an element of it is not finite in one of the tiles.

    Args:
      tiles: shared memory, each `[R, H]` of 16 bits with `tile_transforms`; R a multiple of 16.
      flags: shared memory, `[R]`, float32; a later `zero_bad_rows` of this warpgroup may read it
        at once, others after a barrier.
      interpret: use the twin in plain JAX.
    """
    if interpret:
        is_finite = [jnp.isfinite(x[...].astype(jnp.float32)).all(axis=1) for x in tiles]
        flags[...] = jnp.where(jnp.stack(is_finite).all(axis=0), 0.0, NAN)
        return

    @plgpu.inline_mgpu(arg_types=((_TILE,) * len(tiles), plgpu.RefType()))
    def find(_: Any, tiles: Any, flags: Any) -> None:
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        nan, zero = mgpu.utils.c(NAN, f32), mgpu.utils.c(0.0, f32)
        first_lane = arith.andi(mgpu.utils.thread_idx(), mgpu.utils.c(24, i32))

        def look(row: Any) -> None:
            ballot = _warps_votes(_sum_of_zeros(tiles, row))
            row_votes = arith.andi(arith.shrui(ballot, first_lane), mgpu.utils.c(255, i32))
            is_bad = arith.cmpi(arith.CmpIPredicate.ne, row_votes, mgpu.utils.c(0, i32))
            flag = vector.broadcast(_vector(1, f32), arith.select(is_bad, nan, zero))
            vector.store(flag, flags, [row])

        _for_each_row(tiles[0], look)
        mgpu.utils.warp_barrier()

    find(tiles, flags)


def fill_bad_rows(tile: Any, flags: Any, value: float, *, interpret: bool) -> None:
    """Overwrites rows of a tile unless |flag| < |BAD_LSE|; `plgpu.commit_smem` has to follow.

    Args:
      tile: shared memory, `[R, H]` of 16 bits with `tile_transforms`; R a multiple of 16.
      flags: shared memory, `[R]`, float32.
      value: 0 or NaN.
      interpret: use the twin in plain JAX.
    """
    if interpret:
        is_good = (jnp.abs(flags[...]) < -BAD_LSE)[:, None]
        tile[...] = jnp.where(is_good, tile[...], jnp.asarray(value, tile.dtype))
        return

    @plgpu.inline_mgpu(arg_types=(_TILE, plgpu.RefType()))
    def fill(_: Any, tile: Any, flags: Any) -> None:
        f32 = ir.F32Type.get()
        element = ir.MemRefType(tile.type).element_type
        chunk = vector.broadcast(_vector(_CHUNK, element), mgpu.utils.c(value, element))

        def fill_row(row: Any) -> None:
            flag = vector.extract(vector.load(_vector(1, f32), flags, [row]), [], [0])
            bound = mgpu.utils.c(-BAD_LSE, f32)
            with mgpu.utils.when(arith.cmpf(arith.CmpFPredicate.UGE, math.absf(flag), bound)):
                for index in _chunks(tile, row):
                    vector.store(chunk, tile, index)

        _for_each_row(tile, fill_row)

    fill(tile, flags)


def make_finite(k: Any, v: Any, *, interpret: bool) -> None:
    """Bounds elements of `k` by the largest finite number, and makes those of `v` that are not
    finite 0; `plgpu.commit_smem` has to follow.

    Args:
      k: shared memory, `[R, H]` of 16 bits with `tile_transforms`; R a multiple of 16.
      v: like k.
      interpret: use the twin in plain JAX.
    """
    if interpret:
        largest = jnp.asarray(jnp.finfo(k.dtype).max, k.dtype)
        k[...] = jnp.where(jnp.isnan(k[...]), -largest, jnp.clip(k[...], -largest, largest))
        v[...] = jnp.where(jnp.isfinite(v[...]), v[...], jnp.zeros((), v.dtype))
        return
    largest = float(jnp.finfo(k.dtype).max)

    @plgpu.inline_mgpu(arg_types=(_TILE, _TILE))
    def clean(_: Any, k: Any, v: Any) -> None:
        element = ir.MemRefType(k.type).element_type
        chunk_type = _vector(_CHUNK, element)

        def splat(value: float) -> Any:
            return vector.broadcast(chunk_type, mgpu.utils.c(value, element))

        def bounded(x: Any) -> Any:
            return arith.minnumf(arith.maxnumf(x, splat(-largest)), splat(largest))

        def zeroed(x: Any) -> Any:
            products = arith.mulf(x, splat(0.0))
            is_finite = arith.cmpf(arith.CmpFPredicate.ORD, products, products)
            return arith.select(is_finite, x, splat(0.0))

        def clean_row(row: Any) -> None:
            for tile, make in ((k, bounded), (v, zeroed)):
                with mgpu.utils.when(_is_nan(_sum_of_zeros((tile,), row))):
                    for index in _chunks(tile, row):
                        vector.store(make(vector.load(chunk_type, tile, index)), tile, index)

        _for_each_row(k, clean_row)

    clean(k, v)


def _sum_of_zeros(tiles: Any, row: Any) -> Any:
    """Multiplies a thread's elements of a row with 0 and adds them up: NaN if one is not finite."""
    element = ir.MemRefType(tiles[0].type).element_type
    pair = _vector(2, element)
    zero = vector.broadcast(pair, mgpu.utils.c(0.0, element))
    total = zero
    for tile in tiles:
        for index in _chunks(tile, row):
            chunk = vector.load(_vector(_CHUNK, element), tile, index)
            for b in range(0, _CHUNK, 2):
                total = math.fma(mgpu.utils.vector_slice(chunk, slice(b, b + 2)), zero, total)
    low, high = (arith.extf(ir.F32Type.get(), vector.extract(total, [], [b])) for b in (0, 1))
    return arith.addf(low, high)


def _warps_votes(x: Any) -> Any:
    """Returns which threads of the warp have NaN, one bit each."""
    vote = "{ .reg .pred p; setp.nan.f32 p, $1, $1; vote.sync.ballot.b32 $0, p, 0xffffffff; }"
    return llvm.inline_asm(
        ir.IntegerType.get_signless(32), [x], vote, "=r,f", has_side_effects=True
    )


def _chunks(tile: Any, row: Any) -> Iterator[tuple[Any, ...]]:
    """Yields the indices of this thread's elements of a row of a tile.

    The swizzle moves 16 bytes about within a row, which does not matter here.
    """
    index = ir.IndexType.get()
    eight = mgpu.utils.c(8, index)
    column = arith.muli(arith.remui(_thread(), eight), eight)
    for segment in range(ir.MemRefType(tile.type).shape[1]):
        yield (
            arith.divui(row, eight),
            mgpu.utils.c(segment, index),
            arith.remui(row, eight),
            column,
        )


def _for_each_row(tile: Any, body: Callable[[Any], None]) -> None:
    """Calls `body(row)` for those rows of a tile that this thread has a part of."""
    tiles, _, rows, columns = ir.MemRefType(tile.type).shape
    assert (rows, columns) == (8, _SEGMENT), "the layout is not that of `tile_transforms`"
    index = ir.IndexType.get()
    first = arith.divui(_thread(), mgpu.utils.c(_LANES, index))
    step = mgpu.utils.c(_ROWS_AT_ONCE, index)

    # A loop, because the producer has few registers.
    @mgpu.utils.fori(mgpu.utils.c(tiles * rows // _ROWS_AT_ONCE, index), [])
    def _(i: Any, _: Any) -> list[Any]:
        body(arith.addi(first, arith.muli(i, step)))
        return []


def _thread() -> Any:
    """Index of this thread in its warpgroup.

    Read by opaque code: else the compiler works out all addresses ahead of the producer's loop, and
    spills them.
    """
    i32 = ir.IntegerType.get_signless(32)
    thread: Any = llvm.inline_asm(i32, [], "mov.u32 $0, %tid.x;", "=r", has_side_effects=True)
    thread = arith.andi(thread, mgpu.utils.c(127, i32))
    return arith.index_castui(ir.IndexType.get(), thread)


def _is_nan(x: Any) -> Any:
    return arith.cmpf(arith.CmpFPredicate.UNO, x, x)


def _i32(x: int) -> Any:
    return mgpu.utils.c(x, ir.IntegerType.get_signless(32))


def _vector(length: int, element: Any) -> Any:
    return ir.VectorType.get((length,), element)

"""RMSNorm for sm_90a, quantised and transposed; x is read from HBM once.

  rstd = rsqrt(mean(x^2) + eps),   y = x rstd weight   -> 8-bit y and y^T, amax |y|, rstd

A persistent CTA owns blocks of B rows and passes over each twice: forwards for the sums of squares,
backwards for y. The last tiles of the first pass are still in shared memory when the second begins;
the others come from L2, which holds the blocks of all CTAs if B is small. But a wgmma accumulator's
64 rows, of even and of odd rows each, make 128: so a tile is `chunks` = 128 / B column ranges of C
columns, one below the other, and warp w of a warpgroup works on range w * chunks / 4.

  step, by each warpgroup on its own tiles             ordered by
  first pass: tile t into slot t % S, sums of squares  TMA -> `full` (one barrier per slot)
  sums of all warpgroups, double-buffered by block     `summed`: one arrival per warpgroup
  second pass: tile t from slot t % S                  nothing while resident, then `full`
  slot refilled: tile t - S, or t of the next block    commit_smem: a barrier of the warpgroup
  q and q_t leave through staging buffers              the TMA store of the last tile has read them

Not supported: M not a multiple of 128, K not a multiple of the tile's width times the warpgroups.
"""

# Shapes: M rows, K columns, B rows of a block, C columns and R pairs of rows of a chunk, S slots, W
# warpgroups.

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from pallas_kernels.hardware import SM90_SMEM_BYTES_PER_BLOCK
from pallas_kernels.mosaic import MATRIX, PER_ROW, ROWS, SMEM_OVERHEAD, launcher, tile_transforms
from pallas_kernels.quantize.sm90_plan import TILE_ROWS
from pallas_kernels.quantize.sm90_tiles import (
    pack_pairs,
    row_amax,
    row_zeros,
    saturate,
    write_amax,
)

_COLUMNS = 64
_WARPS = 4


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RmsNormConfig:
    """How the kernel cuts its work; changes the result by the rounding of float32 sums."""

    chunks: int = 4
    """Column ranges of a tile: a block has 128 / chunks rows."""
    warpgroups: int = 2
    """Warpgroups of a CTA, each with its own columns of the block."""
    slots: int = 5
    """Tiles in shared memory per warpgroup: this many are read from memory once."""

    def __post_init__(self) -> None:
        if self.chunks not in (1, 2, 4):
            raise ValueError(f"{self.chunks=} must be 1, 2 or 4: whole warps work on each")
        if self.warpgroups < 1 or self.slots < 1:
            raise ValueError(f"{self.warpgroups=} and {self.slots=} must be at least 1")


def candidates() -> list[RmsNormConfig]:
    """Configs worth timing."""
    return [
        RmsNormConfig(chunks=4, warpgroups=2, slots=5),
        RmsNormConfig(chunks=4, warpgroups=1, slots=10),
        RmsNormConfig(chunks=1, warpgroups=2, slots=5),
    ]


def config_for(columns: int) -> RmsNormConfig:
    """The config with the fewest rows to a block, most of which then stay on the chip."""
    for chunks in (4, 2, 1):
        for warpgroups in (2, 1):
            if columns % (_COLUMNS * chunks * warpgroups) == 0:
                return RmsNormConfig(chunks=chunks, warpgroups=warpgroups)
    return RmsNormConfig(chunks=1, warpgroups=1)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RmsNormPlan:
    """Shapes, types and semantics of one kernel."""

    rows: int
    """M."""
    columns: int
    """K."""
    eps: float
    """Added to the mean of squares."""
    input_dtype: Any
    """Of x: 16 bits."""
    dtype: Any
    """8-bit type of q and q_t."""
    config: RmsNormConfig
    """How the work is cut."""
    sm_count: int = 132
    """Multiprocessors."""
    interpret: bool = False
    """Run in the CPU interpreter."""

    @property
    def pairs(self) -> int:
        """R: pairs of rows of a block."""
        return ROWS // self.config.chunks

    @property
    def num_blocks(self) -> int:
        """Blocks of rows."""
        return self.rows // (2 * self.pairs)

    @property
    def tiles(self) -> int:
        """Tiles of one block and warpgroup."""
        return self.columns // (_COLUMNS * self.config.chunks * self.config.warpgroups)

    @property
    def slots(self) -> int:
        """S: no more than there are tiles."""
        return min(self.config.slots, self.tiles)

    @property
    def programs(self) -> int:
        """CTAs."""
        return min(self.sm_count, self.num_blocks)


def smem_bytes(plan: RmsNormPlan) -> int:
    """Shared memory of one CTA."""
    tile = TILE_ROWS * _COLUMNS
    buffers = plan.config.warpgroups * tile * (2 * plan.slots + 2)
    return buffers + 2 * 1024 * plan.config.warpgroups + 4096 + SMEM_OVERHEAD


def unsupported_reason(plan: RmsNormPlan) -> str | None:
    """Why the kernel cannot run this shape or config; None if it can."""
    config = plan.config
    width = _COLUMNS * config.chunks * config.warpgroups
    rules = (
        (
            plan.rows % TILE_ROWS == 0,
            f"the {plan.rows} rows must be a multiple of {TILE_ROWS}; pad them",
        ),
        (
            plan.columns % width == 0,
            f"the {plan.columns} columns must be a multiple of {width} for {config}",
        ),
        (
            plan.rows * plan.columns < 2**31,
            f"{plan.rows} x {plan.columns} elements do not fit int32; split the rows",
        ),
        (
            smem_bytes(plan) <= SM90_SMEM_BYTES_PER_BLOCK,
            f"{config} needs {smem_bytes(plan)} bytes of shared memory; there are"
            f" {SM90_SMEM_BYTES_PER_BLOCK}",
        ),
        (
            jnp.dtype(plan.input_dtype).itemsize == 2,
            f"x.dtype={plan.input_dtype} must have 16 bits; cast it",
        ),
    )
    return next((reason for holds, reason in rules if not holds), None)


class _Scratch(NamedTuple):
    """Shared memory."""

    x: Any  # [W, S, 2, 64, C]
    q: Any  # [W, 2, 64, C]
    q_t: Any  # [W, C, 128] bytes; on the GPU also as [W, C, 64] units of 16 bits
    sums: Any  # [2, W, 2, 128]: of the blocks by turns; rows twice, to be read rotated
    full: Any  # TMA -> a warpgroup, one per slot
    summed: Any  # all warpgroups
    row_max: Any  # [W, 64]
    reduced: Any  # all warpgroups


def _scratch_types(plan: RmsNormPlan) -> _Scratch:
    wgs, slots = plan.config.warpgroups, plan.slots
    # One box of TMA for each chunk: [C, R] units, swizzled over the bytes of their rows.
    width = 2 * plan.pairs
    swizzle = plgpu.SwizzleTransform(width)
    as_bytes = plgpu.SMEM(
        (wgs, _COLUMNS, TILE_ROWS),
        plan.dtype,
        transforms=(plgpu.TilingTransform((_COLUMNS, width)), swizzle),
    )
    as_units = plgpu.SMEM(
        (wgs, _COLUMNS, ROWS),
        jnp.bfloat16,
        transforms=(plgpu.TilingTransform((_COLUMNS, plan.pairs)), swizzle),
    )
    byte_rows = (plgpu.TilingTransform((8, _COLUMNS)), plgpu.SwizzleTransform(_COLUMNS))
    return _Scratch(
        x=plgpu.SMEM(
            (wgs, slots, 2, ROWS, _COLUMNS), plan.input_dtype, transforms=tile_transforms(2)
        ),
        q=plgpu.SMEM((wgs, 2, ROWS, _COLUMNS), plan.dtype, transforms=byte_rows),
        q_t=as_bytes if plan.interpret else plgpu.RefUnion((as_units,), (as_bytes,)),
        sums=plgpu.SMEM((2, wgs, 2, 2 * ROWS), jnp.float32),
        full=plgpu.Barrier(num_arrivals=2 * plan.config.chunks, num_barriers=wgs * slots),
        summed=plgpu.Barrier(num_arrivals=wgs),
        row_max=plgpu.SMEM((wgs, ROWS), jnp.float32),
        reduced=plgpu.Barrier(num_arrivals=wgs),
    )


def _spread_weight(weight: Any, first: Array, plan: RmsNormPlan) -> Array:
    """w[r, c] = weight[first + (r // R) * C + c], float32 `[64, C]`.

    Written by hand: the columns that a thread holds depend on its warp, which no Pallas load says.
    """
    shape = (ROWS, _COLUMNS)
    if plan.interpret:
        spread = weight.at[pl.ds(first, plan.config.chunks * _COLUMNS)][...]
        return jnp.repeat(spread.reshape(-1, _COLUMNS), plan.pairs, axis=0)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT),
        return_type=plgpu.ShapeDtypeStruct(shape, jnp.float32, MATRIX),
    )
    def spread(_: Any, weight: Any, first: Any) -> Any:
        i32, index = ir.IntegerType.get_signless(32), ir.IndexType.get()
        constant = lambda value: mgpu.utils.c(value, i32)  # noqa: E731
        thread = arith.remui(mgpu.utils.thread_idx(), constant(128))
        warp = arith.divui(thread, constant(32))
        chunk = arith.divui(warp, constant(_WARPS // plan.config.chunks))
        lane_column = arith.muli(arith.remui(thread, constant(4)), constant(2))
        start = arith.addi(first.registers.item(), arith.muli(chunk, constant(_COLUMNS)))
        start = arith.addi(start, lane_column)
        pair = ir.VectorType.get((2,), ir.F32Type.get())
        layout = MATRIX.to_mgpu()
        registers = np.empty(layout.registers_shape(shape), dtype=object)
        flat = registers.reshape(-1, _COLUMNS // 8, 2)
        for j in range(_COLUMNS // 8):
            position = arith.index_cast(index, arith.addi(start, constant(8 * j)))
            flat[0, j, :] = vector.load(pair, weight, [position])
        return mgpu.FragmentedArray(
            _registers=flat.reshape(registers.shape), _layout=layout, _is_signed=None
        )

    return spread(weight, first)


class _Kernel(NamedTuple):
    """What the steps of one warpgroup share."""

    plan: RmsNormPlan
    refs: Any  # x, weight, then q, q_t, rstd, amax in global memory
    smem: _Scratch

    def column(self, tile: Array) -> Array:
        """First column of a tile of this warpgroup."""
        config = self.plan.config
        position = tile * config.warpgroups + lax.axis_index("wg")
        return position * (config.chunks * _COLUMNS)

    def load(self, block: Array, tile: Array) -> None:
        """Starts the TMA loads of a tile into its slot."""
        plan, wg = self.plan, lax.axis_index("wg")
        slot = lax.rem(tile, jnp.int32(plan.slots))
        for chunk in range(plan.config.chunks):
            columns = pl.ds(self.column(tile) + chunk * _COLUMNS, _COLUMNS)
            for a in (0, 1):
                plgpu.copy_gmem_to_smem(
                    self.refs[0].at[pl.ds(block * plan.pairs, plan.pairs), a, columns],
                    self.smem.x.at[wg, slot, a, pl.ds(chunk * plan.pairs, plan.pairs)],
                    self.smem.full.at[wg * plan.slots + slot],
                )

    def read(self, tile: Array) -> list[Array]:
        """Even and odd rows of a tile that has arrived, float32."""
        wg, slot = lax.axis_index("wg"), lax.rem(tile, jnp.int32(self.plan.slots))
        halves = [plgpu.load(self.smem.x.at[wg, slot, a], layout=MATRIX) for a in (0, 1)]
        return [x.astype(jnp.float32) for x in halves]

    def wait(self, tile: Array) -> None:
        """Waits for the TMA loads of a tile."""
        slot = lax.rem(tile, jnp.int32(self.plan.slots))
        plgpu.barrier_wait(self.smem.full.at[lax.axis_index("wg") * self.plan.slots + slot])

    def rstd(self, sums: Any, turn: Array) -> list[Array]:
        """rsqrt of the mean squares of even and odd rows, for each row of a tile."""
        plan, wg = self.plan, lax.axis_index("wg")
        for a in (0, 1):
            for copy in (0, 1):
                self.smem.sums.at[turn, wg, a, pl.ds(copy * ROWS, ROWS)][...] = sums[a]
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.smem.summed)
        plgpu.barrier_wait(self.smem.summed)

        def rotated(a: int, chunks: int) -> Array:
            """Sums of all warpgroups; each chunk's rows hold those of the chunk `chunks` on."""
            rows = pl.ds(chunks * plan.pairs, ROWS)
            parts = [
                plgpu.load(self.smem.sums.at[turn, other, a, rows], layout=PER_ROW)
                for other in range(plan.config.warpgroups)
            ]
            return functools.reduce(jnp.add, parts)

        results = []
        for a in (0, 1):
            totals = [rotated(a, chunks) for chunks in range(plan.config.chunks)]
            while len(totals) > 1:  # opposite ones first: every chunk then adds the same pairs
                half = len(totals) // 2
                totals = [totals[i] + totals[i + half] for i in range(half)]
            results.append(lax.rsqrt(totals[0] * (1.0 / plan.columns) + plan.eps))
        return results

    def stage(self, even: Array, odd: Array) -> None:
        """Stores y / scale of a tile into the staging buffers."""
        plan, wg = self.plan, lax.axis_index("wg")
        # inf - inf is NaN: a saturating conversion alone would hide an infinity.
        even, odd = (x + (x - x) for x in (even, odd))
        for a, x in enumerate((even, odd)):
            self.smem.q.at[wg, a][...] = saturate(x, plan.dtype, interpret=plan.interpret)
        if plan.interpret:
            tile = jnp.stack([even, odd], axis=1).reshape(TILE_ROWS, -1)
            self.smem.q_t.at[wg][...] = saturate(tile, plan.dtype, interpret=True).T
        else:
            units = self.smem.q_t[0][0].at[wg]
            units.transpose((1, 0))[...] = pack_pairs(even, odd, plan.dtype)

    def send(self, block: Array, tile: Array) -> None:
        """Starts the TMA stores of a tile, as one group."""
        plan, wg = self.plan, lax.axis_index("wg")
        q_t = self.smem.q_t if plan.interpret else self.smem.q_t[1][0]
        for chunk in range(plan.config.chunks):
            columns = pl.ds(self.column(tile) + chunk * _COLUMNS, _COLUMNS)
            rows = pl.ds(chunk * plan.pairs, plan.pairs)
            for a in (0, 1):
                plgpu.copy_smem_to_gmem(
                    self.smem.q.at[wg, a, rows],
                    self.refs[3].at[pl.ds(block * plan.pairs, plan.pairs), a, columns],
                    commit_group=False,
                )
            width = 2 * plan.pairs
            plgpu.copy_smem_to_gmem(
                q_t.at[wg, :, pl.ds(chunk * width, width)],
                self.refs[4].at[columns, pl.ds(block * width, width)],
                commit_group=False,
            )
        plgpu.commit_smem_to_gmem_group()


def _kernel(*refs: Any, plan: RmsNormPlan, **smem: Any) -> None:
    """Both passes over all blocks of a CTA, by one warpgroup."""
    kernel = _Kernel(plan, refs, _Scratch(**smem))
    _, weight, scale, _, _, rstd_gmem, amax_gmem = refs
    cta, wg = lax.axis_index("cta"), lax.axis_index("wg")
    tiles, slots = plan.tiles, plan.slots
    count = lax.div(plan.num_blocks - cta + (plan.programs - 1), jnp.int32(plan.programs))
    inverse = 1.0 / scale[0]
    for tile in range(slots):
        kernel.load(cta, jnp.int32(tile))

    def block_step(i: Array, row_max: Array) -> Array:
        block = cta + i * plan.programs

        def sum_squares(tile: Array, sums: Any) -> Any:
            kernel.wait(tile)
            even, odd = kernel.read(tile)
            sums = sums[0] + jnp.sum(even * even, axis=1), sums[1] + jnp.sum(odd * odd, axis=1)
            plgpu.commit_smem()  # everyone has read the slot
            pl.when(tile + slots < tiles)(lambda: kernel.load(block, tile + slots))
            return sums

        sums = lax.fori_loop(0, tiles, sum_squares, (row_zeros(), row_zeros()))
        rstd = kernel.rstd(sums, lax.rem(i, jnp.int32(2)))
        _store_rstd(kernel, rstd_gmem, rstd, block, wg)

        def normalize(step: Array, row_max: Array) -> Array:
            tile = tiles - 1 - step
            pl.when(step >= slots)(lambda: kernel.wait(tile))
            spread = _spread_weight(weight, kernel.column(tile), plan)
            y = [
                x * lax.broadcast_in_dim(r, x.shape, [0]) * spread
                for x, r in zip(kernel.read(tile), rstd, strict=True)
            ]
            for x in y:
                row_max = jnp.maximum(row_max, row_amax(x, interpret=plan.interpret))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            kernel.stage(*(x * inverse for x in y))
            plgpu.commit_smem()
            kernel.send(block, tile)
            pl.when(tile >= slots)(lambda: kernel.load(block, tile - slots))
            is_last = i + 1 >= count
            pl.when((tile < slots) & ~is_last)(lambda: kernel.load(block + plan.programs, tile))
            return row_max

        return lax.fori_loop(0, tiles, normalize, row_max)

    row_max = lax.fori_loop(0, count, block_step, row_zeros())
    write_amax(plan.config.warpgroups, row_max, kernel.smem.row_max, kernel.smem.reduced, amax_gmem)
    plgpu.wait_smem_to_gmem(0)


def _store_rstd(kernel: _Kernel, out: Any, rstd: list[Array], block: Array, wg: Array) -> None:
    """Writes rstd of a block to out[block]: `[2, 64]`, each row's value once for each chunk."""

    @pl.when(wg == 0)
    def _() -> None:
        for a in (0, 1):
            out.at[block, a][...] = rstd[a]


@launcher("plan")
def launch(
    plan: RmsNormPlan, x: Array, weight: Array, scale: Array
) -> tuple[Array, Array, Array, Array]:
    """Runs the kernel.

    Args:
      plan: a supported one.
      x: `[M, K]`.
      weight: float32 `[K]`.
      scale: float32 `()`.

    Returns: q `[M, K]`, q_t `[K, M]`, rstd float32 `[M]`, and amax float32 `[programs]`.
    """
    struct = jax.ShapeDtypeStruct
    scratch = _scratch_types(plan)._asdict()
    q, q_t, rstd, amax = plgpu.kernel(
        functools.partial(_kernel, plan=plan),
        out_type=(
            struct((plan.rows // 2, 2, plan.columns), plan.dtype),
            struct((plan.columns, plan.rows), plan.dtype),
            struct((plan.num_blocks, 2, ROWS), jnp.float32),
            struct((plan.programs,), jnp.float32),
        ),
        scratch_types=scratch,
        grid=(plan.programs,),
        grid_names=("cta",),
        num_threads=plan.config.warpgroups,
        thread_name="wg",
        kernel_name="rmsnorm_quantize",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if plan.interpret else None,
    )(x.reshape(plan.rows // 2, 2, plan.columns), weight, scale.reshape(1))
    # [block, parity, row pair] of the first chunk.
    rstd = rstd[:, :, : plan.pairs].swapaxes(1, 2).reshape(plan.rows)
    return q.reshape(plan.rows, plan.columns), q_t, rstd, amax

"""FP8 matrix product for sm_90a: out = scale * (lhs . rhs_t^T), a persistent kernel.

lhs [M, K] and rhs_t [N, K] are read along K, the only way Hopper's tensor cores take 8-bit
operands. The result is walked through in tiles of [tile_m, tile_n], each the sum over K / 128
blocks; a tile's rows of lhs and rhs_t wait in a ring of `stages` buffers. Tiles are numbered so
that those at work at one time share rows and columns in L2 (`plgpu.planar_snake`).

Warpgroups: two compute, the third only starts TMA loads and gives its registers to the others.

  step of the producer                     ordered by
  wait until the stage is free             `empty`: each reader, in a cluster of both CTAs
  load lhs and rhs blocks into it          TMA -> `full`
  after the last tile: wait for all        `empty`: a CTA of a cluster may not leave while its peer
                                           still writes into its memory

  step of a compute warpgroup              ordered by
  wait for the stage; start its wgmmas     `full`
  wait for the wgmmas of the stage before  wgmma_wait: one stage's remain in flight
  give that stage back                     `empty`
  after the last block: for 128 bytes of columns at a time
    staging buffer <- scale * accumulator  the TMA store of `out_slots` buffers ago has read it
    TMA store                              commit_smem: a fence and a barrier of the warpgroup

Nobody waits for a tile to be stored: meanwhile the producer fills the ring for the next one. With
"pingpong" each warpgroup has whole tiles of its own, every other one of the CTA, and no barrier
orders the two: blocks of one tile reach the ring only behind those of the tile before, so one
multiplies while the other stores. Its `full` barriers are its own, because a warpgroup must see
every phase of a barrier that it waits for.

Accumulation: the tensor cores add 8-bit products with about 14 bits of mantissa relative to the
largest term. "fast" leaves whole sums to them, as cuBLASLt's fast accumulation does
(`lax.Precision.DEFAULT` of a dot in XLA). "exact" bounds that error, as `lax.Precision.HIGHEST`
does: every block of 128 products starts a new accumulator, and is added to a float32 sum in
registers (DeepSeek-V3, arXiv:2412.19437, section 3.3.2). Two blocks take turns, so that the tensor
cores work on one while the other is added.

Not supported: K not a multiple of 128 (exact: 256), M not of 8, N not of 128 bytes of the result
(Mosaic GPU makes global arrays of whole tiles of shared memory); beyond that tiles may be ragged:
TMA reads zeros and does not write.
"""

# Shapes: M rows of lhs, N rows of rhs_t, K contracted.

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.matmul.config import (
    BLOCK_K,
    COMPUTE_WARPGROUPS,
    MatmulPlan,
    Scratch,
    scratch_types,
)
from pallas_kernels.mosaic import MATRIX, ROWS, launcher

KERNEL_NAME = "fp8_matmul"
_COMPUTE_REGISTERS = 232
_PRODUCER_REGISTERS = 40


class _Kernel(NamedTuple):
    """What the warpgroups share."""

    plan: MatmulPlan
    lhs: Any  # [M, K] in global memory
    rhs: Any  # [N, K]
    out: Any  # [M, N]
    smem: Scratch

    @property
    def num_tiles(self) -> Array:
        """Tiles of this CTA."""
        plan, cta = self.plan, lax.axis_index("cta")
        return lax.div(plan.num_tiles - cta + (plan.programs - 1), jnp.int32(plan.programs))

    def tile(self, i: Array) -> tuple[Array, Array]:
        """First row and first column of the i-th tile of this CTA."""
        plan, config = self.plan, self.plan.config
        index = lax.axis_index("cta") + i * plan.programs
        width = min(config.group, plan.grid[config.group_axis])
        row, column = plgpu.planar_snake(index, plan.grid, config.group_axis, width)
        if config.cluster > 1:
            row = row * config.cluster + lax.axis_index("peer")
        return row * config.tile_m, column * config.tile_n

    def slot(self, block: Array) -> Array:
        """The stage of the CTA's block of that number."""
        return lax.rem(block, jnp.int32(self.plan.config.stages))

    def full(self, i: Array, slot: Array) -> Any:
        """The barrier that the i-th tile's loads complete."""
        if self.plan.config.schedule == "pingpong":
            reader = lax.rem(i, jnp.int32(COMPUTE_WARPGROUPS))
            slot = reader * self.plan.config.stages + slot
        return self.smem.full.at[slot]

    # ---------------------------------------------------------------------------- the producer

    def load_tiles(self) -> None:
        """Fills the ring, block after block of tile after tile."""
        plan, config = self.plan, self.plan.config
        stages, steps, count = config.stages, plan.steps, self.num_tiles

        def load(i: Array, _: None) -> None:
            row, column = self.tile(i)

            def step(k: Array, _: None) -> None:
                block = i * steps + k
                slot = self.slot(block)
                pl.when(block >= stages)(lambda: plgpu.barrier_wait(self.smem.empty.at[slot]))
                full, along_k = self.full(i, slot), pl.ds(k * BLOCK_K, BLOCK_K)
                plgpu.copy_gmem_to_smem(
                    self.lhs.at[pl.ds(row, config.tile_m), along_k], self.smem.lhs.at[slot], full
                )
                plgpu.copy_gmem_to_smem(
                    self.rhs.at[pl.ds(column, config.tile_n), along_k],
                    self.smem.rhs.at[slot],
                    full,
                    collective_axes="peer" if config.cluster > 1 else None,
                )

            lax.fori_loop(0, steps, step, None)

        lax.fori_loop(0, count, load, None)
        total = count * steps
        for last in range(stages, 0, -1):
            block = total - last
            slot = self.slot(jnp.maximum(block, 0))
            pl.when(block >= 0)(lambda slot=slot: plgpu.barrier_wait(self.smem.empty.at[slot]))

    # ----------------------------------------------------------------------- a compute warpgroup

    def compute_tiles(self, scale: Array) -> None:
        """Multiplies and stores this warpgroup's part of every tile, or every other tile."""
        wg = lax.axis_index("wg")

        def compute(i: Array) -> None:
            row, column = self.tile(i)
            self.store(self.multiply(i), scale, row + self.first_row, column)

        if self.plan.config.schedule == "pingpong":
            mine = lax.div(
                self.num_tiles - wg + (COMPUTE_WARPGROUPS - 1), jnp.int32(COMPUTE_WARPGROUPS)
            )
            lax.fori_loop(0, mine, lambda i, _: compute(COMPUTE_WARPGROUPS * i + wg), None)
        else:
            lax.fori_loop(0, self.num_tiles, lambda i, _: compute(i), None)
        plgpu.wait_smem_to_gmem(0)

    @property
    def first_row(self) -> Array | int:
        """Of this warpgroup in a tile."""
        config = self.plan.config
        is_shared = config.schedule == "cooperative"
        return lax.axis_index("wg") * config.rows_per_warpgroup if is_shared else 0

    def start(self, i: Array, k: Array, accumulators: Sequence[Any]) -> Array:
        """Starts to add block k of the i-th tile to the accumulators; returns its stage."""
        slot = self.slot(i * self.plan.steps + k)
        plgpu.barrier_wait(self.full(i, slot))
        rhs = self.smem.rhs.at[slot].transpose((1, 0))
        for half, accumulator in enumerate(accumulators):
            rows = pl.ds(self.first_row + half * ROWS, ROWS)
            plgpu.wgmma(accumulator, self.smem.lhs.at[slot, rows], rhs)
        return slot

    def multiply(self, i: Array) -> tuple[Array, ...]:
        """This warpgroup's rows of the i-th tile, 64 at a time: float32 `[64, tile_n]`."""
        plan, config = self.plan, self.plan.config
        if plan.accumulation == "exact":
            return (self.multiply_exactly(i),)

        def run(*accumulators: Any) -> tuple[Array, ...]:
            def step(k: Array, before: Array) -> Array:
                slot = self.start(i, k, accumulators)
                plgpu.wgmma_wait(config.halves)
                plgpu.barrier_arrive(self.smem.empty.at[before])
                return slot

            first = self.start(i, jnp.int32(0), accumulators)
            last = lax.fori_loop(1, plan.steps, step, first)
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(self.smem.empty.at[last])
            return tuple(accumulator[...] for accumulator in accumulators)

        types = [plgpu.ACC((ROWS, config.tile_n), jnp.float32)] * config.halves
        return pl.run_scoped(run, *types)

    def multiply_exactly(self, i: Array) -> Array:
        """The same, of the only 64 rows; each block has an accumulator of its own."""
        shape = (ROWS, self.plan.config.tile_n)

        def two_blocks(j: Array, sums: Array) -> Array:
            def run(first: Any, second: Any) -> Array:
                slots = [self.start(i, 2 * j, [first]), self.start(i, 2 * j + 1, [second])]
                part = plgpu.wgmma_accumulator_load(first, wait_n=1)
                plgpu.barrier_arrive(self.smem.empty.at[slots[0]])
                total = sums + part
                part = second[...]
                plgpu.barrier_arrive(self.smem.empty.at[slots[1]])
                return total + part

            return pl.run_scoped(run, *[plgpu.ACC(shape, jnp.float32)] * 2)

        zeros = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), MATRIX)
        return lax.fori_loop(0, self.plan.steps // 2, two_blocks, zeros)

    def store(self, sums: tuple[Array, ...], scale: Array, row: Array, column: Array) -> None:
        """Sends scale * sums to the result, one staging buffer after the other."""
        plan, slots, width = self.plan, self.plan.out_slots, self.plan.out_columns
        buffers, per_half = self.smem.out.at[lax.axis_index("wg")], plan.config.tile_n // width
        for half, values in enumerate(sums):
            for j in range(per_half):
                buffer = buffers.at[(half * per_half + j) % slots]
                plgpu.wait_smem_to_gmem(slots - 1, wait_read_only=True)
                part = values[:, j * width : (j + 1) * width] * scale
                buffer[...] = part.astype(plan.out_dtype)
                plgpu.commit_smem()
                rows, columns = pl.ds(row + half * ROWS, ROWS), pl.ds(column + j * width, width)
                plgpu.copy_smem_to_gmem(buffer, self.out.at[rows, columns])


def _body(lhs: Any, rhs: Any, scale: Any, out: Any, *smem: Any, plan: MatmulPlan) -> None:
    """What one warpgroup does."""
    kernel = _Kernel(plan, lhs, rhs, out, Scratch(*smem))
    wg = lax.axis_index("wg")

    @pl.when(wg < COMPUTE_WARPGROUPS)
    def _() -> None:
        plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")
        kernel.compute_tiles(scale[0])

    @pl.when(wg == COMPUTE_WARPGROUPS)
    def _() -> None:
        plgpu.set_max_registers(_PRODUCER_REGISTERS, action="decrease")
        kernel.load_tiles()


@launcher("plan")
def launch(plan: MatmulPlan, lhs: Array, rhs_t: Array, scale: Array) -> Array:
    """Runs the kernel.

    Args:
      plan: a supported one.
      lhs: `[M, K]`.
      rhs_t: `[N, K]`.
      scale: float32 `()`.

    Returns: `[M, N]`.
    """
    cluster = plan.config.cluster
    return plgpu.kernel(
        functools.partial(_body, plan=plan),
        out_type=jax.ShapeDtypeStruct((plan.m, plan.n), plan.out_dtype),
        scratch_types=tuple(scratch_types(plan)),
        grid=(plan.programs,),
        grid_names=("cta",),
        cluster=(cluster,) if cluster > 1 else (),
        cluster_names=("peer",) if cluster > 1 else (),
        num_threads=COMPUTE_WARPGROUPS + 1,
        thread_name="wg",
        kernel_name=KERNEL_NAME,
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if plan.interpret else None,
    )(lhs, rhs_t, scale.reshape(1))

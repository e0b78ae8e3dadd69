"""Flash attention backward in FP8, SM90: how dS is exchanged, and dQ computed and added.

Split from `sm90_bwd_fp8`, whose text explains the warps and barriers.
"""

# Shapes: B batch, T query, S key, N query heads, K key/value heads, H head dim.

import functools
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash_attention.fp8 import E4M3
from pallas_kernels.flash_attention.sm90_bwd_fp8_loads import (
    load_columns,
    load_keys,
    load_rows,
)
from pallas_kernels.flash_attention.sm90_bwd_fp8_plan import BLOCK_Q, WARPGROUPS, Tile
from pallas_kernels.mosaic import store_transposed_8_bits


def hand_over(tile: Tile, ds: Array, step: Array) -> None:
    """Stores this warpgroup's dS' of a step, transposed, for who multiplies it."""
    plan, slot = tile.plan, tile.ds_slot(step)
    units = tile.scratch.ds if plan.interpret else tile.scratch.ds[0][0]
    if plan.config.separate_dq:
        plgpu.barrier_wait(tile.scratch.ds_free.at[slot])
    target = units.at[slot, lax.axis_index("wg")]
    store_transposed_8_bits(ds, target, E4M3, interpret=plan.interpret)
    plgpu.commit_smem()
    plgpu.barrier_arrive(tile.scratch.ds_full.at[slot])


def add_own_part(tile: Tile, dq_gmem: Any, head: Array, block: Array, step: Array) -> None:
    """Adds a compute warpgroup's columns of dQ to global memory; waits for all its products, and
    until both warpgroups have multiplied dS'.
    """
    scratch, slot = tile.scratch, tile.ds_slot(step)
    plgpu.barrier_wait(scratch.ds_full.at[slot])
    part = lax.axis_index("wg")
    dq = _product(tile, part, slot)
    plgpu.barrier_arrive(scratch.columns_free.at[tile.slot(step)])
    plgpu.barrier_arrive(scratch.ds_free.at[slot])
    _add(tile, dq_gmem, dq, part, head, block, step)
    plgpu.barrier_wait(scratch.ds_free.at[slot])


def finish(tile: Tile) -> None:
    """Ends a compute warpgroup's part in the exchange."""
    plan = tile.plan
    if plan.config.separate_dq and plan.interpret:  # which wants all arrivals to be waited for
        for slot in range(plan.num_ds_stages):
            plgpu.barrier_wait(tile.scratch.ds_free.at[slot])
    if plan.announces_turns:
        pl.when(tile.num_steps > 0)(lambda: tile.pass_turn(tile.num_steps - 1))


def assist(tile: Tile, dq_gmem: Any) -> None:
    """Does the work of a warpgroup that loads, multiplies dQ, both halves of its columns, and adds
    it to global memory.
    """
    plan, scratch = tile.plan, tile.scratch
    load_keys(tile)
    for slot in range(plan.num_ds_stages):  # all buffers start out free
        plgpu.barrier_arrive(scratch.ds_free.at[slot])
    for step in range(plan.config.num_stages):
        pl.when(step < tile.num_steps)(functools.partial(_load, tile, step))
    plgpu.barrier_wait(scratch.kv_full)

    def run_step(head: Array, block: Array, step: Array) -> None:
        slot, ds_slot, ahead = tile.slot(step), tile.ds_slot(step), step + plan.config.num_stages
        has_more = ahead < tile.num_steps
        plgpu.barrier_wait(scratch.rows_free.at[slot])
        pl.when(has_more)(lambda: load_rows(tile, *tile.position(ahead), slot))
        plgpu.barrier_wait(scratch.ds_full.at[ds_slot])
        _add(tile, dq_gmem, _product(tile, 0, ds_slot), 0, head, block, step)
        # By now dV and dK of this step are done, or nearly.
        plgpu.barrier_wait(scratch.columns_free.at[slot])
        pl.when(has_more)(lambda: load_columns(tile, *tile.position(ahead), slot))
        dq = _product(tile, 1, ds_slot)
        plgpu.barrier_arrive(scratch.ds_free.at[ds_slot])
        _add(tile, dq_gmem, dq, 1, head, block, step)

    tile.for_each_step(run_step)
    if plan.takes_turns:
        pl.when(tile.num_steps > 0)(lambda: tile.pass_turn(tile.num_steps - 1))
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    plgpu.barrier_arrive(scratch.dq_sent)
    plgpu.wait_smem_to_gmem(0)


def _load(tile: Tile, step: int) -> None:
    """Loads all of one of the first steps."""
    load_rows(tile, *tile.position(step), step)
    load_columns(tile, *tile.position(step), step)


def _product(tile: Tile, part: Array | int, slot: Array) -> Array:
    """One half of the columns of dS' K."""
    plan, scratch = tile.plan, tile.scratch
    ds = scratch.ds if plan.interpret else scratch.ds[1][0]
    columns = pl.ds(part * plan.dq_columns, plan.dq_columns)

    def product(acc: Any) -> Array:
        for half in range(WARPGROUPS):
            k_t = scratch.k_t.at[half, columns]
            plgpu.wgmma(acc, ds.at[slot, half], k_t.transpose((1, 0)))
        return acc[...]

    return pl.run_scoped(product, plgpu.ACC((BLOCK_Q, plan.dq_columns), jnp.float32))


def _add(
    tile: Tile, dq_gmem: Any, dq: Array, part: Array | int, head: Array, block: Array, step: Array
) -> None:
    """Adds some columns of dQ of a block to global memory, through shared memory."""
    plan = tile.plan
    columns = pl.ds(part * plan.dq_columns, plan.dq_columns)
    target = dq_gmem.at[tile.batch, pl.ds(block * BLOCK_Q, BLOCK_Q), head, columns]
    if plan.interpret:
        if plan.takes_turns and not plan.config.separate_dq:
            plgpu.barrier_wait(tile.turn(step))
        target[...] = target[...] + dq
        return
    staged = tile.staged_dq.at[part]
    # What this warpgroup wrote before may be on its way out; if it writes both halves in turn, that
    # is true of the other half only.
    plgpu.wait_smem_to_gmem(int(plan.config.separate_dq), wait_read_only=True)
    if not plan.config.separate_dq or part == 0:
        tile.pass_turn(step - 1)
    staged[...] = dq
    plgpu.commit_smem()
    if plan.config.separate_dq and part == 0:
        tile.await_counter(step)
    elif plan.takes_turns and not plan.config.separate_dq:
        plgpu.barrier_wait(tile.turn(step))
    plgpu.copy_smem_to_gmem(staged, target, reduction_op="add")

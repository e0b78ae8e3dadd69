"""Flash attention backward in FP8, SM90: how operands arrive.

Split from `sm90_bwd_fp8`, whose text explains the warps and barriers.
"""

# Shapes: B batch, T query, S key, N query heads, K key/value heads, H head dim.

from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash_attention.sm90_bwd_fp8_plan import BLOCK_Q, TILE_KV, WARPGROUPS, Tile
from pallas_kernels.mosaic import ROWS


def produce(tile: Tile) -> None:
    """Does the work of a producer: loads the keys once, then the query side's factors of each step
    as their buffers become free.
    """
    scratch = tile.scratch
    load_keys(tile)

    def load(head: Array, block: Array, step: Array) -> None:
        slot = tile.slot(step)
        plgpu.barrier_wait(scratch.rows_free.at[slot])
        load_rows(tile, head, block, slot)
        plgpu.barrier_wait(scratch.columns_free.at[slot])
        load_columns(tile, head, block, slot)
        # Not before the loads that the step before needs to get to its turn.
        pl.when(step > 0)(lambda: tile.await_turn(step - 1))

    num_steps = tile.for_each_step(load)
    pl.when(num_steps > 0)(lambda: tile.await_turn(num_steps - 1))
    if tile.plan.interpret:  # which insists that somebody waits for every arrival
        for slot in range(tile.plan.config.num_stages):
            plgpu.barrier_wait(scratch.rows_free.at[slot])
            plgpu.barrier_wait(scratch.columns_free.at[slot])


def load_keys(tile: Tile) -> None:
    """Loads K, V, K^T and the matrix that rotates dK back."""
    inputs, scratch = tile.inputs, tile.scratch
    batch, kv_head = tile.batch, tile.kv_head
    keys = pl.ds(tile.kv_tile * TILE_KV, TILE_KV)
    plgpu.copy_gmem_to_smem(inputs.k.at[batch, keys, kv_head], scratch.k, scratch.kv_full)
    plgpu.copy_gmem_to_smem(inputs.v.at[batch, keys, kv_head], scratch.v, scratch.kv_full)
    for wg in range(WARPGROUPS):
        half = pl.ds(tile.kv_tile * TILE_KV + wg * ROWS, ROWS)
        source = inputs.k_t.at[batch, kv_head, :, half]
        plgpu.copy_gmem_to_smem(source, scratch.k_t.at[wg], scratch.kv_full)
    if tile.plan.spec.fp8.rotate:
        plgpu.copy_gmem_to_smem(inputs.matrix, scratch.matrix, scratch.kv_full)


def load_rows(tile: Tile, head: Array, block: Array, slot: Array | int) -> None:
    """Loads q, dO and the numbers of a block of queries."""
    inputs, scratch, batch = tile.inputs, tile.scratch, tile.batch
    queries = pl.ds(block * BLOCK_Q, BLOCK_Q)
    full = scratch.rows_full.at[slot]
    for source, target in (
        (inputs.q.at[batch, queries, head], scratch.q),
        (inputs.dout.at[batch, queries, head], scratch.dout),
        (inputs.rows.at[batch, head, block], scratch.rows),
    ):
        plgpu.copy_gmem_to_smem(source, target.at[slot], full)
    if tile.plan.spec.has_segments:
        plgpu.copy_gmem_to_smem(inputs.q_ids.at[batch, queries], scratch.q_ids.at[slot], full)


def load_columns(tile: Tile, head: Array, block: Array, slot: Array | int) -> None:
    """Loads q^T and dO^T of a block of queries."""
    inputs, scratch = tile.inputs, tile.scratch
    queries = pl.ds(block * BLOCK_Q, BLOCK_Q)
    for source, target in ((inputs.q_t, scratch.q_t), (inputs.dout_t, scratch.dout_t)):
        columns = source.at[tile.batch, head, :, queries]
        plgpu.copy_gmem_to_smem(columns, target.at[slot], scratch.columns_full.at[slot])

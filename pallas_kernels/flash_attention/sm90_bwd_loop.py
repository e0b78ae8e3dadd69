"""Flash attention backward, SM90: what stays the same in the loop over queries, how queries arrive,
masks, and how dQ leaves.

Split from `sm90_bwd_bf16`, whose text explains the warps and barriers.
"""

# Shapes: B batch, T query, S key, N query heads, K key/value heads, H head dim, C compute
# warpgroups.

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash_attention.sm90_bwd_plan import (
    NUM_TURN_BARRIERS,
    Inputs,
    Outputs,
    Plan,
    Scratch,
    Tile,
    turn_of,
)
from pallas_kernels.flash_attention.sm90_fwd_loop import pin, row_constant
from pallas_kernels.flash_attention.sm90_fwd_plan import BlockRange
from pallas_kernels.flash_attention.sm90_isolation import fill_bad_rows, make_finite
from pallas_kernels.mosaic import PER_COLUMN, PER_ROW, ROWS, divmod_traced, keep_columns, keep_equal


class Loop(NamedTuple):
    """What stays the same while a tile of keys meets its blocks of queries."""

    plan: Plan
    inputs: Inputs
    outputs: Outputs
    scratch: Scratch
    counters: Any  # [num_turns], semaphores: warpgroups that have added to dQ; None if nobody
    # counts them: in any order, and in the interpreter, which runs the tiles in order
    tile: Tile
    blocks: BlockRange  # of queries
    first_step: Array  # blocks that this CTA has met before: numbers the stages
    kv_ids: Array | None  # [ROWS]

    @property
    def num_steps(self) -> Array:
        """Blocks of this tile over all heads of the group, at least 1."""
        return (self.blocks.stop - self.blocks.start) * self.plan.group

    def block(self, step: Array) -> tuple[Array, Array]:
        """Returns the query head and the block of queries of a step.

        In a fixed order the last block goes first: all tiles see it, so that they soon follow each
        other at a distance of one step. In any order each tile begins elsewhere, because tiles
        that add to the same block at the same time wait for each other: at its own diagonal, or,
        where all tiles see the same blocks, evenly spread.
        """
        start, stop, _, _ = self.blocks
        if self.plan.takes_turns:
            head, position = self._head_and_position(step, stop - start)
            return head, stop - 1 - position
        if self.plan.spec.band.right is None:
            first = lax.div(self.tile.kv_tile * self.num_steps, jnp.int32(self.plan.num_kv_tiles))
            step += first
            step -= jnp.where(step >= self.num_steps, self.num_steps, 0)
        head, position = self._head_and_position(step, stop - start)
        return head, start + position

    def _head_and_position(self, step: Array, blocks: Array) -> tuple[Array, Array]:
        """Returns the query head of a step, and which of the head's blocks it is."""
        if self.plan.group == 1:
            return self.tile.kv_head, step
        head, position = divmod_traced(step, blocks)
        return self.tile.kv_head * self.plan.group + head, position

    def needs_mask(self, step: Array) -> Array:
        """Returns whether some pair of a step's block is masked."""
        _, block = self.block(step)
        needs_mask = (block < self.blocks.full_start) | (block >= self.blocks.full_stop)
        if self.plan.is_ragged:
            needs_mask |= self.tile.kv_tile == self.plan.num_kv_tiles - 1
        return needs_mask

    def q_slot(self, step: Array) -> Array:
        """Returns which buffers hold Q, lse and ids of a step."""
        return lax.rem(self.first_step + step, jnp.int32(self.plan.config.num_q_stages))

    def do_slot(self, step: Array) -> Array:
        """Returns which buffers hold dO and delta of a step."""
        return lax.rem(self.first_step + step, jnp.int32(self.plan.config.num_do_stages))

    def turn_slot(self, step: Array) -> Array:
        """Returns which barrier tells that it is this tile's turn to add to dQ of a step."""
        return lax.rem(self.first_step + step, jnp.int32(NUM_TURN_BARRIERS))

    def ds(self, step: Array) -> Any:
        """Returns the buffer of dS^T of a step, `[block_q / 64, block_kv, 64]`."""
        if self.plan.config.split_channels:
            return self.scratch.ds.at[lax.axis_index("wg")]
        return self.scratch.ds.at[lax.rem(self.first_step + step, jnp.int32(2))]

    def own_keys(self, x: Any) -> Any:
        """Returns the rows of a `[block_kv, ...]` buffer that this warpgroup works on."""
        wg = lax.axis_index("wg")
        if self.plan.config.split_channels:
            # Always 0, but the compiler does not know: it would otherwise work out the wgmma
            # descriptors of all 256 channels ahead, and run out of uniform registers.
            wg = lax.shift_right_logical(wg, jnp.int32(3))
        return x.at[pl.ds(wg * ROWS, ROWS)]

    def own_channels(self, x: Any) -> Any:
        """Returns the columns of a `[..., H]` buffer that belong to this warpgroup's dK and dV."""
        if not self.plan.config.split_channels:
            return x
        half = self.plan.spec.head_dim // 2
        return x.at[:, pl.ds(lax.axis_index("wg") * half, half)]


def first_key_of(plan: Plan, tile: Tile) -> Array:
    """Returns the first key of this warpgroup."""
    first = tile.kv_tile * plan.config.block_kv
    return first if plan.config.split_channels else first + lax.axis_index("wg") * ROWS


def clean_keys(loop: Loop) -> None:
    """Makes K and V of a tile finite, if it meets a mask."""
    plan, scratch = loop.plan, loop.scratch
    if not plan.isolates:
        return
    # Nobody else uses these before `exchange`, or where both warpgroups share their keys, ...
    rows = plan.config.block_kv // plan.config.compute_warpgroups
    keys = pl.ds(lax.axis_index("wg") * rows, rows)
    make_finite(scratch.k.at[keys], scratch.v.at[keys], interpret=plan.interpret)
    plgpu.commit_smem()
    if plan.config.split_channels:  # ... before this.
        plgpu.barrier_arrive(scratch.exchange)
        plgpu.barrier_wait(scratch.exchange)


def load_queries(loop: Loop, step: Array) -> None:
    """Loads Q, lse and segment ids, dO and delta of a step, as their buffers become free; what
    belongs to a bad query as zeros, if the block has a mask.
    """
    if loop.plan.isolates:
        load = functools.partial(_load_queries, loop, step)
        lax.cond(loop.needs_mask(step), lambda: load(True), lambda: load(False))
    else:
        _load_queries(loop, step, False)


def _load_queries(loop: Loop, step: Array, is_checked: bool) -> None:
    plan, inputs, scratch = loop.plan, loop.inputs, loop.scratch
    batch = loop.tile.batch
    head, block = loop.block(step)
    rows = pl.ds(block * plan.config.block_q, plan.config.block_q)
    q_slot, do_slot = loop.q_slot(step), loop.do_slot(step)
    q_full, do_full = scratch.q_full.at[q_slot], scratch.do_full.at[do_slot]
    q_arrived, do_arrived = q_full, do_full
    if is_checked:
        q_arrived, do_arrived = scratch.checked.at[0], scratch.checked.at[1]

    def check(target: Any, arrived: Any, full: Any) -> None:
        if is_checked:
            plgpu.barrier_wait(arrived)
            fill_bad_rows(target, scratch.lse.at[q_slot], 0.0, interpret=plan.interpret)
            plgpu.commit_smem()
            plgpu.barrier_arrive(full)
            plgpu.barrier_arrive(full)

    q_smem, do_smem = scratch.q.at[q_slot], scratch.do.at[do_slot]
    plgpu.barrier_wait(scratch.q_free.at[q_slot])
    if plan.spec.has_segments:
        plgpu.copy_gmem_to_smem(inputs.q_ids.at[batch, rows], scratch.q_ids.at[q_slot], q_full)
    plgpu.copy_gmem_to_smem(inputs.q.at[batch, rows, head], q_smem, q_arrived)
    plgpu.copy_gmem_to_smem(inputs.lse.at[batch, head, rows], scratch.lse.at[q_slot], q_arrived)
    if plan.config.num_do_stages == 1:  # dO has to wait for the step before, and Q need not
        check(q_smem, q_arrived, q_full)
    plgpu.barrier_wait(scratch.do_free.at[do_slot])
    plgpu.copy_gmem_to_smem(inputs.do.at[batch, rows, head], do_smem, do_arrived)
    delta = inputs.delta.at[batch, head, rows]
    plgpu.copy_gmem_to_smem(delta, scratch.delta.at[do_slot], do_arrived)
    if plan.config.num_do_stages > 1:
        check(q_smem, q_arrived, q_full)
    check(do_smem, do_arrived, do_full)


def mask(loop: Loop, step: Array, s: Array, *, has_branch: bool = True) -> Array:
    """Sets the logits of pairs that may not see each other to -inf; skips blocks without any, but
    not if a product is in flight, which a branch would make ptxas serialise.
    """
    plan, spec = loop.plan, loop.plan.spec
    if not plan.isolates and not plan.is_ragged:
        return s
    _, block = loop.block(step)
    first_query = block * plan.config.block_q

    def masked() -> Array:
        row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=PER_ROW)
        # Without the pin the bounds are worked out ahead, and held in registers.
        key = row + pin(plan, first_key_of(plan, loop.tile))
        # Columns of this block: the queries that see the key of each row. Those past the end have
        # lse = +inf, so their P is 0.
        last = row_constant(plan.config.block_q - 1, jnp.int32)
        if spec.band.left is not None:
            last = key + (spec.band.left - first_query)
        if plan.is_ragged or spec.band.is_full:
            last = jnp.where(key < spec.key_length, last, -1)
        first = None
        if spec.band.right is not None:
            first = key - (spec.band.right + first_query)
        # Called even where it keeps all: Mosaic finds the layout of what follows through it.
        seen = keep_columns(s, first, last, interpret=plan.interpret)
        if loop.kv_ids is None:
            return seen
        q_ids = plgpu.load(loop.scratch.q_ids.at[loop.q_slot(step)], layout=PER_COLUMN)
        return keep_equal(seen, loop.kv_ids, q_ids, interpret=plan.interpret)

    return lax.cond(loop.needs_mask(step), masked, lambda: s) if has_branch else masked()


def dq_part_of(plan: Plan, part: Array | int) -> tuple[Any, Any]:
    """Returns the queries of a block and the channels of dQ that this warpgroup adds in a part."""
    rows, columns = plan.dq_shape
    wg = lax.axis_index("wg")
    if plan.config.block_q > rows:
        return pl.ds(wg * rows, rows), pl.ds(0, columns)
    return pl.ds(0, rows), pl.ds((wg * plan.dq_parts + part) * columns, columns)


def add_dq(loop: Loop, step: Array, part: Array | int, dq: Array) -> None:
    """Adds this warpgroup's part of dQ to global memory, through shared memory."""
    plan = loop.plan
    head, block = loop.block(step)
    rows, columns = dq_part_of(plan, part)
    queries = pl.ds(block * plan.config.block_q + rows.start, rows.size)
    if plan.interpret:
        target = loop.outputs.dq.at[loop.tile.kv_tile, loop.tile.batch, queries, head, columns]
        _if_first(part, lambda: _take_turn(loop, step))
        target[...] = dq
        return
    target = loop.outputs.dq.at[loop.tile.batch, queries, head, columns]
    (dq_smem,), _ = loop.scratch.staging
    staged = dq_smem.at[lax.axis_index("wg")]
    # What was written before may still be on its way out of this buffer.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    _if_first(part, lambda: pass_turn(loop, step - 1))
    staged[...] = dq
    plgpu.commit_smem()
    _if_first(part, lambda: _take_turn(loop, step))
    plgpu.copy_smem_to_gmem(staged, target, reduction_op="add")


def _if_first(part: Array | int, action: Callable[[], None]) -> None:
    """Acts for part 0; without a branch where there is one part, because products are in flight."""
    if isinstance(part, int):
        action()
    else:
        pl.when(part == 0)(action)


def _turn_counter(loop: Loop, step: Array) -> Any:
    """Returns the counter of the additions to the dQ that a step adds to.

    Step -1 has a counter that nobody reads: a branch would make ptxas serialise the products that
    are in flight.
    """
    plan = loop.plan
    head, block = loop.block(step)
    row = loop.tile.batch * plan.spec.num_heads + head
    index = row * plan.num_q_blocks + block
    return loop.counters.at[jnp.where(step < 0, plan.num_turns - 1, index)]


def await_turn(loop: Loop, step: Array) -> None:
    """Waits until all tiles that come before have added to the dQ of a step; tells `compute`."""
    plan = loop.plan
    if loop.counters is not None:
        _, block = loop.block(step)
        before = turn_of(plan, loop.inputs, loop.tile, block) * plan.config.compute_warpgroups
        counter = _turn_counter(loop, step)
        plgpu.semaphore_wait(counter, before, decrement=False, memory_scope="gpu")
    plgpu.barrier_arrive(loop.scratch.turn.at[loop.turn_slot(step)])


def _take_turn(loop: Loop, step: Array) -> None:
    """Waits until it is this tile's turn to add to dQ of a step."""
    if loop.plan.takes_turns:
        plgpu.barrier_wait(loop.scratch.turn.at[loop.turn_slot(step)])


def pass_turn(loop: Loop, step: Array) -> None:
    """Waits until dQ of a step is in global memory, and lets the next tile add to it."""
    if loop.counters is not None:
        plgpu.wait_smem_to_gmem(0)
        plgpu.semaphore_signal(_turn_counter(loop, step), memory_scope="gpu")

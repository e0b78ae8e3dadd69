"""Flash attention forward, SM90: what the kernels of all precisions do alike: the producer, turns
of the warpgroups, masks, the launch.
"""

# Shapes: B batch, T query, S key, N query heads, K key/value heads, H head dim, C compute
# warpgroups.

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash_attention.sm90_fwd_plan import (
    BlockRange,
    Inputs,
    Launch,
    Plan,
    Scratch,
    block_range_of,
    cta_tiles,
    schedule_operand,
    scratch_types,
    tile_of,
)
from pallas_kernels.flash_attention.sm90_isolation import NAN, fill_bad_rows, find_bad_rows
from pallas_kernels.mosaic import PER_COLUMN, PER_ROW, ROWS, keep_columns, keep_equal

NEG_INF = float("-inf")


def for_each_tile(
    plan: Plan,
    scratch: Scratch,
    body: Callable[[Callable[[], Array], Array, Array | int], Array],
    *,
    computes: bool,
) -> None:
    """Calls `step = body(index, step, number)` for each tile of this CTA, the first time with step
    0; `number` is 0, or 1 in the second pass of `sm90_isolation`.

    `index()` works out the tile's index anew: cheaper than holding it in registers.
    """
    if plan.num_ctas == plan.num_tiles:
        if not plan.isolates:
            body(lambda: lax.axis_index("cta"), jnp.int32(0), 0)
            return
        count, index = jnp.int32(1), lambda i: lax.axis_index("cta")
    elif plan.has_schedule:
        plgpu.barrier_wait(scratch.schedule_full)
        count, index = scratch.schedule[0], lambda i: scratch.schedule[1 + i]
    else:
        count, index = cta_tiles(plan)

    def walk(number: Array | int, count: Array, step: Array) -> Array:
        def tile(i: Array, step: Array) -> Array:
            return body(lambda: index(pin(plan, i)), step, number)

        return lax.fori_loop(0, count, tile, step)

    if not plan.isolates:
        walk(0, count, jnp.int32(0))
        return

    def one_pass(number: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        count, step = state
        step = walk(number, count, step)
        has_bad = lax.cond(
            number == 0, lambda: _has_bad_output(scratch, plan, computes), lambda: jnp.int32(0)
        )
        return jnp.where(has_bad > 0, count, 0), step

    lax.fori_loop(0, 2, one_pass, (count, jnp.int32(0)))


def _has_bad_output(scratch: Scratch, plan: Plan, computes: bool) -> Array:
    """Waits until all tiles of this CTA are done; returns 1 if an output was not finite, else 0."""
    if computes:
        # The second pass writes to the same places.
        plgpu.wait_smem_to_gmem(0)
        plgpu.barrier_arrive(scratch.first_pass)
    plgpu.barrier_wait(scratch.first_pass)
    flags = [scratch.bad_outputs[wg, 0] for wg in range(plan.config.compute_warpgroups)]
    return functools.reduce(jnp.maximum, flags)


def produce(plan: Plan, inputs: Inputs, scratch: Scratch) -> None:
    """Loads Q of each tile, then its blocks of K and V, as their buffers become free."""
    stages, block_kv = plan.config.num_stages, plan.config.block_kv

    def load_tile(index: Callable[[], Array], step: Array, number: Array | int) -> Array:
        tile = tile_of(plan, index())
        kv_head = lax.div(tile.head, jnp.int32(plan.spec.num_heads // plan.spec.num_kv_heads))
        blocks = block_range_of(plan, inputs.block_ranges, tile)
        queries = pl.ds(tile.q_tile * plan.tile_q, plan.tile_q)
        plgpu.barrier_wait(scratch.q_free)
        plgpu.copy_gmem_to_smem(
            inputs.q.at[tile.batch, queries, tile.head], scratch.q, scratch.q_full
        )
        if plan.spec.precision == "fp8":
            scales = inputs.scales.at[tile.batch, kv_head]
            plgpu.copy_gmem_to_smem(scales, scratch.scales, scratch.q_full)

        def load_block(j: Array, step: Array) -> Array:
            slot = lax.rem(step, jnp.int32(stages))
            keys = pl.ds((blocks.stop - 1 - j) * block_kv, block_kv)
            k_full, v_full = scratch.k_full.at[slot], scratch.v_full.at[slot]
            k = inputs.k.at[tile.batch, keys, kv_head]
            if plan.spec.precision == "fp8":
                v = inputs.v.at[tile.batch, kv_head, :, keys]
            else:
                v = inputs.v.at[tile.batch, keys, kv_head]
            plgpu.barrier_wait(scratch.k_free.at[slot])
            if plan.spec.has_segments:
                plgpu.copy_gmem_to_smem(
                    inputs.kv_ids.at[tile.batch, keys], scratch.kv_ids.at[slot], k_full
                )

            def load() -> None:
                plgpu.copy_gmem_to_smem(k, scratch.k.at[slot], k_full)
                plgpu.barrier_wait(scratch.v_free.at[slot])
                plgpu.copy_gmem_to_smem(v, scratch.v.at[slot], v_full)

            if plan.isolates:
                lax.cond(number == 0, load, lambda: _load_checked(plan, scratch, k, v, slot))
            else:
                load()
            return step + 1

        return lax.fori_loop(0, blocks.stop - blocks.start, load_block, step)

    if plan.has_schedule:
        row = inputs.schedule.at[lax.axis_index("cta")]
        plgpu.copy_gmem_to_smem(row, scratch.schedule, scratch.schedule_full)
    for_each_tile(plan, scratch, load_tile, computes=False)
    if plan.interpret:  # which insists that somebody waits for every arrival
        plgpu.barrier_wait(scratch.q_free)
        for slot in range(stages):
            plgpu.barrier_wait(scratch.k_free.at[slot])
            plgpu.barrier_wait(scratch.v_free.at[slot])


def _load_checked(plan: Plan, scratch: Scratch, k: Any, v: Any, slot: Array) -> None:
    """Loads a block with bad rows of V as zeros, and K of these keys as NaN."""
    k_smem, v_smem = scratch.k.at[slot], scratch.v.at[slot]

    def load(source: Any, target: Any) -> None:
        plgpu.copy_gmem_to_smem(source, target, scratch.checked)
        plgpu.barrier_wait(scratch.checked)

    # V passes through K's buffer first: its own becomes free only after this K has been used.
    load(v, k_smem)
    find_bad_rows((k_smem,), scratch.bad_keys, interpret=plan.interpret)
    plgpu.commit_smem()
    load(k, k_smem)
    fill_bad_rows(k_smem, scratch.bad_keys, NAN, interpret=plan.interpret)
    plgpu.commit_smem()
    plgpu.barrier_arrive(scratch.k_full.at[slot])
    plgpu.barrier_wait(scratch.v_free.at[slot])
    load(v, v_smem)
    fill_bad_rows(v_smem, scratch.bad_keys, 0.0, interpret=plan.interpret)
    plgpu.commit_smem()
    plgpu.barrier_arrive(scratch.v_full.at[slot])


class Loop(NamedTuple):
    """What stays the same while ROWS queries meet their blocks of keys; block j of the loop is j-th
    from the last.
    """

    plan: Plan
    scratch: Scratch
    blocks: BlockRange
    first_query: Array
    first_step: Array  # blocks that this CTA has loaded before: numbers the stages
    q_ids: Array | None  # [ROWS]

    @property
    def num_blocks(self) -> Array:
        """Blocks of this tile, at least 1."""
        return self.blocks.stop - self.blocks.start

    def stage(self, j: Array) -> Array:
        """Returns which buffers hold block j."""
        return lax.rem(self.first_step + j, jnp.int32(self.plan.config.num_stages))


def wait_for_k(loop: Loop, j: Array) -> None:
    """Waits until K of block j has arrived, if the tile has that many."""

    @pl.when(j < loop.num_blocks)
    def _() -> None:
        plgpu.barrier_wait(loop.scratch.k_full.at[loop.stage(j)])


def pin(plan: Launch, x: Any) -> Any:
    """Keeps the compiler from moving the computation of x past this point, or from merging it."""
    return x if plan.interpret else lax.optimization_barrier(x)


def take_turn(plan: Plan, scratch: Scratch) -> None:
    """Waits until this warpgroup may issue matrix products."""
    if plan.config.ping_pong:
        plgpu.barrier_wait(scratch.turn.at[lax.axis_index("wg")])


def pass_turn(plan: Plan, scratch: Scratch) -> None:
    """Lets the next warpgroup issue its matrix products."""
    if plan.config.ping_pong:
        wgs = jnp.int32(plan.config.compute_warpgroups)
        plgpu.barrier_arrive(scratch.turn.at[lax.rem(lax.axis_index("wg") + 1, wgs)])


def logits_type(plan: Plan) -> Any:
    """Accumulator of Q K^T."""
    return plgpu.ACC((ROWS, plan.config.block_kv), jnp.float32)


def out_type(plan: Plan) -> Any:
    """Accumulator of P V."""
    return plgpu.ACC((ROWS, plan.spec.head_dim), jnp.float32)


def issue_qk(loop: Loop, acc: Any, j: Array) -> None:
    """Starts Q K^T of block j."""
    q = loop.scratch.q.at[pl.ds(lax.axis_index("wg") * ROWS, ROWS)]
    plgpu.wgmma(acc, q, loop.scratch.k.at[loop.stage(j)].transpose((1, 0)))


def spread_rows(x: Array, shape: tuple[int, ...]) -> Array:
    """Broadcasts one value per row, [ROWS], to a matrix."""
    return lax.broadcast_in_dim(x, shape, [0])


def row_constant(value: Any, dtype: Any) -> Array:
    """Returns `value` for each row."""
    return plgpu.layout_cast(jnp.full((ROWS,), value, dtype), PER_ROW)


def for_each_block(
    loop: Loop, step: Callable[[bool, Array, Any], Any], state: Any, *, first: int
) -> Any:
    """Calls `state = step(may_be_masked, j, state)` for each block j from `first`, in order.

    The blocks that need no mask, mostly all but one or two, have a loop of their own: a branch
    around the mask inside of one loop would keep the compiler from overlapping its blocks.
    """
    plan, blocks = loop.plan, loop.blocks
    # In order of j: the blocks past the last one without a mask, those without, and those before.
    sees_all = _clip(blocks.stop - blocks.full_stop, first, loop.num_blocks)
    before = _clip(blocks.stop - blocks.full_start, sees_all, loop.num_blocks)
    band, has_segments = plan.spec.band, plan.spec.has_segments
    # Only block 0 reaches past the last key, so without a band `step` has `first` > 0 to skip it.
    if band.right is not None or has_segments or first == 0:
        state = lax.fori_loop(first, sees_all, functools.partial(step, True), state)
    state = lax.fori_loop(sees_all, before, functools.partial(step, False), state)
    if band.left is not None or has_segments:
        state = lax.fori_loop(before, loop.num_blocks, functools.partial(step, True), state)
    return state


def _clip(x: Array, low: Array | int, high: Array) -> Array:
    """Bounds a scalar; `low` <= `high`."""
    return jnp.minimum(jnp.maximum(x, low), high)


def mask(loop: Loop, j: Array, s: Array) -> Array:
    """Sets the logits of pairs that may not see each other to -inf; skips blocks without any."""
    plan, spec, blocks = loop.plan, loop.plan.spec, loop.blocks
    is_ragged = spec.key_length % plan.config.block_kv != 0
    if spec.band.is_full and not spec.has_segments and not is_ragged:
        return s

    def masked() -> Array:
        first_key = (blocks.stop - 1 - j) * plan.config.block_kv
        row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=PER_ROW)
        # Columns of this block that the query of each row sees.
        query = row + (loop.first_query - first_key)
        # Without a bound on the right, one that no key reaches: bounds that do not depend on `row`
        # leave Mosaic GPU's layout inference without an anchor, and it gives up after minutes.
        last = query + (spec.key_length if spec.band.right is None else spec.band.right)
        if is_ragged:
            last_key = row_constant(spec.key_length - 1 - first_key, jnp.int32)
            last = jnp.minimum(last_key, last)
        first = None if spec.band.left is None else query - spec.band.left
        seen = keep_columns(s, first, last, interpret=plan.interpret)
        if loop.q_ids is None:
            return seen
        kv_ids = plgpu.load(loop.scratch.kv_ids.at[loop.stage(j)], layout=PER_COLUMN)
        # Orders this read before TMA's next write to the same buffer.
        plgpu.commit_smem()
        return keep_equal(seen, loop.q_ids, kv_ids, interpret=plan.interpret)

    block = blocks.stop - 1 - j
    needs_mask = (block < blocks.full_start) | (block >= blocks.full_stop)
    return lax.cond(needs_mask, masked, lambda: s)


def launch_forward(
    compute: Callable[[Plan, Inputs, tuple[Any, ...], Scratch], None],
    arrays: tuple[Array, ...],
    segments: tuple[Array, Array, Array] | None,
    *,
    plan: Plan,
    out_types: tuple[jax.ShapeDtypeStruct, ...],
    name: str,
) -> Any:
    """Runs a forward kernel: `compute` on each compute warpgroup, `produce` on the last one.

    Args:
      compute: what a compute warpgroup does with plan, inputs, outputs and scratch.
      arrays: q, k, v, and in FP8 the factor and the scales; see `Inputs`.
      segments: ids of queries and keys, and block ranges; or None.
      plan: shapes, config and device.
      out_types: of the outputs.
      name: of the kernel.

    Returns:
      The outputs.
    """
    wgs = plan.config.compute_warpgroups

    def kernel(*refs: Any, **scratch_refs: Any) -> None:
        inputs = _inputs(plan, refs[: -len(out_types)])
        scratch = Scratch(**{name: scratch_refs.get(name) for name in Scratch._fields})
        wg = lax.axis_index("wg")

        @pl.when(wg < wgs)
        def _() -> None:
            plgpu.set_max_registers(plan.config.compute_registers, action="increase")
            compute(plan, inputs, refs[-len(out_types) :], scratch)

        @pl.when(wg == wgs)
        def _() -> None:
            plgpu.set_max_registers(plan.config.producer_registers, action="decrease")
            produce(plan, inputs, scratch)

    types = scratch_types(plan)._asdict().items()
    return plgpu.kernel(
        kernel,
        out_type=out_types,
        scratch_types={name: x for name, x in types if x is not None},
        grid=(plan.num_ctas,),
        grid_names=("cta",),
        num_threads=wgs + 1,
        thread_name="wg",
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if plan.interpret else None,
    )(*arrays, *(segments or ()), *schedule_operand(plan))


def _inputs(plan: Plan, refs: tuple[Any, ...]) -> Inputs:
    """Gives the operands of `launch_forward` their names."""
    arrays, rest = list(refs), [None, None, None]
    schedule = arrays.pop() if plan.has_schedule else None
    if plan.spec.has_segments:
        arrays, rest = arrays[:-3], arrays[-3:]
    q, k, v, *fp8_only = arrays
    q_ids, kv_ids, ranges = rest
    return Inputs(q, k, v, q_ids, kv_ids, ranges, schedule, *fp8_only)

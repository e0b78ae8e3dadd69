"""Flash attention backward for sm_90a in FP8, in Pallas Mosaic GPU: five products, one kernel.

The maths is `fp8`'s. A CTA owns 128 keys of one key/value head, 64 for each of its two compute
warpgroups, and visits the blocks of 64 queries that see them, head by head of the group:
  X^T = c K Q^T,        P^T = exp2(X^T - offset)            both round8 of P^T and dS^T stay in the
  dP^T = V (dO 2^-R)^T, dS^T = P^T (slope dP^T - delta)     accumulator's registers as A operands
  dV += P^T dO 2^-E,    dK += dS^T q 2^(R - E - t)          accumulators of the whole tile
  dQ += dS K                                                in float32 to global memory, by TMA
offset and delta are numbers of each query, slope of the CTA, c of both; powers of two in them bound
P and dS ahead of time. dK and dV leave in the output's type, times a factor of the head; dK is
rotated back by one more product.

  warpgroup      does                                       waits for              then arrives at
  compute 0, 1   S^T, dP^T, dV, dK for 64 keys;             kv_full rows_full      rows_free
                 dQ for half of the head dim                columns_full           columns_free
  producer (2)   TMA loads                                  rows_free columns_free (TMA) the *_full

8-bit wgmma has no transposed operands, so each factor comes in the order in which it is contracted:
q and dO as rows and as columns (`fp8.permute_16` along the queries, the order that accumulators
have as A operands), k as rows and as columns (`fp8.permute_28` along the keys). dS reaches shared
memory transposed: the bytes of keys g and g + 8 make one 16-bit unit, and stmatrix transposes
units; hence that order. `dS_full` and `dS_free` order the exchange between the warpgroups.

Deterministic mode: tiles that add to the same part of dQ take turns in the order of their keys,
counted in global memory (`turns`); the producer waits for a step's turn, and tells the compute
warpgroups by the barrier `turn`. A tile waits only for tiles of smaller CTA index, which have begun
before, because the hardware starts CTAs in order.

Not supported: head dims other than 64 and 128 (dK and dV of 256 do not fit the registers).
"""

# Shapes: B batch, T query, S key, N query heads, K key/value heads, H head dim.

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash_attention.fp8 import E4M3
from pallas_kernels.flash_attention.sm90_bwd_fp8_plan import (
    BLOCK_Q,
    TILE_KV,
    TURN_SLOTS,
    WARPGROUPS,
    Inputs,
    Plan,
    Scalars,
    Scratch,
    scratch_types,
)
from pallas_kernels.flash_attention.sm90_fwd_plan import BlockRange
from pallas_kernels.mosaic import (
    PER_COLUMN,
    PER_ROW,
    ROWS,
    accumulator_as_8_bit_operand,
    keep_columns,
    keep_equal,
    launcher,
    set_first_row,
    store_transposed_8_bits,
)

_REGISTERS, _PRODUCER_REGISTERS = 240, 24


class _Tile(NamedTuple):
    """What one CTA computes."""

    plan: Plan
    inputs: Inputs
    scratch: Scratch
    batch: Array
    kv_head: Array
    kv_tile: Array
    blocks: BlockRange  # of queries
    counters: Any  # [num_turns], semaphores: warpgroups that have added to dQ; or None

    def for_each_step(self, body: Any) -> Array:
        """Calls body(head, block, step) for each head of the group and each block of queries;
        returns the number of steps.

        Tiles that add to the same block at the same time wait for each other. So where all tiles
        see the same blocks, and no order is asked for, each begins with another one.
        """
        first_head = self.kv_head * self.plan.group
        count = self.blocks.stop - self.blocks.start
        first = jnp.int32(0)
        if self.plan.spec.band.right is None and not self.plan.takes_turns:
            first = lax.div(self.kv_tile * count, jnp.int32(self.plan.num_kv_tiles))

        def in_head(g: Array, _: None) -> None:
            def in_block(i: Array, _: None) -> None:
                position = first + i
                position -= jnp.where(position >= count, count, 0)
                body(first_head + g, self.blocks.start + position, g * count + i)

            lax.fori_loop(0, count, in_block, None)

        lax.fori_loop(0, self.plan.group, in_head, None)
        return self.plan.group * count

    def await_turn(self, step: Array) -> None:
        """Waits until all tiles that come before have added to dQ of a step; tells `_compute`."""
        if not self.plan.takes_turns:
            return
        if self.counters is not None:
            row = self.batch if self.plan.spec.has_segments else 0
            _, block = self.position(step)
            before = self.inputs.turns[row, self.kv_tile, block] * WARPGROUPS
            counter = self.counter(step)
            plgpu.semaphore_wait(counter, before, decrement=False, memory_scope="gpu")
        plgpu.barrier_arrive(self.turn(step))

    def pass_turn(self, step: Array) -> None:
        """Waits until dQ of a step is in global memory, and lets the next tile add to it."""
        if self.counters is not None:
            plgpu.wait_smem_to_gmem(0)
            plgpu.semaphore_signal(self.counter(step), memory_scope="gpu")

    def position(self, step: Array) -> tuple[Array, Array]:
        """Head and block of queries of a step."""
        count = self.blocks.stop - self.blocks.start
        head = self.kv_head * self.plan.group + lax.div(step, count)
        return head, self.blocks.start + lax.rem(step, count)

    def counter(self, step: Array) -> Any:
        """The counter of the additions to dQ of a step; step -1 has one that nobody reads."""
        head, block = self.position(step)
        row = self.batch * self.plan.spec.num_heads + head
        index = row * self.plan.num_q_blocks + block
        return self.counters.at[jnp.where(step < 0, self.plan.num_turns - 1, index)]

    def turn(self, step: Array) -> Any:
        """The barrier of a step's turn."""
        return self.scratch.turn.at[lax.rem(step, jnp.int32(TURN_SLOTS))]

    def scalars(self) -> Scalars:
        """The numbers of this tile."""
        index = self.batch, self.kv_head, self.kv_tile
        return Scalars(*(self.inputs.scalars[*index, i] for i in range(4)))

    def slot(self, step: Array) -> Array:
        """The buffers of a step."""
        return lax.rem(step, jnp.int32(self.plan.num_stages))


def _tile_of(plan: Plan, inputs: Inputs, scratch: Scratch, counters: Any) -> _Tile:
    """This CTA's tile: the first keys, which a causal mask shows to the most queries, go first."""
    heads = plan.spec.batch_size * plan.spec.num_kv_heads
    cta = lax.axis_index("cta")
    kv_tile, index = lax.div(cta, jnp.int32(heads)), lax.rem(cta, jnp.int32(heads))
    batch = lax.div(index, jnp.int32(plan.spec.num_kv_heads))
    kv_head = lax.rem(index, jnp.int32(plan.spec.num_kv_heads))
    row = batch if plan.spec.has_segments else 0
    blocks = BlockRange(*(inputs.block_ranges[row, kv_tile, i] for i in range(4)))
    return _Tile(plan, inputs, scratch, batch, kv_head, kv_tile, blocks, counters)


def _produce(tile: _Tile) -> None:
    """Loads K, V once, then the query side's factors of each step as their buffers become free."""
    plan, inputs, scratch = tile.plan, tile.inputs, tile.scratch
    batch, kv_head = tile.batch, tile.kv_head
    keys = pl.ds(tile.kv_tile * TILE_KV, TILE_KV)
    plgpu.copy_gmem_to_smem(inputs.k.at[batch, keys, kv_head], scratch.k, scratch.kv_full)
    plgpu.copy_gmem_to_smem(inputs.v.at[batch, keys, kv_head], scratch.v, scratch.kv_full)
    for wg in range(WARPGROUPS):
        half = pl.ds(tile.kv_tile * TILE_KV + wg * ROWS, ROWS)
        source = inputs.k_t.at[batch, kv_head, :, half]
        plgpu.copy_gmem_to_smem(source, scratch.k_t.at[wg], scratch.kv_full)

    if plan.spec.fp8.rotate:
        plgpu.copy_gmem_to_smem(inputs.matrix, scratch.matrix, scratch.kv_full)

    def load(head: Array, block: Array, step: Array) -> None:
        slot = tile.slot(step)
        queries = pl.ds(block * BLOCK_Q, BLOCK_Q)
        full, columns_full = scratch.rows_full.at[slot], scratch.columns_full.at[slot]
        plgpu.barrier_wait(scratch.rows_free.at[slot])
        for source, target in (
            (inputs.q.at[batch, queries, head], scratch.q),
            (inputs.dout.at[batch, queries, head], scratch.dout),
            (inputs.rows.at[batch, head, block], scratch.rows),
        ):
            plgpu.copy_gmem_to_smem(source, target.at[slot], full)
        if plan.spec.has_segments:
            plgpu.copy_gmem_to_smem(inputs.q_ids.at[batch, queries], scratch.q_ids.at[slot], full)
        plgpu.barrier_wait(scratch.columns_free.at[slot])
        for source, target in ((inputs.q_t, scratch.q_t), (inputs.dout_t, scratch.dout_t)):
            columns = source.at[batch, head, :, queries]
            plgpu.copy_gmem_to_smem(columns, target.at[slot], columns_full)
        # Not before the loads that the step before needs to get to its turn.
        pl.when(step > 0)(lambda: tile.await_turn(step - 1))

    num_steps = tile.for_each_step(load)
    pl.when(num_steps > 0)(lambda: tile.await_turn(num_steps - 1))
    if plan.interpret:  # which insists that somebody waits for every arrival
        for slot in range(plan.num_stages):
            plgpu.barrier_wait(scratch.rows_free.at[slot])
            plgpu.barrier_wait(scratch.columns_free.at[slot])


def _compute(tile: _Tile, outputs: tuple[Any, Any, Any]) -> None:
    """Computes dK and dV of ROWS keys, and this tile's part of dQ."""
    plan, scratch = tile.plan, tile.scratch
    wg = lax.axis_index("wg")
    dk_gmem, dv_gmem, dq_gmem = outputs
    first_key = tile.kv_tile * TILE_KV + wg * ROWS
    for slot in range(plan.num_stages):  # all buffers start out free
        plgpu.barrier_arrive(scratch.rows_free.at[slot])
        plgpu.barrier_arrive(scratch.columns_free.at[slot])
    kv_ids = None
    if plan.spec.has_segments:
        ids = tile.inputs.kv_ids.at[tile.batch, pl.ds(first_key, ROWS)]
        kv_ids = plgpu.load(ids, layout=PER_ROW, optimized=False)
    scalars = tile.scalars()
    plgpu.barrier_wait(scratch.kv_full)

    def run(dk_acc: Any, dv_acc: Any) -> tuple[Array, Array]:
        def run_step(head: Array, block: Array, step: Array) -> None:
            slot = tile.slot(step)
            p, ds = _probabilities(tile, scalars, kv_ids, block, slot)
            _add_dk_dv(tile, dk_acc, dv_acc, p, ds, slot)
            dq = _dq(tile, ds)
            plgpu.barrier_arrive(scratch.columns_free.at[slot])
            _send_dq(tile, dq_gmem, dq, head, block, step)

        num_steps = tile.for_each_step(run_step)
        if plan.takes_turns:
            pl.when(num_steps > 0)(lambda: tile.pass_turn(num_steps - 1))
        return dk_acc[...], dv_acc[...]

    accumulator = plgpu.ACC((ROWS, plan.spec.head_dim), jnp.float32)
    dk, dv = pl.run_scoped(run, accumulator, accumulator)
    # Reading these anew is cheaper than holding them in registers through the loop.
    scalars = tile.scalars()
    dk, dv = (
        (value * factor).astype(plan.spec.dtype)
        for value, factor in ((dk, scalars.dk_factor), (dv, scalars.dv_factor))
    )
    if plan.spec.fp8.rotate:
        dk = _rotate_back(tile, dk)
    for value, target in ((dk, dk_gmem), (dv, dv_gmem)):
        _, (buffer,) = scratch.staging
        buffer = buffer.at[wg]
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        buffer[...] = value
        plgpu.commit_smem()
        keys = pl.ds(first_key, ROWS)
        plgpu.copy_smem_to_gmem(buffer, target.at[tile.batch, keys, tile.kv_head])
    plgpu.wait_smem_to_gmem(0)


def _rotate_back(tile: _Tile, dk: Array) -> Array:
    """Returns dK M^T in dK's type."""
    operand = dk
    if tile.plan.interpret:  # which takes no A operand in registers
        operand = tile.scratch.rotated.at[lax.axis_index("wg")]
        operand[...] = dk
        plgpu.commit_smem()

    def product(acc: Any) -> Array:
        plgpu.wgmma(acc, operand, tile.scratch.matrix)
        return acc[...]

    accumulator = plgpu.ACC((ROWS, tile.plan.spec.head_dim), jnp.float32)
    return pl.run_scoped(product, accumulator).astype(dk.dtype)


def _probabilities(
    tile: _Tile, scalars: Scalars, kv_ids: Array | None, block: Array, slot: Array
) -> tuple[Array, Array]:
    """Returns P'^T and dS'^T of one block of queries, `[ROWS, BLOCK_Q]`, float32."""
    scratch = tile.scratch
    keys = pl.ds(lax.axis_index("wg") * ROWS, ROWS)

    def column(i: int) -> Array:
        x = plgpu.load(scratch.rows.at[slot, i], layout=PER_COLUMN)
        return lax.broadcast_in_dim(x, (ROWS, BLOCK_Q), [1])

    def corrected(s: Array) -> Array:
        first_key = plgpu.load(scratch.rows.at[slot, 3], layout=PER_COLUMN)
        return set_first_row(s, first_key, interpret=tile.plan.interpret)

    def products(s_acc: Any, dp_acc: Any) -> tuple[Array, Array]:
        plgpu.wgmma(s_acc, scratch.k.at[keys], scratch.q.at[slot].transpose((1, 0)))
        plgpu.wgmma(dp_acc, scratch.v.at[keys], scratch.dout.at[slot].transpose((1, 0)))
        s = plgpu.wgmma_accumulator_load(s_acc, wait_n=1)
        s = _mask(tile, kv_ids, block, slot, s)
        if tile.plan.spec.fp8.exact_first_key:
            has_it = (tile.kv_tile == 0) & (lax.axis_index("wg") == 0)
            s = lax.cond(has_it, functools.partial(corrected, s), lambda: s)
        return jnp.exp2(s * factor - column(0)), dp_acc[...]

    plgpu.barrier_wait(scratch.rows_full.at[slot])
    factor = scratch.rows[slot, 2, 0] * scalars.k_scale
    accumulator = plgpu.ACC((ROWS, BLOCK_Q), jnp.float32)
    p, dp = pl.run_scoped(products, accumulator, accumulator)
    delta = column(1)
    if tile.plan.interpret:  # whose race detector wants reads ordered before TMA's next write
        plgpu.commit_smem()
    plgpu.barrier_arrive(scratch.rows_free.at[slot])
    return p, p * (dp * scalars.slope - delta)


def _mask(tile: _Tile, kv_ids: Array | None, block: Array, slot: Array, s: Array) -> Array:
    """Sets the logits `[keys, queries]` of pairs that may not see each other to -inf."""
    spec, interpret = tile.plan.spec, tile.plan.interpret
    is_ragged = spec.key_length % TILE_KV != 0
    if spec.band.is_full and not spec.has_segments and not is_ragged:
        return s

    def masked() -> Array:
        first_key = tile.kv_tile * TILE_KV + lax.axis_index("wg") * ROWS
        key = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=PER_ROW) + first_key
        # Columns of this block that see the key of each row: s - right <= t <= s + left.
        offset = block * BLOCK_Q
        left = spec.query_length + BLOCK_Q if spec.band.left is None else spec.band.left
        last = key + (left - offset)
        if is_ragged:
            last = jnp.where(key < spec.key_length, last, -1)
        first = None if spec.band.right is None else key - (offset + spec.band.right)
        seen = keep_columns(s, first, last, interpret=interpret)
        if kv_ids is None:
            return seen
        q_ids = plgpu.load(tile.scratch.q_ids.at[slot], layout=PER_COLUMN)
        return keep_equal(seen, kv_ids, q_ids, interpret=interpret)

    needs_mask = (block < tile.blocks.full_start) | (block >= tile.blocks.full_stop)
    return lax.cond(needs_mask, masked, lambda: s)


def _add_dk_dv(tile: _Tile, dk_acc: Any, dv_acc: Any, p: Array, ds: Array, slot: Array) -> None:
    """Starts dV += P'^T (dO 2^-E) and dK += dS'^T (q 2^(R - E - t))."""
    scratch, interpret = tile.scratch, tile.plan.interpret
    p, ds = (accumulator_as_8_bit_operand(x, E4M3, interpret=interpret) for x in (p, ds))
    plgpu.barrier_wait(scratch.columns_full.at[slot])
    if interpret:  # which takes no A operand in registers
        operands = scratch.operands.at[lax.axis_index("wg")]
        operands.at[0][...], operands.at[1][...] = p, ds
        plgpu.commit_smem()
        p, ds = operands.at[0], operands.at[1]
    else:
        # Converted before the products start: their registers must not change while they run.
        p, ds = lax.optimization_barrier((p, ds))
    plgpu.wgmma(dv_acc, p, scratch.dout_t.at[slot].transpose((1, 0)))
    plgpu.wgmma(dk_acc, ds, scratch.q_t.at[slot].transpose((1, 0)))


def _dq(tile: _Tile, ds: Array) -> Array:
    """Exchanges dS'; returns this warpgroup's columns of dS' K, and waits for all products."""
    plan, scratch = tile.plan, tile.scratch
    wg = lax.axis_index("wg")
    units, ds_bytes = (scratch.ds,) * 2 if plan.interpret else (x for (x,) in scratch.ds)
    store_transposed_8_bits(ds, units.at[wg], E4M3, interpret=plan.interpret)
    plgpu.commit_smem()
    plgpu.barrier_arrive(scratch.ds_full)
    plgpu.barrier_wait(scratch.ds_full)
    columns = pl.ds(wg * plan.dq_columns, plan.dq_columns)

    def product(acc: Any) -> Array:
        for half in range(WARPGROUPS):
            k_t = scratch.k_t.at[half, columns]
            plgpu.wgmma(acc, ds_bytes.at[half], k_t.transpose((1, 0)))
        return acc[...]

    return pl.run_scoped(product, plgpu.ACC((BLOCK_Q, plan.dq_columns), jnp.float32))


def _send_dq(tile: _Tile, dq_gmem: Any, dq: Array, head: Array, block: Array, step: Array) -> None:
    """Adds a part of dQ to global memory; afterwards dS may be overwritten."""
    plan, scratch = tile.plan, tile.scratch
    wg = lax.axis_index("wg")
    plgpu.barrier_arrive(scratch.ds_free)
    columns = pl.ds(wg * plan.dq_columns, plan.dq_columns)
    target = dq_gmem.at[tile.batch, pl.ds(block * BLOCK_Q, BLOCK_Q), head, columns]
    if plan.interpret:
        if plan.takes_turns:
            plgpu.barrier_wait(tile.turn(step))
        target[...] = target[...] + dq
    else:
        (staged,), _ = scratch.staging
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        tile.pass_turn(step - 1)
        staged.at[wg][...] = dq
        plgpu.commit_smem()
        if plan.takes_turns:
            plgpu.barrier_wait(tile.turn(step))
        plgpu.copy_smem_to_gmem(staged.at[wg], target, reduction_op="add")
    plgpu.barrier_wait(scratch.ds_free)


def _kernel(*refs: Any, plan: Plan, **scratch_refs: Any) -> None:
    """Splits the warpgroups into compute and producer."""
    *given, dq, dk, dv = refs
    names = [name for name in Inputs._fields if name in plan.operands]
    inputs = Inputs(**dict(zip(names, given, strict=True)))
    counters = None
    if plan.takes_turns and not plan.interpret:
        counters = pl.get_global(plgpu.SemaphoreType.REGULAR((plan.num_turns,)))
    scratch = Scratch(**{name: scratch_refs.get(name) for name in Scratch._fields})
    wg = lax.axis_index("wg")

    @pl.when(wg < WARPGROUPS)
    def _() -> None:
        plgpu.set_max_registers(_REGISTERS, action="increase")
        _compute(_tile_of(plan, inputs, scratch, counters), (dk, dv, dq))

    @pl.when(wg == WARPGROUPS)
    def _() -> None:
        plgpu.set_max_registers(_PRODUCER_REGISTERS, action="decrease")
        _produce(_tile_of(plan, inputs, scratch, counters))


@launcher("plan")
def launch(inputs: Inputs, *, plan: Plan) -> tuple[Array, Array, Array]:
    """Runs the kernel.

    Returns:
      dQ `[B, T, N, H]`, float32, dK and dV `[B, S, K, H]`, with padded lengths: what
      `fp8_vjp.Kernels.fp8_backward` returns.
    """
    spec = plan.spec
    scratch = {name: x for name, x in scratch_types(plan)._asdict().items() if x is not None}
    keys = jax.ShapeDtypeStruct(
        (spec.batch_size, plan.num_kv_tiles * TILE_KV, spec.num_kv_heads, spec.head_dim),
        spec.dtype,
    )
    queries = (spec.batch_size, plan.num_q_blocks * BLOCK_Q, spec.num_heads, spec.head_dim)
    dq = jax.new_ref(jnp.zeros(queries, jnp.float32))
    operands = [x for x in inputs if x is not None]
    dk, dv = plgpu.kernel(
        functools.partial(_kernel, plan=plan),
        out_type=(keys, keys),
        scratch_types=scratch,
        grid=(plan.num_kv_tiles * spec.batch_size * spec.num_kv_heads,),
        grid_names=("cta",),
        num_threads=WARPGROUPS + 1,
        thread_name="wg",
        kernel_name="flash_attention_bwd_fp8",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if plan.interpret else None,
    )(*operands, dq)
    return dq[...], dk, dv

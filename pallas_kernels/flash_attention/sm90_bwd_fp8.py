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

With `separate_dq`, dQ is the third warpgroup's: the other two wait for nobody but it, two steps
later (`ds_free`), and its products and its addition overlap theirs.

  compute 0, 1   S^T, dP^T, dV, dK for 64 keys              the *_full, ds_free    ds_full, *_free
  assistant (2)  TMA loads, dQ                              ds_full, the *_free    ds_free dq_sent

8-bit wgmma has no transposed operands, so each factor comes in the order in which it is contracted:
q and dO as rows and as columns (`fp8.permute_16` along the queries, the order that accumulators
have as A operands), k as rows and as columns (`fp8.permute_28` along the keys). dS reaches shared
memory transposed: the bytes of keys g and g + 8 make one 16-bit unit, and stmatrix transposes
units; hence that order. `ds_full` and `ds_free` order the exchange between the warpgroups.

Deterministic mode: tiles that add to the same part of dQ take turns in the order of their keys,
counted in global memory (`turns`); the producer waits for a step's turn, and tells the compute
warpgroups by the barrier `turn`; an assistant waits itself. A tile waits only for tiles of smaller
CTA index, which have begun before, because the hardware starts CTAs in order.

Not supported: head dims other than 64 and 128 (dK and dV of 256 do not fit the registers).
"""

# Shapes: B batch, T query, S key, N query heads, K key/value heads, H head dim.

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash_attention.fp8 import E4M3
from pallas_kernels.flash_attention.sm90_bwd_fp8_dq import add_own_part, assist, finish, hand_over
from pallas_kernels.flash_attention.sm90_bwd_fp8_loads import produce
from pallas_kernels.flash_attention.sm90_bwd_fp8_plan import (
    BLOCK_Q,
    TILE_KV,
    WARPGROUPS,
    Inputs,
    Plan,
    Scalars,
    Scratch,
    Tile,
    scratch_types,
    tile_of,
)
from pallas_kernels.mosaic import (
    PER_COLUMN,
    PER_ROW,
    ROWS,
    accumulator_as_8_bit_operand,
    keep_columns,
    keep_equal,
    launcher,
    set_first_row,
)


def _compute(tile: Tile, outputs: tuple[Any, Any, Any]) -> None:
    """Computes dK and dV of ROWS keys, and this tile's part of dQ."""
    plan, scratch = tile.plan, tile.scratch
    wg = lax.axis_index("wg")
    dk_gmem, dv_gmem, dq_gmem = outputs
    first_key = tile.kv_tile * TILE_KV + wg * ROWS
    if not plan.config.separate_dq:
        for slot in range(plan.config.num_stages):  # all buffers start out free
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
            ds = _step(tile, (dk_acc, dv_acc), scalars, kv_ids, block, slot)
            hand_over(tile, ds, step)
            if plan.config.separate_dq:
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(scratch.columns_free.at[slot])
            else:
                add_own_part(tile, dq_gmem, head, block, step)

        tile.for_each_step(run_step)
        finish(tile)
        return dk_acc[...], dv_acc[...]

    accumulator = plgpu.ACC((ROWS, plan.spec.head_dim), jnp.float32)
    dk, dv = pl.run_scoped(run, accumulator, accumulator)
    _leave(tile, dk, dv, (dk_gmem, dv_gmem))


def _leave(tile: Tile, dk: Array, dv: Array, targets: tuple[Any, Any]) -> None:
    """Scales dK and dV, rotates dK back, and writes them through shared memory."""
    plan, scratch = tile.plan, tile.scratch
    wg = lax.axis_index("wg")
    # Reading these anew is cheaper than holding them in registers through the loop.
    scalars = tile.scalars()
    dk, dv = (
        (value * factor).astype(plan.spec.dtype)
        for value, factor in ((dk, scalars.dk_factor), (dv, scalars.dv_factor))
    )
    if plan.spec.fp8.rotate:
        dk = _rotate_back(tile, dk)
    if plan.config.separate_dq:
        plgpu.barrier_wait(scratch.dq_sent)
    for value, target in zip((dk, dv), targets, strict=True):
        _, (buffer,) = scratch.staging
        buffer = buffer.at[wg]
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        buffer[...] = value
        plgpu.commit_smem()
        keys = pl.ds(tile.kv_tile * TILE_KV + wg * ROWS, ROWS)
        plgpu.copy_smem_to_gmem(buffer, target.at[tile.batch, keys, tile.kv_head])
    plgpu.wait_smem_to_gmem(0)


def _rotate_back(tile: Tile, dk: Array) -> Array:
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


def _step(
    tile: Tile,
    accumulators: tuple[Any, Any],
    scalars: Scalars,
    kv_ids: Array | None,
    block: Array,
    slot: Array,
) -> Array:
    """Starts dV += P'^T (dO 2^-E) and dK += dS'^T (q 2^(R - E - t)) of one block of queries;
    returns dS'^T, `[ROWS, BLOCK_Q]`, float32.
    """
    plan, scratch = tile.plan, tile.scratch
    dk_acc, dv_acc = accumulators
    keys = pl.ds(lax.axis_index("wg") * ROWS, ROWS)

    def column(i: int) -> Array:
        x = plgpu.load(scratch.rows.at[slot, i], layout=PER_COLUMN)
        return lax.broadcast_in_dim(x, (ROWS, BLOCK_Q), [1])

    def products(s_acc: Any, dp_acc: Any) -> tuple[Array, Array]:
        plgpu.wgmma(s_acc, scratch.k.at[keys], scratch.q.at[slot].transpose((1, 0)))
        plgpu.wgmma(dp_acc, scratch.v.at[keys], scratch.dout.at[slot].transpose((1, 0)))
        s = plgpu.wgmma_accumulator_load(s_acc, wait_n=1)
        s = _exact(tile, slot, _mask(tile, kv_ids, block, slot, s))
        p = jnp.exp2(s * factor - column(0))
        if not plan.config.early_dv:
            return p, dp_acc[...]
        (p8,) = _operands(tile, (p,))
        plgpu.barrier_wait(scratch.columns_full.at[slot])
        plgpu.wgmma(dv_acc, p8, scratch.dout_t.at[slot].transpose((1, 0)))
        return p, plgpu.wgmma_accumulator_load(dp_acc, wait_n=1)

    plgpu.barrier_wait(scratch.rows_full.at[slot])
    factor = scratch.rows[slot, 2, 0] * scalars.k_scale
    accumulator = plgpu.ACC((ROWS, BLOCK_Q), jnp.float32)
    p, dp = pl.run_scoped(products, accumulator, accumulator)
    ds = p * (dp * scalars.slope - column(1))
    if plan.interpret:  # whose race detector wants reads ordered before TMA's next write
        plgpu.commit_smem()
    plgpu.barrier_arrive(scratch.rows_free.at[slot])
    if plan.config.early_dv:
        (ds8,) = _operands(tile, (ds,), first=1)
    else:
        p8, ds8 = _operands(tile, (p, ds))
        plgpu.barrier_wait(scratch.columns_full.at[slot])
        plgpu.wgmma(dv_acc, p8, scratch.dout_t.at[slot].transpose((1, 0)))
    plgpu.wgmma(dk_acc, ds8, scratch.q_t.at[slot].transpose((1, 0)))
    return ds


def _operands(tile: Tile, values: tuple[Array, ...], first: int = 0) -> tuple[Any, ...]:
    """Rounds P'^T or dS'^T to 8 bits, as A operands."""
    interpret = tile.plan.interpret
    rounded = tuple(accumulator_as_8_bit_operand(x, E4M3, interpret=interpret) for x in values)
    if not interpret:
        # Converted before the products start: their registers must not change while they run.
        return lax.optimization_barrier(rounded)
    buffers = tile.scratch.operands.at[lax.axis_index("wg")]  # no A operand in registers
    targets = tuple(buffers.at[first + i] for i in range(len(rounded)))
    for target, x in zip(targets, rounded, strict=True):
        target[...] = x
    plgpu.commit_smem()
    return targets


def _exact(tile: Tile, slot: Array, s: Array) -> Array:
    """Replaces the logits of the first key by those without rounding, if asked for."""

    def corrected() -> Array:
        first_key = plgpu.load(tile.scratch.rows.at[slot, 3], layout=PER_COLUMN)
        return set_first_row(s, first_key, interpret=tile.plan.interpret)

    if not tile.plan.spec.fp8.exact_first_key:
        return s
    has_it = (tile.kv_tile == 0) & (lax.axis_index("wg") == 0)
    return lax.cond(has_it, corrected, lambda: s)


def _mask(tile: Tile, kv_ids: Array | None, block: Array, slot: Array, s: Array) -> Array:
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
    config = plan.config

    @pl.when(wg < WARPGROUPS)
    def _() -> None:
        plgpu.set_max_registers(config.compute_registers, action="increase")
        _compute(tile_of(plan, inputs, scratch, counters), (dk, dv, dq))

    @pl.when(wg == WARPGROUPS)
    def _() -> None:
        plgpu.set_max_registers(config.producer_registers, action="decrease")
        tile = tile_of(plan, inputs, scratch, counters)
        if plan.config.separate_dq:
            assist(tile, dq)
        else:
            produce(tile)


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

"""Flash attention backward for sm_90a in bfloat16 or float16, written in Pallas Mosaic GPU.

For each tile of keys, over the blocks i of queries that see it, of all query heads of its group:
  P_i^T = exp2(c K Q_i^T - lse_i),   dS_i^T = P_i^T * (V dO_i^T - delta_i),
  dV += P_i^T dO_i,   dK += dS_i^T Q_i,   dQ_i += dS_i K,   c = softmax_scale * log2(e)
with delta = rowsum(dO * O) - dlse; dK and dQ are multiplied by softmax_scale at the end.
(Dao 2023, arXiv:2307.08691; S^T in registers as an A operand: Shah et al. 2024, arXiv:2407.08608.)

One persistent CTA on each SM walks through the tiles, longest first:

  warpgroup        does                                      waits for            arrives at
  compute 0, 1     S^T, dP^T, dK, dV for 64 keys each, dQ    kv_full q_full       kv_free q_free
                   for half of the channels or queries       do_full exchange     do_free exchange
                                                             turn
  producer (last)  TMA loads of K, V, Q, dO, lse, delta,     kv_free q_free       (TMA) kv_full
                   segment ids; waits for turns              do_free              q_full do_full
                                                                                  turn

P^T and dS^T feed dV and dK from registers. dS^T goes through shared memory too, because dQ needs
the keys of both warpgroups (barrier `exchange`). dQ is added to global memory by TMA. Every step
first finishes dK and dQ of the block before, so that exponentials, dS and the copies of dQ run
while a matrix product is in flight:

  tensor cores  dK_{i-1}  dQ_{i-1}  S_i            dP_i       dV_i
  other units                       dQ_{i-1} out   exp2(S_i)  dS_i

`late_dq`: nobody waits for the other warpgroup's dS, so that the two can drift half a step apart,
and one multiplies while the other does not:

  tensor cores  S_i  dK_{i-1}   dQ_{i-1}  dV_i           dP_i
  other units        exp2(S_i)            dQ_{i-1} out         dS_i

`split_channels` (head dim 256): both warpgroups work on the same 64 keys, each on half of the
channels of dK, dV and dQ; both compute S^T and dP^T (7 products instead of 5), and nothing is
exchanged. dQ leaves in two parts.

In any order, each tile begins with another block of queries: tiles that add to the same part of
dQ at the same time wait for each other.

Deterministic mode: tiles that add to the same part of dQ take turns in the order of their keys,
counted in global memory. A tile waits only for tiles with a smaller index, which some CTA has
begun before; so no cycle of waiting exists as long as all CTAs are resident, which `num_ctas`
ensures.

Not supported: float32, head dims other than 64, 128, 256, biases, dropout, logit soft-capping.
"""

# Shapes: B batch, T query, S key, N query heads, K key/value heads, H head dim, C compute
# warpgroups.

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash_attention.sm90_bwd_loop import (
    Loop,
    add_dq,
    await_turn,
    clean_keys,
    dq_part_of,
    first_key_of,
    load_queries,
    mask,
    pass_turn,
)
from pallas_kernels.flash_attention.sm90_bwd_plan import (
    Inputs,
    Outputs,
    Plan,
    Scratch,
    query_range_of,
    scratch_types,
    tile_of,
)
from pallas_kernels.flash_attention.sm90_fwd_loop import pin
from pallas_kernels.flash_attention.sm90_fwd_plan import cta_tiles
from pallas_kernels.mosaic import PER_COLUMN, PER_ROW, ROWS, launcher
from pallas_kernels.numerics import LOG2E


def _produce(plan: Plan, inputs: Inputs, outputs: Outputs, scratch: Scratch, counters: Any) -> None:
    """Loads K and V of each tile, then its blocks of Q and dO, as their buffers become free."""
    count, index = cta_tiles(plan)
    block_kv = plan.config.block_kv

    def load_tile(i: Array, first_step: Array) -> Array:
        tile = tile_of(plan, index(i))
        blocks = query_range_of(plan, inputs, tile)
        loop = Loop(plan, inputs, outputs, scratch, counters, tile, blocks, first_step, None)
        keys = pl.ds(tile.kv_tile * block_kv, block_kv)
        plgpu.barrier_wait(scratch.kv_free)
        for gmem, smem in ((inputs.k, scratch.k), (inputs.v, scratch.v)):
            gmem = gmem.at[tile.batch, keys, tile.kv_head]
            plgpu.copy_gmem_to_smem(gmem, smem, scratch.kv_full)

        def load_block(step: Array, _: None) -> None:
            load_queries(loop, step)
            if plan.takes_turns:
                # Not before the loads that the step before needs to get to its turn.
                pl.when(step > 0)(lambda: await_turn(loop, step - 1))

        lax.fori_loop(0, loop.num_steps, load_block, None)
        if plan.takes_turns:
            await_turn(loop, loop.num_steps - 1)
        return first_step + loop.num_steps

    lax.fori_loop(0, count, load_tile, jnp.int32(0))
    if plan.interpret:  # which insists that somebody waits for every arrival
        plgpu.barrier_wait(scratch.kv_free)
        for slot in range(plan.config.num_q_stages):
            plgpu.barrier_wait(scratch.q_free.at[slot])
        for slot in range(plan.config.num_do_stages):
            plgpu.barrier_wait(scratch.do_free.at[slot])


def _compute(plan: Plan, inputs: Inputs, outputs: Outputs, scratch: Scratch, counters: Any) -> None:
    """Computes dK and dV of each tile, and adds to dQ."""
    count, index = cta_tiles(plan)
    # All buffers start out free.
    plgpu.barrier_arrive(scratch.kv_free)
    for slot in range(plan.config.num_q_stages):
        plgpu.barrier_arrive(scratch.q_free.at[slot])
    for slot in range(plan.config.num_do_stages):
        plgpu.barrier_arrive(scratch.do_free.at[slot])

    def compute_tile(i: Array, first_step: Array) -> Array:
        # Without the pin the compiler finds that slots repeat in every tile, works out all wgmma
        # descriptors ahead, and runs out of uniform registers.
        first_step = pin(plan, first_step)
        tile = tile_of(plan, index(i))
        blocks = query_range_of(plan, inputs, tile)
        kv_ids = None
        if plan.spec.has_segments:
            ids = inputs.kv_ids.at[tile.batch, pl.ds(first_key_of(plan, tile), ROWS)]
            kv_ids = plgpu.load(ids, layout=PER_ROW, optimized=False)
        loop = Loop(plan, inputs, outputs, scratch, counters, tile, blocks, first_step, kv_ids)
        accumulator = plgpu.ACC((ROWS, plan.channels), jnp.float32)
        plgpu.barrier_wait(scratch.kv_full)
        clean_keys(loop)
        dk, dv = pl.run_scoped(functools.partial(_meet_queries, loop), accumulator, accumulator)
        plgpu.barrier_arrive(scratch.kv_free)
        # Working these out anew is cheaper than holding them in registers through the loop.
        i = pin(plan, i)
        tile = tile_of(plan, index(i))
        loop = loop._replace(tile=tile, blocks=query_range_of(plan, inputs, tile))
        _store(loop, dk, dv)
        return first_step + loop.num_steps

    lax.fori_loop(0, count, compute_tile, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)


def _meet_queries(loop: Loop, dk_acc: Any, dv_acc: Any) -> tuple[Array, Array]:
    """Runs the loop over blocks of queries; returns dK / softmax_scale and dV."""
    first = jnp.int32(0)
    if loop.plan.config.split_channels:
        # The other warpgroup, which it never waits for, keeps the tensor cores busy.
        def whole_block(step: Array, _: None) -> None:
            _finish_block(loop, dk_acc, step, _first_half(loop, dv_acc, step), None)

        lax.fori_loop(0, loop.num_steps, whole_block, None)
    else:
        ds = _first_half(loop, dv_acc, first)
        next_block = _late_block if loop.plan.config.late_dq else _next_block
        next_block = functools.partial(next_block, loop, dk_acc, dv_acc)
        ds = lax.fori_loop(1, loop.num_steps, next_block, ds)
        _finish_block(loop, dk_acc, loop.num_steps - 1, ds, None)
    return dk_acc[...], dv_acc[...]


def _first_half(loop: Loop, dv_acc: Any, step: Array) -> Array:
    """Computes dV and dS of a step, with nothing else in flight; returns dS^T."""

    def s_alone(s_acc: Any) -> Array:
        _issue_s(loop, s_acc, step)
        return mask(loop, step, s_acc[...])

    s = pl.run_scoped(s_alone, _block_type(loop.plan))
    return _dv_then_dp(loop, dv_acc, step, _probabilities(loop, step, s))


def _next_block(loop: Loop, dk_acc: Any, dv_acc: Any, step: Array, ds: Array) -> Array:
    """Finishes dK and dQ of the step before, then computes dV and dS of this one."""
    plan = loop.plan

    def s_and_mask(s_acc: Any) -> Array:
        _finish_block(loop, dk_acc, step - 1, ds, lambda: _issue_s(loop, s_acc, step))
        return mask(loop, step, s_acc[...])

    # The mask comes before dP is started: both at once need too many registers.
    s = pl.run_scoped(s_and_mask, _block_type(plan))
    if not plan.config.overlap:
        return _dv_then_dp(loop, dv_acc, step, pin(plan, _probabilities(loop, step, s)))
    s = pin(plan, s)

    def dp_then_dv(dp_acc: Any) -> Array:
        _issue_dp(loop, dp_acc, step)
        p = pin(plan, pin(plan, _probabilities(loop, step, s)).astype(plan.spec.dtype))
        _issue_dv(loop, dv_acc, step, p)
        ds = _share_ds(loop, step, p, plgpu.wgmma_accumulator_load(dp_acc, wait_n=1))
        # A product in flight at the end of a loop's body makes ptxas serialise all of them.
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(loop.scratch.do_free.at[loop.do_slot(step)])
        return ds

    return pl.run_scoped(dp_then_dv, _block_type(plan))


def _late_block(loop: Loop, dk_acc: Any, dv_acc: Any, step: Array, ds: Array) -> Array:
    """`_next_block` for `late_dq`: dQ of the step before waits until this one's exponentials are
    done, and the other warpgroup's dS has long been written.
    """
    plan, scratch = loop.plan, loop.scratch

    def logits(s_acc: Any) -> Array:
        _issue_s(loop, s_acc, step)
        _multiply(loop, dk_acc, ds, loop.own_channels(scratch.q.at[loop.q_slot(step - 1)]), 1)
        s = plgpu.wgmma_accumulator_load(s_acc, wait_n=1)
        return mask(loop, step, s, has_branch=False)

    s = pl.run_scoped(logits, _block_type(plan))
    p = pin(plan, pin(plan, _probabilities(loop, step, s)).astype(plan.spec.dtype))
    plgpu.wgmma_wait(0)  # dK, so that the Q after the next is on its way early enough
    plgpu.barrier_arrive(scratch.q_free.at[loop.q_slot(step - 1)])

    def dq_beside_dv(dq_acc: Any) -> None:
        plgpu.barrier_wait(scratch.exchange)
        _issue_dq(loop, dq_acc, step - 1, 0)
        plgpu.barrier_wait(scratch.do_full.at[loop.do_slot(step)])
        _issue_dv(loop, dv_acc, step, p)
        dq = plgpu.wgmma_accumulator_load(dq_acc, wait_n=1)
        add_dq(loop, step - 1, 0, dq)

    def dp_alone(dp_acc: Any) -> Array:
        _issue_dp(loop, dp_acc, step, wait=False)
        return dp_acc[...]

    pl.run_scoped(dq_beside_dv, plgpu.ACC(plan.dq_shape, jnp.float32))
    new_ds = _share_ds(loop, step, p, pl.run_scoped(dp_alone, _block_type(plan)))
    plgpu.barrier_arrive(scratch.do_free.at[loop.do_slot(step)])
    return new_ds


def _dv_then_dp(loop: Loop, dv_acc: Any, step: Array, p: Array) -> Array:
    """Computes dV and dS with fewer registers than `_next_block`; returns dS^T."""
    plan = loop.plan
    p = pin(plan, p.astype(plan.spec.dtype))

    def dp_alone(dp_acc: Any) -> Array:
        plgpu.barrier_wait(loop.scratch.do_full.at[loop.do_slot(step)])
        _issue_dv(loop, dv_acc, step, p)
        _issue_dp(loop, dp_acc, step, wait=False)
        return dp_acc[...]

    ds = _share_ds(loop, step, p, pl.run_scoped(dp_alone, _block_type(plan)))
    plgpu.barrier_arrive(loop.scratch.do_free.at[loop.do_slot(step)])
    return ds


def _share_ds(loop: Loop, step: Array, p: Array, dp: Array) -> Array:
    """Computes dS^T, writes it to shared memory for dQ, and returns it for dK."""
    plan = loop.plan
    delta = plgpu.load(loop.scratch.delta.at[loop.do_slot(step)], layout=PER_COLUMN)
    # P as rounded for dV: the float32 values would need too many registers.
    ds = p.astype(jnp.float32) * (dp - _columns(delta, p.shape))
    ds = ds.astype(plan.spec.dtype)
    for i in range(plan.config.block_q // ROWS):
        loop.own_keys(loop.ds(step).at[i])[...] = ds[:, ROWS * i : ROWS * (i + 1)]
    plgpu.commit_smem()
    if not plan.config.split_channels:
        plgpu.barrier_arrive(loop.scratch.exchange)
    return ds


def _finish_block(
    loop: Loop, dk_acc: Any, step: Array, ds: Array, issue_next: Callable[[], None] | None
) -> None:
    """Computes dK and dQ of a step whose dS is ready; `issue_next` starts one more product behind
    them, which stays in flight.
    """
    plan, scratch = loop.plan, loop.scratch
    _multiply(loop, dk_acc, ds, loop.own_channels(scratch.q.at[loop.q_slot(step)]), 1)
    if not plan.config.split_channels:
        plgpu.barrier_wait(scratch.exchange)

    def dq_part(part: Array | int, _: None) -> None:
        def product(dq_acc: Any) -> None:
            _issue_dq(loop, dq_acc, step, part)
            if issue_next is not None:
                issue_next()
            dq = plgpu.wgmma_accumulator_load(dq_acc, wait_n=int(issue_next is not None))
            if plan.dq_parts == 1:  # dK has ended too
                plgpu.barrier_arrive(scratch.q_free.at[loop.q_slot(step)])
            add_dq(loop, step, part, dq)

        pl.run_scoped(product, plgpu.ACC(plan.dq_shape, jnp.float32))

    if plan.dq_parts == 1:
        dq_part(0, None)
    else:
        lax.fori_loop(0, plan.dq_parts, dq_part, None)
        plgpu.barrier_arrive(scratch.q_free.at[loop.q_slot(step)])


def _block_type(plan: Plan) -> Any:
    """Accumulator of S^T and dP^T."""
    return plgpu.ACC((ROWS, plan.config.block_q), jnp.float32)


def _issue_s(loop: Loop, s_acc: Any, step: Array) -> None:
    """Starts S^T = K Q^T."""
    slot = loop.q_slot(step)
    plgpu.barrier_wait(loop.scratch.q_full.at[slot])
    q = loop.scratch.q.at[slot].transpose((1, 0))
    plgpu.wgmma(s_acc, loop.own_keys(loop.scratch.k), q)


def _issue_dp(loop: Loop, dp_acc: Any, step: Array, *, wait: bool = True) -> None:
    """Starts dP^T = V dO^T, once dO has arrived."""
    slot = loop.do_slot(step)
    if wait:
        plgpu.barrier_wait(loop.scratch.do_full.at[slot])
    do = loop.scratch.do.at[slot].transpose((1, 0))
    plgpu.wgmma(dp_acc, loop.own_keys(loop.scratch.v), do)


def _issue_dq(loop: Loop, dq_acc: Any, step: Array, part: Array | int) -> None:
    """Starts this warpgroup's part of dQ = dS K, once dS of both is there."""
    rows, columns = dq_part_of(loop.plan, part)
    operand = loop.ds(step).at[lax.div(rows.start, jnp.int32(ROWS))]
    plgpu.wgmma(dq_acc, operand.transpose((1, 0)), loop.scratch.k.at[:, columns])


def _issue_dv(loop: Loop, dv_acc: Any, step: Array, p: Array) -> None:
    """Starts dV += P^T dO."""
    _multiply(loop, dv_acc, p, loop.own_channels(loop.scratch.do.at[loop.do_slot(step)]), 0)


def _multiply(loop: Loop, acc: Any, a: Array, b: Any, which: int) -> None:
    """Starts acc += a b, with `a` in registers; the interpreter wants it in an operand buffer."""
    if not loop.plan.interpret:
        plgpu.wgmma(acc, a, b)
        return
    operand = loop.scratch.operand.at[lax.axis_index("wg"), which]
    operand[...] = a
    plgpu.commit_smem()
    plgpu.wgmma(acc, operand, b)


def _probabilities(loop: Loop, step: Array, s: Array) -> Array:
    """Returns P^T from masked S^T."""
    scale = loop.plan.spec.softmax_scale * LOG2E
    lse = plgpu.load(loop.scratch.lse.at[loop.q_slot(step)], layout=PER_COLUMN)
    return jnp.exp2(s * scale - _columns(lse, s.shape))


def _columns(x: Array, shape: tuple[int, ...]) -> Array:
    """Broadcasts one value per column to a matrix."""
    return lax.broadcast_in_dim(x, shape, [1])


def _store(loop: Loop, dk: Array, dv: Array) -> None:
    """Writes dV, then dK, through shared memory."""
    plan, tile = loop.plan, loop.tile
    _, (buffer,) = loop.scratch.staging
    buffer = buffer.at[lax.axis_index("wg")]
    keys = pl.ds(first_key_of(plan, tile), ROWS)
    pass_turn(loop, loop.num_steps - 1)
    for value, target in ((dv, loop.outputs.dv), (dk * plan.spec.softmax_scale, loop.outputs.dk)):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        value = value.astype(plan.spec.dtype)
        target = loop.own_channels(target.at[tile.batch, keys, tile.kv_head])
        for i in range(plan.channels // ROWS):
            buffer.at[i][...] = value[:, ROWS * i : ROWS * (i + 1)]
        plgpu.commit_smem()
        for i in range(plan.channels // ROWS):
            plgpu.copy_smem_to_gmem(buffer.at[i], target.at[:, pl.ds(ROWS * i, ROWS)])


def _kernel(*refs: Any, plan: Plan, **scratch_refs: Any) -> None:
    """Splits the warpgroups into compute and producer."""
    num_inputs = 6 + (3 + plan.takes_turns if plan.spec.has_segments else 0)
    inputs = Inputs(*(*refs[:num_inputs], None, None, None, None)[: len(Inputs._fields)])
    dq, dk, dv = refs[num_inputs:]
    outputs = Outputs(dk, dv, dq)
    scratch = Scratch(**{name: scratch_refs.get(name) for name in Scratch._fields})
    counters = None
    if plan.takes_turns and not plan.interpret:
        counters = pl.get_global(plgpu.SemaphoreType.REGULAR((plan.num_turns,)))
    wgs = plan.config.compute_warpgroups

    @pl.when(lax.axis_index("wg") == wgs)
    def _() -> None:
        plgpu.set_max_registers(plan.config.producer_registers, action="decrease")
        _produce(plan, inputs, outputs, scratch, counters)

    @pl.when(lax.axis_index("wg") < wgs)
    def _() -> None:
        plgpu.set_max_registers(plan.config.compute_registers, action="increase")
        _compute(plan, inputs, outputs, scratch, counters)


@launcher("plan")
def launch(
    q: Array,
    k: Array,
    v: Array,
    do: Array,
    lse: Array,
    delta: Array,
    segments: tuple[Array, ...],
    dq: Array,
    *,
    plan: Plan,
) -> tuple[Array, Array, Array]:
    """Runs the kernel.

    Args:
      q: `[B, T, N, H]`; T and S may be rounded up to `GMEM_ROWS` here.
      k: `[B, S, K, H]`.
      v: like k.
      do: gradient of the output, like q.
      lse: `[B, N, padded T]`, float32, in base 2; +inf for queries that see no key, `BAD_LSE` for
        those that have something not finite.
      delta: `[B, N, padded T]`, float32, finite: rowsum(do * out) - gradient of the log-sum-exp.
      segments: `()`, or the last three or (if `plan.takes_turns`) four fields of `Inputs`.
      dq: zeros, `[B, padded T, N, H]`, float32.
      plan: shapes, config and device.

    Returns:
      dQ / softmax_scale, like dq; dK and dV like k.
    """
    scratch = {name: x for name, x in scratch_types(plan)._asdict().items() if x is not None}
    dq_shape = dq.shape
    dq_ref = jax.new_ref(jnp.broadcast_to(dq, (*plan.dq_copies, *dq_shape)))
    dk, dv = plgpu.kernel(
        functools.partial(_kernel, plan=plan),
        out_type=(jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)),
        scratch_types=scratch,
        grid=(plan.num_ctas,),
        grid_names=("cta",),
        num_threads=plan.config.compute_warpgroups + 1,
        thread_name="wg",
        kernel_name="flash_attention_bwd",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if plan.interpret else None,
    )(q, k, v, do, lse, delta, *segments, dq_ref)
    dq = dq_ref[...]
    return dq.reshape(-1, *dq_shape).sum(axis=0) if plan.interpret else dq, dk, dv

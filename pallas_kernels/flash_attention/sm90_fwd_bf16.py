"""Flash attention forward for sm_90a in bfloat16 or float16, written in Pallas Mosaic GPU.

For each tile of queries, over the blocks j of keys that it sees, last block first, with
c = softmax_scale * log2(e):
  S_j = Q K_j^T
  m'  = max(m, rowmax(c S_j))
  P_j = exp2(c S_j - m')
  l   = l exp2(m - m') + rowsum(P_j)
  O   = O exp2(m - m') + P_j V_j
and at the end O / l and lse = (m + log2 l) ln 2
(Dao 2023, arXiv:2307.08691; warp specialisation and ping-pong: Shah et al. 2024, arXiv:2407.08608).
Each thread keeps its own part of l until the end.

One persistent CTA on each SM walks through its tiles (`sm90_fwd_plan.make_schedule`):

  warpgroup        does                                waits for              arrives at
  compute 0..C-1   S, softmax, O of 64 queries each    q_full k_full v_full   q_free k_free v_free
  producer (last)  TMA of Q, K, V, segment ids         q_free k_free v_free   (TMA) *_full

Ping-pong: the compute warpgroups issue their matrix products in turn (barrier `turn`), so that one
is in its softmax while another keeps the tensor cores busy. Overlap: within a warpgroup S_{j+1} is
issued before P_j V_j, and the softmax of S_{j+1} runs while P_j V_j is still in flight.

Not supported: float32, head dims other than 64, 128, 256, biases, dropout, logit soft-capping.
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

from pallas_kernels.flash_attention.sm90_fwd_loop import (
    NEG_INF,
    Loop,
    for_each_block,
    for_each_tile,
    issue_qk,
    launch_forward,
    logits_type,
    mask,
    out_type,
    pass_turn,
    pin,
    row_constant,
    spread_rows,
    take_turn,
    wait_for_k,
)
from pallas_kernels.flash_attention.sm90_fwd_plan import (
    Inputs,
    Plan,
    Scratch,
    Tile,
    block_range_of,
    tile_of,
)
from pallas_kernels.flash_attention.sm90_isolation import note_bad_output
from pallas_kernels.flash_attention.sm90_softmax import LOWEST, online_softmax, rescale
from pallas_kernels.mosaic import MATRIX, PER_ROW, ROWS, launcher, total_row_sums
from pallas_kernels.numerics import LN2, LOG2E


def _compute(plan: Plan, inputs: Inputs, outputs: tuple[Any, Any], scratch: Scratch) -> None:
    """Computes ROWS queries of each tile."""
    wg = lax.axis_index("wg")
    wgs = plan.config.compute_warpgroups
    if plan.isolates:
        scratch.bad_outputs[wg, 0] = jnp.int32(0)
    # All buffers start out free.
    plgpu.barrier_arrive(scratch.q_free)
    for slot in range(plan.config.num_stages):
        plgpu.barrier_arrive(scratch.k_free.at[slot])
        plgpu.barrier_arrive(scratch.v_free.at[slot])
    if plan.config.ping_pong:
        pl.when(wg == wgs - 1)(lambda: plgpu.barrier_arrive(scratch.turn.at[0]))

    def compute_tile(index: Callable[[], Array], step: Array, number: Array | int) -> Array:
        tile = tile_of(plan, index())
        blocks = block_range_of(plan, inputs.block_ranges, tile)
        first_query = tile.q_tile * plan.tile_q + wg * ROWS
        q_ids = None
        if plan.spec.has_segments:
            ids = inputs.q_ids.at[tile.batch, pl.ds(first_query, ROWS)]
            q_ids = plgpu.load(ids, layout=PER_ROW, optimized=False)
        plgpu.barrier_wait(scratch.q_full)
        state = _attend(Loop(plan, scratch, blocks, first_query, step, q_ids))
        if plan.isolates:
            flag = scratch.bad_outputs.at[wg]
            note = functools.partial(note_bad_output, state.out, flag, interpret=plan.interpret)
            pl.when(number == 0)(note)
        _store(plan, outputs, scratch, tile_of(plan, index()), state)
        return step + blocks.stop - blocks.start

    for_each_tile(plan, scratch, compute_tile, computes=True)
    if plan.config.ping_pong and plan.interpret:
        pl.when(wg == 0)(lambda: plgpu.barrier_wait(scratch.turn.at[0]))
    plgpu.wait_smem_to_gmem(0)


class _State(NamedTuple):
    """The online softmax of ROWS queries after some blocks."""

    out: Array  # [ROWS, H], float32: sum of P V, without the last block's
    reference: Array  # [ROWS], near the maximum of c * S (`sm90_softmax`)
    row_sum: Array  # [ROWS], each thread's part
    p: Array  # [ROWS, block_kv]: the last block's P


def _attend(loop: Loop) -> _State:
    """Runs the loop over key blocks for ROWS queries; `p` of the result is used up."""
    state = for_each_block(loop, functools.partial(_next_block, loop), _first_block(loop), first=1)
    if not loop.plan.config.reuse_q_smem:
        plgpu.barrier_arrive(loop.scratch.q_free)
    last = loop.num_blocks - 1

    def product(o_acc: Any) -> Array:
        _issue_pv(loop, o_acc, state, last)
        return _read_out(loop, o_acc, state)

    plgpu.barrier_wait(loop.scratch.v_full.at[loop.stage(last)])
    out = pl.run_scoped(product, out_type(loop.plan))
    plgpu.barrier_arrive(loop.scratch.v_free.at[loop.stage(last)])
    return state._replace(out=out)


def _first_block(loop: Loop) -> _State:
    """Computes P of block 0."""
    plan, scratch = loop.plan, loop.scratch
    first = jnp.int32(0)

    def product(s_acc: Any) -> Array:
        take_turn(plan, scratch)
        issue_qk(loop, s_acc, first)
        pass_turn(plan, scratch)
        return s_acc[...]

    wait_for_k(loop, first)
    s = pl.run_scoped(product, logits_type(plan))
    reference, row_sum = row_constant(LOWEST, jnp.float32), row_constant(0.0, jnp.float32)
    p, reference, row_sum, _ = _softmax(loop, mask(loop, first, s), reference, row_sum)
    plgpu.barrier_arrive(scratch.k_free.at[loop.stage(first)])
    wait_for_k(loop, first + 1)
    out = jnp.zeros((ROWS, plan.spec.head_dim), jnp.float32)
    return _State(plgpu.layout_cast(out, MATRIX), reference, row_sum, p.astype(plan.spec.dtype))


def _next_block(loop: Loop, may_be_masked: bool, j: Array, state: _State) -> _State:
    """Computes P of block j, and adds the product of block j - 1 to the output."""
    plan, scratch = loop.plan, loop.scratch
    k_free, v_free = scratch.k_free.at[loop.stage(j)], scratch.v_free.at[loop.stage(j - 1)]

    def products(s_acc: Any, o_acc: Any) -> tuple[tuple[Array, ...], Array]:
        take_turn(plan, scratch)
        issue_qk(loop, s_acc, j)
        plgpu.barrier_wait(scratch.v_full.at[loop.stage(j - 1)])
        _issue_pv(loop, o_acc, state, j - 1)
        pass_turn(plan, scratch)
        if plan.config.overlap:
            s = plgpu.wgmma_accumulator_load(s_acc, wait_n=1)
            s = mask(loop, j, s) if may_be_masked else s
            result = _softmax(loop, s, state.reference, state.row_sum)
            plgpu.barrier_arrive(k_free)
            # The pin, and the branch of the wait, keep ptxas from moving the wait for P V
            # ahead of the softmax.
            result = pin(plan, result)
            wait_for_k(loop, j + 1)
            out = _read_out(loop, o_acc, state)
            plgpu.barrier_arrive(v_free)
            return result, out
        out = _read_out(loop, o_acc, state)
        plgpu.barrier_arrive(v_free)
        s = mask(loop, j, s_acc[...]) if may_be_masked else s_acc[...]
        result = _softmax(loop, s, state.reference, state.row_sum)
        plgpu.barrier_arrive(k_free)
        wait_for_k(loop, j + 1)
        return result, out

    types = logits_type(plan), out_type(plan)
    (p, reference, row_sum, decay), out = pl.run_scoped(products, *types)
    # The registers of the old P feed the product that is in flight until `out` is read; writing
    # the new P earlier would make ptxas serialise the wgmmas.
    p, out = pin(plan, (p, out))
    out = rescale(out, decay, interpret=plan.interpret)
    return _State(out, reference, row_sum, p.astype(plan.spec.dtype))


def _issue_pv(loop: Loop, o_acc: Any, state: _State, j: Array) -> None:
    """Starts O += P V of block j."""
    v = loop.scratch.v.at[loop.stage(j)]
    if loop.plan.interpret:
        p = loop.scratch.p.at[lax.axis_index("wg")]
        p[...] = state.p
        plgpu.commit_smem()
        plgpu.wgmma(o_acc, p, v)
    else:
        o_acc[...] = state.out
        plgpu.wgmma(o_acc, state.p, v)


def _read_out(loop: Loop, o_acc: Any, state: _State) -> Array:
    """Waits for O += P V."""
    return state.out + o_acc[...] if loop.plan.interpret else o_acc[...]


def _softmax(
    loop: Loop, s: Array, reference: Array, row_sum: Array
) -> tuple[Array, Array, Array, Array]:
    """Returns P of masked logits, the new reference and sum, and the decay of what is older."""
    scale = loop.plan.spec.softmax_scale * LOG2E
    return online_softmax(s, reference, row_sum, scale, interpret=loop.plan.interpret)


def _store(
    plan: Plan,
    outputs: tuple[Any, Any],
    scratch: Scratch,
    tile: Tile,
    state: _State,
) -> None:
    """Normalises O, writes it through shared memory, and the log-sum-exp directly."""
    out_gmem, lse_gmem = outputs
    rows = pl.ds(lax.axis_index("wg") * ROWS, ROWS)
    out_smem = (scratch.q if plan.config.reuse_q_smem else scratch.out).at[rows]
    row_sum = total_row_sums(state.row_sum, interpret=plan.interpret)
    is_empty = row_sum == 0.0
    row_sum = jnp.where(is_empty, 1.0, row_sum)
    out = state.out * spread_rows(1.0 / row_sum, state.out.shape)
    lse = jnp.where(is_empty, NEG_INF, state.reference * LN2 + jnp.log(row_sum))
    queries = pl.ds(tile.q_tile * plan.tile_q + lax.axis_index("wg") * ROWS, ROWS)
    lse_gmem.at[tile.batch, tile.head, queries][...] = lse
    # The previous tile's output may still be on its way out of this buffer.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    out_smem[...] = out.astype(plan.spec.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out_smem, out_gmem.at[tile.batch, queries, tile.head])
    if plan.config.reuse_q_smem:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(scratch.q_free)


@launcher("plan")
def launch(
    q: Array,
    k: Array,
    v: Array,
    segments: tuple[Array, Array, Array] | None,
    *,
    plan: Plan,
) -> tuple[Array, Array]:
    """Runs the kernel.

    Args:
      q: `[B, T, N, H]`; T and S may be rounded up to `GMEM_ROWS` here.
      k: `[B, S, K, H]`.
      v: like k.
      segments: ids `[B, padded T]` and `[B, padded S]`, and block ranges `[B, num_q_tiles, 4]`, all
        int32; or None.
      plan: shapes, config and device.

    Returns:
      Output like q, and log-sum-exp `[B, N, padded T]`, float32.
    """
    spec = plan.spec
    lse_shape = (spec.batch_size, spec.num_heads, plan.padded_query_length)
    out_types = (
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        jax.ShapeDtypeStruct(lse_shape, jnp.float32),
    )
    return launch_forward(
        _compute, (q, k, v), segments, plan=plan, out_types=out_types, name="flash_attention_fwd"
    )

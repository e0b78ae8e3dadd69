"""Flash attention forward for sm_90a in FP8 (E4M3), written in Pallas Mosaic GPU.

The maths is `fp8`'s. For each tile of queries, over the blocks j of keys that it sees, last first:
  X_j = c_j Q K_j^T,   u = max(u, rowmax(X_j)),   r_j = max(rowmax(X_j), u - MAX_RISE)
  P_j = exp2(X_j - r_j + P_BITS),   d = exp2(r_{j+1} - r_j),   l = l d + rowsum(P_j),
  O = O d sv_{j+1} / sv_j + round8(P_j) V_j;   at the end out = sv_j O / l,
  lse2 = r + log2(l) - P_BITS
Each P_j V_j has a fresh accumulator, which is added to O in float32: the tensor cores keep about 14
bits of an 8-bit product's sum, which one block does not exhaust, and the addition is also the
rescaling of O, to which V's scale is no more work (cf. Zhang et al. 2024, arXiv:2411.10958). Head
dim 256 has no registers for that, and rescales O before.

The warps and barriers are those of `sm90_fwd_bf16`:

  warpgroup        does                                  waits for              arrives at
  compute 0..C-1   X, softmax, O of 64 queries each      q_full k_full v_full   q_free k_free v_free
  producer (last)  TMA of Q, scales, K, V^T, ids         q_free k_free v_free   (TMA) *_full

P leaves the registers of X's accumulator and becomes the A operand of P V without moving
(`accumulator_as_8_bit_operand`); for that, V^T has its keys in the order of `fp8.permute_16`.
Without ping-pong nothing orders the warpgroups: all may multiply at the same time, and then all
wait for exponentials. With it, a warpgroup issues P_j V_j and X_{j+1} in its turn, while the others
are in the softmax; with overlap too, both are in flight at once (which takes 64 registers more).

Not supported: head dims other than 64, 128, 256, biases, dropout, logit soft-capping.
(Shah et al. 2024, arXiv:2407.08608; sinks and the order of keys: arXiv:2606.06521.)
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

from pallas_kernels.flash_attention.fp8 import BLOCK, E4M3, MAX_RISE, P_BITS, Statistics
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
    divmod_int32,
    tile_of,
)
from pallas_kernels.mosaic import (
    MATRIX,
    PER_ROW,
    ROWS,
    accumulator_as_8_bit_operand,
    launcher,
    partial_row_sums,
    set_first_column,
    total_row_sums,
)

_MAX_PROMOTED_HEAD_DIM = 128
"""A wider O has no room for a second accumulator: P V is then added on the tensor cores."""
_LOWEST = -1e30
"""Reference of a row that has seen no key: below every logit, but finite."""


class _Queries(NamedTuple):
    """Numbers of ROWS queries."""

    factor: Array  # c / k_scale
    first_key: Array | None  # [ROWS]: product with key 0, to be exact


class _State(NamedTuple):
    """The softmax of ROWS queries after some blocks."""

    out: Array  # [ROWS, H], float32: sum of P V, relative to r
    reference: Array  # [ROWS]: r - P_BITS of the last block
    top: Array  # [ROWS]: u
    row_sum: Array  # [ROWS]: l, relative to r, each thread's part


def _compute(plan: Plan, inputs: Inputs, outputs: tuple[Any, ...], scratch: Scratch) -> None:
    """Computes ROWS queries of each tile."""
    wg = lax.axis_index("wg")
    wgs = plan.config.compute_warpgroups
    # All buffers start out free.
    plgpu.barrier_arrive(scratch.q_free)
    for slot in range(plan.config.num_stages):
        plgpu.barrier_arrive(scratch.k_free.at[slot])
        plgpu.barrier_arrive(scratch.v_free.at[slot])
    if plan.config.ping_pong:
        pl.when(wg == wgs - 1)(lambda: plgpu.barrier_arrive(scratch.turn.at[0]))

    def compute_tile(index: Callable[[], Array], step: Array, _: Array | int) -> Array:
        tile = tile_of(plan, index())
        blocks = block_range_of(plan, inputs.block_ranges, tile)
        first_query = tile.q_tile * plan.tile_q + wg * ROWS
        q_ids = None
        if plan.spec.has_segments:
            ids = inputs.q_ids.at[tile.batch, pl.ds(first_query, ROWS)]
            q_ids = plgpu.load(ids, layout=PER_ROW, optimized=False)
        first_key = None
        if inputs.first_key is not None:
            source = inputs.first_key.at[tile.batch, tile.head, pl.ds(first_query, ROWS)]
            first_key = plgpu.load(source, layout=PER_ROW, optimized=False)
        factor = inputs.factor[tile.batch, tile.head, lax.div(first_query, jnp.int32(BLOCK))]
        plgpu.barrier_wait(scratch.q_full)
        state = _attend(
            Loop(plan, scratch, blocks, first_query, step, q_ids), _Queries(factor, first_key)
        )
        tile = tile_of(plan, index())
        v_scale = inputs.v_scale[tile.batch, _kv_head(plan, tile), _scale_block(plan, blocks.start)]
        _store(plan, outputs, scratch, tile, v_scale, state)
        return step + blocks.stop - blocks.start

    for_each_tile(plan, scratch, compute_tile, computes=True)
    if plan.config.ping_pong and plan.interpret:
        pl.when(wg == 0)(lambda: plgpu.barrier_wait(scratch.turn.at[0]))
    plgpu.wait_smem_to_gmem(0)


def _kv_head(plan: Plan, tile: Tile) -> Array:
    """Index of the tile's key/value head."""
    return lax.div(tile.head, jnp.int32(plan.spec.num_heads // plan.spec.num_kv_heads))


def _scale_block(plan: Plan, block: Array) -> Array:
    """Index of the scale of a block of keys."""
    return lax.div(block, jnp.int32(BLOCK // plan.config.block_kv))


def _attend(loop: Loop, queries: _Queries) -> _State:
    """Runs the loop over key blocks for ROWS queries."""
    plan = loop.plan
    zeros = jnp.zeros((ROWS, plan.spec.head_dim), jnp.float32)
    state = _State(
        plgpu.layout_cast(zeros, MATRIX),
        row_constant(_LOWEST, jnp.float32),
        row_constant(NEG_INF, jnp.float32),
        row_constant(0.0, jnp.float32),
    )
    if not plan.config.overlap:
        take_turn(plan, loop.scratch)
        state = for_each_block(loop, functools.partial(_block, loop, queries), state, first=0)
        pass_turn(plan, loop.scratch)
        _free_q(loop)
        return state
    first = jnp.int32(0)
    wait_for_k(loop, first)
    take_turn(plan, loop.scratch)
    logits = _first_logits(loop)
    step = functools.partial(_block_in_turn, loop, queries)
    state, logits = lax.fori_loop(0, loop.num_blocks - 1, step, (state, logits))
    last = loop.num_blocks - 1
    p, decay, state = _softmax(loop, queries, last, mask(loop, last, logits), state)
    _free_q(loop)
    plgpu.barrier_wait(loop.scratch.v_full.at[loop.stage(last)])
    return state._replace(out=_add_pv(loop, last, p, decay, state.out))


def _free_q(loop: Loop) -> None:
    """Hands the buffers of Q and of the scales back."""
    if loop.plan.interpret:  # whose race detector wants reads ordered before TMA's next write
        plgpu.commit_smem()
    plgpu.barrier_arrive(loop.scratch.q_free)


def _block(loop: Loop, queries: _Queries, may_be_masked: bool, j: Array, state: _State) -> _State:
    """Adds block j. The turn, if there are any, has been taken, and is held again at the end: from
    P V of one block to Q K^T of the next, without logits that the loop would have to carry.
    """
    plan, scratch = loop.plan, loop.scratch
    plgpu.barrier_wait(scratch.k_full.at[loop.stage(j)])

    def product(acc: Any) -> Array:
        issue_qk(loop, acc, j)
        pass_turn(plan, scratch)
        return acc[...]

    logits = pl.run_scoped(product, logits_type(plan))
    logits = mask(loop, j, logits) if may_be_masked else logits
    p, decay, state = _softmax(loop, queries, j, logits, state)
    # This wait also keeps ptxas from mixing the softmax with what follows, and spilling.
    plgpu.barrier_wait(scratch.v_full.at[loop.stage(j)])
    take_turn(plan, scratch)
    return state._replace(out=_add_pv(loop, j, p, decay, state.out))


def _first_logits(loop: Loop) -> Array:
    """Computes Q K^T of block 0 in this warpgroup's turn, and passes it on."""

    def product(acc: Any) -> Array:
        issue_qk(loop, acc, jnp.int32(0))
        pass_turn(loop.plan, loop.scratch)
        return acc[...]

    return pl.run_scoped(product, logits_type(loop.plan))


def _block_in_turn(
    loop: Loop, queries: _Queries, j: Array, carry: tuple[_State, Array]
) -> tuple[_State, Array]:
    """Adds block j, whose logits are given, and computes those of block j + 1."""
    plan, scratch = loop.plan, loop.scratch
    state, logits = carry
    p, decay, state = _softmax(loop, queries, j, mask(loop, j, logits), state)
    plgpu.barrier_wait(scratch.v_full.at[loop.stage(j)])
    plgpu.barrier_wait(scratch.k_full.at[loop.stage(j + 1)])
    take_turn(plan, scratch)

    def products(o_acc: Any, s_acc: Any) -> tuple[Array, Array]:
        _issue_pv(loop, o_acc, p, j)
        issue_qk(loop, s_acc, j + 1)
        pass_turn(plan, scratch)
        added = plgpu.wgmma_accumulator_load(o_acc, wait_n=1)
        plgpu.barrier_arrive(scratch.v_free.at[loop.stage(j)])
        out = state.out * spread_rows(decay, added.shape) + added
        return out, s_acc[...]

    out, logits = pl.run_scoped(products, out_type(plan), logits_type(plan))
    return state._replace(out=out), logits


def _issue_pv(loop: Loop, acc: Any, p: Array, j: Array) -> None:
    """Starts P V of block j."""
    v = loop.scratch.v.at[loop.stage(j)]
    if loop.plan.interpret:  # which takes no A operand in registers
        p_smem = loop.scratch.p.at[lax.axis_index("wg")]
        p_smem[...] = p
        plgpu.commit_smem()
        p = p_smem
    plgpu.wgmma(acc, p, v.transpose((1, 0)))


def _add_pv(loop: Loop, j: Array, p: Array, decay: Array, out: Array) -> Array:
    """Returns O * decay + P V of block j, and frees V's buffer."""
    out = out * spread_rows(decay, out.shape)
    in_place = loop.plan.spec.head_dim > _MAX_PROMOTED_HEAD_DIM and not loop.plan.interpret

    def product(acc: Any) -> Array:
        if in_place:
            acc[...] = out
        _issue_pv(loop, acc, p, j)
        return acc[...] if in_place else out + acc[...]

    out = pl.run_scoped(product, out_type(loop.plan))
    plgpu.barrier_arrive(loop.scratch.v_free.at[loop.stage(j)])
    return out


def _softmax(
    loop: Loop, queries: _Queries, j: Array, logits: Array, state: _State
) -> tuple[Array, Array, _State]:
    """Returns P of block j's masked logits in 8 bits, the factor on O, and the state but for O."""
    # The products have read the block's keys, the mask its segment ids.
    plgpu.barrier_arrive(loop.scratch.k_free.at[loop.stage(j)])
    block = loop.blocks.stop - 1 - j
    scale_index = divmod_int32(block, loop.plan.scales_shape[2])
    factor = queries.factor * loop.scratch.scales[0, *scale_index]
    if queries.first_key is not None:
        is_first = row_constant(block, jnp.int32) == 0
        known = jnp.where(is_first, queries.first_key, NEG_INF)
        logits = set_first_column(logits, known, interpret=loop.plan.interpret)
    local = logits.max(axis=1) * factor
    top = jnp.maximum(state.top, local)
    reference = jnp.maximum(local, top - MAX_RISE) - float(P_BITS)
    # A row without any key so far has maximum -inf; inf - inf must not reach the exponent.
    reference = jnp.maximum(reference, _LOWEST)
    decay = jnp.exp2(state.reference - reference)
    p = jnp.exp2(logits * factor - spread_rows(reference, logits.shape))
    row_sum = state.row_sum * decay + partial_row_sums(p, interpret=loop.plan.interpret)
    decay *= loop.scratch.scales[1, *scale_index]
    operand = accumulator_as_8_bit_operand(p, E4M3, interpret=loop.plan.interpret)
    # Converted before the product starts: its registers must not change while it runs.
    operand, reference, top, row_sum, decay = pin(
        loop.plan, (operand, reference, top, row_sum, decay)
    )
    return operand, decay, _State(state.out, reference, top, row_sum)


def _store(
    plan: Plan,
    outputs: tuple[Any, ...],
    scratch: Scratch,
    tile: Tile,
    v_scale: Array,
    state: _State,
) -> None:
    """Normalises O, writes it through shared memory, and the statistics directly."""
    out_gmem, lse2_gmem, top_gmem = outputs
    wg = lax.axis_index("wg")
    row_sum = total_row_sums(state.row_sum, interpret=plan.interpret)
    is_empty = row_sum == 0.0
    row_sum = jnp.where(is_empty, 1.0, row_sum)
    lse2 = jnp.where(is_empty, NEG_INF, state.reference + jnp.log2(row_sum))
    queries = pl.ds(tile.q_tile * plan.tile_q + wg * ROWS, ROWS)
    lse2_gmem.at[tile.batch, tile.head, queries][...] = lse2
    top_gmem.at[tile.batch, tile.head, queries][...] = state.top
    inverse = v_scale / row_sum
    out_smem = scratch.out.at[pl.ds(wg * ROWS, ROWS)]
    # The previous tile's output may still be on its way out of this buffer.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    out = state.out * spread_rows(inverse, state.out.shape)
    out_smem[...] = out.astype(plan.spec.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out_smem, out_gmem.at[tile.batch, queries, tile.head])


def block_scales(k_scale: Array, v_scale: Array, plan: Plan) -> Array:
    """Returns what the loop multiplies by in each of its blocks of keys.

    Args:
      k_scale: `[B, K, S / BLOCK]`, float32.
      v_scale: like k_scale.
      plan: gives the number of blocks.

    Returns:
      `[B, K, *plan.scales_shape]`: k_scale of block j; v_scale of block j + 1, which is met before,
      over that of block j.
    """
    repeats = BLOCK // plan.config.block_kv
    ratio = jnp.concatenate([v_scale[..., 1:], v_scale[..., -1:]], axis=2) / v_scale
    k_scale = jnp.repeat(k_scale, repeats, axis=2)
    ones = jnp.ones((*ratio.shape, repeats - 1), ratio.dtype)
    ratio = jnp.concatenate([ones, ratio[..., None]], axis=3).reshape(k_scale.shape)
    scales = jnp.stack([k_scale, ratio], axis=2)
    padding = plan.scales_shape[1] * plan.scales_shape[2] - scales.shape[3]
    scales = jnp.pad(scales, ((0, 0),) * 3 + ((0, padding),))
    return scales.reshape(*scales.shape[:2], *plan.scales_shape)


@launcher("plan")
def launch(
    q: Array,
    k: Array,
    v_t: Array,
    factor: Array,
    scales: Array,
    v_scale: Array,
    first_key: Array | None,
    segments: tuple[Array, Array, Array] | None,
    *,
    plan: Plan,
) -> tuple[Array, Statistics]:
    """Runs the kernel.

    Args:
      q: `[B, T, N, H]`, E4M3; T and S may be rounded up to `GMEM_ROWS` here.
      k: `[B, S, K, H]`, E4M3.
      v_t: `[B, K, H, padded S]`, E4M3, zero in the padding, keys in the order of `fp8.permute_16`.
      factor: `[B, N, T / BLOCK]`, float32: c / k_scale.
      scales: see `block_scales`.
      v_scale: `[B, K, S / BLOCK]`, float32.
      first_key: `[B, N, padded T]`, float32: what the product with key 0 is to be; or None.
      segments: ids `[B, padded T]` and `[B, padded S]`, and block ranges `[B, num_q_tiles, 4]`, all
        int32; or None.
      plan: shapes, config and device.

    Returns:
      Output like q in spec.dtype, and statistics `[B, N, padded T]`.
    """
    spec = plan.spec
    rows = jax.ShapeDtypeStruct(
        (spec.batch_size, spec.num_heads, plan.padded_query_length), jnp.float32
    )
    out, lse2, top = launch_forward(
        _compute,
        (q, k, v_t, factor, scales, v_scale, *(() if first_key is None else (first_key,))),
        segments,
        plan=plan,
        out_types=(jax.ShapeDtypeStruct(q.shape, spec.dtype), rows, rows),
        name="flash_attention_fwd_fp8",
    )
    return out, Statistics(lse2, top)

"""Flash attention backward, SM90: the plan: shared memory, tile schedule, order of additions.

Split from `sm90_bwd_bf16`, whose text explains the warps and barriers.
"""

# Shapes: B batch, T query, S key, N query heads, K key/value heads, H head dim, C compute
# warpgroups.

import dataclasses
import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash_attention.config import AttentionSpec, BackwardConfig
from pallas_kernels.flash_attention.sm90_fwd_plan import BlockRange, divmod_int32
from pallas_kernels.mosaic import ROWS, scratch_bytes, smem_tile

# At the end of a tile the producer announces two turns without waiting in between for anything
# that `compute` does after it has taken the turn before them. With two barriers the second would
# complete a barrier on which a warpgroup still waits, which then waits for ever.
NUM_TURN_BARRIERS = 3


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Everything static about one launch."""

    spec: AttentionSpec
    """What is computed."""
    config: BackwardConfig
    """How the work is cut."""
    sm_count: int
    """Streaming multiprocessors of the device; each holds one CTA."""
    interpret: bool = False
    """Runs in the CPU interpreter, which lacks A operands in registers and TMA reductions."""

    def __post_init__(self) -> None:
        if self.config.late_dq and self.takes_turns:
            raise ValueError(
                f"{self.config.late_dq=} cannot keep the fixed order of deterministic=True: the"
                " producer announces turns too early for it; use late_dq=False"
            )

    @property
    def num_ctas(self) -> int:
        """CTAs launched: all resident if they wait for each other. With `split_channels` and no
        waiting, each has one tile, because the loop over tiles costs registers.
        """
        if self.config.split_channels and not self.takes_turns:
            return self.num_tiles
        return min(self.sm_count, self.num_tiles)

    @property
    def num_kv_tiles(self) -> int:
        """Tiles along S; the last may reach beyond it."""
        return pl.cdiv(self.spec.key_length, self.config.block_kv)

    @property
    def num_q_blocks(self) -> int:
        """Blocks along T; the last may reach beyond it."""
        return pl.cdiv(self.spec.query_length, self.config.block_q)

    @property
    def num_tiles(self) -> int:
        """Tiles of the whole problem: all query heads of a group share one."""
        return self.spec.batch_size * self.spec.num_kv_heads * self.num_kv_tiles

    @property
    def group(self) -> int:
        """Query heads that share a key/value head."""
        return self.spec.num_heads // self.spec.num_kv_heads

    @property
    def padded_query_length(self) -> int:
        """T rounded up to whole blocks."""
        return self.num_q_blocks * self.config.block_q

    @property
    def padded_key_length(self) -> int:
        """S rounded up to whole tiles."""
        return self.num_kv_tiles * self.config.block_kv

    @property
    def channels(self) -> int:
        """Channels of dK and dV that a compute warpgroup works on."""
        wgs = self.config.compute_warpgroups
        return self.spec.head_dim // wgs if self.config.split_channels else self.spec.head_dim

    @property
    def dq_parts(self) -> int:
        """Parts in which a compute warpgroup adds its share of dQ; more parts need fewer registers
        and less shared memory.
        """
        return 2 if self.config.split_channels else 1

    @property
    def dq_shape(self) -> tuple[int, int]:
        """Queries and channels of one such part."""
        wgs = self.config.compute_warpgroups
        if self.config.block_q == ROWS * wgs:
            return ROWS, self.spec.head_dim
        return ROWS, self.spec.head_dim // wgs // self.dq_parts

    @property
    def dq_copies(self) -> tuple[int, ...]:
        """Leading axes of dQ: the interpreter cannot add to memory, so each tile has its own."""
        return (self.num_kv_tiles,) if self.interpret else ()

    @property
    def takes_turns(self) -> bool:
        """Whether tiles add to dQ in a fixed order: if asked to, because that takes 35 % longer."""
        return self.spec.deterministic is True

    @property
    def isolates(self) -> bool:
        """Whether bad values are kept from positions that may not see them (`sm90_isolation`);
        where no pair is masked, there are none.
        """
        return self.spec.has_segments or not self.spec.band.is_full

    @property
    def is_ragged(self) -> bool:
        """Whether the last tile reaches past the last key."""
        return self.spec.key_length % self.config.block_kv != 0

    @property
    def num_turns(self) -> int:
        """Counters of the deterministic mode; nobody reads the last one."""
        return self.spec.batch_size * self.spec.num_heads * self.num_q_blocks + 1


class Scratch(NamedTuple):
    """Shared memory and barriers of one CTA; a barrier's comment names producer and consumer."""

    k: Any  # [block_kv, H]
    v: Any  # [block_kv, H]
    q: Any  # [num_q_stages, block_q, H]
    do: Any  # [num_do_stages, block_q, H]
    lse: Any  # [num_q_stages, block_q], float32, base 2
    delta: Any  # [num_do_stages, block_q], float32
    q_ids: Any  # [num_q_stages, block_q], int32, or None
    # Matrices that are written from registers are cut into 64 columns: the addresses within all of
    # them are then the same, and take few registers.
    ds: Any  # [2, block_q / 64, block_kv, 64]: dS^T of this step and the last, or of each warpgroup
    staging: Any  # what leaves: dQ [C, *dq_shape], float32, or dV, dK [C, channels / 64, ROWS, 64]
    operand: Any  # [C, 2, ROWS, block_q], interpreter only: A operands of dV and dK
    kv_full: Any  # TMA -> compute: K and V
    q_full: Any  # TMA -> compute, one per stage: Q, lse (and segment ids)
    do_full: Any  # TMA -> compute, one per stage: dO, delta
    kv_free: Any  # compute -> producer
    q_free: Any  # compute -> producer, one per stage
    do_free: Any  # compute -> producer, one per stage
    exchange: Any  # compute -> compute: dS^T of all warpgroups is in shared memory
    turn: Any  # producer -> compute, several in turn: dQ of a step may be added to; or None
    checked: Any  # TMA -> producer, two: Q and lse, dO and delta of a masked block; or None


def scratch_types(plan: Plan) -> Scratch:
    """Returns the shared-memory plan: the single source of the allocation and of `smem_bytes`."""
    config, spec = plan.config, plan.spec
    wgs, q_stages, do_stages = config.compute_warpgroups, config.num_q_stages, config.num_do_stages
    block_q, block_kv, head_dim = config.block_q, config.block_kv, spec.head_dim
    tile = functools.partial(smem_tile, dtype=spec.dtype)
    dq = smem_tile((wgs, *plan.dq_shape), jnp.float32)
    gradients = tile((wgs, plan.channels // ROWS, ROWS, ROWS))
    return Scratch(
        k=tile((block_kv, head_dim)),
        v=tile((block_kv, head_dim)),
        q=tile((q_stages, block_q, head_dim)),
        do=tile((do_stages, block_q, head_dim)),
        lse=plgpu.SMEM((q_stages, block_q), jnp.float32),
        delta=plgpu.SMEM((do_stages, block_q), jnp.float32),
        q_ids=plgpu.SMEM((q_stages, block_q), jnp.int32) if spec.has_segments else None,
        ds=tile((2, block_q // ROWS, block_kv, ROWS)),  # C == 2
        # The interpreter knows no unions; it adds to dQ without staging.
        staging=((), (gradients,)) if plan.interpret else plgpu.RefUnion((dq,), (gradients,)),
        operand=tile((wgs, 2, ROWS, block_q)) if plan.interpret else None,
        kv_full=plgpu.Barrier(num_arrivals=2),
        q_full=plgpu.Barrier(num_arrivals=2 + spec.has_segments, num_barriers=q_stages),
        do_full=plgpu.Barrier(num_arrivals=2, num_barriers=do_stages),
        kv_free=plgpu.Barrier(num_arrivals=wgs),
        q_free=plgpu.Barrier(num_arrivals=wgs, num_barriers=q_stages),
        do_free=plgpu.Barrier(num_arrivals=wgs, num_barriers=do_stages),
        exchange=plgpu.Barrier(num_arrivals=wgs),
        turn=plgpu.Barrier(num_barriers=NUM_TURN_BARRIERS) if plan.takes_turns else None,
        checked=plgpu.Barrier(num_arrivals=2, num_barriers=2) if plan.isolates else None,
    )


def smem_bytes(plan: Plan) -> int:
    """Returns the shared memory of one CTA, barriers included."""
    return scratch_bytes(scratch_types(plan))


class Inputs(NamedTuple):
    """Global memory that the kernel reads."""

    q: Any  # [B, T, N, H]
    k: Any  # [B, S, K, H]
    v: Any  # [B, S, K, H]
    do: Any  # [B, T, N, H]: gradient of the output
    lse: Any  # [B, N, padded T], float32: log2 of the softmax's denominator; +inf: sees no key;
    # BAD_LSE: something about this query is not finite
    delta: Any  # [B, N, padded T], float32, finite: rowsum(dO * O) - gradient of the log-sum-exp
    q_ids: Any  # [B, padded T], int32, or None
    kv_ids: Any  # [B, padded S], int32, or None
    block_ranges: Any  # [B, num_kv_tiles, 4], int32, or None: see `BlockRange`
    turns: Any  # [B, num_kv_tiles, num_q_blocks], int32, or None: see `turn_of`


class Outputs(NamedTuple):
    """Global memory that the kernel writes."""

    dk: Any  # [B, S, K, H]
    dv: Any  # [B, S, K, H]
    dq: Any  # [*dq_copies, B, padded T, N, H], float32: added to; without softmax_scale


class Tile(NamedTuple):
    """One tile of work, as traced scalars."""

    batch: Array
    kv_head: Array
    kv_tile: Array


def tile_of(plan: Plan, index: Array) -> Tile:
    """Maps the index of a tile to its coordinates: the first keys of all heads first.

    Under a causal mask the first keys are seen by the most queries, so the longest tiles go first.
    The deterministic mode relies on the order: a tile waits only for tiles with a smaller index.
    """
    if plan.group == 1:
        # It is less anyway. But ptxas, short of registers, spills without this remainder, and for
        # groups of query heads with it.
        index = lax.rem(index, jnp.int32(plan.num_tiles))
    row, kv_head = divmod_int32(index, plan.spec.num_kv_heads)
    kv_tile, batch = divmod_int32(row, plan.spec.batch_size)
    return Tile(batch, kv_head, kv_tile)


def query_range_of(plan: Plan, inputs: Inputs, tile: Tile) -> BlockRange:
    """Returns which blocks of queries a tile of keys needs: looked up with segment ids, else
    computed from the band.
    """
    if plan.spec.has_segments:
        ranges = inputs.block_ranges
        return BlockRange(*(ranges[tile.batch, tile.kv_tile, i] for i in range(4)))
    band, block_q, last_block = plan.spec.band, plan.config.block_q, plan.num_q_blocks - 1
    first_k = tile.kv_tile * plan.config.block_kv
    last_k = jnp.minimum(first_k + plan.config.block_kv, plan.spec.key_length) - 1
    start = full_start = jnp.int32(0)
    stop = full_stop = jnp.int32(plan.num_q_blocks)
    if band.right is not None:
        start = jnp.minimum(lax.div(jnp.maximum(first_k - band.right, 0), block_q), last_block)
        full_start = lax.div(jnp.maximum(last_k - band.right, 0) + block_q - 1, block_q)
    if band.left is not None:
        stop = jnp.minimum(stop, lax.div(last_k + band.left, block_q) + 1)
        full_stop = jnp.minimum(full_stop, lax.div(first_k + band.left + 1, block_q))
    # A tile that no query sees still runs one block, all masked, which makes its gradients 0.
    return BlockRange(start, jnp.maximum(stop, start + 1), full_start, full_stop)


def turn_of(plan: Plan, inputs: Inputs, tile: Tile, q_block: Array) -> Array:
    """Returns how many tiles add to dQ of a query block before this one, in the deterministic mode:
    those with smaller keys, of the same head.
    """
    if plan.spec.has_segments:
        return inputs.turns[tile.batch, tile.kv_tile, q_block]
    band = plan.spec.band
    if band.left is None:
        return tile.kv_tile
    first_k = jnp.maximum(q_block * plan.config.block_q - band.left, 0)
    return tile.kv_tile - lax.div(first_k, jnp.int32(plan.config.block_kv))

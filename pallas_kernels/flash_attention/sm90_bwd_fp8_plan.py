"""Flash attention backward in FP8, SM90: the plan: operands and shared memory.

Split from `sm90_bwd_fp8`, whose text explains the warps and barriers.
"""

# Shapes: B batch, T query, S key, N query heads, K key/value heads, H head dim.

import dataclasses
import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash_attention.config import AttentionSpec, Fp8BackwardConfig
from pallas_kernels.flash_attention.fp8 import E4M3, E5M2
from pallas_kernels.flash_attention.sm90_fwd_plan import BlockRange
from pallas_kernels.mosaic import ROWS, smem_tile

BLOCK_Q = 64
"""Queries of one step."""
TILE_KV = 2 * ROWS
"""Keys of one CTA."""
WARPGROUPS = 2
"""That compute, each for ROWS keys; one more loads."""
NUM_TURN_BARRIERS = 3
"""Barriers of the deterministic mode: two steps are under way, and at the end the producer is one
ahead."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Everything static about one launch."""

    spec: AttentionSpec
    """What is computed."""
    config: Fp8BackwardConfig = Fp8BackwardConfig()
    """How the work is cut."""
    interpret: bool = False
    """Runs in the CPU interpreter, which lacks A operands in registers and TMA additions."""

    @property
    def num_kv_tiles(self) -> int:
        """Tiles along S; the last may reach beyond it."""
        return pl.cdiv(self.spec.key_length, TILE_KV)

    @property
    def num_q_blocks(self) -> int:
        """Blocks along T; the last may reach beyond it."""
        return pl.cdiv(self.spec.query_length, BLOCK_Q)

    @property
    def group(self) -> int:
        """Query heads of a key/value head."""
        return self.spec.num_heads // self.spec.num_kv_heads

    @property
    def gradient_dtype(self) -> Any:
        """Of dO."""
        return {"e4m3": E4M3, "e5m2": E5M2}[self.spec.fp8.gradient_format]

    @property
    def takes_turns(self) -> bool:
        """Whether tiles add to dQ in a fixed order."""
        return self.spec.deterministic is True

    @property
    def start_distance(self) -> int:
        """`config.stagger` as it applies: a fixed order has the first block go first."""
        if self.takes_turns:
            return 0
        if self.config.stagger is None:
            return 2 if self.spec.band.right is None else 0
        return self.config.stagger

    @property
    def num_ds_stages(self) -> int:
        """Buffers for dS."""
        return 2 if self.config.separate_dq else 1

    @property
    def num_adders(self) -> int:
        """Warpgroups of a tile that add to a block of dQ."""
        return 1 if self.config.separate_dq else WARPGROUPS

    @property
    def num_turns(self) -> int:
        """Counters of the deterministic mode; nobody reads the last one."""
        return self.spec.batch_size * self.spec.num_heads * self.num_q_blocks + 1

    @property
    def announces_turns(self) -> bool:
        """Whether the producer waits for turns; a warpgroup that has dQ for itself can do that."""
        return self.takes_turns and not self.config.separate_dq

    @property
    def num_rows(self) -> int:
        """Numbers of each query."""
        return 3 + self.spec.fp8.exact_first_key

    @property
    def operands(self) -> tuple[str, ...]:
        """Names of the `Inputs` that there are."""
        absent = set()
        if not self.spec.fp8.rotate:
            absent |= {"matrix"}
        if not self.spec.has_segments:
            absent |= {"q_ids", "kv_ids"}
        if not self.takes_turns:
            absent |= {"turns"}
        return tuple(name for name in Inputs._fields if name not in absent)

    @property
    def dq_columns(self) -> int:
        """Channels of dQ that a warpgroup computes."""
        return self.spec.head_dim // WARPGROUPS


class Inputs(NamedTuple):
    """Global memory that the kernel reads; lengths are rounded up to whole blocks or tiles."""

    q: Any  # [B, T, N, H]
    k: Any  # [B, S, K, H]
    v: Any  # [B, S, K, H]
    dout: Any  # [B, T, N, H]
    q_t: Any  # [B, N, H, T]: q 2^(R - E - t), in the order of permute_16
    dout_t: Any  # [B, N, H, T]: dO 2^-E, in the order of permute_16
    k_t: Any  # [B, K, H, S], in the order of permute_28
    # [B, N, T / BLOCK_Q, num_rows, BLOCK_Q], float32: offset, delta, c / k_scale (, first_key)
    rows: Any
    scalars: Any  # [B, K, num_kv_tiles, 4], float32: `Scalars`
    block_ranges: Any  # [B or 1, num_kv_tiles, 4], int32: `BlockRange` of query blocks
    matrix: Any = None  # [H, H], spec.dtype: M^T, or None
    q_ids: Any = None  # [B, T], int32, or None
    kv_ids: Any = None  # [B, S], int32, or None
    turns: Any = None  # [B or 1, num_kv_tiles, num_q_blocks], int32: tiles before; or None


class Scalars(NamedTuple):
    """Numbers of a tile of keys."""

    k_scale: Any
    slope: Any
    dk_factor: Any
    dv_factor: Any


class Scratch(NamedTuple):
    """Shared memory and barriers of one CTA; a barrier's comment names producer and consumer."""

    k: Any  # [TILE_KV, H]
    v: Any  # [TILE_KV, H]
    k_t: Any  # [2, H, ROWS]
    q: Any  # [num_stages, BLOCK_Q, H]
    dout: Any  # [num_stages, BLOCK_Q, H]
    q_t: Any  # [num_stages, H, BLOCK_Q]
    dout_t: Any  # [num_stages, H, BLOCK_Q]
    rows: Any  # [num_stages, num_rows, BLOCK_Q], float32
    q_ids: Any  # [num_stages, BLOCK_Q], int32, or None
    ds: Any  # [num_ds_stages, 2, BLOCK_Q, ROWS]: dS, as bytes and as units of 16 bits
    staging: Any  # what leaves: dQ [2, BLOCK_Q, dq_columns], float32, or dK, dV [2, ROWS, H]
    matrix: Any  # [H, H]: M^T; or None
    rotated: Any  # [2, ROWS, H], interpreter only: the A operand of dK M^T
    operands: Any  # [2, 2, ROWS, BLOCK_Q], interpreter only: A operands of dV and dK
    kv_full: Any  # TMA -> compute
    rows_full: Any  # TMA -> compute, one per stage: q, dout and the numbers of each query
    columns_full: Any  # TMA -> compute, one per stage: q_t and dout_t
    rows_free: Any  # compute -> producer, one per stage
    columns_free: Any  # compute -> producer, one per stage
    ds_full: Any  # compute -> dQ's, one per stage: both warpgroups have written dS
    ds_free: Any  # dQ's -> compute, one per stage: it has been multiplied
    dq_sent: Any  # dQ's -> compute: dK and dV may take the place of dQ; or None
    turn: Any  # producer -> compute, three in turn: dQ of a step may be added to; or None


def scratch_types(plan: Plan) -> Scratch:
    """Returns the shared-memory plan."""
    h, stages = plan.spec.head_dim, plan.config.num_stages
    has_segments = plan.spec.has_segments
    tile = functools.partial(smem_tile, dtype=E4M3)
    ds = tile((plan.num_ds_stages, WARPGROUPS, BLOCK_Q, ROWS))
    units = smem_tile((plan.num_ds_stages, WARPGROUPS, BLOCK_Q, ROWS // 2), jnp.bfloat16)
    dq = smem_tile((WARPGROUPS, BLOCK_Q, plan.dq_columns), jnp.float32)
    gradients = smem_tile((WARPGROUPS, ROWS, h), plan.spec.dtype)
    barrier = functools.partial(plgpu.Barrier, num_barriers=stages)
    return Scratch(
        k=tile((TILE_KV, h)),
        v=tile((TILE_KV, h)),
        k_t=tile((WARPGROUPS, h, ROWS)),
        q=tile((stages, BLOCK_Q, h)),
        dout=smem_tile((stages, BLOCK_Q, h), plan.gradient_dtype),
        q_t=tile((stages, h, BLOCK_Q)),
        dout_t=smem_tile((stages, h, BLOCK_Q), plan.gradient_dtype),
        rows=plgpu.SMEM((stages, plan.num_rows, BLOCK_Q), jnp.float32),
        q_ids=plgpu.SMEM((stages, BLOCK_Q), jnp.int32) if has_segments else None,
        ds=ds if plan.interpret else plgpu.RefUnion((units,), (ds,)),
        # The interpreter knows no unions; it adds to dQ without staging.
        staging=((), (gradients,)) if plan.interpret else plgpu.RefUnion((dq,), (gradients,)),
        matrix=smem_tile((h, h), plan.spec.dtype) if plan.spec.fp8.rotate else None,
        rotated=gradients if plan.interpret and plan.spec.fp8.rotate else None,
        operands=tile((WARPGROUPS, 2, ROWS, BLOCK_Q)) if plan.interpret else None,
        kv_full=plgpu.Barrier(num_arrivals=2 + WARPGROUPS + plan.spec.fp8.rotate),
        rows_full=barrier(num_arrivals=3 + has_segments),
        columns_full=barrier(num_arrivals=2),
        rows_free=barrier(num_arrivals=WARPGROUPS),
        columns_free=barrier(num_arrivals=WARPGROUPS),
        ds_full=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=plan.num_ds_stages),
        ds_free=plgpu.Barrier(num_arrivals=plan.num_adders, num_barriers=plan.num_ds_stages),
        dq_sent=plgpu.Barrier() if plan.config.separate_dq else None,
        turn=plgpu.Barrier(num_barriers=NUM_TURN_BARRIERS) if plan.announces_turns else None,
    )


class Tile(NamedTuple):
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

        Tiles that add to the same block at the same time wait for each other, so each begins some
        blocks after the one before; see `Fp8BackwardConfig.stagger`.
        """
        first_head = self.kv_head * self.plan.group

        def in_head(g: Array, _: None) -> None:
            def in_block(i: Array, _: None) -> None:
                body(first_head + g, self._block(i), g * self.num_blocks + i)

            lax.fori_loop(0, self.num_blocks, in_block, None)

        lax.fori_loop(0, self.plan.group, in_head, None)
        return self.num_steps

    @property
    def num_blocks(self) -> Array:
        """Blocks of queries of each head that see this tile."""
        return self.blocks.stop - self.blocks.start

    @property
    def num_steps(self) -> Array:
        """Blocks of queries of all heads."""
        return self.plan.group * self.num_blocks

    def position(self, step: Array | int) -> tuple[Array, Array]:
        """Head and block of queries of a step."""
        step = jnp.asarray(step, jnp.int32)
        if self.plan.group == 1:
            return self.kv_head, self._block(step)
        # Not `divmod_traced`, by whose inverse the 64 registers of `separate_dq` overflow.
        head = self.kv_head * self.plan.group + lax.div(step, self.num_blocks)
        return head, self._block(lax.rem(step, self.num_blocks))

    def _block(self, i: Array) -> Array:
        """The i-th block of queries of a head."""
        distance = self.plan.start_distance
        if distance > 0:
            i += lax.rem(self.kv_tile * distance, jnp.maximum(self.num_blocks, 1))
            i -= jnp.where(i >= self.num_blocks, self.num_blocks, 0)
        return self.blocks.start + i

    def await_turn(self, step: Array) -> None:
        """Waits until all tiles that come before have added to dQ of a step; tells `_compute`."""
        if self.plan.announces_turns:
            self.await_counter(step)
            plgpu.barrier_arrive(self.turn(step))

    def await_counter(self, step: Array) -> None:
        """Waits until all tiles that come before have added to dQ of a step."""
        if self.counters is not None:
            row = self.batch if self.plan.spec.has_segments else 0
            _, block = self.position(step)
            before = self.inputs.turns[row, self.kv_tile, block] * self.plan.num_adders
            counter = self.counter(step)
            plgpu.semaphore_wait(counter, before, decrement=False, memory_scope="gpu")

    def pass_turn(self, step: Array) -> None:
        """Waits until dQ of a step is in global memory, and lets the next tile add to it."""
        if self.counters is not None:
            plgpu.wait_smem_to_gmem(0)
            plgpu.semaphore_signal(self.counter(step), memory_scope="gpu")

    def counter(self, step: Array) -> Any:
        """The counter of the additions to dQ of a step; step -1 has one that nobody reads."""
        head, block = self.position(step)
        row = self.batch * self.plan.spec.num_heads + head
        index = row * self.plan.num_q_blocks + block
        return self.counters.at[jnp.where(step < 0, self.plan.num_turns - 1, index)]

    def turn(self, step: Array) -> Any:
        """The barrier of a step's turn."""
        return self.scratch.turn.at[lax.rem(step, jnp.int32(NUM_TURN_BARRIERS))]

    def scalars(self) -> Scalars:
        """The numbers of this tile."""
        index = self.batch, self.kv_head, self.kv_tile
        return Scalars(*(self.inputs.scalars[*index, i] for i in range(4)))

    def ds_slot(self, step: Array) -> Array:
        """The buffer of dS of a step."""
        return lax.rem(step, jnp.int32(self.plan.num_ds_stages))

    @property
    def staged_dq(self) -> Any:
        """Where dQ waits to leave."""
        (staged,), _ = self.scratch.staging
        return staged

    def slot(self, step: Array) -> Array:
        """The buffers of a step."""
        return lax.rem(step, jnp.int32(self.plan.config.num_stages))


def tile_of(plan: Plan, inputs: Inputs, scratch: Scratch, counters: Any) -> Tile:
    """This CTA's tile: the first keys, which a causal mask shows to the most queries, go first."""
    heads = plan.spec.batch_size * plan.spec.num_kv_heads
    cta = lax.axis_index("cta")
    kv_tile, index = lax.div(cta, jnp.int32(heads)), lax.rem(cta, jnp.int32(heads))
    batch = lax.div(index, jnp.int32(plan.spec.num_kv_heads))
    kv_head = lax.rem(index, jnp.int32(plan.spec.num_kv_heads))
    row = batch if plan.spec.has_segments else 0
    blocks = BlockRange(*(inputs.block_ranges[row, kv_tile, i] for i in range(4)))
    return Tile(plan, inputs, scratch, batch, kv_head, kv_tile, blocks, counters)

"""Flash attention forward, SM90: the plan: shared memory and tile schedule.

Shared by `sm90_fwd_bf16` and `sm90_fwd_fp8`, whose texts explain the warps and barriers.
"""

import dataclasses
import functools
import heapq
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash_attention.config import AttentionSpec, ForwardConfig
from pallas_kernels.flash_attention.fp8 import BLOCK as FP8_BLOCK
from pallas_kernels.mosaic import ROWS, scratch_bytes, smem_tile

_L2_BYTES = 32 * 2**20  # of 50 MiB: K and V of one section; the rest is for Q and O
_TILE_OVERHEAD = 1.5  # of a tile's start and end, in key blocks
_MAX_ROUNDS = 200
_TMA_INTS = 32  # TMA copies 128 bytes or more in one dimension


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Everything static about one launch."""

    spec: AttentionSpec
    """What is computed."""
    config: ForwardConfig
    """How the work is cut."""
    sm_count: int
    """Streaming multiprocessors of the device; each holds one CTA."""
    interpret: bool = False
    """Runs in the CPU interpreter, which lacks A operands in registers and preset accumulators."""

    @property
    def num_ctas(self) -> int:
        """CTAs launched."""
        return min(self.sm_count, self.num_tiles) if self.config.persistent else self.num_tiles

    @property
    def tile_q(self) -> int:
        """Queries of one CTA tile."""
        return ROWS * self.config.compute_warpgroups

    @property
    def num_q_tiles(self) -> int:
        """Tiles along T; the last may reach beyond it."""
        return pl.cdiv(self.spec.query_length, self.tile_q)

    @property
    def num_kv_blocks(self) -> int:
        """Blocks along S; the last may reach beyond it."""
        return pl.cdiv(self.spec.key_length, self.config.block_kv)

    @property
    def num_tiles(self) -> int:
        """Tiles of the whole problem."""
        return self.spec.batch_size * self.spec.num_heads * self.num_q_tiles

    @property
    def heads_per_section(self) -> int:
        """(batch, head) pairs whose tiles are dealt out together: few, so that their K and V stay
        in L2 while CTAs at other places of the same head read them.
        """
        spec = self.spec
        if not self.has_schedule and not self.are_tiles_unequal:
            return spec.num_heads // spec.num_kv_heads
        if not self.has_schedule and self.num_ctas < self.num_tiles:
            # Dealt out in turns, tiles of unequal length balance only if all longest ones go first.
            return spec.batch_size * spec.num_heads
        itemsize = 1 if spec.precision == "fp8" else 2
        at_once = _L2_BYTES // (2 * itemsize * spec.key_length * spec.head_dim)
        kv_heads = spec.batch_size * spec.num_kv_heads
        fitting = [n for n in range(1, max(1, at_once) + 1) if kv_heads % n == 0]
        return spec.num_heads // spec.num_kv_heads * fitting[-1]

    @property
    def are_tiles_unequal(self) -> bool:
        """Whether some tiles see far more keys than others."""
        band = self.spec.band
        return self.spec.has_segments or (band.right is not None and band.left is None)

    @property
    def has_schedule(self) -> bool:
        """Whether it is worked out beforehand which CTA does which tile; not for very many tiles,
        whose list would need much shared memory, and which balance anyway.
        """
        rounds = self.num_tiles / self.num_ctas
        return self.are_tiles_unequal and 1 < rounds <= _MAX_ROUNDS

    @property
    def isolates(self) -> bool:
        """Whether bad values are kept from queries that may not see them: where none is masked,
        there are none; FP8 factors share their scales anyway.
        """
        is_masked = self.spec.has_segments or not self.spec.band.is_full
        return is_masked and self.spec.precision != "fp8"

    @property
    def schedule_slots(self) -> int:
        """Columns of `make_schedule`."""
        return make_schedule(self).shape[1]

    @property
    def scales_shape(self) -> tuple[int, int, int]:
        """Of two numbers for each block of keys, as TMA copies them: FP8 only."""
        repeats = max(1, FP8_BLOCK // self.config.block_kv)
        blocks = pl.cdiv(self.spec.key_length, FP8_BLOCK) * repeats
        return 2, pl.cdiv(blocks, _TMA_INTS), _TMA_INTS

    @property
    def padded_query_length(self) -> int:
        """T rounded up to whole tiles."""
        return self.num_q_tiles * self.tile_q

    @property
    def padded_key_length(self) -> int:
        """S rounded up to whole blocks."""
        return self.num_kv_blocks * self.config.block_kv


class Scratch(NamedTuple):
    """Shared memory and barriers of one CTA; a barrier's comment names producer and consumer."""

    q: Any  # [tile_q, H]; also the output if config.reuse_q_smem
    k: Any  # [num_stages, block_kv, H]
    v: Any  # [num_stages, block_kv, H]; in FP8 [num_stages, H, block_kv]
    out: Any  # [tile_q, H], or None
    kv_ids: Any  # [num_stages, block_kv], int32, or None
    scales: Any  # scales_shape, float32: of each block of keys; FP8 only
    p: Any  # [C, ROWS, block_kv], interpreter only: the A operand of P V
    q_full: Any  # TMA -> compute: Q (and the scales) have arrived
    k_full: Any  # TMA -> compute, one per stage: K (and its segment ids)
    v_full: Any  # TMA -> compute, one per stage
    q_free: Any  # compute -> producer: Q may be overwritten
    k_free: Any  # compute -> producer, one per stage
    v_free: Any  # compute -> producer, one per stage
    schedule: Any  # [slots], int32: this CTA's row, or None
    schedule_full: Any  # TMA -> all: the schedule has arrived; or None
    turn: Any  # compute -> compute, one per warpgroup: it may issue matrix products; or None
    # Of `sm90_isolation`, or None:
    bad_outputs: Any  # [C, 1], int32: a warpgroup has met an output that is not finite
    bad_keys: Any  # [block_kv], float32: NaN for keys with a bad row of V, else 0
    first_pass: Any  # compute -> all: all tiles are done, and `bad_outputs` is written
    checked: Any  # TMA -> producer: a block of the second pass has arrived


def scratch_types(plan: Plan) -> Scratch:
    """Returns the shared-memory plan: the single source of the allocation and of `smem_bytes`."""
    config, spec = plan.config, plan.spec
    wgs, stages, block_kv = config.compute_warpgroups, config.num_stages, config.block_kv
    is_fp8 = spec.precision == "fp8"
    tile = functools.partial(smem_tile, dtype=jnp.float8_e4m3fn if is_fp8 else spec.dtype)
    # 8-bit wgmma has no transposed operand.
    v_shape = (spec.head_dim, block_kv) if is_fp8 else (block_kv, spec.head_dim)
    return Scratch(
        q=tile((plan.tile_q, spec.head_dim)),
        k=tile((stages, block_kv, spec.head_dim)),
        v=tile((stages, *v_shape)),
        out=None if config.reuse_q_smem else smem_tile((plan.tile_q, spec.head_dim), spec.dtype),
        kv_ids=plgpu.SMEM((stages, block_kv), jnp.int32) if spec.has_segments else None,
        scales=plgpu.SMEM(plan.scales_shape, jnp.float32) if is_fp8 else None,
        p=tile((wgs, ROWS, block_kv)) if plan.interpret else None,
        q_full=plgpu.Barrier(num_arrivals=1 + is_fp8),
        k_full=plgpu.Barrier(num_arrivals=1 + spec.has_segments, num_barriers=stages),
        v_full=plgpu.Barrier(num_barriers=stages),
        q_free=plgpu.Barrier(num_arrivals=wgs),
        k_free=plgpu.Barrier(num_arrivals=wgs, num_barriers=stages),
        v_free=plgpu.Barrier(num_arrivals=wgs, num_barriers=stages),
        schedule=plgpu.SMEM((plan.schedule_slots,), jnp.int32) if plan.has_schedule else None,
        schedule_full=plgpu.Barrier() if plan.has_schedule else None,
        turn=plgpu.Barrier(num_barriers=wgs) if config.ping_pong else None,
        bad_outputs=plgpu.SMEM((wgs, 1), jnp.int32) if plan.isolates else None,
        bad_keys=plgpu.SMEM((block_kv,), jnp.float32) if plan.isolates else None,
        first_pass=plgpu.Barrier(num_arrivals=wgs) if plan.isolates else None,
        checked=plgpu.Barrier() if plan.isolates else None,
    )


def smem_bytes(plan: Plan) -> int:
    """Returns the shared memory of one CTA, barriers included."""
    return scratch_bytes(scratch_types(plan))


class Inputs(NamedTuple):
    """Global memory that the kernel reads."""

    q: Any  # [B, T, N, H]
    k: Any  # [B, S, K, H]
    v: Any  # [B, S, K, H]; in FP8 [B, K, H, padded S]
    q_ids: Any  # [B, padded T], int32, or None
    kv_ids: Any  # [B, padded S], int32, or None
    block_ranges: Any  # [B, num_q_tiles, 4], int32, or None: see `BlockRange`
    schedule: Any  # [num_ctas, slots], int32, or None: see `make_schedule`
    factor: Any = None  # [B, N, T / BLOCK], float32, FP8 only: c / k_scale of `fp8`
    scales: Any = None  # [B, K, *scales_shape], float32, FP8 only: `sm90_fwd_fp8.block_scales`
    v_scale: Any = None  # [B, K, S / BLOCK], float32, FP8 only
    first_key: Any = None  # [B, N, padded T], float32, or None; FP8 only


@functools.lru_cache(maxsize=64)
def make_schedule(plan: Plan) -> np.ndarray:
    """Returns for each CTA how many tiles it computes, and which, in order.

    The tiles go, section by section and longest first, each to the CTA that is free first if a tile
    takes as long as its key blocks and `_TILE_OVERHEAD` more: what a work queue would do. Dealing
    them out in turns balances only if all heads form one section, and that overflows L2.

    Returns:
      `[num_ctas, slots]`, int32: the count, then indices of tiles; zeros up to a multiple of 32.
    """
    free_at = [(0.0, cta) for cta in range(plan.num_ctas)]
    tiles: list[list[int]] = [[] for _ in free_at]
    heads = plan.heads_per_section
    for index in range(plan.num_tiles):
        q_tile = plan.num_q_tiles - 1 - index % (heads * plan.num_q_tiles) // heads
        last_key = (q_tile + 1) * plan.tile_q - 1 + (plan.spec.band.right or 0)
        blocks = min(plan.num_kv_blocks, max(1, last_key // plan.config.block_kv + 1))
        time, cta = heapq.heappop(free_at)
        tiles[cta].append(index)
        heapq.heappush(free_at, (time + blocks + _TILE_OVERHEAD, cta))
    slots = -(-(1 + max(map(len, tiles))) // _TMA_INTS) * _TMA_INTS
    schedule = np.zeros((plan.num_ctas, slots), np.int32)
    for row, mine in zip(schedule, tiles, strict=True):
        row[: 1 + len(mine)] = [len(mine), *mine]
    return schedule


def schedule_operand(plan: Plan) -> tuple[Array, ...]:
    """Returns what a launch adds to its operands: the schedule, if there is one."""
    return (jnp.asarray(make_schedule(plan)),) if plan.has_schedule else ()


class Tile(NamedTuple):
    """One tile of work, as traced scalars."""

    batch: Array
    head: Array
    q_tile: Array


class BlockRange(NamedTuple):
    """Blocks start <= j < stop hold all keys that a tile sees; full_start <= j < full_stop need no
    mask.
    """

    start: Array
    stop: Array
    full_start: Array
    full_stop: Array


class Launch(Protocol):
    """A plan whose CTAs walk through tiles."""

    @property
    def num_ctas(self) -> int:
        """CTAs launched."""
        ...

    @property
    def num_tiles(self) -> int:
        """Tiles of the whole problem."""
        ...

    @property
    def interpret(self) -> bool:
        """Runs in the CPU interpreter."""
        ...


def cta_tiles(plan: Launch) -> tuple[Array, Any]:
    """Returns how many tiles this CTA has, and the function from its i-th to the tile's index.

    Tiles are dealt out in rounds, every other round in reverse order, so that a CTA that drew a
    long tile in one round draws a short one in the next.
    """
    cta = lax.axis_index("cta")
    full_rounds, rest = divmod(plan.num_tiles, plan.num_ctas)
    last = (plan.num_ctas - 1 - cta) if full_rounds % 2 else cta
    count = full_rounds + (last < rest).astype(jnp.int32)

    def index(i: Array) -> Array:
        position = jnp.where(i % 2 == 1, plan.num_ctas - 1 - cta, cta)
        return i * plan.num_ctas + position

    return count, index


def tile_of(plan: Plan, index: Array) -> Tile:
    """Maps the index of a tile to its coordinates: section by section, longest tiles first."""
    heads = plan.heads_per_section
    section, rest = divmod_int32(index, heads * plan.num_q_tiles)
    rank, head = divmod_int32(rest, heads)
    batch, head = divmod_int32(section * heads + head, plan.spec.num_heads)
    # Under a causal mask the last queries see the most keys.
    q_tile = plan.num_q_tiles - 1 - rank if plan.spec.band.right is not None else rank
    return Tile(batch, head, q_tile)


def divmod_int32(x: Array, divisor: int) -> tuple[Array, Array]:
    """Divides non-negative int32."""
    divisor = jnp.int32(divisor)
    return lax.div(x, divisor), lax.rem(x, divisor)


def block_range_of(plan: Plan, block_ranges: Any, tile: Tile) -> BlockRange:
    """Returns which key blocks a tile needs: looked up with segment ids, else computed from the
    band.
    """
    if plan.spec.has_segments:
        return BlockRange(*(block_ranges[tile.batch, tile.q_tile, i] for i in range(4)))
    band, block_kv = plan.spec.band, plan.config.block_kv
    first_q = tile.q_tile * plan.tile_q
    last_q = first_q + plan.tile_q - 1
    start = full_start = jnp.int32(0)
    stop = jnp.int32(plan.num_kv_blocks)
    full_stop = jnp.int32(plan.spec.key_length // block_kv)
    if band.right is not None:
        stop = jnp.minimum(stop, lax.div(last_q + band.right, block_kv) + 1)
        full_stop = jnp.minimum(full_stop, lax.div(first_q + band.right + 1, block_kv))
    if band.left is not None:
        start = lax.div(jnp.maximum(first_q - band.left, 0), block_kv)
        start = jnp.minimum(start, plan.num_kv_blocks - 1)
        full_start = lax.div(jnp.maximum(last_q - band.left, 0) + block_kv - 1, block_kv)
    # A tile that sees no key still runs one block, all masked, which makes its output 0.
    return BlockRange(start, jnp.maximum(stop, start + 1), full_start, full_stop)

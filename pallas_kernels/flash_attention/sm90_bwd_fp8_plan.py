"""Flash attention backward in FP8, SM90: the plan: operands and shared memory.

Split from `sm90_bwd_fp8`, whose text explains the warps and barriers.
"""

# Shapes: B batch, T query, S key, N query heads, K key/value heads, H head dim.

import dataclasses
import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash_attention.config import AttentionSpec
from pallas_kernels.flash_attention.fp8 import E4M3, E5M2
from pallas_kernels.mosaic import ROWS, tile_transforms

BLOCK_Q = 64
"""Queries of one step."""
TILE_KV = 2 * ROWS
"""Keys of one CTA."""
WARPGROUPS = 2
"""That compute, each for ROWS keys; one more loads."""
TURN_SLOTS = 3
"""Barriers of the deterministic mode: two steps are under way, and at the end the producer is one
ahead."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Everything static about one launch."""

    spec: AttentionSpec
    """What is computed."""
    num_stages: int = 2
    """Buffers for each of the query side's factors."""
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
    def num_turns(self) -> int:
        """Counters of the deterministic mode; nobody reads the last one."""
        return self.spec.batch_size * self.spec.num_heads * self.num_q_blocks + 1

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
    ds: Any  # [2, BLOCK_Q, ROWS]: dS of each warpgroup, as bytes and as units of 16 bits
    staging: Any  # what leaves: dQ [2, BLOCK_Q, dq_columns], float32, or dK, dV [2, ROWS, H]
    matrix: Any  # [H, H]: M^T; or None
    rotated: Any  # [2, ROWS, H], interpreter only: the A operand of dK M^T
    operands: Any  # [2, 2, ROWS, BLOCK_Q], interpreter only: A operands of dV and dK
    kv_full: Any  # TMA -> compute
    rows_full: Any  # TMA -> compute, one per stage: q, dout and the numbers of each query
    columns_full: Any  # TMA -> compute, one per stage: q_t and dout_t
    rows_free: Any  # compute -> producer, one per stage
    columns_free: Any  # compute -> producer, one per stage
    ds_full: Any  # compute -> compute: both warpgroups have written dS
    ds_free: Any  # compute -> compute: both have multiplied it
    turn: Any  # producer -> compute, three in turn: dQ of a step may be added to; or None


def scratch_types(plan: Plan) -> Scratch:
    """Returns the shared-memory plan."""
    h, stages = plan.spec.head_dim, plan.num_stages
    has_segments = plan.spec.has_segments

    def tile(shape: tuple[int, ...], dtype: Any = E4M3) -> Any:
        transforms = tile_transforms(jnp.dtype(dtype).itemsize, shape[-1])
        return plgpu.SMEM(shape, dtype, transforms=transforms)

    ds = tile((WARPGROUPS, BLOCK_Q, ROWS))
    units = tile((WARPGROUPS, BLOCK_Q, ROWS // 2), jnp.bfloat16)
    dq = tile((WARPGROUPS, BLOCK_Q, plan.dq_columns), jnp.float32)
    gradients = tile((WARPGROUPS, ROWS, h), plan.spec.dtype)
    barrier = functools.partial(plgpu.Barrier, num_barriers=stages)
    return Scratch(
        k=tile((TILE_KV, h)),
        v=tile((TILE_KV, h)),
        k_t=tile((WARPGROUPS, h, ROWS)),
        q=tile((stages, BLOCK_Q, h)),
        dout=tile((stages, BLOCK_Q, h), plan.gradient_dtype),
        q_t=tile((stages, h, BLOCK_Q)),
        dout_t=tile((stages, h, BLOCK_Q), plan.gradient_dtype),
        rows=plgpu.SMEM((stages, plan.num_rows, BLOCK_Q), jnp.float32),
        q_ids=plgpu.SMEM((stages, BLOCK_Q), jnp.int32) if has_segments else None,
        ds=ds if plan.interpret else plgpu.RefUnion((units,), (ds,)),
        # The interpreter knows no unions; it adds to dQ without staging.
        staging=((), (gradients,)) if plan.interpret else plgpu.RefUnion((dq,), (gradients,)),
        matrix=tile((h, h), plan.spec.dtype) if plan.spec.fp8.rotate else None,
        rotated=gradients if plan.interpret and plan.spec.fp8.rotate else None,
        operands=tile((WARPGROUPS, 2, ROWS, BLOCK_Q)) if plan.interpret else None,
        kv_full=plgpu.Barrier(num_arrivals=2 + WARPGROUPS + plan.spec.fp8.rotate),
        rows_full=barrier(num_arrivals=3 + has_segments),
        columns_full=barrier(num_arrivals=2),
        rows_free=barrier(num_arrivals=WARPGROUPS),
        columns_free=barrier(num_arrivals=WARPGROUPS),
        ds_full=plgpu.Barrier(num_arrivals=WARPGROUPS),
        ds_free=plgpu.Barrier(num_arrivals=WARPGROUPS),
        turn=plgpu.Barrier(num_barriers=TURN_SLOTS) if plan.takes_turns else None,
    )

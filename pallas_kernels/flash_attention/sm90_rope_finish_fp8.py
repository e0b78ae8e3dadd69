"""The end of FP8 attention's backward from a fused QKV projection on sm_90a: the projection's
gradient, read from dQ's sums, dK and dV once, and written once.

  for each query head:   z_i = round16(round16(x_i factor_i) M)      x in float32
  dqkv = for each key/value head and its g query heads:   [R^T z_1 | .. | R^T z_g | R^T dk | dv]
R^T turns (a, b), the two halves of a head, to (a cos + b sin, b cos - a sin): what
`sm90_finish_fp8` and then `fused.sm90_rope` make, bit for bit, without dq in 16 bits in memory.

A CTA is one warpgroup and takes 64 rows of several key/value heads with their query heads, first
all queries, then the keys, then the values; cosines and sines stay in registers. Two CTAs share an
SM and fill its shared memory: factors are read from global memory, before the wait for their head.

  step, for a head                               ordered by
  registers <- stage; product; turn              TMA -> `full`, one per stage; `setup`: M
  staging buffer <- registers                    the TMA stores of the head before have read it
  TMA stores; load of the head after the next    commit_smem: a fence and a barrier of the warpgroup

Stages hold a head of sums in float32, or one of dK or dV in 16 bits.

Not supported: head dims other than 64 and 128 (two stages of 256 channels leave room for one CTA).
"""

# Shapes: B batch, L length, K key/value heads, g query heads of each, H head dim.

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash_attention.sm90_finish_fp8 import scaled_product
from pallas_kernels.flash_attention.sm90_rope_quantize_fp8 import heads_per_cta
from pallas_kernels.mosaic import MATRIX, PER_ROW, ROWS, launcher, scratch_bytes, smem_tile

_STAGES = 2
_CTAS_PER_SM = 2


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Everything static about one launch."""

    shape: tuple[int, ...]
    """Of dK and dV, as far as they are wanted: B, L, K, H; L a multiple of 16."""
    group: int
    """g."""
    dtype: Any
    """Of dK, dV and the result: 16 bits."""
    sm_count: int
    """Streaming multiprocessors of the device."""
    interpret: bool = False
    """Run in the CPU interpreter, which takes no A operand in registers, and no unions."""

    @property
    def num_blocks(self) -> int:
        """Blocks of ROWS rows; the last may reach beyond L."""
        return pl.cdiv(self.shape[1], ROWS)

    @property
    def kv_heads_per_cta(self) -> int:
        """Key/value heads that a CTA takes, with their query heads."""
        concurrent = _CTAS_PER_SM * self.sm_count
        return heads_per_cta(self.shape[2], self.shape[0] * self.num_blocks, concurrent)

    @property
    def num_parts(self) -> int:
        """CTAs that share the heads of a block."""
        return self.shape[2] // self.kv_heads_per_cta


class _Smem(NamedTuple):
    """Shared memory and barriers."""

    stages: Any  # [stages, ROWS, H] twice in the same place: float32 for sums, 16 bits for dK, dV
    matrix: Any  # [H, H]
    staged: Any  # [ROWS, H]
    operand: Any  # [ROWS, H], interpreter only
    full: Any  # TMA -> this warpgroup, one per stage
    setup: Any  # TMA -> this warpgroup: M


def _smem_types(plan: Plan) -> _Smem:
    """The shared-memory plan: the single source of its allocation and of `smem_bytes`."""
    h = plan.shape[3]
    sums, others = (smem_tile((_STAGES, ROWS, h), dtype) for dtype in (jnp.float32, plan.dtype))
    return _Smem(
        stages=((sums,), (others,)) if plan.interpret else plgpu.RefUnion((sums,), (others,)),
        matrix=smem_tile((h, h), plan.dtype),
        staged=smem_tile((ROWS, h), plan.dtype),
        operand=smem_tile((ROWS, h), plan.dtype) if plan.interpret else None,
        full=plgpu.Barrier(num_barriers=_STAGES),
        setup=plgpu.Barrier(),
    )


def smem_bytes(plan: Plan) -> int:
    """Shared memory of one CTA."""
    return scratch_bytes(_smem_types(plan))


class _Kernel(NamedTuple):
    """What the steps share."""

    plan: Plan
    sums: Any
    factor: Any
    dk: Any
    dv: Any
    out: Any
    smem: _Smem
    cos: Array
    sin: Array

    @property
    def rows(self) -> Any:
        """Of this CTA."""
        return pl.ds(lax.axis_index("block") * ROWS, ROWS)

    @property
    def counts(self) -> tuple[int, int]:
        """Query heads, and key/value heads, of this CTA."""
        count = self.plan.kv_heads_per_cta
        return count * self.plan.group, count

    def position(self, i: Array) -> tuple[Array, Array]:
        """Which key/value head the i-th head belongs to, and which one of its group it is."""
        (queries, count), group = self.counts, self.plan.group
        is_query, other = i < queries, i - queries
        own = jnp.where(is_query, lax.div(i, jnp.int32(group)), lax.rem(other, jnp.int32(count)))
        member = jnp.where(
            is_query, lax.rem(i, jnp.int32(group)), group + lax.div(other, jnp.int32(count))
        )
        return lax.axis_index("part") + own * self.plan.num_parts, member

    def load(self, i: Array, stage: Any) -> None:
        """Starts the TMA loads of the i-th head."""
        batch, (queries, count) = lax.axis_index("batch"), self.counts
        kv, member = self.position(i)
        full = self.smem.full.at[stage]
        (sums,), (others,) = self.smem.stages

        @pl.when(i < queries)
        def _() -> None:
            head = kv * self.plan.group + member
            plgpu.copy_gmem_to_smem(self.sums.at[batch, self.rows, head], sums.at[stage], full)

        def load_other(source: Any) -> None:
            plgpu.copy_gmem_to_smem(source.at[batch, self.rows, kv], others.at[stage], full)

        is_key = jnp.logical_and(i >= queries, i < queries + count)
        pl.when(is_key)(lambda: load_other(self.dk))
        pl.when(i >= queries + count)(lambda: load_other(self.dv))

    def query(self, i: Array, stage: Array) -> Array:
        """z of the i-th head."""
        plan, smem = self.plan, self.smem
        kv, member = self.position(i)
        head = kv * plan.group + member
        factor = self.factor.at[lax.axis_index("batch"), head, self.rows]
        factor = plgpu.load(factor, layout=PER_ROW, optimized=False)
        plgpu.barrier_wait(smem.full.at[stage])
        x = plgpu.load(smem.stages[0][0].at[stage], layout=MATRIX)
        return scaled_product(x, factor, smem.matrix, smem.operand).astype(plan.dtype)

    def other(self, _: Array, stage: Array) -> Array:
        """dK or dV of the head that the stage is for."""
        plgpu.barrier_wait(self.smem.full.at[stage])
        return plgpu.load(self.smem.stages[1][0].at[stage], layout=MATRIX)

    def turned(self, x: Array) -> Array:
        """R^T x, `[ROWS, H]`, float32."""
        half = self.plan.shape[3] // 2
        a, b = x[:, :half].astype(jnp.float32), x[:, half:].astype(jnp.float32)
        cos, sin = self.cos, self.sin
        return jnp.concatenate((a * cos + b * sin, b * cos - a * sin), axis=1)

    def step(self, i: Array, head: Callable[[Array, Array], Array], *, turns: bool) -> None:
        """Makes the i-th head."""
        stage = lax.rem(i, jnp.int32(_STAGES))
        x = head(i, stage)
        x = self.turned(x).astype(self.plan.dtype) if turns else x
        # The store of the head before has read the staging buffer.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        self.smem.staged[...] = x
        plgpu.commit_smem()
        kv, member = self.position(i)
        target = kv * (self.plan.group + 2) + member
        batch, (queries, count) = lax.axis_index("batch"), self.counts
        plgpu.copy_smem_to_gmem(self.smem.staged, self.out.at[batch, self.rows, target])
        pl.when(i + _STAGES < queries + 2 * count)(lambda: self.load(i + _STAGES, stage))


def _kernel(*refs: Any, plan: Plan, **smem_refs: Any) -> None:
    """The heads of one CTA."""
    sums, factor, dk, dv, cos_gmem, sin_gmem, matrix, out = refs
    smem = _Smem(**{name: smem_refs.get(name) for name in _Smem._fields})
    own = lax.axis_index("batch"), pl.ds(lax.axis_index("block") * ROWS, ROWS)
    plgpu.copy_gmem_to_smem(matrix, smem.matrix, smem.setup)
    cos, sin = (
        plgpu.load(angle.at[own], layout=MATRIX, optimized=False) for angle in (cos_gmem, sin_gmem)
    )
    kernel = _Kernel(plan, sums, factor, dk, dv, out, smem, cos, sin)
    for i in range(_STAGES):  # there are at least a query, a key and a value
        kernel.load(jnp.int32(i), i)
    plgpu.barrier_wait(smem.setup)
    queries, count = kernel.counts
    for first, last, head, turns in (
        (0, queries, kernel.query, True),
        (queries, queries + count, kernel.other, True),
        (queries + count, queries + 2 * count, kernel.other, False),
    ):
        step = functools.partial(kernel.step, head=head, turns=turns)
        lax.fori_loop(first, last, lambda i, _, step=step: step(i), None)
    plgpu.wait_smem_to_gmem(0)


@launcher("sm_count", "interpret")
def rope_finish(
    sums: Array,
    factor: Array,
    dk: Array,
    dv: Array,
    cos: Array,
    sin: Array,
    matrix: Array,
    *,
    sm_count: int,
    interpret: bool = False,
) -> Array:
    """Runs the kernel.

    Args:
      sums: `[B, L or more, K g, H]`, float32, their length a multiple of 64.
      factor: `[B, K g, like sums]`, float32.
      dk: `[B, L or more, K, H]`, bfloat16 or float16, its length a multiple of 64.
      dv: like dk.
      cos: float32 `[B, L, H / 2]`; L a multiple of 16.
      sin: like cos.
      matrix: M, `[H, H]`, like dk; the identity for no Hadamard rotation, which changes no bit.
      sm_count: streaming multiprocessors of the device.
      interpret: run in the CPU interpreter.

    Returns:
      dqkv `[B, L, K (g + 2), H]`, like dk.
    """
    (batch, length, _), (*_, kv_heads, h) = cos.shape, dk.shape
    plan = Plan(
        shape=(batch, length, kv_heads, h),
        group=sums.shape[2] // kv_heads,
        dtype=dk.dtype,
        sm_count=sm_count,
        interpret=interpret,
    )
    padding = plan.num_blocks * ROWS - length
    if padding:  # TMA keeps within an array, the loads of angles do not
        cos, sin = (jnp.pad(a, ((0, 0), (0, padding), (0, 0))) for a in (cos, sin))
    return plgpu.kernel(
        functools.partial(_kernel, plan=plan),
        out_type=jax.ShapeDtypeStruct((batch, length, kv_heads * (plan.group + 2), h), plan.dtype),
        scratch_types={k: v for k, v in _smem_types(plan)._asdict().items() if v is not None},
        # The last axis is the fastest.
        grid=(batch, plan.num_blocks, plan.num_parts),
        grid_names=("batch", "block", "part"),
        kernel_name="fp8_rope_finish",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
    )(sums, factor, dk, dv, cos, sin, matrix)

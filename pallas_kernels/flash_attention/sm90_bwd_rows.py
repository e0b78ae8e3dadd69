"""The start of the bf16 attention backward on sm_90a: what it needs of each query, in one pass.

For each query i of a head:
  delta_i = sum_h dout_ih out_ih - dlse_i,   lse'_i = lse_i log2(e),   dq_i = 0
where a query that sees no key has lse' = +inf, and one that has something not finite, `BAD_LSE`
and delta = 0 (`sm90_isolation`).

By bytes: out and dout read once, the zeros that the backward adds dQ to written once. XLA puts the
sum into the transposition of its result, so that each thread reads whole rows by itself.

A persistent CTA of one warpgroup walks through blocks of 64 queries of a head (`sm90_head_blocks`);
several CTAs share an SM:

  step                                           ordered by
  load of block i into its stage                 TMA -> `full`, one barrier per stage
  TMA store of zeros                             commit_smem, once
  delta and lse' straight to global memory       `full`
  load of block i + 2                            commit_smem: all warps have read the stage

Not supported: lengths that are not a multiple of 64 (the caller pads lse and dlse; TMA reads zeros
beyond the end of out and dout).
"""

# Shapes: B batch, T query, N query heads, H head dim.

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash_attention.sm90_head_blocks import HeadBlocks
from pallas_kernels.flash_attention.sm90_isolation import BAD_LSE
from pallas_kernels.hardware import SM90_SMEM_BYTES_PER_BLOCK
from pallas_kernels.mosaic import MATRIX, PER_ROW, ROWS, launcher, scratch_bytes, smem_tile
from pallas_kernels.numerics import LOG2E

_STAGES = 2


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Everything static about one launch."""

    shape: tuple[int, ...]
    """Of dQ: B, T, N, H; T a multiple of 64."""
    dtype: Any
    """Of out and dout: 16 bits."""
    sm_count: int
    """Streaming multiprocessors of the device."""
    interpret: bool = False
    """Run in the CPU interpreter."""

    @property
    def blocks(self) -> HeadBlocks:
        """Blocks of ROWS rows; all CTAs run at once."""
        batch, length, heads, _ = self.shape
        ctas_per_sm = SM90_SMEM_BYTES_PER_BLOCK // scratch_bytes(_smem_types(self))
        return HeadBlocks(
            batch_size=batch,
            num_heads=heads,
            blocks_per_head=length // ROWS,
            max_ctas=ctas_per_sm * self.sm_count,
        )


class _Smem(NamedTuple):
    """Shared memory and barriers."""

    out: Any  # [stages, ROWS, H]
    dout: Any  # [stages, ROWS, H]
    lse: Any  # [stages, ROWS], float32
    dlse: Any  # [stages, ROWS], float32
    zeros: Any  # [ROWS, H], float32
    full: Any  # TMA -> this warpgroup, one per stage: out, dout, lse, dlse


def _smem_types(plan: Plan) -> _Smem:
    """The shared-memory plan."""
    h = plan.shape[3]
    return _Smem(
        out=smem_tile((_STAGES, ROWS, h), plan.dtype),
        dout=smem_tile((_STAGES, ROWS, h), plan.dtype),
        lse=plgpu.SMEM((_STAGES, ROWS), jnp.float32),
        dlse=plgpu.SMEM((_STAGES, ROWS), jnp.float32),
        zeros=smem_tile((ROWS, h), jnp.float32),
        full=plgpu.Barrier(num_arrivals=4, num_barriers=_STAGES),
    )


def _row_operands(out: Array, dout: Array, lse: Array, dlse: Array) -> tuple[Array, Array]:
    """Returns lse' and delta of the queries of a block."""
    products = dout.astype(jnp.float32) * out.astype(jnp.float32)
    delta = jnp.sum(products, axis=1) - dlse
    inf = jnp.inf
    # NaN fails every comparison.
    is_good = (jnp.abs(delta) < inf) & (lse < inf)
    lse = jnp.where(lse == -inf, inf, lse * LOG2E)
    return jnp.where(is_good, lse, BAD_LSE), jnp.where(is_good, delta, 0.0)


def _kernel(*refs: Any, plan: Plan, **smem_refs: Any) -> None:
    """Walks through the CTA's blocks."""
    *inputs, lse_out, delta_out, dq = refs
    smem = _Smem(**smem_refs)
    blocks = plan.blocks

    def position(i: Array) -> tuple[Array, Array, Any]:
        """Batch row, head and queries of the CTA's i-th block."""
        batch, head, block = blocks.position(i)
        return batch, head, pl.ds(block * ROWS, ROWS)

    def load(i: Array, stage: Any) -> None:
        batch, head, rows = position(i)
        out, dout, lse, dlse = inputs
        full = smem.full.at[stage]
        plgpu.copy_gmem_to_smem(out.at[batch, rows, head], smem.out.at[stage], full)
        plgpu.copy_gmem_to_smem(dout.at[batch, rows, head], smem.dout.at[stage], full)
        plgpu.copy_gmem_to_smem(lse.at[batch, head, rows], smem.lse.at[stage], full)
        plgpu.copy_gmem_to_smem(dlse.at[batch, head, rows], smem.dlse.at[stage], full)

    def step(i: Array, stage: Array) -> None:
        batch, head, rows = position(i)
        plgpu.copy_smem_to_gmem(smem.zeros, dq.at[batch, rows, head])
        plgpu.barrier_wait(smem.full.at[stage])
        matrices = (plgpu.load(x.at[stage], layout=MATRIX) for x in (smem.out, smem.dout))
        vectors = (plgpu.load(x.at[stage], layout=PER_ROW) for x in (smem.lse, smem.dlse))
        lse, delta = _row_operands(*matrices, *vectors)
        lse_out.at[batch, head, rows][...] = lse
        delta_out.at[batch, head, rows][...] = delta
        plgpu.commit_smem()

    def write_zeros() -> None:
        smem.zeros[...] = plgpu.layout_cast(jnp.zeros(smem.zeros.shape, jnp.float32), MATRIX)
        plgpu.commit_smem()

    blocks.walk(load, step, stages=_STAGES, prepare=write_zeros)
    plgpu.wait_smem_to_gmem(0)


@launcher("padded_length", "sm_count", "interpret")
def row_operands(
    out: Array,
    dout: Array,
    lse: Array,
    dlse: Array,
    *,
    padded_length: int,
    sm_count: int,
    interpret: bool = False,
) -> tuple[Array, Array, Array]:
    """Runs the kernel.

    Args:
      out: the forward's output, `[B, T, N, H]`; T may be rounded up to `GMEM_ROWS`.
      dout: gradient of out, like it.
      lse: log-sum-exp, `[B, N, padded_length]`, float32; -inf for queries that see no key, and
        beyond the end.
      dlse: gradient of lse, like it; 0 beyond the end.
      padded_length: T rounded up to a multiple of 64.
      sm_count: streaming multiprocessors of the device.
      interpret: run in the CPU interpreter.

    Returns:
      lse in base 2 and delta as `sm90_bwd_bf16.launch` takes them, like lse; zeros
      `[B, padded_length, N, H]`, float32.
    """
    batch, _, heads, head_dim = out.shape
    shape = (batch, padded_length, heads, head_dim)
    plan = Plan(shape=shape, dtype=out.dtype, sm_count=sm_count, interpret=interpret)
    return plgpu.kernel(
        functools.partial(_kernel, plan=plan),
        out_type=(
            jax.ShapeDtypeStruct(lse.shape, jnp.float32),
            jax.ShapeDtypeStruct(lse.shape, jnp.float32),
            jax.ShapeDtypeStruct(shape, jnp.float32),
        ),
        scratch_types=_smem_types(plan)._asdict(),
        grid=(plan.blocks.num_ctas,),
        grid_names=("cta",),
        kernel_name="flash_attention_bwd_rows",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
    )(out, dout, lse, dlse)

"""The end of FP8 attention's dQ on sm_90a: read in float32 once, and written once.

For each row i of a head of x `[B, L, heads, H]`:   y_i = round16(x_i factor_i) M,   in 16 bits
with the product on the tensor cores, accumulated in float32.

A persistent CTA of one warpgroup walks through blocks of 64 rows (`sm90_head_blocks`), two CTAs
share an SM and fill its shared memory: factors are read from global memory, before the wait for
their block.

  step                                           ordered by
  load of block i into its stage                 TMA -> `full`, one barrier per stage
  y = (stage * factor) M                         `full`; `setup` before the first, for M
  staging buffer <- y                            the TMA store of block i - 1 has read it
  TMA store; load of block i + 2                 commit_smem: a fence and a barrier of the warpgroup

Not supported: head dims other than 64 and 128 (two stages of 256 channels leave room for one CTA).
"""

# Shapes: B batch, L length, H head dim.

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash_attention.sm90_head_blocks import HeadBlocks
from pallas_kernels.mosaic import MATRIX, PER_ROW, ROWS, launcher, smem_tile

_STAGES = 2
_CTAS_PER_SM = 2


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Everything static about one launch."""

    shape: tuple[int, ...]
    """Of x: B, L, heads, H; L a multiple of 64."""
    dtype: Any
    """Of y: 16 bits."""
    sm_count: int
    """Streaming multiprocessors of the device."""
    interpret: bool = False
    """Run in the CPU interpreter, which takes no A operand in registers."""

    @property
    def blocks(self) -> HeadBlocks:
        """Blocks of ROWS rows; all CTAs run at once."""
        batch, length, heads, _ = self.shape
        return HeadBlocks(
            batch_size=batch,
            num_heads=heads,
            blocks_per_head=length // ROWS,
            max_ctas=_CTAS_PER_SM * self.sm_count,
        )


class _Smem(NamedTuple):
    """Shared memory and barriers."""

    x: Any  # [stages, ROWS, H], float32
    matrix: Any  # [H, H]
    y: Any  # [ROWS, H]
    operand: Any  # [ROWS, H], interpreter only
    full: Any  # TMA -> this warpgroup, one per stage: x
    setup: Any  # TMA -> this warpgroup: M


def _smem_types(plan: Plan) -> _Smem:
    """The shared-memory plan."""
    h = plan.shape[3]
    return _Smem(
        x=smem_tile((_STAGES, ROWS, h), jnp.float32),
        matrix=smem_tile((h, h), plan.dtype),
        y=smem_tile((ROWS, h), plan.dtype),
        operand=smem_tile((ROWS, h), plan.dtype) if plan.interpret else None,
        full=plgpu.Barrier(num_barriers=_STAGES),
        setup=plgpu.Barrier(),
    )


def scaled_product(x: Array, factor: Array, matrix: Any, operand: Any) -> Array:
    """(x * factor) M of one warpgroup, float32 [ROWS, H].

    Args:
      x: float32 [ROWS, H] in registers, layout MATRIX.
      factor: float32 [ROWS], layout PER_ROW.
      matrix: M, shared memory [H, H]; its dtype is that of the product's operands.
      operand: None; shared memory in the interpreter, which takes no A operand in registers.
    """
    left: Any = (x * lax.broadcast_in_dim(factor, x.shape, [0])).astype(matrix.dtype)
    if operand is not None:
        operand[...] = left
        plgpu.commit_smem()
        left = operand

    def product(acc: Any) -> Array:
        plgpu.wgmma(acc, left, matrix)
        return acc[...]

    return pl.run_scoped(product, plgpu.ACC((ROWS, x.shape[1]), jnp.float32))


def _kernel(*refs: Any, plan: Plan, **smem_refs: Any) -> None:
    """Walks through the CTA's blocks."""
    x_gmem, factor_gmem, matrix, y_gmem = refs
    smem = _Smem(**{name: smem_refs.get(name) for name in _Smem._fields})
    blocks = plan.blocks

    def load(i: Array, stage: Any) -> None:
        batch, head, block = blocks.position(i)
        rows, full = pl.ds(block * ROWS, ROWS), smem.full.at[stage]
        plgpu.copy_gmem_to_smem(x_gmem.at[batch, rows, head], smem.x.at[stage], full)

    def scaled_and_rotated(i: Array, stage: Array) -> Array:
        batch, head, block = blocks.position(i)
        factor = factor_gmem.at[batch, head, pl.ds(block * ROWS, ROWS)]
        factor = plgpu.load(factor, layout=PER_ROW, optimized=False)
        plgpu.barrier_wait(smem.full.at[stage])
        x = plgpu.load(smem.x.at[stage], layout=MATRIX)
        return scaled_product(x, factor, smem.matrix, smem.operand)

    def step(i: Array, stage: Array) -> None:
        y = scaled_and_rotated(i, stage).astype(plan.dtype)
        # The store of the block before has read the staging buffer.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        smem.y[...] = y
        plgpu.commit_smem()
        batch, head, block = blocks.position(i)
        plgpu.copy_smem_to_gmem(smem.y, y_gmem.at[batch, pl.ds(block * ROWS, ROWS), head])

    plgpu.copy_gmem_to_smem(matrix, smem.matrix, smem.setup)
    blocks.walk(
        load, step, stages=_STAGES, prepare=functools.partial(plgpu.barrier_wait, smem.setup)
    )
    plgpu.wait_smem_to_gmem(0)


@launcher("dtype", "sm_count", "interpret")
def scale_and_rotate(
    x: Array, factor: Array, matrix: Array, *, dtype: Any, sm_count: int, interpret: bool = False
) -> Array:
    """Runs the kernel.

    Args:
      x: `[B, L, heads, H]`, float32; L a multiple of 64.
      factor: `[B, heads, L]`, float32.
      matrix: M, `[H, H]`, in dtype.
      dtype: of the result: bfloat16 or float16.
      sm_count: streaming multiprocessors of the device.
      interpret: run in the CPU interpreter.

    Returns:
      y, like x in dtype.
    """
    plan = Plan(shape=x.shape, dtype=jnp.dtype(dtype), sm_count=sm_count, interpret=interpret)
    scratch = {k: v for k, v in _smem_types(plan)._asdict().items() if v is not None}
    return plgpu.kernel(
        functools.partial(_kernel, plan=plan),
        out_type=jax.ShapeDtypeStruct(x.shape, plan.dtype),
        scratch_types=scratch,
        grid=(plan.blocks.num_ctas,),
        grid_names=("cta",),
        kernel_name="fp8_scale_and_rotate",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
    )(x, factor, matrix)

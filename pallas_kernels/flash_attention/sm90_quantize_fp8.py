"""Quantisation of q, k and v for FP8 attention on sm_90a: each is read once.

For each block of 128 rows x `[128, H]` of a head, with M, m and s of `fp8`:
  y = x M - m   (M and m are optional; the product on the tensor cores, in float32)
  s = the power of two with max |y| / s just below 448,   rows = round8(y / s)
and optionally columns = rows^T in the order of `fp8.permute_16` and the largest |y_i|^2, or the
products y_i . key with a vector for each head.

A persistent CTA of one warpgroup walks through blocks (`sm90_head_blocks`). Registers are for two
CTAs on an SM; at 128 channels M leaves shared memory for one only:

  step                                           ordered by
  load of block i into its stage                 TMA -> `full`, one barrier per stage
  y = stage M; maximum, scale                    `full`; `setup` before the first, for M
  staging buffers <- y / s                       the TMA stores of block i - 1 have read them
  TMA stores; load of block i + 2                commit_smem: a fence and a barrier of the warpgroup

A block lies in registers as two halves of 64 rows: even and odd rows if columns are wanted, because
a pair of rows makes the 16-bit units that are transposed (`sm90_columns_fp8`).

Not supported: head dims other than 64 and 128 (the scale of 256 channels is not one warpgroup's).
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

from pallas_kernels.flash_attention import fp8
from pallas_kernels.flash_attention.sm90_columns_fp8 import (
    TILE_ROWS,
    columns_type,
    round_saturating,
    send_columns,
    store_columns,
)
from pallas_kernels.flash_attention.sm90_head_blocks import HeadBlocks
from pallas_kernels.mosaic import MATRIX, PER_COLUMN, PER_ROW, ROWS, launcher, smem_tile
from pallas_kernels.numerics import E4M3_MAX
from pallas_kernels.quantize.sm90_tiles import row_amax

HEAD_DIMS = (64, 128)
_STAGES = 2
_CTAS_PER_SM = 2


class Part(NamedTuple):
    """Some heads of a tensor: of each `group` of heads `count`, from `first` on."""

    group: int
    first: int
    count: int

    def source(self, head: Array) -> Array:
        """Which head of the tensor is the part's head `head`."""
        if self == WHOLE:
            return head
        count = jnp.int32(self.count)
        return lax.div(head, count) * self.group + self.first + lax.rem(head, count)


WHOLE = Part(group=1, first=0, count=1)
"""All heads of a tensor."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Everything static about one launch."""

    shape: tuple[int, ...]
    """Of the result: B, L, heads, H; L a multiple of 16."""
    part: Part
    """Which of the heads of x these are."""
    dtype: Any
    """Of x: 16 bits."""
    rotates: bool
    """Whether there is M."""
    centers: bool
    """Whether there is m."""
    writes_columns: bool
    """Whether columns and norms are wanted too."""
    multiplies: bool
    """Whether there is a key."""
    sm_count: int
    """Streaming multiprocessors of the device."""
    interpret: bool = False
    """Run in the CPU interpreter."""

    @property
    def num_blocks(self) -> int:
        """Blocks along L; the last may reach beyond it."""
        return pl.cdiv(self.shape[1], TILE_ROWS)

    @property
    def tiles(self) -> HeadBlocks:
        """Blocks of all heads; all CTAs run at once."""
        return HeadBlocks(
            batch_size=self.shape[0],
            num_heads=self.shape[2],
            blocks_per_head=self.num_blocks,
            max_ctas=_CTAS_PER_SM * self.sm_count,
        )


class Quantized(NamedTuple):
    """What the kernel makes of x, `[B, L, heads, H]`."""

    rows: Array  # [B, L, heads, H], E4M3
    scale: Array  # [B, heads, blocks], float32
    columns: Array | None  # [B, heads, H, L rounded up to 128], E4M3, zero beyond L
    norm: Array | None  # [B, heads], float32: largest Euclidean length of a row of x
    products: Array | None  # [B, heads, L], float32: y . key


class _Smem(NamedTuple):
    """Shared memory and barriers."""

    x: Any  # [stages, 2, ROWS, H]
    rows: Any  # [2, ROWS, H], E4M3
    full: Any  # TMA -> this warpgroup, one per stage: x
    setup: Any  # TMA -> this warpgroup: M; or None
    matrix: Any  # [H, H], or None
    mean: Any  # [stages, H], float32, or None
    columns: Any  # `columns_type`, or None
    key: Any  # [stages, H], float32, or None


def _smem_types(plan: Plan) -> _Smem:
    """The shared-memory plan."""
    h = plan.shape[3]
    columns = None
    if plan.writes_columns:
        columns = columns_type(h, fp8.E4M3, 16, interpret=plan.interpret)
    return _Smem(
        x=smem_tile((_STAGES, 2, ROWS, h), plan.dtype),
        rows=smem_tile((2, ROWS, h), fp8.E4M3),
        full=plgpu.Barrier(num_arrivals=2 + plan.centers + plan.multiplies, num_barriers=_STAGES),
        setup=plgpu.Barrier() if plan.rotates else None,
        matrix=smem_tile((h, h), plan.dtype) if plan.rotates else None,
        mean=plgpu.SMEM((_STAGES, h), jnp.float32) if plan.centers else None,
        columns=columns,
        key=plgpu.SMEM((_STAGES, h), jnp.float32) if plan.multiplies else None,
    )


class _Kernel(NamedTuple):
    """What the steps share."""

    plan: Plan
    x: Any
    matrix: Any
    mean: Any
    rows: Any
    amax: Any
    columns: Any
    norm: Any
    key: Any
    products: Any
    smem: _Smem

    def half(self, ref: Any, i: Array, a: int) -> Any:
        """64 rows of a block in `[B, L / 2, 2, heads, H]`, or in `[B, L, heads, H]`."""
        batch, head, block = self.plan.tiles.position(i)
        head = self.plan.part.source(head) if ref is self.x else head
        if self.plan.writes_columns:
            return ref.at[batch, pl.ds(block * ROWS, ROWS), a, head]
        return ref.at[batch, pl.ds(block * TILE_ROWS + a * ROWS, ROWS), head]

    def load(self, i: Array, stage: Any) -> None:
        """Starts the TMA loads of a block."""
        full = self.smem.full.at[stage]
        for a in (0, 1):
            plgpu.copy_gmem_to_smem(self.half(self.x, i, a), self.smem.x.at[stage, a], full)
        batch, head, _ = self.plan.tiles.position(i)
        for source, target in ((self.mean, self.smem.mean), (self.key, self.smem.key)):
            if source is not None:
                plgpu.copy_gmem_to_smem(source.at[batch, head], target.at[stage], full)

    def half_values(self, x: Any, stage: Array) -> Array:
        """y of half a block, `[ROWS, H]`, float32."""

        def product(acc: Any) -> Array:
            plgpu.wgmma(acc, x, self.smem.matrix)
            return acc[...]

        if self.plan.rotates:
            y = pl.run_scoped(product, plgpu.ACC((ROWS, self.plan.shape[3]), jnp.float32))
        else:
            y = plgpu.load(x, layout=MATRIX).astype(jnp.float32)
        if self.plan.centers:
            mean = plgpu.load(self.smem.mean.at[stage], layout=PER_COLUMN)
            y -= lax.broadcast_in_dim(mean, y.shape, [1])
        return y

    def multiply(self, i: Array, stage: Array, halves: tuple[Array, Array]) -> None:
        """Writes the products with the key."""
        batch, head, block = self.plan.tiles.position(i)
        key = plgpu.load(self.smem.key.at[stage], layout=PER_COLUMN)
        for a, y in enumerate(halves):
            rows = pl.ds(block * TILE_ROWS + a * ROWS, ROWS)
            products = jnp.sum(y * lax.broadcast_in_dim(key, y.shape, [1]), axis=1)
            self.products.at[batch, head, rows][...] = products

    def store(self, i: Array, halves: tuple[Array, Array]) -> None:
        """Rounds a block and starts its TMA stores."""
        plan, smem = self.plan, self.smem
        batch, head, block = self.plan.tiles.position(i)
        largest = [row_amax(y, interpret=plan.interpret) for y in halves]
        amax = jnp.max(jnp.maximum(*largest))
        self.amax[batch, head, block] = amax
        inverse = inverse_scale(plgpu.layout_cast(jnp.full((ROWS,), amax), PER_ROW))
        if plan.writes_columns:
            squares = [jnp.sum(y * y, axis=1) for y in halves]
            self.norm[batch, head, block] = jnp.max(jnp.maximum(*squares))
        inverse = lax.broadcast_in_dim(inverse, halves[0].shape, [0])
        halves = halves[0] * inverse, halves[1] * inverse
        # The stores of the block before have read the staging buffers.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for a, y in enumerate(halves):
            smem.rows.at[a][...] = round_saturating(y, fp8.E4M3, interpret=plan.interpret)
        if plan.writes_columns:
            store_columns(halves, smem.columns, fp8.E4M3, 16, interpret=plan.interpret)
        plgpu.commit_smem()
        for a in (0, 1):
            plgpu.copy_smem_to_gmem(smem.rows.at[a], self.half(self.rows, i, a))
        if plan.writes_columns:
            target = self.columns.at[batch, head]
            send_columns(smem.columns, target, block, 16, interpret=plan.interpret)


def inverse_scale(amax: Array) -> Array:
    """1 / `fp8.scale_of(amax, E4M3_MAX, fp8.MIN_SCALE)`, float32, by the same bits."""
    bits = lax.bitcast_convert_type(amax, jnp.int32) + fp8.SCALE_CARRY
    exponent = lax.shift_right_logical(bits, 23) - fp8.E4M3_EXPONENT
    exponent = jnp.maximum(exponent, fp8.MIN_SCALE_EXPONENT + 127)
    inverse = lax.bitcast_convert_type(lax.shift_left(254 - exponent, 23), jnp.float32)
    return jnp.where(amax < jnp.inf, inverse, jnp.nan)


def _kernel(*refs: Any, plan: Plan, **smem_refs: Any) -> None:
    """Walks through the CTA's blocks."""
    queue = list(refs)
    x = queue.pop(0)
    matrix = queue.pop(0) if plan.rotates else None
    mean = queue.pop(0) if plan.centers else None
    key = queue.pop(0) if plan.multiplies else None
    rows, amax = queue[:2]
    columns, norm = queue[2:4] if plan.writes_columns else (None, None)
    products = queue[-1] if plan.multiplies else None
    smem = _Smem(**{name: smem_refs.get(name) for name in _Smem._fields})
    kernel = _Kernel(plan, x, matrix, mean, rows, amax, columns, norm, key, products, smem)
    if matrix is not None:
        plgpu.copy_gmem_to_smem(matrix, smem.matrix, smem.setup)

    def step(i: Array, stage: Array) -> None:
        plgpu.barrier_wait(smem.full.at[stage])
        x = smem.x.at[stage]
        halves = kernel.half_values(x.at[0], stage), kernel.half_values(x.at[1], stage)
        if plan.multiplies:
            kernel.multiply(i, stage, halves)
        kernel.store(i, halves)

    def wait_for_matrix() -> None:
        if plan.rotates:
            plgpu.barrier_wait(smem.setup)

    plan.tiles.walk(kernel.load, step, stages=_STAGES, prepare=wait_for_matrix)
    plgpu.wait_smem_to_gmem(0)


@launcher("writes_columns", "part", "sm_count", "interpret")
def quantize(
    x: Array,
    matrix: Array | None,
    mean: Array | None,
    key: Array | None = None,
    *,
    writes_columns: bool,
    sm_count: int,
    part: Part = WHOLE,
    interpret: bool = False,
) -> Quantized:
    """Runs the kernel.

    Args:
      x: `[B, L, heads, H]`, bfloat16 or float16; or with more heads, see `part`.
      matrix: M, `[H, H]`, like x; or None for no rotation.
      mean: m M, or m without a rotation, `[B, heads, H]`, float32; or None for 0. The last block's
        scale takes rows beyond L for -m.
      key: `[B, heads, H]`, float32, to be multiplied with y; or None, as it must be with columns.
      writes_columns: whether columns and norms are wanted.
      sm_count: streaming multiprocessors of the device.
      part: the heads of x to take, `heads` in all that follows x; the others are not read.
      interpret: run in the CPU interpreter.

    Returns:
      The results; columns, norm and products are None unless asked for.
    """
    assert key is None or not writes_columns, "rows are in order only without columns"
    batch, length, all_heads, h = x.shape
    padding = -length % 16  # whole groups of the permutation
    x = jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) if padding else x
    heads = all_heads // part.group * part.count
    plan = Plan(
        shape=(batch, x.shape[1], heads, h),
        part=part,
        dtype=x.dtype,
        rotates=matrix is not None,
        centers=mean is not None,
        writes_columns=writes_columns,
        multiplies=key is not None,
        sm_count=sm_count,
        interpret=interpret,
    )
    rows = (x.shape[1] // 2, 2) if writes_columns else (x.shape[1],)
    per_block = jax.ShapeDtypeStruct((batch, heads, plan.num_blocks), jnp.float32)
    out_type = [jax.ShapeDtypeStruct((batch, *rows, heads, h), fp8.E4M3), per_block]
    if writes_columns:
        columns = (batch, heads, h, plan.num_blocks * TILE_ROWS)
        out_type += [jax.ShapeDtypeStruct(columns, fp8.E4M3), per_block]
    if key is not None:
        rows_type = (batch, heads, plan.num_blocks * TILE_ROWS)
        out_type.append(jax.ShapeDtypeStruct(rows_type, jnp.float32))
    quantized, amax, *others = plgpu.kernel(
        functools.partial(_kernel, plan=plan),
        out_type=tuple(out_type),
        scratch_types={k: v for k, v in _smem_types(plan)._asdict().items() if v is not None},
        grid=(plan.tiles.num_ctas,),
        grid_names=("cta",),
        kernel_name="fp8_quantize_blocks",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
    )(x.reshape(batch, *rows, all_heads, h), *(a for a in (matrix, mean, key) if a is not None))
    products = None if key is None else others.pop()[:, :, :length]
    columns, norm = others or (None, None)
    norm = None if norm is None else jnp.sqrt(norm.max(axis=2))
    scale = fp8.scale_of(amax, E4M3_MAX, fp8.MIN_SCALE)
    quantized = quantized.reshape(plan.shape)[:, :length]
    return Quantized(quantized, scale, columns, norm, products)

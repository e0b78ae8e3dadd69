"""Rotary positions and quantisation of q or k for FP8 attention on sm_90a: read once, written once.

For each head of a part of x `[B, L, all heads, H]`, a fused QKV projection, with its halves (a, b):
  z = round16(a cos - b sin, b cos + a sin)      as `fused.rope.rotate` has it
  y = z M - m                                    M, m optional; on the tensor cores, in float32
  s = the power of two with max |y| / s just below 448 over 128 rows,   rows = round8(y / s)
and optionally the products y_i . key: what `sm90_quantize_fp8` makes of z, bit for bit, without a
z in global memory. v, which is not rotated, is for that kernel.

A CTA is two warpgroups, each of 64 of the 128 rows that share a scale, and takes several heads of
these rows: cosines and sines stay in registers, which 128 rows would not leave to one warpgroup.
M is [[A, A], [C, -C]] (Sylvester): with p = a' A and q = b' C, for the halves (a', b') of z, y is
(p + q, p - q), half the work of a product with M.

  prologue                                       ordered by
  loads of the first heads; of M by warpgroup 0  TMA
  registers <- cosines and sines                 plain loads
  step, for a head                               ordered by
  registers <- stage; z; y = z M                 `full`, one per warpgroup and stage; `setup`: M
  row_max <- maxima of this warpgroup's rows     commit_smem, then `met`: both have written them
  staging buffer <- y / s                        the TMA store of two heads before has read it
  TMA store; load of the head `stages` later     commit_smem: a fence and a barrier of the warpgroup

The maxima of a step go to another buffer than those of the step before, which the other warpgroup
may still read. They are read back as if they belonged to columns: so each thread quad holds all of
them, and none crosses warps, for which Mosaic GPU has one buffer for both warpgroups.

Not supported: head dims other than 64 and 128, L not a multiple of 16.
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
from pallas_kernels.flash_attention.sm90_columns_fp8 import TILE_ROWS, round_saturating
from pallas_kernels.flash_attention.sm90_quantize_fp8 import Part, Quantized, inverse_scale
from pallas_kernels.mosaic import (
    MATRIX,
    PER_COLUMN,
    PER_ROW,
    ROWS,
    launcher,
    scratch_bytes,
    smem_tile,
)
from pallas_kernels.numerics import E4M3_MAX
from pallas_kernels.quantize.sm90_tiles import row_amax

_WARPGROUPS = 2
_STAGES = 4
_SLOTS = 2


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
    multiplies: bool
    """Whether there is a key."""
    sm_count: int
    """Streaming multiprocessors of the device; each has one CTA at a time."""
    interpret: bool = False
    """Run in the CPU interpreter, which takes no A operand in registers."""

    @property
    def num_blocks(self) -> int:
        """Blocks along L; the last may reach beyond it."""
        return pl.cdiv(self.shape[1], TILE_ROWS)

    @property
    def heads_per_cta(self) -> int:
        """Heads that a CTA takes of its rows."""
        blocks = self.shape[0] * self.num_blocks
        return heads_per_cta(self.shape[2], blocks, self.sm_count)


def heads_per_cta(heads: int, blocks: int, concurrent: int) -> int:
    """The divisor of `heads` with which CTAs, `concurrent` at a time, are done first.

    A CTA takes that many steps, and as long as one more to begin with.
    """

    def steps(count: int) -> int:
        return pl.cdiv(blocks * (heads // count), concurrent) * (count + 1)

    return min((n for n in range(1, heads + 1) if heads % n == 0), key=steps)


class _Smem(NamedTuple):
    """Shared memory and barriers; "wgs" is one for each warpgroup."""

    x: Any  # [wgs, stages, ROWS, H]
    matrix: Any  # [2, H / 2, H / 2]: A and C; or None
    rows: Any  # [wgs, slots, ROWS, H], E4M3
    row_max: Any  # [2, wgs, ROWS], float32
    mean: Any  # [wgs, stages, H], float32, or None
    key: Any  # [wgs, stages, H], float32, or None
    operand: Any  # [wgs, 2, ROWS, H / 2], interpreter only
    full: Any  # TMA -> a warpgroup, wgs * stages: x, mean and key
    setup: Any  # TMA -> both warpgroups: A and C; or None
    met: Any  # each warpgroup -> both: row_max


def _smem_types(plan: Plan) -> _Smem:
    """The shared-memory plan: the single source of its allocation and of `smem_bytes`."""
    h = plan.shape[3]
    vectors = plgpu.SMEM((_WARPGROUPS, _STAGES, h), jnp.float32)
    operand = smem_tile((_WARPGROUPS, 2, ROWS, h // 2), plan.dtype)
    return _Smem(
        x=smem_tile((_WARPGROUPS, _STAGES, ROWS, h), plan.dtype),
        matrix=smem_tile((2, h // 2, h // 2), plan.dtype) if plan.rotates else None,
        rows=smem_tile((_WARPGROUPS, _SLOTS, ROWS, h), fp8.E4M3),
        row_max=plgpu.SMEM((2, _WARPGROUPS, ROWS), jnp.float32),
        mean=vectors if plan.centers else None,
        key=vectors if plan.multiplies else None,
        operand=operand if plan.interpret else None,
        full=plgpu.Barrier(
            num_arrivals=1 + plan.centers + plan.multiplies, num_barriers=_WARPGROUPS * _STAGES
        ),
        setup=plgpu.Barrier() if plan.rotates else None,
        met=plgpu.Barrier(num_arrivals=_WARPGROUPS),
    )


def smem_bytes(plan: Plan) -> int:
    """Shared memory of one CTA."""
    return scratch_bytes(_smem_types(plan))


class _Kernel(NamedTuple):
    """What the steps of one warpgroup share."""

    plan: Plan
    x: Any
    mean: Any
    key: Any
    rows: Any
    amax: Any
    products: Any
    smem: _Smem

    @property
    def first_row(self) -> Array:
        """This warpgroup's first row."""
        return lax.axis_index("block") * TILE_ROWS + lax.axis_index("wg") * ROWS

    def head(self, i: Any) -> Array:
        """The CTA's i-th head. CTAs side by side take heads side by side in memory."""
        return lax.axis_index("heads") + i * (self.plan.shape[2] // self.plan.heads_per_cta)

    def load(self, i: Any, stage: Any) -> None:
        """Starts the TMA loads of this warpgroup's rows of the i-th head."""
        wg, batch, head = lax.axis_index("wg"), lax.axis_index("batch"), self.head(i)
        full = self.smem.full.at[wg * _STAGES + stage]
        rows = self.x.at[batch, pl.ds(self.first_row, ROWS), self.plan.part.source(head)]
        plgpu.copy_gmem_to_smem(rows, self.smem.x.at[wg, stage], full)
        for source, target in ((self.mean, self.smem.mean), (self.key, self.smem.key)):
            if source is not None:
                plgpu.copy_gmem_to_smem(source.at[batch, head], target.at[wg, stage], full)

    def values(self, stage: Array, cos: Array, sin: Array) -> Array:
        """y of this warpgroup's rows, `[ROWS, H]`, float32."""
        plan, smem, wg = self.plan, self.smem, lax.axis_index("wg")
        x = plgpu.load(smem.x.at[wg, stage], layout=MATRIX)
        half = plan.shape[3] // 2
        a, b = x[:, :half].astype(jnp.float32), x[:, half:].astype(jnp.float32)
        z = [part.astype(plan.dtype) for part in (a * cos - b * sin, b * cos + a * sin)]
        if plan.rotates:
            p, q = self.hadamard_halves(z)
            y = jnp.concatenate((p + q, p - q), axis=1)
        else:
            y = jnp.concatenate(z, axis=1).astype(jnp.float32)
        if plan.centers:
            mean = plgpu.load(smem.mean.at[wg, stage], layout=PER_COLUMN)
            y -= lax.broadcast_in_dim(mean, y.shape, [1])
        return y

    def hadamard_halves(self, z: list[Any]) -> tuple[Array, Array]:
        """p = a' A and q = b' C, `[ROWS, H / 2]`, float32."""
        if self.plan.interpret:
            operands = self.smem.operand.at[lax.axis_index("wg")]
            for part in (0, 1):
                operands.at[part][...] = z[part]
            plgpu.commit_smem()
            z = [operands.at[part] for part in (0, 1)]

        def multiply(*accs: Any) -> tuple[Array, Array]:
            for part, acc in enumerate(accs):
                plgpu.wgmma(acc, z[part], self.smem.matrix.at[part])
            p, q = (acc[...] for acc in accs)
            return p, q

        acc = plgpu.ACC((ROWS, self.plan.shape[3] // 2), jnp.float32)
        return pl.run_scoped(multiply, acc, acc)

    def multiply(self, i: Array, stage: Array, y: Array) -> None:
        """Writes the products with the key."""
        key = plgpu.load(self.smem.key.at[lax.axis_index("wg"), stage], layout=PER_COLUMN)
        products = jnp.sum(y * lax.broadcast_in_dim(key, y.shape, [1]), axis=1)
        batch, head = lax.axis_index("batch"), self.head(i)
        self.products.at[batch, head, pl.ds(self.first_row, ROWS)][...] = products

    def block_amax(self, i: Array, y: Array) -> Array:
        """The largest |y| of both warpgroups' rows."""
        row_max, wg = self.smem.row_max.at[lax.rem(i, jnp.int32(2))], lax.axis_index("wg")
        row_max.at[wg][...] = row_amax(y, interpret=self.plan.interpret)
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.smem.met)
        plgpu.barrier_wait(self.smem.met)
        both = [plgpu.load(row_max.at[other], layout=PER_COLUMN) for other in range(_WARPGROUPS)]
        return jnp.max(functools.reduce(jnp.maximum, both))

    def store(self, i: Array, y: Array, amax: Array) -> None:
        """Rounds and starts the TMA store."""
        wg, slot = lax.axis_index("wg"), lax.rem(i, jnp.int32(_SLOTS))
        batch, head = lax.axis_index("batch"), self.head(i)

        @pl.when(wg == 0)
        def _() -> None:
            self.amax[batch, head, lax.axis_index("block")] = amax

        inverse = inverse_scale(plgpu.layout_cast(jnp.full((ROWS,), amax), PER_ROW))
        y *= lax.broadcast_in_dim(inverse, y.shape, [0])
        plgpu.wait_smem_to_gmem(_SLOTS - 1, wait_read_only=True)
        staged = self.smem.rows.at[wg, slot]
        staged[...] = round_saturating(y, fp8.E4M3, interpret=self.plan.interpret)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(staged, self.rows.at[batch, pl.ds(self.first_row, ROWS), head])


def _kernel(*refs: Any, plan: Plan, **smem_refs: Any) -> None:
    """One warpgroup's rows of the CTA's heads."""
    queue = list(refs)
    x, cos_gmem, sin_gmem = (queue.pop(0) for _ in range(3))
    matrix = queue.pop(0) if plan.rotates else None
    mean = queue.pop(0) if plan.centers else None
    key = queue.pop(0) if plan.multiplies else None
    rows, amax, products = (*queue, None)[:3]
    smem = _Smem(**{name: smem_refs.get(name) for name in _Smem._fields})
    kernel = _Kernel(plan, x, mean, key, rows, amax, products, smem)
    count = plan.heads_per_cta
    for i in range(min(_STAGES, count)):
        kernel.load(i, i)

    if matrix is not None:

        @pl.when(lax.axis_index("wg") == 0)
        def _() -> None:
            plgpu.copy_gmem_to_smem(matrix, smem.matrix, smem.setup)

    own = lax.axis_index("batch"), pl.ds(kernel.first_row, ROWS)
    cos, sin = (
        plgpu.load(angle.at[own], layout=MATRIX, optimized=False) for angle in (cos_gmem, sin_gmem)
    )
    if plan.rotates:
        plgpu.barrier_wait(smem.setup)

    def step(i: Array, _: None) -> None:
        stage = lax.rem(i, jnp.int32(_STAGES))
        plgpu.barrier_wait(smem.full.at[lax.axis_index("wg") * _STAGES + stage])
        y = kernel.values(stage, cos, sin)
        if plan.multiplies:
            kernel.multiply(i, stage, y)
        kernel.store(i, y, kernel.block_amax(i, y))
        pl.when(i + _STAGES < count)(lambda: kernel.load(i + _STAGES, stage))

    lax.fori_loop(0, count, step, None)
    plgpu.wait_smem_to_gmem(0)


@launcher("part", "sm_count", "interpret")
def rope_quantize(
    x: Array,
    cos: Array,
    sin: Array,
    matrix: Array | None,
    mean: Array | None,
    key: Array | None = None,
    *,
    part: Part,
    sm_count: int,
    interpret: bool = False,
) -> Quantized:
    """Runs the kernel.

    Args:
      x: `[B, L, all heads, H]`, bfloat16 or float16; L a multiple of 16.
      cos: float32 `[B, L, H / 2]`.
      sin: like cos.
      matrix: M, `[H, H]`, like x, of the form [[A, A], [C, -C]] as `fp8.rotation` has it; or None
        for no Hadamard rotation.
      mean: m M, or m without a rotation, `[B, heads, H]`, float32; or None for 0. The last block's
        scale takes rows beyond L for -m.
      key: `[B, heads, H]`, float32, to be multiplied with y; or None.
      part: the heads of x to take, `heads` of the arguments and results.
      sm_count: streaming multiprocessors of the device.
      interpret: run in the CPU interpreter.

    Returns:
      The results, without columns and norm; products are None without a key.
    """
    batch, length, all_heads, h = x.shape
    heads = all_heads // part.group * part.count
    plan = Plan(
        shape=(batch, length, heads, h),
        part=part,
        dtype=x.dtype,
        rotates=matrix is not None,
        centers=mean is not None,
        multiplies=key is not None,
        sm_count=sm_count,
        interpret=interpret,
    )
    padded = plan.num_blocks * TILE_ROWS
    if padded != length:  # TMA keeps within an array, the loads of angles do not
        cos, sin = (jnp.pad(a, ((0, 0), (0, padded - length), (0, 0))) for a in (cos, sin))
    quarters = None if matrix is None else matrix[:, : h // 2].reshape(2, h // 2, h // 2)
    out_type = [
        jax.ShapeDtypeStruct(plan.shape, fp8.E4M3),
        jax.ShapeDtypeStruct((batch, heads, plan.num_blocks), jnp.float32),
    ]
    if key is not None:
        out_type.append(jax.ShapeDtypeStruct((batch, heads, padded), jnp.float32))
    rows, amax, *others = plgpu.kernel(
        functools.partial(_kernel, plan=plan),
        out_type=tuple(out_type),
        scratch_types={k: v for k, v in _smem_types(plan)._asdict().items() if v is not None},
        # The last axis is the fastest.
        grid=(batch, plan.num_blocks, heads // plan.heads_per_cta),
        grid_names=("batch", "block", "heads"),
        num_threads=_WARPGROUPS,
        thread_name="wg",
        kernel_name="fp8_rope_quantize",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
    )(x, cos, sin, *(a for a in (quarters, mean, key) if a is not None))
    products = others[0][:, :, :length] if others else None
    scale = fp8.scale_of(amax, E4M3_MAX, fp8.MIN_SCALE)
    return Quantized(rows, scale, None, None, products)

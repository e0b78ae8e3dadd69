"""The tile loop of the 8-bit kernels for sm_90a: quantise, transpose and amax in one pass.

For each tile of 128 rows x C columns, with values v = f(inputs) in float32:
  q = round8(v / scale),   q_t = q^T,   amax = max |v|,   and optionally v itself in 16 bits.

No element crosses registers. TMA reads x [M, K] as [M / 2, 2, K] and so lands the even and the odd
rows of a tile in two buffers E and O of [64, C]. Both are read in the layout of a wgmma
accumulator: a thread holds rows 2i and 2i + 1 of the same columns. q leaves through a buffer for E
and one for O. For q_t the pair (q[2i, c], q[2i + 1, c]) is one 16-bit unit, and the [64, C] units
are stored transposed by stmatrix: byte 2i + a of row c is row 2i + a of the tile, as q_t wants it.

Every warpgroup of a persistent CTA walks through tiles of its own:

  step                                        ordered by
  load inputs of a tile into its stage        TMA -> `full` (one barrier per warpgroup and stage)
  registers <- stage; compute; amax           `full`
  staging buffers <- registers                the TMA store of the slot's last tile has read them
  TMA stores; load of tile i + stages         commit_smem: a fence and a barrier of the warpgroup
  after the last tile: amax of the CTA        `reduced`: one arrival per warpgroup

Rows and columns beyond the arrays are read as zero and not written (TMA clips).

Not supported: M not a multiple of 128 (Mosaic GPU tiles q_t so; 16 if q_t is not written), K not a
multiple of `tile_columns`.
"""

# Shapes: M rows, K columns, C columns of a tile, W warpgroups, S stages, P programs (CTAs).

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, vector

from pallas_kernels.mosaic import MATRIX, PER_ROW, ROWS, launcher
from pallas_kernels.quantize.contract import Quantized, fold_amax
from pallas_kernels.quantize.partition import Kind, per_device
from pallas_kernels.quantize.sm90_plan import (
    PAIR_GROUP,
    TILE_ROWS,
    TilePlan,
    scratch_types,
    unsupported_reason,
)

_KINDS: dict[str, Kind] = {"q": "rows", "q_t": "columns", "plain": "rows", "amax": "parts"}


def pack_pairs(even: Array, odd: Array, dtype: Any) -> Array:
    """Rounds two matrices to 8 bits, saturating, and zips them: even is the low byte of each unit.

    Args:
      even: `[64, C]`, float32, layout `MATRIX`.
      odd: like even.
      dtype: of the bytes.

    Returns: `[64, C]` units, typed bfloat16 to be moved as 16 bits.
    """
    name = "e4m3" if jnp.dtype(dtype) == jnp.float8_e4m3fn else "e5m2"
    convert = f"""{{
        .reg .b16 first, second;
        cvt.rn.satfinite.{name}x2.f32 first, $2, $1;
        cvt.rn.satfinite.{name}x2.f32 second, $4, $3;
        mov.b32 $0, {{first, second}};
        }}"""

    @plgpu.inline_mgpu(
        arg_types=(MATRIX, MATRIX),
        return_type=plgpu.ShapeDtypeStruct(even.shape, jnp.bfloat16, MATRIX),
    )
    def pack(_: Any, even: Any, odd: Any) -> Any:
        unit_pair = ir.VectorType.get((2,), ir.BF16Type.get())
        registers = np.empty(even.registers.shape, dtype=object)
        for index in np.ndindex(*registers.shape):
            pairs = even.registers[index], odd.registers[index]
            values = [vector.extract(pair, [], [i]) for i in (0, 1) for pair in pairs]
            packed: Any = llvm.inline_asm(
                ir.IntegerType.get_signless(32), values, convert, "=r,f,f,f,f"
            )
            registers[index] = mgpu.utils.bitcast(packed, unit_pair)
        return mgpu.FragmentedArray(_registers=registers, _layout=even.layout, _is_signed=None)

    return pack(even, odd)


def saturate(x: Array, dtype: Any, *, interpret: bool) -> Array:
    """Rounds float32 to 8 bits; on the GPU the conversion itself saturates."""
    if interpret:
        largest = float(jnp.finfo(dtype).max)
        x = jnp.clip(x, -largest, largest)
    return x.astype(dtype)


def store_quantized(plan: TilePlan, even: Array, odd: Array, q: Any, q_t: Any) -> None:
    """Stores v / scale of E and O, `[64, C]` float32, into the staging buffers of a tile."""
    # inf - inf is NaN: a saturating conversion alone would hide an infinity. And -0 becomes +0.
    even, odd = (x + (x - x) for x in (even, odd))
    if q is not None:
        for a, x in enumerate((even, odd)):
            q.at[a][...] = saturate(x, plan.dtype, interpret=plan.interpret)
    if q_t is None:
        return
    if plan.interpret:
        tile = jnp.stack([even, odd], axis=1).reshape(TILE_ROWS, -1)
        q_t[...] = saturate(tile, plan.dtype, interpret=True).T
    else:
        q_t.transpose((1, 0))[...] = pack_pairs(even, odd, plan.dtype)


def row_zeros() -> Array:
    """A float32 zero for each row of a matrix in registers."""
    return plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), PER_ROW)


def row_amax(x: Array, *, interpret: bool) -> Array:
    """Largest |x| of each row, float32; not finite if one of them is not."""
    if interpret:  # where a maximum may lose a NaN
        x = jnp.where(jnp.isnan(x), jnp.inf, x)
    return jnp.max(jnp.abs(x), axis=1).astype(jnp.float32)


def write_amax(wgs: int, row_max: Array, row_max_smem: Any, reduced: Any, out: Any) -> None:
    """Writes the maximum over the CTA's warpgroups to out[cta].

    One warpgroup alone reduces to a scalar: Mosaic GPU gives all warpgroups the same scratch bytes
    for reductions across warps, so two of them at a time would race.
    """
    wg = lax.axis_index("wg")
    row_max_smem.at[wg][...] = row_max
    plgpu.commit_smem()
    plgpu.barrier_arrive(reduced)
    plgpu.barrier_wait(reduced)

    @pl.when(wg == 0)
    def _() -> None:
        total = plgpu.load(row_max_smem.at[0], layout=PER_ROW)
        for other in range(1, wgs):
            total = jnp.maximum(total, plgpu.load(row_max_smem.at[other], layout=PER_ROW))
        out[lax.axis_index("cta")] = jnp.max(total)


class _Kernel(NamedTuple):
    """What the steps of the tile loop share."""

    plan: TilePlan
    compute: Callable[..., tuple[Array, ...]]
    arrays: tuple[Any, ...]  # [M / 2, 2, columns] in global memory
    out: dict[str, Any]  # `TilePlan.outputs` in global memory
    smem: dict[str, Any]  # `scratch_types`

    def tile(self, i: Array) -> tuple[Array, Array]:
        """Row and column, in tiles, of the i-th tile of this warpgroup."""
        config = self.plan.config
        worker = lax.axis_index("cta") * config.warpgroups + lax.axis_index("wg")
        index = worker + i * (self.plan.programs * config.warpgroups)
        across = jnp.int32(self.plan.columns // config.tile_columns)
        return lax.div(index, across), lax.rem(index, across)

    @property
    def num_tiles(self) -> Array:
        """Tiles of this warpgroup."""
        config = self.plan.config
        worker = lax.axis_index("cta") * config.warpgroups + lax.axis_index("wg")
        step = self.plan.programs * config.warpgroups
        return lax.div(self.plan.num_tiles - worker + (step - 1), jnp.int32(step))

    def columns(self, tile: Array, half: int | None) -> Any:
        """The columns of a tile in an array."""
        width = self.plan.config.tile_columns
        if half is None:
            return pl.ds(tile * width, width)
        per_group = jnp.int32(PAIR_GROUP // width)
        group = lax.div(tile, per_group) * (2 * PAIR_GROUP)
        return pl.ds(group + lax.rem(tile, per_group) * width + half * PAIR_GROUP, width)

    def load(self, i: Array, stage: Any) -> None:
        """Starts the TMA loads of the i-th tile."""
        row, column = self.tile(i)
        wg = lax.axis_index("wg")
        for n, slab in enumerate(self.plan.inputs):
            columns = self.columns(column, slab.half)
            for a in (0, 1):
                plgpu.copy_gmem_to_smem(
                    self.arrays[slab.array].at[pl.ds(row * ROWS, ROWS), a, columns],
                    self.smem["x"].at[n, wg, stage, a],
                    self.smem["full"].at[wg * self.plan.config.stages + stage],
                )

    def send(self, i: Array, slot: Any) -> None:
        """Starts the TMA stores of the i-th tile, as one group."""
        row, column = self.tile(i)
        wg = lax.axis_index("wg")
        for n, half in enumerate(self.plan.halves):
            columns = self.columns(column, half)
            for name in ("q", "plain"):
                if name not in self.out:
                    continue
                for a in (0, 1):
                    plgpu.copy_smem_to_gmem(
                        self.smem[name].at[n, wg, slot, a],
                        self.out[name].at[pl.ds(row * ROWS, ROWS), a, columns],
                        commit_group=False,
                    )
            if "q_t" in self.out:
                plgpu.copy_smem_to_gmem(
                    self.smem["q_t"][-1].at[n, wg, slot],
                    self.out["q_t"].at[columns, pl.ds(row * TILE_ROWS, TILE_ROWS)],
                    commit_group=False,
                )
        plgpu.commit_smem_to_gmem_group()

    def stage_outputs(self, evens: Any, odds: Any, inverse: Array, slot: Any) -> None:
        """Stores the results of a tile into its staging buffers."""
        wg, plan = lax.axis_index("wg"), self.plan
        for n, (even, odd) in enumerate(zip(evens, odds, strict=True)):
            if "plain" in self.out:
                for a, x in enumerate((even, odd)):
                    self.smem["plain"].at[n, wg, slot, a][...] = x.astype(plan.plain_dtype)
            q = self.smem["q"].at[n, wg, slot] if "q" in self.out else None
            q_t = self.smem["q_t"][0].at[n, wg, slot] if "q_t" in self.out else None
            if q is None and q_t is None:
                continue
            even, odd = even.astype(jnp.float32) * inverse, odd.astype(jnp.float32) * inverse
            store_quantized(plan, even, odd, q, q_t)


def _kernel(*refs: Any, plan: TilePlan, compute: Callable[..., Any], **smem: Any) -> None:
    """The tile loop of one warpgroup."""
    num_arrays = 1 + max(slab.array for slab in plan.inputs)
    arrays, (scale, *outputs) = refs[:num_arrays], refs[num_arrays:]
    if "q_t" in smem:
        union = smem["q_t"]
        smem["q_t"] = (union, union) if plan.interpret else tuple(x for (x,) in union)
    out = dict(zip(plan.outputs, outputs, strict=True))
    kernel = _Kernel(plan, compute, arrays, out, smem)
    stages, slots = jnp.int32(plan.config.stages), jnp.int32(plan.config.out_slots)
    count, wg = kernel.num_tiles, lax.axis_index("wg")
    inverse = 1.0 / scale[0]
    for i in range(plan.config.stages):
        pl.when(i < count)(functools.partial(kernel.load, jnp.int32(i), i))

    def step(i: Array, row_max: Array) -> Array:
        stage, slot = lax.rem(i, stages), lax.rem(i, slots)
        plgpu.barrier_wait(smem["full"].at[wg * plan.config.stages + stage])
        results = []
        for a in (0, 1):
            tiles = [
                plgpu.load(smem["x"].at[n, wg, stage, a], layout=MATRIX)
                for n in range(len(plan.inputs))
            ]
            results.append(compute(*tiles))
            for x in results[-1] if "amax" in out else ():
                row_max = jnp.maximum(row_max, row_amax(x, interpret=plan.interpret))
        plgpu.wait_smem_to_gmem(plan.config.out_slots - 1, wait_read_only=True)
        kernel.stage_outputs(results[0], results[1], inverse, slot)
        plgpu.commit_smem()
        kernel.send(i, slot)
        pl.when(i + stages < count)(lambda: kernel.load(i + stages, stage))
        return row_max

    row_max = lax.fori_loop(0, count, step, row_zeros())
    if "amax" in out:
        write_amax(plan.config.warpgroups, row_max, smem["row_max"], smem["reduced"], out["amax"])
    plgpu.wait_smem_to_gmem(0)


@launcher("plan", "compute")
def launch(
    plan: TilePlan,
    compute: Callable[..., tuple[Array, ...]],
    arrays: tuple[Array, ...],
    scale: Array,
) -> dict[str, Array]:
    """Runs the kernel.

    Args:
      plan: a supported one.
      compute: from the tiles of `plan.inputs`, `[64, C]` in `MATRIX` layout, to those of the
        results; element by element.
      arrays: `[M, columns]` each.
      scale: float32 `()`.

    Returns: `plan.outputs` by name; arrays of rows as `[M, columns]`, and amax `[P]`.
    """
    views = [x.reshape(x.shape[0] // 2, 2, x.shape[1]) for x in arrays]
    outs = plgpu.kernel(
        functools.partial(_kernel, plan=plan, compute=compute),
        out_type=tuple(plan.outputs.values()),
        scratch_types=scratch_types(plan),
        grid=(plan.programs,),
        grid_names=("cta",),
        num_threads=plan.config.warpgroups,
        thread_name="wg",
        kernel_name=plan.name,
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if plan.interpret else None,
    )(*views, scale.reshape(1))
    named = dict(zip(plan.outputs, outs, strict=True))
    return {
        name: x.reshape(plan.rows, -1) if name in ("q", "plain") else x for name, x in named.items()
    }


def run(
    plan_of: Callable[..., TilePlan],
    compute: Callable[..., tuple[Array, ...]],
    arrays: tuple[Array, ...],
    scale: Array,
) -> tuple[Quantized, Array | None]:
    """Runs a quantising kernel on each device's part of the arrays (see `partition`).

    Args:
      plan_of: the plan for arrays of some shapes.
      compute: as in `launch`.
      arrays: as in `launch`.
      scale: float32 `()`.

    Returns: the 8-bit results, and the plain one or None.

    Raises:
      NotImplementedError: if the kernel does not support a device's part; says why.
    """
    named = _run(plan_of, compute, arrays, scale)
    return Quantized(named.get("q"), named.get("q_t"), named["amax"]), named.get("plain")


def run_plain(
    plan_of: Callable[..., TilePlan],
    compute: Callable[..., tuple[Array, ...]],
    arrays: tuple[Array, ...],
) -> Array:
    """`run` for plans with `layouts="none"`, which write nothing but the plain result."""
    return _run(plan_of, compute, arrays, jnp.float32(1))["plain"]


def _run(
    plan_of: Callable[..., TilePlan],
    compute: Callable[..., tuple[Array, ...]],
    arrays: tuple[Array, ...],
    scale: Array,
) -> dict[str, Array]:
    """What the plan writes, by name; the amax as `Quantized.amax_bits`."""
    plan = plan_of(*arrays)
    names = list(plan.outputs)

    def local(*operands: Array) -> tuple[Array, ...]:
        own_plan = plan_of(*operands[:-1])
        reason = unsupported_reason(own_plan)
        if reason is not None:
            raise NotImplementedError(
                f"implementation='mosaic' cannot run one device's part: {reason}"
            )
        out = launch(own_plan, compute, operands[:-1], operands[-1])
        return tuple(fold_amax(out[name]) if name == "amax" else out[name] for name in names)

    results = per_device(
        local,
        arrays,
        scale,
        [_KINDS[name] for name in names],
        widths=[x.shape[1] // plan.columns for x in arrays],
        result_width=len(plan.halves),
    )
    return dict(zip(names, results, strict=True))

"""The online softmax of the SM90 forward, which rescales only when it must.

P = exp2(c S - m) may use any reference m that is near the maximum of the row: the sum of P takes it
out again. So m follows the maximum only when it grows by more than GROWTH (Zadouri et al. 2026,
FlashAttention-4, section on rescaling). In most blocks no row of a warp does: the warp then neither
exchanges maxima between the threads of a row nor rescales the output. Each warp decides for itself.

Not supported: a negative scale.
"""

# Shapes: R rows of a warpgroup, N keys, H head dim.

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, math, scf, vector

from pallas_kernels.mosaic import MATRIX, PER_ROW, per_row

GROWTH = 8.0
"""P stays below 2 ** GROWTH: exact in bfloat16 and float16, and far from float32's limits."""
LOWEST = -3e38
"""The reference of a row without keys; finite, so that -inf minus it is -inf."""


def online_softmax(
    s: Array, reference: Array, row_sum: Array, scale: float, *, interpret: bool
) -> tuple[Array, Array, Array, Array]:
    """Returns P of one block, and what changes in the rows' references and sums.

    Args:
      s: masked logits `[R, N]`, float32, layout `MATRIX`.
      reference: `[R]`, float32, layout `PER_ROW`; LOWEST where no key was seen yet.
      row_sum: `[R]`, like reference: each thread's part (`mosaic.partial_row_sums`).
      scale: c, positive: softmax_scale * log2(e).
      interpret: use the twin in plain JAX.

    Returns:
      P, the new reference, the new sums, and exp2(reference - new reference).
    """
    if interpret:
        block_max = s.max(axis=1) * scale
        new = jnp.where(block_max > reference + GROWTH, block_max, reference)
        decay = jnp.exp2(reference - new)
        p = jnp.exp2(s * scale - new[:, None])
        return p, new, row_sum * decay + p.sum(axis=1), decay
    rows = plgpu.ShapeDtypeStruct(reference.shape, jnp.float32, PER_ROW)
    matrix = plgpu.ShapeDtypeStruct(s.shape, jnp.float32, MATRIX)

    @plgpu.inline_mgpu(arg_types=(MATRIX, PER_ROW, PER_ROW), return_type=(matrix, rows, rows, rows))
    def step(_: Any, s: Any, reference: Any, row_sum: Any) -> Any:
        pairs = s.registers.reshape(s.shape[1] // 8, 2)
        old, sums = _scalars(reference), _scalars(row_sum)
        factor = _f32(scale)
        tops = [arith.mulf(_tree(_max, _elements(pairs[:, i])), factor) for i in (0, 1)]
        limits = [arith.addf(x, _f32(GROWTH)) for x in old]
        new, decays = _follow(tops, old, limits)
        out = np.empty_like(pairs)
        for half in (0, 1):
            minus = arith.negf(new[half])
            for i, pair in enumerate(pairs[:, half]):
                values = [math.fma(vector.extract(pair, [], [b]), factor, minus) for b in (0, 1)]
                out[i, half] = vector.from_elements(pair.type, [_exp2(x) for x in values])
            part = _tree(arith.addf, _elements(out[:, half]))
            sums[half] = math.fma(sums[half], decays[half], part)
        p = mgpu.FragmentedArray(
            _registers=out.reshape(s.registers.shape), _layout=s.layout, _is_signed=None
        )
        return p, per_row(new), per_row(sums), per_row(decays)

    return step(s, reference, row_sum)


def rescale(out: Array, decay: Array, *, interpret: bool) -> Array:
    """Multiplies the rows of `out`, `[R, H]`, with `decay`, `[R]`; skips warps where all are 1."""
    if interpret:
        return out * decay[:, None]

    @plgpu.inline_mgpu(
        arg_types=(MATRIX, PER_ROW),
        return_type=plgpu.ShapeDtypeStruct(out.shape, jnp.float32, MATRIX),
    )
    def multiply(_: Any, out: Any, decay: Any) -> Any:
        pairs = out.registers.reshape(out.shape[1] // 8, 2)
        decays = _scalars(decay)
        differs = [arith.cmpf(arith.CmpFPredicate.UNE, x, _f32(1.0)) for x in decays]
        branch = scf.IfOp(_any(arith.ori(*differs)), [x.type for x in pairs.flat], has_else=True)
        with ir.InsertionPoint(branch.then_block):
            spread = [vector.broadcast(pairs[0, 0].type, x) for x in decays]
            scaled = [arith.mulf(x, spread[i % 2]) for i, x in enumerate(pairs.flat)]
            scf.YieldOp(scaled)
        with ir.InsertionPoint(_else(branch)):
            scf.YieldOp(list(pairs.flat))
        registers = np.empty(out.registers.size, dtype=object)
        registers[:] = list(branch.results)
        return mgpu.FragmentedArray(
            _registers=registers.reshape(out.registers.shape), _layout=out.layout, _is_signed=None
        )

    return multiply(out, decay)


def _follow(tops: list[Any], old: list[Any], limits: list[Any]) -> tuple[list[Any], list[Any]]:
    """Returns new references and decays, given this thread's maxima of its two rows."""
    f32 = ir.F32Type.get()
    above = [arith.cmpf(arith.CmpFPredicate.OGT, x, y) for x, y in zip(tops, limits, strict=True)]
    branch = scf.IfOp(_any(arith.ori(*above)), [f32] * 4, has_else=True)
    with ir.InsertionPoint(branch.then_block):
        new = []
        for top, reference, limit in zip(tops, old, limits, strict=True):
            for lane in (1, 2):
                top = _max(top, mgpu.utils.shfl_bfly(top, lane))
            grows = arith.cmpf(arith.CmpFPredicate.OGT, top, limit)
            new.append(arith.select(grows, top, reference))
        scf.YieldOp([*new, *(_exp2(arith.subf(x, y)) for x, y in zip(old, new, strict=True))])
    with ir.InsertionPoint(_else(branch)):
        scf.YieldOp([*old, _f32(1.0), _f32(1.0)])
    results = list(branch.results)
    return results[:2], results[2:]


def _else(branch: scf.IfOp) -> ir.Block:
    assert branch.else_block is not None
    return branch.else_block


def _any(x: Any) -> Any:
    """Whether x holds in any thread of the warp."""
    i32 = ir.IntegerType.get_signless(32)
    vote = (
        "{ .reg .pred p, q; setp.ne.u32 p, $1, 0; vote.sync.any.pred q, p, 0xffffffff;"
        " selp.u32 $0, 1, 0, q; }"
    )
    flag: Any = llvm.inline_asm(i32, [arith.extui(i32, x)], vote, "=r,r", has_side_effects=True)
    return arith.cmpi(arith.CmpIPredicate.ne, flag, mgpu.utils.c(0, i32))


def _scalars(x: Any) -> list[Any]:
    """This thread's two values of a `PER_ROW` array."""
    return [vector.extract(register, [], [0]) for register in x.registers.flat]


def _elements(pairs: Any) -> list[Any]:
    return [vector.extract(pair, [], [b]) for pair in pairs for b in (0, 1)]


def _tree(combine: Any, values: list[Any]) -> Any:
    """Reduces in four independent chains: one would wait for each step."""
    chains = [functools.reduce(combine, values[i::4]) for i in range(4)]
    return combine(combine(*chains[:2]), combine(*chains[2:]))


def _max(x: Any, y: Any) -> Any:
    return arith.maximumf(x, y)


def _exp2(x: Any) -> Any:
    return llvm.inline_asm(x.type, [x], "ex2.approx.ftz.f32 $0, $1;", "=f,f")


def _f32(x: float) -> Any:
    return mgpu.utils.c(x, ir.F32Type.get())

"""Proof that FP8 is what runs, and measures of what quantisation costs.

XLA runs a dot in 16 bits, without a word, wherever it cannot run it in 8. `fp8_dot_count` reads
what a compiled GPU program really runs; `lowered_dot_count` what a program asks for, which is what
a CPU emulates.
"""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
from jax import lax

from jfp8.formats import Format
from jfp8.hlo import Gemm, hlo_gemms, stablehlo_gemms
from jfp8.quantize import GROUPS, current_scale, group_amax_bits, quantize


@dataclasses.dataclass(frozen=True, slots=True)
class DotReport:
    """The GEMMs of a program; `print` it for a table."""

    gemms: tuple[Gemm, ...]

    @property
    def fp8_count(self) -> int:
        """GEMMs of 8-bit floats in the program (one in a loop counts once)."""
        return sum(gemm.is_fp8 for gemm in self.gemms)

    @property
    def other_count(self) -> int:
        """All other GEMMs."""
        return len(self.gemms) - self.fp8_count

    @property
    def fp8_flops(self) -> int:
        """FLOPs of one run of the program that are in FP8 GEMMs, loops included."""
        return sum(gemm.flops for gemm in self.gemms if gemm.is_fp8)

    @property
    def other_flops(self) -> int:
        """FLOPs of one run of the program in all other GEMMs."""
        return sum(gemm.flops for gemm in self.gemms if not gemm.is_fp8)

    @property
    def fp8_flop_fraction(self) -> float:
        """Share of the GEMM FLOPs that is in FP8; 0 without any GEMM."""
        total = self.fp8_flops + self.other_flops
        return self.fp8_flops / total if total else 0.0

    def matching(self, op_name: str) -> "DotReport":
        """The GEMMs in whose `op_name` the regular expression is found.

        The GEMMs of `jfp8.dot_general` are called fp8_dot/fwd, fp8_dot/dgrad, fp8_dot/wgrad, and
        under the bf16 recipe bf16_dot/...: `r"(fp8|bf16)_dot/"` finds them and no others.
        """
        pattern = re.compile(op_name)
        return DotReport(tuple(gemm for gemm in self.gemms if pattern.search(gemm.op_name)))

    def __str__(self) -> str:
        lines = [
            f"{self.fp8_count} of {len(self.gemms)} GEMMs and"
            f" {100 * self.fp8_flop_fraction:.1f} % of their FLOPs in FP8"
        ]
        for gemm in self.gemms:
            size = f"{gemm.m}x{gemm.k}x{gemm.n}" + (f" b{gemm.batch}" if gemm.batch > 1 else "")
            times = f"x{gemm.executions}" + ("" if gemm.executions_known else "+")
            dtypes = f"{gemm.lhs_dtype} . {gemm.rhs_dtype} -> {gemm.out_dtype}"
            lines.append(f"  {times:>5} {size:24} {dtypes:32} {gemm.kind:12} {gemm.op_name}")
        return "\n".join(lines)


def fp8_dot_count(compiled: jax.stages.Compiled | str, *, op_name: str | None = None) -> DotReport:
    """Which GEMMs of a compiled GPU program run in FP8.

    Args:
      compiled: `jax.jit(f).lower(...).compile()`, or its `as_text()`.
      op_name: regular expression; report only the GEMMs whose name it is found in.

    Returns: the report. On a CPU it finds no FP8: XLA:CPU emulates it (see `lowered_dot_count`).

    Raises:
      ValueError: for text that is not HLO, or a program that cannot be read.
    """
    text = compiled if isinstance(compiled, str) else compiled.as_text()
    if text is None:
        raise ValueError("compiled.as_text() is None: this backend does not show its program")
    report = DotReport(tuple(hlo_gemms(text)))
    return report if op_name is None else report.matching(op_name)


def lowered_dot_count(
    lowered: jax.stages.Lowered | str, *, op_name: str | None = None
) -> DotReport:
    """Which GEMMs a program asks to run in FP8, on any device.

    Args:
      lowered: `jax.jit(f).lower(...)`, or its StableHLO text (with names only if it was made by
        `as_text(debug_info=True)`).
      op_name: regular expression; report only the GEMMs whose name it is found in.

    Returns: the report.

    Raises:
      ValueError: for what is not StableHLO.
    """
    module = lowered if isinstance(lowered, str) else lowered.compiler_ir("stablehlo")
    if module is None:
        raise ValueError("lowered.compiler_ir('stablehlo') is None: it was not lowered to it")
    report = DotReport(tuple(stablehlo_gemms(module)))
    return report if op_name is None else report.matching(op_name)


def sqnr_db(reference: jax.Array, value: jax.Array) -> jax.Array:
    """Signal to quantisation noise ratio of `value`, in dB: 10 log10(sum r^2 / sum (r - v)^2).

    Args:
      reference: what `value` should be.
      value: same shape.

    Returns: float32 `()`; infinity if they are equal.
    """
    reference = jnp.asarray(reference, jnp.float32)
    noise = reference - jnp.asarray(value, jnp.float32)
    return 10 * jnp.log10(jnp.sum(jnp.square(reference)) / jnp.sum(jnp.square(noise)))


def saturated_fraction(x: jax.Array, scale: jax.Array, format: Format) -> jax.Array:
    """Share of the elements of `x` that quantisation with `scale` clips. float32 `()`."""
    return jnp.mean(_scaled_magnitude(x, scale) > format.max_value, dtype=jnp.float32)


def underflowed_fraction(x: jax.Array, scale: jax.Array, format: Format) -> jax.Array:
    """Share of the elements of `x` that are not zero but become zero. float32 `()`."""
    # Half the smallest subnormal is a tie and rounds to even: to zero.
    lost = (_scaled_magnitude(x, scale) <= format.min_subnormal / 2) & (x != 0)
    return jnp.mean(lost, dtype=jnp.float32)


QUANTITIES = (
    "amax",
    "scale",
    "saturated_count",
    "underflowed_count",
    "nonfinite_count",
    "count",
    "signal",
    "noise",
)
"""What `inspect_tensor` measures; the last two are sums of squares in units of scale^2."""


def inspect_tensor(x: jax.Array, scale: jax.Array | None, format: Format) -> jax.Array:
    """Measures a tensor and what quantising it costs, on every element, in one pass.

    Non-finite elements are counted and left out of the rest.

    Args:
      x: `[..., columns]`, float32 or bfloat16.
      scale: float32 `()`; None takes that of the `current` recipe, which costs one more pass.
      format: that `x` is, or would be, quantised to.

    Returns: float32 `[len(QUANTITIES)]`. Counts are exact up to 2**24 a group of rows; there are up
      to 128 groups.
    """
    rows = x.reshape(-1, x.shape[-1])
    if scale is None:
        finite = jnp.where(jnp.isfinite(rows), rows, 0)
        scale = current_scale(group_amax_bits(finite), format)
    scaled = rows.astype(jnp.float32) * (1 / scale)
    is_finite = jnp.isfinite(rows)
    scaled = jnp.where(is_finite, scaled, 0)
    error = scaled - quantize(scaled, jnp.float32(1), format).astype(jnp.float32)
    magnitude = jnp.abs(scaled)
    columns = (
        magnitude,
        magnitude > format.max_value,
        (magnitude <= format.min_subnormal / 2) & (rows != 0) & is_finite,
        ~is_finite,
        jnp.square(scaled),
        jnp.square(error),
    )
    groups = math.gcd(len(rows), GROUPS)
    # One reduction of six values an element: nothing but `x` is read, and that once. Groups of
    # rows come first, so that each device of a sharded tensor reduces its own.
    sums = lax.reduce(
        tuple(c.astype(jnp.float32).reshape(groups, -1, rows.shape[1]) for c in columns),
        (jnp.float32(0),) * len(columns),
        lambda a, b: (jnp.maximum(a[0], b[0]), *(x + y for x, y in zip(a[1:], b[1:], strict=True))),
        (1, 2),
    )
    amax = sums[0].max() * scale
    saturated, underflowed, nonfinite, signal, noise = (x.sum() for x in sums[1:])
    return jnp.stack(
        [amax, scale, saturated, underflowed, nonfinite, jnp.float32(x.size), signal, noise]
    )


def _scaled_magnitude(x: jax.Array, scale: jax.Array) -> jax.Array:
    return jnp.abs(jnp.asarray(x, jnp.float32)) * (1 / jnp.asarray(scale, jnp.float32))

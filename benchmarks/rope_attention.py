"""Times what FP8 attention does before and after its kernels, from and to a fused QKV projection.

    python -m benchmarks.rope_attention --output benchmarks/results/rope_attention.json

"fused" rotates inside the kernels that quantise q, k and v, and inside the one that finishes the
gradient (`rope_flash_attention`); "apart" is `rope_qkv` and `flash_attention`, quantised by kernels
as well. Results of both are compared on the device, then both and a copy of the projection are
timed in turns, several calls in a program, each with arrays of its own. The floor is what must be
read and written, at the copy's rate.
"""

import argparse
import dataclasses
import functools
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.common import markdown_table, write_json
from benchmarks.contenders import jax_device
from benchmarks.quantize import repeated, time_in_turns
from pallas_kernels import Fp8Options, rope_qkv
from pallas_kernels.flash_attention import (
    fp8,
    rope_attention,
    sm90_finish_fp8,
    sm90_fp8,
    sm90_rope_fp8,
)
from pallas_kernels.flash_attention.config import AttentionSpec
from pallas_kernels.interpreter import interpret_kernels, is_interpreting
from pallas_kernels.quantize.contract import sm_count

_CALLS = 4  # in one program
_ROUNDS = 7


@dataclasses.dataclass(frozen=True)
class Case:
    """One projection."""

    batch: int
    tokens: int
    kv_heads: int
    group: int
    head_dim: int = 128

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.kv_heads * self.group

    @property
    def spec(self) -> AttentionSpec:
        """Of its attention."""
        options = Fp8Options(quantize_implementation="mosaic")
        return rope_attention.Options(
            self.kv_heads, self.head_dim, is_causal=True, fp8_options=options
        ).spec(jax.ShapeDtypeStruct((self.batch, self.tokens, self.width), jnp.bfloat16), None)

    @property
    def width(self) -> int:
        """Of the projection."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    def floor_bytes(self, what: str) -> int:
        """What must be read and written."""
        rows, angles = self.batch * self.tokens, 2 * 4 * self.head_dim // 2
        if what == "quantise":  # 16 bits in; 8 bits out, those of v twice
            return rows * (3 * self.width + self.kv_heads * self.head_dim + angles)
        sums, others = self.heads * self.head_dim, 2 * self.kv_heads * self.head_dim
        return rows * (4 * sums + 2 * others + 2 * self.width + angles)


CASES = [Case(2, 8192, 8, 4), Case(2, 8192, 16, 1)]
TINY = [Case(1, 64, 1, 1, 64)]


def contenders(case: Case, what: str) -> dict[str, Callable[..., Any]]:
    """Functions of `arguments`."""
    spec, interpret = case.spec, is_interpreting()
    heads = dict(num_kv_heads=case.kv_heads, head_dim=case.head_dim)
    if what == "quantise":

        def quantise_apart(*arrays: jax.Array) -> fp8.Inputs:
            q, k, v = rope_qkv(*arrays, **heads, implementation="mosaic")
            return sm90_fp8.quantize_inputs(q, k, v, spec, interpret=interpret)

        fused = functools.partial(sm90_rope_fp8.quantize_qkv, spec=spec, interpret=interpret)
        return {"apart": quantise_apart, "fused": fused}

    def finish_apart(dq: Any, dk: Any, dv: Any, factor: Any, cos: Any, sin: Any) -> jax.Array:
        matrix = sm90_fp8.inverse_rotation(spec)
        options = dict(dtype=spec.dtype, sm_count=sm_count(), interpret=interpret)
        dq = sm90_finish_fp8.scale_and_rotate(dq, factor, matrix, **options)
        zeros = jnp.zeros((case.batch, case.tokens, case.width), spec.dtype)
        rope = functools.partial(rope_qkv, cos=cos, sin=sin, **heads, implementation="mosaic")
        return jax.vjp(rope, zeros)[1]((dq, dk, dv))[0]

    def finish_fused(dq: Any, dk: Any, dv: Any, *others: Any) -> jax.Array:
        return sm90_rope_fp8.finish_dqkv((dq, dk, dv), *others, spec, interpret=interpret)

    return {"apart": finish_apart, "fused": finish_fused}


def arguments(case: Case, what: str, seed: int) -> tuple[jax.Array, ...]:
    """Random arrays of a call."""
    keys = jax.random.split(jax.random.key(seed), 5)
    angle = 50 * jax.random.normal(keys[0], (case.batch, case.tokens, 1, case.head_dim // 2))
    angles = jnp.cos(angle), jnp.sin(angle)
    normal = lambda i, n, dtype: jax.random.normal(  # noqa: E731
        keys[i], (case.batch, case.tokens, n, case.head_dim), dtype
    )
    if what == "quantise":
        qkv = normal(1, case.width // case.head_dim, jnp.bfloat16)
        return qkv.reshape(case.batch, case.tokens, -1), *angles
    others = (normal(i, case.kv_heads, jnp.bfloat16) for i in (1, 2))
    factor = jnp.exp2(jax.random.randint(keys[4], (case.batch, case.heads, case.tokens), -9, -5))
    return normal(3, case.heads, jnp.float32), *others, factor.astype(jnp.float32), *angles


def difference(got: Any, want: Any) -> float:
    """Largest relative difference of two arrays of the results, by Euclidean norms.

    Not 0 where a sum of two products was rounded otherwise, which XLA may do on its own.
    """

    def relative(a: jax.Array, b: jax.Array) -> float:
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))

    return max(jax.tree.leaves(jax.tree.map(relative, got, want)))


def run_case(case: Case, what: str, rounds: int) -> list[dict[str, Any]]:
    """Compares and times both."""
    calls = [arguments(case, what, seed) for seed in range(_CALLS)]
    functions = contenders(case, what)
    results = {name: jax.block_until_ready(f(*calls[0])) for name, f in functions.items()}
    apart = difference(results["fused"], results["apart"])
    del results
    copied = [
        (jnp.full((case.batch * case.tokens, case.width), seed, jnp.bfloat16), jnp.bfloat16(2))
        for seed in range(_CALLS)
    ]
    programs = {"copy": functools.partial(repeated(lambda x, scale: x * scale), copied)}
    for name, function in functions.items():
        programs[name] = functools.partial(repeated(function), calls)
    medians = {k: statistics.median(v) for k, v in time_in_turns(programs, rounds).items()}
    copy_rate = 4 * case.batch * case.tokens * case.width / medians["copy"]
    floor = case.floor_bytes(what)
    return [
        dataclasses.asdict(case)
        | {
            "what": what,
            "contender": name,
            "median_ms": 1e3 * medians[name],
            "floor_mb": floor / 1e6,
            "floor_ms": 1e3 * floor / copy_rate,
            "difference": apart,
        }
        for name in functions
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs all cases."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rope_attention")
    parser.add_argument("--output", type=Path, required=True, help="the JSON file")
    parser.add_argument("--tiny", action="store_true", help="a small shape in the CPU interpreter")
    options = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    for case in TINY if options.tiny else CASES:
        for what in ("quantise", "finish"):
            with interpret_kernels(options.tiny):
                rows += run_case(case, what, rounds=1 if options.tiny else _ROUNDS)
    header = ["shape", "what", "contender", "us", "floor us", "floor MB", "difference"]
    cells = [
        [
            f"{r['batch']} x {r['tokens']}, {r['kv_heads'] * r['group']}/{r['kv_heads']}",
            *(r["what"], r["contender"], f"{1e3 * r['median_ms']:.1f}"),
            *(f"{1e3 * r['floor_ms']:.1f}", f"{r['floor_mb']:.0f}"),
            f"{r['difference']:.1e}",
        ]
        for r in rows
    ]
    print(markdown_table(header, cells))
    write_json(
        options.output, jax_device.describe() | {"benchmark": "rope_attention", "rows": rows}
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

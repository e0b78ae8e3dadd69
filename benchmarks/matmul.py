"""Checks and times the FP8 GEMM kernel beside cuBLASLt: same operands, device, process and minute.

    python -m benchmarks.matmul --output benchmarks/results/matmul.json

The shapes are the twelve GEMMs of a block of configs/llama_8b_slice_fp8.toml: forward, dgrad and
wgrad of qkv, out, gate_up and down. cuBLASLt is what the step itself calls, `jfp8.gemms.gemm` with
XLA's flags of the trainer: accumulating fast in the forward pass, exactly in the others, and there
fast as well for comparison. So does the kernel, in its candidate configs.

All programs are compiled first, the kernels in threads. A program multiplies several left operands
by one right operand, so that the host's launches do not count; the contenders of a shape take
turns. Each result is compared with exact sums on some rows, and may be off by twice what cuBLASLt's
is with the same accumulation. The file is rewritten after each shape; a kernel that hangs costs the
shapes after it (run under `timeout`).
"""

import argparse
import concurrent.futures
import contextvars
import dataclasses
import functools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from benchmarks.common import markdown_table, write_json
from benchmarks.contenders import jax_device
from jfp8.gemms import EXACT, FAST, gemm
from pallas_kernels.interpreter import interpret_kernels
from pallas_kernels.matmul.api import make_plan, matmul_mosaic
from pallas_kernels.matmul.config import (
    Accumulation,
    MatmulConfig,
    candidates,
    unsupported_reason,
)
from train.environment import prepare_environment

_REPEATS = 4  # of the product in one program
_ROUNDS = 9
_CHECKED_ROWS = 128
_FAST_BACKWARD_CANDIDATES = 2
_LAYERS = 6  # of the 8b-slice
_SCALE = 2.0**-10
_LAST = (-1, -1)
_E4M3, _E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2

type Product = Callable[[Array, Array, Array], Array]


@dataclasses.dataclass(frozen=True)
class Case:
    """One GEMM: [m, k] by [n, k]."""

    name: str
    """Of the layer's dot."""
    kind: str
    """fwd, dgrad or wgrad."""
    m: int
    n: int
    k: int

    @property
    def dtypes(self) -> tuple[Any, Any]:
        """Of both operands; gradients are E5M2."""
        return {"fwd": (_E4M3, _E4M3), "dgrad": (_E5M2, _E4M3), "wgrad": (_E4M3, _E5M2)}[self.kind]

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
        return 2 * self.m * self.n * self.k


def _cases(tokens: int, dots: dict[str, tuple[int, int]]) -> list[Case]:
    forward = [Case(name, "fwd", tokens, n, k) for name, (k, n) in dots.items()]
    dgrad = [Case(name, "dgrad", tokens, k, n) for name, (k, n) in dots.items()]
    return [*forward, *dgrad, *(Case(name, "wgrad", *dot, tokens) for name, dot in dots.items())]


CASES = _cases(
    16384,
    dict(qkv=(4096, 6144), out=(4096, 4096), gate_up=(4096, 28672), down=(14336, 4096)),
)
TINY = _cases(256, dict(qkv=(128, 256)))[:2]


def contenders(case: Case) -> Iterator[tuple[str, Product, MatmulConfig | None]]:
    """cuBLASLt as the step calls it, then with fast accumulation, then the kernel."""
    is_forward = case.kind == "fwd"
    precisions: dict[Accumulation, lax.Precision] = {"exact": EXACT, "fast": FAST}
    if is_forward:
        del precisions["exact"]
    for accumulation, precision in precisions.items():
        yield f"cublaslt {accumulation}", functools.partial(_xla, precision=precision), None
    for accumulation in precisions:
        configs = candidates(accumulation)
        if accumulation == "fast" and not is_forward:
            configs = configs[:_FAST_BACKWARD_CANDIDATES]
        for config in configs:
            product = functools.partial(
                matmul_mosaic, out_dtype=jnp.bfloat16, accumulation=accumulation, config=config
            )
            yield f"mosaic {accumulation} {_name(config)}", product, config


def _xla(lhs: Array, rhs_t: Array, scale: Array, *, precision: lax.Precision) -> Array:
    dtype = np.dtype(jnp.bfloat16)
    return gemm(lhs, rhs_t, _LAST, dtype, precision) * scale.astype(dtype)


def _name(config: MatmulConfig) -> str:
    tile = f"{config.tile_m}x{config.tile_n} stages={config.stages} {config.schedule}"
    return f"{tile} cluster={config.cluster} group={config.group}/{config.group_axis}"


def operands(case: Case, count: int) -> tuple[list[Array], Array, Array]:
    """Several left operands, one right operand and the scale; normal, as if scaled to fit."""

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def normal(key: Array, shape: tuple[int, int], dtype: Any) -> Array:
        return (64 * jax.random.normal(key, shape, jnp.bfloat16)).astype(dtype)

    keys = jax.random.split(jax.random.key(0), count + 1)
    left = [normal(key, (case.m, case.k), case.dtypes[0]) for key in keys[1:]]
    return left, normal(keys[0], (case.n, case.k), case.dtypes[1]), jnp.float32(_SCALE)


def compile_program(case: Case, product: Product, count: int) -> Callable[..., list[Array]]:
    """A program that multiplies `count` left operands."""

    def run(left: list[Array], right: Array, scale: Array) -> list[Array]:
        return [product(x, right, scale) for x in left]

    left, right = (
        jax.ShapeDtypeStruct((rows, case.k), dtype)
        for rows, dtype in zip((case.m, case.n), case.dtypes, strict=True)
    )
    return jax.jit(run).lower([left] * count, right, jax.ShapeDtypeStruct((), "float32")).compile()


@dataclasses.dataclass
class Contender:
    """One implementation of a case, and its row of the result."""

    program: Callable[..., list[Array]] | None
    row: dict[str, Any]


def compile_all(cases: Sequence[Case], count: int, workers: int) -> dict[Case, list[Contender]]:
    """The programs of all cases; the row of one that cannot be compiled says why."""

    def build(case: Case, name: str, product: Product, config: MatmulConfig | None) -> Contender:
        row = dataclasses.asdict(case) | {"contender": name}
        if config is not None:
            row["config"] = dataclasses.asdict(config)
            left, right = (
                jax.ShapeDtypeStruct((rows, case.k), dtype)
                for rows, dtype in zip((case.m, case.n), case.dtypes, strict=True)
            )
            accumulation = "exact" if "exact" in name else "fast"
            plan = make_plan(left, right, jnp.bfloat16, accumulation, config)
            reason = unsupported_reason(plan)
            if reason is not None:
                return Contender(None, row | {"rejected": reason})
        try:
            return Contender(compile_program(case, product, count), row)
        except Exception as error:  # reported as the row of this config; the next one still runs
            return Contender(None, row | {"error": f"{type(error).__name__}: {str(error)[:300]}"})

    built: dict[Case, list[Any]] = {case: [] for case in cases}
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        for case in cases:
            for contender in contenders(case):
                # XLA times cuBLASLt's algorithms on the GPU, so not several at once: see below.
                task = functools.partial(build, case, *contender)
                is_kernel = contender[2] is not None
                run = contextvars.copy_context().run
                built[case].append(pool.submit(run, task) if is_kernel else task)
        for tasks in built.values():
            tasks[:] = [task() if callable(task) else task for task in tasks]
        futures = concurrent.futures.Future
        return {
            case: [x.result() if isinstance(x, futures) else x for x in tasks]
            for case, tasks in built.items()
        }


def relative_error(left: Array, right: Array, got: Array) -> float:
    """Of the first rows, against float32 sums of exact products."""

    @jax.jit
    def error(left: Array, right: Array, got: Array) -> Array:
        x, y = (a.astype(jnp.bfloat16) for a in (left[:_CHECKED_ROWS], right))
        want = _SCALE * gemm(x, y, _LAST, np.dtype(jnp.float32), EXACT)
        difference = got[:_CHECKED_ROWS].astype(jnp.float32) - want
        return jnp.linalg.norm(difference) / jnp.linalg.norm(want)

    return float(error(left, right, got))


def time_in_turns(programs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of one product in each round."""
    times: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name, program in programs.items():
            started = time.perf_counter()
            jax.block_until_ready(program())
            times[name].append((time.perf_counter() - started) / _REPEATS)
    return times


def run_case(case: Case, built: list[Contender], rounds: int) -> list[dict[str, Any]]:
    """Checks and times all contenders of a case."""
    arguments = operands(case, _REPEATS)
    programs, rows = {}, {contender.row["contender"]: contender.row for contender in built}
    for contender in built:
        if contender.program is None:
            continue
        name = contender.row["contender"]
        got = contender.program(*arguments)
        contender.row["error_norm"] = relative_error(arguments[0][-1], arguments[1], got[-1])
        programs[name] = functools.partial(contender.program, *arguments)
        del got
    for name, times in time_in_turns(programs, rounds).items():
        median = statistics.median(times)
        peer = rows["cublaslt exact" if "exact" in name else "cublaslt fast"]
        rows[name] |= {
            "is_right": rows[name]["error_norm"] <= 2 * peer["error_norm"],
            "median_ms": 1e3 * median,
            "tflops": case.flops / median / 1e12,
            "times_ms": [1e3 * t for t in times],
        }
    return list(rows.values())


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as markdown."""
    return markdown_table(
        ["GEMM", "m x n x k", "contender", "ms", "TFLOP/s", "error", "right"],
        [
            [
                f"{row['name']} {row['kind']}",
                f"{row['m']} x {row['n']} x {row['k']}",
                row["contender"],
                f"{row['median_ms']:.3f}" if "median_ms" in row else "-",
                f"{row['tflops']:.0f}" if "median_ms" in row else "-",
                f"{row['error_norm']:.5f}" if "error_norm" in row else "-",
                row.get("error") or row.get("rejected") or str(row["is_right"]),
            ]
            for row in rows
        ],
    )


def fastest(rows: list[dict[str, Any]], word: str) -> dict[str, Any] | None:
    """The fastest right contender with that word in its name."""
    right = [row for row in rows if row.get("is_right") and word in row["contender"]]
    return min(right, key=lambda row: row["median_ms"], default=None)


def summary(cases: Sequence[Case], rows: list[dict[str, Any]]) -> str:
    """Milliseconds of a step by kind of GEMM, and the entries of `TUNED_H200`."""
    lines, totals = [], dict[tuple[str, str], float]()
    for case in cases:
        own = [r for r in rows if (r["name"], r["kind"]) == (case.name, case.kind)]
        for word in ("cublaslt exact", "cublaslt fast", "mosaic exact", "mosaic fast"):
            best = fastest(own, word)
            if best is not None:
                key = (case.kind, word)
                totals[key] = totals.get(key, 0.0) + _LAYERS * best["median_ms"]
        best = fastest(own, "mosaic")
        if best is not None and case.kind == "fwd":
            fields = ", ".join(f"{name}={value!r}" for name, value in best["config"].items())
            lines.append(f"({case.m}, {case.k}, {case.n}): MatmulConfig({fields}),")
    step = [f"{kind} {word}: {total:.1f} ms a step" for (kind, word), total in totals.items()]
    return "\n".join([*step, *lines])


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs all cases; returns 1 if a contender failed or was wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.matmul")
    parser.add_argument("--output", type=Path, required=True, help="the JSON file")
    parser.add_argument("--only", default="", help="run the kinds of GEMM that contain this word")
    parser.add_argument("--threads", type=int, default=16, help="that compile")
    parser.add_argument("--tiny", action="store_true", help="small shapes in the CPU interpreter")
    options = parser.parse_args(arguments)
    prepare_environment()
    cases = [c for c in (TINY if options.tiny else CASES) if options.only in c.kind]
    rows: list[dict[str, Any]] = []
    with interpret_kernels(options.tiny):
        started = time.perf_counter()
        built = compile_all(cases, _REPEATS, 1 if options.tiny else options.threads)
        compile_s = time.perf_counter() - started
        print(f"compiled in {compile_s:.1f} s", flush=True)
        for case in cases:
            new = run_case(case, built.pop(case), rounds=1 if options.tiny else _ROUNDS)
            rows += new
            print(table(new) + "\n", flush=True)
            result = {"benchmark": "matmul", "compile_s": compile_s, "rows": rows}
            write_json(options.output, jax_device.describe() | result)
    print(summary(cases, rows))
    return int(any("error" in row or row.get("is_right") is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())

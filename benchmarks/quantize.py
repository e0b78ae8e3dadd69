"""Checks and times the quantising kernels beside XLA and a copy: same shapes, device and run.

    python -m benchmarks.quantize --output benchmarks/results/quantize.json

Every candidate config of every kernel is first compared with XLA's result on the device: the cast
bit for bit, the others to the neighbouring 8-bit value. Then all contenders of a shape are timed in
turns. A program runs its kernel several times, on arrays of its own each time (XLA would read
shared ones once), so that the host's launches do not count. GB/s count what the operation must
read and write; the copy is a multiplication that reads and writes bfloat16. The file is rewritten
after each shape; a kernel that hangs costs the rows after it (run under `timeout`).
"""

import argparse
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

import pallas_kernels
from benchmarks.common import markdown_table, write_json
from benchmarks.contenders import jax_device
from pallas_kernels.fused import rmsnorm, sm90_rmsnorm, sm90_swiglu
from pallas_kernels.interpreter import interpret_kernels
from pallas_kernels.quantize import sm90, sm90_plan
from pallas_kernels.quantize.contract import Quantized

_REPEATS = 4  # of the kernel in one program
_ROUNDS = 7
_EPS = 1e-5
_E4M3, _E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2


@dataclasses.dataclass(frozen=True)
class Case:
    """One operation at one shape."""

    operation: str
    """cast, cast_gradient, cast_weight, rmsnorm, swiglu or swiglu_gradient."""
    rows: int
    columns: int
    """Of the result; of the hidden layer for SwiGLU."""

    @property
    def bytes(self) -> int:
        """What it must read and write."""
        per_element = {"cast_weight": 4 + 2, "swiglu": 4 + 2, "swiglu_gradient": 6 + 4}
        return self.rows * self.columns * per_element.get(self.operation, 2 + 2)


# The shapes of the targets, then those of configs/llama_8b_slice_fp8.toml and llama_1b_fp8.toml:
# activations, gradients and weights of qkv, out, gate_up and down.
CASES = [
    Case("cast", 16384, 4096),
    Case("cast", 16384, 14336),
    Case("rmsnorm", 16384, 4096),
    Case("swiglu", 16384, 14336),
    Case("swiglu_gradient", 16384, 14336),
    *(Case("cast_gradient", 16384, n) for n in (6144, 4096)),
    *(Case("cast_weight", *shape) for shape in ((4096, 6144), (4096, 4096), (4096, 28672))),
    Case("cast_weight", 14336, 4096),
    Case("cast", 16384, 2048),
    Case("cast_gradient", 16384, 6144),
    Case("rmsnorm", 16384, 2048),
    Case("swiglu", 16384, 5632),
    Case("swiglu_gradient", 16384, 5632),
    *(Case("cast_weight", *shape) for shape in ((2048, 6144), (2048, 2048), (2048, 11264))),
    Case("cast_weight", 5632, 2048),
]
TINY = [Case("cast", 128, 128), Case("swiglu", 128, 128), Case("rmsnorm", 128, 256)]

type Operation = Callable[..., Any]  # of a call's arguments; a kernel returns Quantized


def contenders(case: Case) -> Iterator[tuple[str, Operation]]:
    """XLA, then the kernel in every candidate config that the shape allows."""
    dtype = _E5M2 if "gradient" in case.operation else _E4M3
    options = dict(dtype=dtype, layouts="both")
    if case.operation.startswith("cast"):
        yield (
            "xla",
            functools.partial(pallas_kernels.quantize, dtype=dtype, implementation="xla"),
        )
        itemsize = 4 if case.operation == "cast_weight" else 2
        for config in sm90.candidates(itemsize):
            yield _name(config), functools.partial(sm90.quantize, config=config, **options)
    elif case.operation == "swiglu":
        yield "xla", functools.partial(pallas_kernels.swiglu_quantize, implementation="xla")
        for config in sm90_swiglu.forward_candidates():
            yield _name(config), functools.partial(sm90_swiglu.forward, config=config, **options)
    elif case.operation == "swiglu_gradient":
        call = functools.partial(pallas_kernels.swiglu_grad_quantize, implementation="xla")
        yield "xla", lambda *args: call(*args)[0]
        for config in sm90_swiglu.backward_candidates():
            kernel = functools.partial(sm90_swiglu.backward, config=config, plain=False, **options)
            yield _name(config), lambda *args, kernel=kernel: kernel(*args)[0]
    else:
        norm = functools.partial(pallas_kernels.rmsnorm_quantize, eps=_EPS, implementation="xla")
        yield "xla", lambda *args: norm(*args)[0]
        for config in sm90_rmsnorm.candidates():
            yield _name(config), functools.partial(_rmsnorm, config=config)


def _rmsnorm(x: jax.Array, weight: jax.Array, scale: jax.Array, *, config: Any) -> Quantized:
    plan = rmsnorm.make_plan(x, eps=_EPS, dtype=_E4M3, config=config)
    reason = sm90_rmsnorm.unsupported_reason(plan)
    if reason is not None:
        raise NotImplementedError(reason)
    q, q_t, _, amax = sm90_rmsnorm.launch(plan, x, weight, scale)
    bits = jax.lax.bitcast_convert_type(amax.max(), jnp.int32)
    return Quantized(q, q_t, bits[None])


def _name(config: sm90_plan.TileConfig | sm90_rmsnorm.RmsNormConfig) -> str:
    fields = dataclasses.asdict(config).items()
    return "mosaic " + " ".join(f"{name}={value}" for name, value in fields)


def inputs(case: Case, seed: int) -> tuple[jax.Array, ...]:
    """Random arrays of the case, without the scale."""

    def normal(index: int, width: int, dtype: Any = jnp.bfloat16) -> jax.Array:
        return jax.random.normal(jax.random.key(2 * seed + index), (case.rows, width), dtype)

    match case.operation:
        case "swiglu":
            return (normal(0, 2 * case.columns),)
        case "swiglu_gradient":
            return normal(0, 2 * case.columns), normal(1, case.columns)
        case "rmsnorm":
            return normal(0, case.columns), jnp.linspace(0.5, 1.5, case.columns)
        case "cast_weight":
            return (normal(0, case.columns, jnp.float32),)
    return (normal(0, case.columns),)


def compare(got: Quantized, want: Quantized) -> dict[str, int | bool]:
    """How far the results of a kernel are from XLA's; computed on the device."""

    @jax.jit
    def difference(got: Quantized, want: Quantized) -> tuple[jax.Array, ...]:
        bits = lambda x: jax.lax.bitcast_convert_type(x, jnp.uint8)  # noqa: E731
        order = lambda x: (x & 127).astype(jnp.int32) * jnp.where(x & 128, -1, 1)  # noqa: E731
        apart = jnp.abs(order(bits(got.q)) - order(bits(want.q)))
        transposed = (bits(got.q).T != bits(got.q_t)).sum()
        return apart.max(), (apart > 0).sum(), transposed

    worst, differ, transposed = map(int, difference(got, want))
    bits = [x.amax_bits.max() for x in (got, want)]
    amax = [float(jax.lax.bitcast_convert_type(x, jnp.float32)) for x in bits]
    return {
        "most_values_apart": worst,
        "elements_that_differ": differ,
        "q_t_is_not_q_transposed": transposed,
        "amax_is_close": abs(amax[0] - amax[1]) <= 1e-5 * abs(amax[1]),
    }


def is_right(case: Case, difference: dict[str, int | bool]) -> bool:
    """The cast bit for bit; what computes in float32 first, to the next value."""
    allowed = 0 if case.operation.startswith("cast") else 1
    return (
        difference["most_values_apart"] <= allowed
        and difference["q_t_is_not_q_transposed"] == 0
        and bool(difference["amax_is_close"])
    )


def repeated(operation: Operation) -> Callable[..., Any]:
    """A program of several calls, each with its own arguments."""
    return jax.jit(lambda calls: [operation(*args) for args in calls])


def time_in_turns(programs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of one call in each round."""
    times: dict[str, list[float]] = {name: [] for name in programs}
    for program in programs.values():
        jax.block_until_ready(program())
    for _ in range(rounds):
        for name, program in programs.items():
            started = time.perf_counter()
            jax.block_until_ready(program())
            times[name].append((time.perf_counter() - started) / _REPEATS)
    return times


def run_case(case: Case, rounds: int) -> list[dict[str, Any]]:
    """Checks and times all contenders of a case."""
    scale = jnp.float32(2.0**-3)
    calls = [(*inputs(case, seed), scale) for seed in range(_REPEATS)]
    shape = case.rows, case.columns
    originals = [(jnp.full(shape, seed, jnp.bfloat16), scale) for seed in range(_REPEATS)]
    copy = repeated(lambda x, scale: x * scale.astype(x.dtype))
    programs: dict[str, Callable[[], Any]] = {"copy": functools.partial(copy, originals)}
    rows, want = {}, None
    for name, operation in contenders(case):
        row = dataclasses.asdict(case) | {"contender": name}
        try:
            got = jax.jit(operation)(*calls[0])
            jax.block_until_ready(got)
        except Exception as error:  # reported as the row of this config; the next one still runs
            rows[name] = row | {"error": f"{type(error).__name__}: {str(error)[:300]}"}
            continue
        want = want or got
        difference = compare(got, want)
        rows[name] = row | difference | {"is_right": is_right(case, difference)}
        programs[name] = functools.partial(repeated(operation), calls)
        del got
    del want
    times = time_in_turns(programs, rounds)
    moved = {"copy": 4 * case.rows * case.columns}
    rows["copy"] = dataclasses.asdict(case) | {"contender": "copy"}
    medians = {name: statistics.median(values) for name, values in times.items()}
    copy_rate = moved["copy"] / medians["copy"]
    for name, median in medians.items():
        rate = moved.get(name, case.bytes) / median
        rows[name] |= {
            "median_ms": 1e3 * median,
            "gb_per_s": rate / 1e9,
            "of_copy": rate / copy_rate,
            "times_ms": [1e3 * t for t in times[name]],
        }
    return list(rows.values())


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as markdown."""
    return markdown_table(
        ["operation", "shape", "contender", "us", "GB/s", "of copy", "right"],
        [
            [
                row["operation"],
                f"{row['rows']} x {row['columns']}",
                row["contender"],
                f"{1e3 * row['median_ms']:.1f}" if "median_ms" in row else "-",
                f"{row['gb_per_s']:.0f}" if "median_ms" in row else "-",
                f"{row['of_copy']:.0%}" if "median_ms" in row else "-",
                row.get("error") or str(row.get("is_right", "-")),
            ]
            for row in rows
        ],
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs all cases; returns 1 if a kernel failed or was wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantize")
    parser.add_argument("--output", type=Path, required=True, help="the JSON file")
    parser.add_argument("--only", default="", help="run the operations that contain this word")
    parser.add_argument("--tiny", action="store_true", help="small shapes in the CPU interpreter")
    options = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    for case in TINY if options.tiny else CASES:
        if options.only not in case.operation:
            continue
        with interpret_kernels(options.tiny):
            new = run_case(case, rounds=1 if options.tiny else _ROUNDS)
        rows += new
        print(table(new) + "\n", flush=True)
        write_json(options.output, jax_device.describe() | {"benchmark": "quantize", "rows": rows})
    return int(any("error" in row or row.get("is_right") is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())

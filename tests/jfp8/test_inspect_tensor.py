"""Measurements of a tensor against NumPy float64; and that a GPU reads the tensor once."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jfp8.diagnostics import QUANTITIES, inspect_tensor
from jfp8.formats import E4M3, E5M2
from tests.aot import compile_for_h200
from tests.jfp8.reference import f64, quantize, smallest_exponent

FORMATS = {"e4m3": E4M3, "e5m2": E5M2}
# The smallest subnormal of each format, from its definition.
SMALLEST = {"e4m3": 2.0**-9, "e5m2": 2.0**-16}
LARGEST = {"e4m3": 448.0, "e5m2": 57344.0}


def spread(shape: tuple[int, ...], dtype, seed: int = 0) -> jax.Array:
    """Numbers over 60 powers of two, some zero."""
    random = np.random.default_rng(seed)
    x = random.normal(size=shape) * 2.0 ** random.integers(-50, 10, shape)
    return jnp.asarray(np.where(random.random(shape) < 0.1, 0, x), dtype)


def expected(x: jax.Array, exponent: int, format: str) -> dict[str, float]:
    wide = f64(x)
    finite = np.isfinite(wide)
    kept = np.where(finite, wide, 0)
    scale = 2.0**exponent
    magnitude = np.abs(kept) / scale
    clean = jnp.asarray(np.where(finite, np.asarray(x), 0).astype(x.dtype))
    error = kept - quantize(clean, exponent, format)
    return {
        "amax": np.abs(kept).max(),
        "scale": scale,
        "saturated_count": (magnitude > LARGEST[format]).sum(),
        "underflowed_count": ((magnitude <= SMALLEST[format] / 2) & (kept != 0)).sum(),
        "nonfinite_count": (~finite).sum(),
        "count": wide.size,
        "signal": (kept**2).sum() / scale**2,
        "noise": (error**2).sum() / scale**2,
    }


@functools.cache
def measure(format: str, has_scale: bool):
    if has_scale:
        return jax.jit(lambda x, scale: inspect_tensor(x, scale, FORMATS[format]))
    return jax.jit(lambda x: inspect_tensor(x, None, FORMATS[format]))


def assert_measured(got: jax.Array, want: dict[str, float]) -> None:
    values = dict(zip(QUANTITIES, np.asarray(got, np.float64), strict=True))
    sums = {name: (values.pop(name), want.pop(name)) for name in ("signal", "noise")}
    assert values == want
    for name, (value, reference) in sums.items():
        # A float32 sum of n squares, each rounded once: n ulp at worst, a few in practice.
        assert value == pytest.approx(reference, rel=1e-5), name


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize("shape", [(48, 32), (2, 3, 5, 16)], ids=str)
def test_with_a_given_scale(format, dtype, shape):
    x = spread(shape, dtype)
    for exponent in (-20, 0, 7):
        scale = jnp.float32(2.0**exponent)
        assert_measured(measure(format, True)(x, scale), expected(x, exponent, format))


@pytest.mark.parametrize("format", FORMATS)
def test_with_the_scale_of_its_own_amax(format):
    x = spread((48, 32), jnp.bfloat16)
    exponent = smallest_exponent(np.abs(f64(x)).max(), format)
    assert_measured(measure(format, False)(x), expected(x, exponent, format))


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_non_finite_elements_are_counted_and_left_out(bad):
    clean = spread((48, 32), jnp.float32).at[3, 5].set(0).at[40, 1].set(0)
    x = clean.at[3, 5].set(bad).at[40, 1].set(bad)
    exponent = smallest_exponent(np.abs(f64(clean)).max(), "e4m3")
    got = measure("e4m3", False)(x)
    want = expected(clean, exponent, "e4m3")
    assert want["nonfinite_count"] == 0
    assert_measured(got, want | {"nonfinite_count": 2})


def test_zero_tensor():
    got = measure("e4m3", False)(jnp.zeros((16, 32)))
    assert dict(zip(QUANTITIES, np.asarray(got).tolist(), strict=True)) == {
        **dict.fromkeys(QUANTITIES, 0.0),
        "scale": 1.0,
        "count": 512.0,
    }


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bf16", "f32"])
def test_gpu_reads_the_tensor_once_and_writes_next_to_nothing(dtype):
    x = jax.ShapeDtypeStruct((8192, 4096), dtype)
    scale = jax.ShapeDtypeStruct((), jnp.float32)
    text = compile_for_h200(lambda x, s: inspect_tensor(x, s, E4M3), x, scale).as_text()
    entry = re.search(r"^ENTRY .*?^}", text, re.M | re.S).group()
    (parameter,) = re.findall(r"%(\S+) = (?:bf16|f32)\[8192,4096\]\S* parameter", entry)
    readers = [
        line
        for line in entry.splitlines()
        if re.search(rf"%{re.escape(parameter)}[,)]", line) and "bitcast(" not in line
    ]
    bitcasts = re.findall(r"%(\S+) = \S+ bitcast\(", entry)
    readers += [
        line
        for line in entry.splitlines()
        for name in bitcasts
        if re.search(rf"%{re.escape(name)}[,)]", line)
    ]
    assert len(readers) == 1, readers
    # Six sums for each group of rows, and the sums over the groups.
    written = re.findall(r"= \(?((?:\w+\[[\d,]*\]\S*,? ?)+)\)? (?:fusion|reduce)\(", entry)
    sizes = [
        int(np.prod([int(n) for n in dims.split(",") if n] or [1]))
        for line in written
        for dims in re.findall(r"\w+\[([\d,]*)\]", line)
    ]
    assert max(sizes) <= 128 * 4096 // 8, written

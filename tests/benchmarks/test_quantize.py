"""The benchmark of the quantising kernels, tried out in the CPU interpreter."""

import json

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import quantize
from pallas_kernels.quantize.contract import Quantized


def result(q):
    bits = jnp.abs(q.astype(jnp.float32)).max().view(jnp.int32)[None]
    return Quantized(q, q.T, bits)


def test_compare_counts_neighbours_wrong_transposes_and_wrong_amaxes():
    values = jnp.asarray([[1.0, -0.5], [0.0, 2.0]]).astype(jnp.float8_e4m3fn)
    next_up = jax.lax.bitcast_convert_type(
        jax.lax.bitcast_convert_type(values, jnp.uint8) + jnp.uint8(1), values.dtype
    )
    case = quantize.Case("swiglu", 2, 2)
    same = quantize.compare(result(values), result(values))
    assert same["most_values_apart"] == 0 and quantize.is_right(case, same)
    near = quantize.compare(
        result(next_up)._replace(amax_bits=result(values).amax_bits), result(values)
    )
    assert near["most_values_apart"] == 1 and near["elements_that_differ"] == 4
    assert quantize.is_right(case, near)
    assert not quantize.is_right(quantize.Case("cast", 2, 2), near)
    wrong = quantize.compare(result(values)._replace(q_t=values), result(values))
    assert wrong["q_t_is_not_q_transposed"] == 2 and not quantize.is_right(case, wrong)
    amax = quantize.compare(result(2 * values), result(values))
    assert not amax["amax_is_close"]


def test_bytes_by_hand():
    assert quantize.Case("cast", 10, 10).bytes == 400
    assert quantize.Case("cast_weight", 10, 10).bytes == 600
    assert quantize.Case("swiglu_gradient", 10, 10).bytes == 1000


def test_tiny_run_writes_checked_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(quantize, "_REPEATS", 1)
    path = tmp_path / "quantize.json"
    assert quantize.main(["--tiny", "--only", "swiglu", "--output", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    names = [row["contender"] for row in rows]
    assert names[0] == "xla" and names[-1] == "copy" and "mosaic" in names[1]
    for row in rows:
        assert row["median_ms"] > 0 and len(row["times_ms"]) == 1
        np.testing.assert_allclose(
            row["gb_per_s"],
            (4 if row["contender"] == "copy" else 6) * 128 * 128 / row["median_ms"] / 1e6,
        )
        assert row.get("is_right", True)

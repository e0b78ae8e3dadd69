"""The benchmark of the FP8 GEMM, tried out in the CPU interpreter."""

import json

import jax.numpy as jnp
import numpy as np

from benchmarks import matmul


def test_the_cases_are_the_twelve_gemms_of_a_block():
    assert len(matmul.CASES) == 12
    block = 4096 * 6144 + 4096 * 4096 + 4096 * 28672 + 14336 * 4096
    assert sum(case.flops for case in matmul.CASES) == 3 * 2 * 16384 * block
    by_kind = {case.kind: case for case in matmul.CASES if case.name == "down"}
    assert [(c.m, c.n, c.k) for c in by_kind.values()] == [
        (16384, 4096, 14336),
        (16384, 14336, 4096),
        (14336, 4096, 16384),
    ]
    assert matmul.Case("", "fwd", 10, 20, 30).flops == 12000


def test_relative_error_by_hand():
    left, right = (jnp.ones(shape).astype(jnp.float8_e4m3fn) for shape in ((2, 4), (3, 4)))
    got = jnp.full((2, 3), 4 * matmul._SCALE).at[0, 0].mul(1.5)
    np.testing.assert_allclose(matmul.relative_error(left, right, got), 0.5 / np.sqrt(6), rtol=1e-6)


def row(contender, median_ms, is_right=True, **fields):
    shape = dict(name="qkv", kind="fwd", m=16384, n=6144, k=4096)
    return shape | dict(contender=contender, median_ms=median_ms, is_right=is_right) | fields


def test_summary_takes_the_fastest_right_config():
    config = dict(tile_m=128, tile_n=128)
    rows = [
        row("cublaslt fast", 0.6),
        row("mosaic fast a", 0.3, is_right=False),
        row("mosaic fast b", 0.5, config=config),
        row("mosaic fast c", 0.7, config=dict(tile_m=256)),
        dict(row("mosaic fast d", 0.1), is_right=None, error="no"),
    ]
    assert matmul.summary(matmul.CASES[:1], rows).splitlines() == [
        "fwd cublaslt fast: 3.6 ms a step",
        "fwd mosaic fast: 3.0 ms a step",
        "(16384, 4096, 6144): MatmulConfig(tile_m=128, tile_n=128),",
    ]


def test_tiny_run_writes_checked_rows(tmp_path, monkeypatch):
    configs = {"fast": [matmul.MatmulConfig()], "exact": [matmul.candidates("exact")[0]]}
    configs["exact"].append(matmul.MatmulConfig(stages=9))
    monkeypatch.setattr(matmul, "candidates", configs.get)
    monkeypatch.setattr(matmul, "_REPEATS", 1)
    monkeypatch.setattr(matmul, "prepare_environment", lambda: None)
    path = tmp_path / "matmul.json"
    assert matmul.main(["--tiny", "--only", "dgrad", "--output", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [r["contender"].split()[:2] for r in rows] == [
        [name, accumulation]
        for name, accumulation in (
            *(("cublaslt", "exact"), ("cublaslt", "fast")),
            *(("mosaic", "exact"), ("mosaic", "exact"), ("mosaic", "fast")),
        )
    ]
    assert "do not fit" in rows.pop(3)["rejected"]
    for r in rows:
        assert r["is_right"] and len(r["times_ms"]) == 1
        np.testing.assert_allclose(r["tflops"], 2 * 256 * 128 * 256 / r["median_ms"] / 1e9)

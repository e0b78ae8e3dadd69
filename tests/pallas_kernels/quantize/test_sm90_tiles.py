"""The tile loop: what ptxas makes of every shipped config, and its shared memory by hand."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import hardware
from pallas_kernels.quantize import sm90, sm90_plan
from pallas_kernels.quantize.sm90_plan import TileConfig
from tests.pallas_kernels.compile_gate import ptxas_report

COMPILED = [
    (input_dtype, dtype, layouts, config)
    for input_dtype in (jnp.bfloat16, jnp.float32)
    for config in sm90.candidates(jnp.dtype(input_dtype).itemsize)
    for dtype, layouts in [(jnp.float8_e4m3fn, "both")]
] + [
    (jnp.bfloat16, jnp.float8_e5m2, "both", TileConfig()),
    (jnp.bfloat16, jnp.float8_e5m2, "columns", TileConfig()),
    (jnp.float16, jnp.float8_e4m3fn, "rows", TileConfig()),
]


def plan_of(shape, input_dtype, dtype=jnp.float8_e4m3fn, layouts="both", config=None):
    x = jax.ShapeDtypeStruct(shape, input_dtype)
    return sm90.make_plan(x, dtype=dtype, layouts=layouts, config=config)


@pytest.mark.parametrize("case", COMPILED, ids=lambda c: f"{c[0].__name__}-{c[1].__name__}-{c[2:]}")
def test_compiles_for_sm90a_without_spills(case):
    input_dtype, dtype, layouts, config = case
    with hardware.assume_device_kind("NVIDIA H200"):
        plan = plan_of((4096, 2048), input_dtype, dtype, layouts, config)
        reason = sm90.unsupported_reason(plan)
        if reason is not None:
            assert "bytes of shared memory" in reason
            return
        report = ptxas_report(
            functools.partial(sm90.quantize, dtype=dtype, layouts=layouts, config=config),
            jax.ShapeDtypeStruct((4096, 2048), input_dtype),
            jax.ShapeDtypeStruct((), jnp.float32),
        )
    assert report.spilled_bytes == 0, report.text


def test_shared_memory_by_hand():
    with hardware.assume_device_kind("NVIDIA H200"):
        plan = plan_of((4096, 2048), jnp.bfloat16, config=TileConfig(tile_columns=128))
    tile = 128 * 128
    barriers = 8 * (2 + 1)
    # Two warpgroups: 16 bits in, q and q_t out; the row maxima; what Mosaic GPU adds.
    assert sm90_plan.smem_bytes(plan) == 2 * (2 + 1 + 1) * tile + 1024 + barriers + 2176


def test_small_work_starts_no_idle_programs():
    with hardware.assume_device_kind("NVIDIA H200"):
        assert plan_of((256, 384), jnp.bfloat16).programs == 3  # 6 tiles, 2 warpgroups
        assert plan_of((16384, 4096), jnp.bfloat16).programs == 132

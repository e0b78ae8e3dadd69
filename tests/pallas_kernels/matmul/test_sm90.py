"""The Mosaic product: exact in the interpreter, also with a late warpgroup; compiles for sm_90a."""

import dataclasses
import functools
import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call, shared_memory

from pallas_kernels import fp8_matmul, hardware
from pallas_kernels.matmul import sm90
from pallas_kernels.matmul.api import matmul_mosaic
from pallas_kernels.matmul.config import (
    TUNED_H200,
    MatmulConfig,
    MatmulPlan,
    candidates,
    config_for,
    rejection,
    scratch_types,
    smem_bytes,
    unsupported_reason,
)
from tests.pallas_kernels.compile_gate import ptxas_report
from tests.pallas_kernels.matmul.reference import E4M3, E5M2, integers, normal, product, rounded

SCALE = jnp.float32(2.0**-3)
# Of configs/llama_8b_slice_fp8.toml, forward: m, n, k of qkv, out, gate_up, down.
STEP = [(16384, 6144, 4096), (16384, 4096, 4096), (16384, 28672, 4096), (16384, 4096, 14336)]


def make_plan(m, n, k, config, *, lhs=E4M3, rhs=E4M3, out=jnp.bfloat16, **options):
    return MatmulPlan(
        m=m, n=n, k=k, lhs_dtype=lhs, rhs_dtype=rhs, out_dtype=out, config=config, **options
    )


def interpreted(plan):
    lhs = integers(0, plan.m, plan.k, plan.lhs_dtype)
    rhs_t = integers(1, plan.n, plan.k, plan.rhs_dtype)
    assert unsupported_reason(plan) is None
    got = sm90.launch(dataclasses.replace(plan, interpret=True), lhs, rhs_t, SCALE)
    want = rounded(product(lhs, rhs_t, SCALE), plan.out_dtype)
    np.testing.assert_array_equal(np.asarray(got, np.float64), want.astype(np.float64))


COOPERATIVE = MatmulConfig(tile_m=128, tile_n=64, stages=2, group=2)
PINGPONG = MatmulConfig(tile_m=64, tile_n=64, stages=3, schedule="pingpong", out_slots=1)
PLANS = {
    "two_accumulators": make_plan(
        264, 128, 256, dataclasses.replace(COOPERATIVE, tile_m=256), sm_count=1, out=jnp.float32
    ),
    "ragged_e5m2_lhs": make_plan(
        136, 192, 384, dataclasses.replace(COOPERATIVE, tile_n=128), sm_count=2, lhs=E5M2
    ),
    "pingpong_odd_tiles_e5m2_rhs": make_plan(
        192, 64, 512, dataclasses.replace(PINGPONG, group_axis=1), sm_count=1, rhs=E5M2
    ),
    "cluster_one_step": make_plan(
        256, 128, 128, dataclasses.replace(COOPERATIVE, cluster=2), sm_count=2
    ),
    "exact": make_plan(
        136, 192, 768, dataclasses.replace(COOPERATIVE, tile_n=128), accumulation="exact"
    ),
    "exact_pingpong": make_plan(192, 64, 256, PINGPONG, sm_count=1, accumulation="exact"),
    "cluster_pingpong": make_plan(
        256, 192, 256, dataclasses.replace(PINGPONG, cluster=2), sm_count=4
    ),
}


@pytest.mark.parametrize("name", PLANS)
def test_interpreted(name):
    interpreted(PLANS[name])
    assert not interpret_pallas_call.get_races().races_found


@pytest.mark.parametrize("late", [0, 1, 2], ids=["compute_0", "compute_1", "producer"])
@pytest.mark.parametrize(
    ("config", "accumulation"),
    [(COOPERATIVE, "fast"), (PINGPONG, "fast"), (COOPERATIVE, "exact")],
    ids=["cooperative", "pingpong", "exact"],
)
def test_a_late_warpgroup_changes_nothing(config, accumulation, late, monkeypatch):
    wait = shared_memory.Barrier.wait

    def late_wait(barrier, thread, *args, **kwargs):
        if thread.warpgroup_id == late:
            time.sleep(0.005)
        return wait(barrier, thread, *args, **kwargs)

    monkeypatch.setattr(shared_memory.Barrier, "wait", late_wait)
    # More steps than buffers.
    interpreted(make_plan(192, 128, 768, config, sm_count=1, accumulation=accumulation))


def test_smem_is_what_is_allocated():
    plan = make_plan(256, 256, 256, MatmulConfig(tile_m=128, tile_n=128, stages=3, out_slots=1))
    # 3 stages of 16 + 16 KiB, 8 KiB for each of two warpgroups, 6 barriers and Mosaic's own.
    assert smem_bytes(plan) == 3 * 32768 + 2 * 8192 + 6 * 8 + 2048 + 128
    assert scratch_types(plan).out.shape == (2, 1, 64, 64)
    cluster = dataclasses.replace(plan, config=dataclasses.replace(plan.config, cluster=2))
    assert smem_bytes(cluster) == smem_bytes(plan)


def test_every_step_shape_has_a_config_that_it_can_use_and_candidates():
    for m, n, k in STEP:
        for out, accumulation in itertools.product((jnp.bfloat16, jnp.float32), ("fast", "exact")):
            config = config_for(m, n, k, out, accumulation)
            plan = make_plan(m, n, k, config, out=out, accumulation=accumulation)
            assert unsupported_reason(plan) is None
            for candidate in candidates(accumulation):
                assert rejection(dataclasses.replace(plan, config=candidate)) is None
    for (m, n, k), config in TUNED_H200.items():
        assert unsupported_reason(make_plan(m, n, k, config)) is None


@pytest.mark.parametrize(
    ("shape", "config", "reason"),
    [
        ((100, 128, 128), {}, "100 rows of lhs must be a multiple of 8; pad them"),
        ((128, 96, 128), {}, "96 rows of rhs_t must be a multiple of 64; pad them"),
        ((128, 128, 192), {}, "192 contracted elements must be a multiple of 128"),
        ((2**20, 4096, 4096), {}, "does not fit int32; split the rows"),
        ((128, 128, 128), dict(stages=9), "bytes of shared memory; there are 232448"),
        ((128, 128, 128), dict(tile_m=256), "128 x 256 sums of a warpgroup do not fit its"),
        ((128, 128, 128), dict(cluster=2), "2 CTAs with 128 rows each have more than the 128"),
    ],
)
def test_reasons(shape, config, reason):
    assert reason in unsupported_reason(make_plan(*shape, MatmulConfig(**config)))


@pytest.mark.parametrize(
    "fields",
    [
        dict(stages=1),
        dict(group=0),
        dict(out_slots=0),
        dict(schedule="both"),
        dict(cluster=3),
        dict(tile_m=64),
        dict(tile_m=192),
        dict(tile_n=100),
        dict(tile_n=320),
    ],
)
def test_config_rejects(fields):
    with pytest.raises(ValueError, match=f"MatmulConfig.*{next(iter(fields))}"):
        MatmulConfig(**fields)


def structs(m, n, k, lhs=E4M3, rhs=E4M3):
    struct = jax.ShapeDtypeStruct
    return struct((m, k), lhs), struct((n, k), rhs), struct((), jnp.float32)


def compiled_configs():
    """One of each kernel body: the order of tiles is the same code."""
    for config in candidates():
        is_first_order = (config.group, config.group_axis) == (8, 0)
        if is_first_order and (config.cluster == 1 or config.tile_n == 256):
            yield config
    yield config_for(1024, 1024, 1024, jnp.bfloat16)
    yield from TUNED_H200.values()


@pytest.mark.parametrize("config", list(dict.fromkeys(compiled_configs())), ids=str)
def test_compiles_for_sm90a_without_spills(config):
    m, n, k = STEP[0]
    with hardware.assume_device_kind("NVIDIA H200"):
        run = functools.partial(matmul_mosaic, out_dtype=jnp.bfloat16, config=config)
        report = ptxas_report(run, *structs(m, n, k))
    assert report.spilled_bytes == 0 and not report.serialised_wgmmas, report.text


@pytest.mark.parametrize(
    ("lhs", "rhs", "out", "accumulation"),
    [
        (E5M2, E4M3, jnp.float32, "fast"),
        (E4M3, E5M2, jnp.bfloat16, "exact"),
        (E5M2, E4M3, jnp.float32, "exact"),
    ],
)
def test_other_types_compile_for_sm90a_without_spills(lhs, rhs, out, accumulation):
    m, n, k = STEP[3]
    with hardware.assume_device_kind("NVIDIA H200"):
        run = functools.partial(matmul_mosaic, out_dtype=out, accumulation=accumulation)
        report = ptxas_report(run, *structs(m, n, k, lhs, rhs))
    assert report.spilled_bytes == 0 and not report.serialised_wgmmas, report.text


@pytest.mark.parametrize("shape", STEP, ids=str)
def test_lowers_for_cuda_at_the_steps_shapes(shape):
    with hardware.assume_device_kind("NVIDIA H200"):
        run = functools.partial(fp8_matmul, implementation="mosaic")
        lowered = jax.jit(run).trace(*structs(*shape)).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("custom_call @mosaic_gpu") == 1


def errors(m, n, k, lhs, rhs, **options):
    """Relative errors of the kernel and of cuBLASLt with the same accumulation."""
    x, y = normal(0, m, k, lhs), normal(1, n, k, rhs)
    exact = product(x, y, SCALE)
    results = [
        fp8_matmul(x, y, SCALE, implementation=name, **options) for name in ("mosaic", "xla")
    ]
    return [
        np.linalg.norm(np.asarray(r, np.float64) - exact) / np.linalg.norm(exact) for r in results
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("formats", [(E4M3, E4M3), (E5M2, E4M3), (E4M3, E5M2)], ids=str)
@pytest.mark.parametrize("out", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("shape", [(1024, 1536, 4096), (1032, 576, 768)], ids=str)
@pytest.mark.parametrize("accumulation", ["fast", "exact"])
def test_gpu_is_as_accurate_as_cublaslt(shape, formats, out, accumulation):
    ours, cublaslt = errors(*shape, *formats, out_dtype=out, accumulation=accumulation)
    assert ours <= 2 * cublaslt, (ours, cublaslt)


@pytest.mark.gpu
@pytest.mark.parametrize("accumulation", ["fast", "exact"])
def test_gpu_every_candidate_gives_the_same_bits_every_time(accumulation):
    m, n, k = 2048, 3072, 4096
    x, y = normal(0, m, k, E4M3), normal(1, n, k, E4M3)
    want = None
    for config in candidates(accumulation):
        run = functools.partial(matmul_mosaic, accumulation=accumulation, config=config)
        for _ in range(3):
            got = run(x, y, SCALE, out_dtype=jnp.bfloat16)
            bits = np.asarray(got).view(np.uint16)
            want = bits if want is None else want
            np.testing.assert_array_equal(bits, want, err_msg=str(config))

"""The sm_90a forward kernel: interpreted against float64, lowered, and compiled for the H200."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

from pallas_kernels import flash_attention, hardware
from pallas_kernels.flash_attention import sm90, sm90_fwd_plan, tuning
from pallas_kernels.flash_attention.config import AttentionSpec, ForwardConfig
from pallas_kernels.flash_attention.masks import make_band
from pallas_kernels.reference import attention_reference
from tests.pallas_kernels.cases import Case
from tests.pallas_kernels.compile_gate import ptxas_report


def spec_of(case, dtype="bfloat16"):
    return AttentionSpec(
        batch_size=case.b,
        query_length=case.t,
        key_length=case.s,
        num_heads=case.n,
        num_kv_heads=case.k,
        head_dim=case.h,
        dtype=dtype,
        band=make_band(case.is_causal, case.window, case.t, case.s),
        has_segments=bool(case.segments),
        softmax_scale=case.softmax_scale or case.h**-0.5,
        return_lse=True,
        precision="bf16",
    )


SMALL = ForwardConfig(block_kv=64)
INTERPRETED = [
    (Case(name="full", b=1, t=128, s=192, n=2, k=1, h=64), SMALL),
    (Case(name="causal_ragged", b=1, t=200, s=200, n=2, k=1, h=64, is_causal=True), SMALL),
    (
        Case(name="window_t_over_s", b=1, t=300, s=130, n=1, k=1, h=64, window=(50, 20)),
        ForwardConfig(block_kv=64, reuse_q_smem=True, num_stages=3),
    ),
    (
        Case(name="packed", b=2, t=160, s=160, n=1, k=1, h=64, is_causal=True, segments="packed"),
        ForwardConfig(block_kv=64, overlap=False),
    ),
    (
        Case(name="padded", b=1, t=130, s=130, n=1, k=1, h=64, segments="padded"),
        ForwardConfig(block_kv=64, compute_warpgroups=3),
    ),
    (
        Case(name="one_warpgroup_mqa", b=1, t=60, s=100, n=3, k=1, h=64, is_causal=True),
        ForwardConfig(block_kv=64, compute_warpgroups=1, ping_pong=False),
    ),
    (Case(name="head_dim_128", b=1, t=64, s=256, n=1, k=1, h=128), ForwardConfig()),
]


@pytest.mark.parametrize(("case", "config"), INTERPRETED, ids=[str(c) for c, _ in INTERPRETED])
def test_interpreted_kernel_is_right_and_free_of_races(case, config, monkeypatch):
    # Three CTAs, so that one of them walks through several tiles.
    monkeypatch.setattr(sm90, "sm_count", lambda: 3)
    q, k, v, *_ = case.arrays(jnp.bfloat16)
    expected = case.expected(q, k, v)
    spec = spec_of(case)
    ids = [None if x is None else jnp.asarray(x) for x in case.segment_ids()]
    out, lse = sm90.forward(q, k, v, *ids, spec, config=config, interpret=True)
    assert not interpret_pallas_call.get_races().races_found
    twin, _ = attention_reference(
        q,
        k,
        v,
        softmax_scale=spec.softmax_scale,
        band=spec.band,
        q_segment_ids=ids[0],
        kv_segment_ids=ids[1],
    )
    error = np.abs(np.asarray(out, np.float64) - expected.out).max()
    assert error <= 2 * np.abs(np.asarray(twin, np.float64) - expected.out).max()
    lse = np.asarray(lse)[:, :, : case.t].transpose(0, 2, 1)
    np.testing.assert_allclose(lse, expected.lse, atol=1e-5)


# The shapes of benchmarks/attention.py.
BENCHMARK = [
    Case(name="8x2048", b=8, t=2048, s=2048, n=16, k=16, h=128, is_causal=True),
    Case(name="2x8192", b=2, t=8192, s=8192, n=16, k=16, h=128, is_causal=True),
    Case(name="2x8192_full", b=2, t=8192, s=8192, n=16, k=16, h=128),
    Case(name="2x8192_gqa", b=2, t=8192, s=8192, n=32, k=8, h=128, is_causal=True),
    Case(name="window", b=2, t=8192, s=8192, n=32, k=8, h=128, is_causal=True, window=(1024, 0)),
    Case(name="packed", b=2, t=8192, s=8192, n=32, k=8, h=128, is_causal=True, segments="packed"),
    Case(name="head_dim_64", b=2, t=8192, s=8192, n=32, k=32, h=64, is_causal=True),
    Case(name="head_dim_256", b=2, t=8192, s=8192, n=8, k=8, h=256, is_causal=True),
    Case(name="odd_lengths", b=1, t=1234, s=4321, n=6, k=3, h=128, is_causal=True),
    Case(name="cross", b=1, t=300, s=1000, n=4, k=2, h=128),
    Case(name="packed_full", b=2, t=1024, s=1024, n=4, k=2, h=64, segments="packed"),
]


def arguments(case, dtype=jnp.bfloat16):
    """Returns the shapes of q, k, v and the segment ids."""
    q = jax.ShapeDtypeStruct((case.b, case.t, case.n, case.h), dtype)
    kv = jax.ShapeDtypeStruct((case.b, case.s, case.k, case.h), dtype)
    if not case.segments:
        return (q, kv, kv)
    ids = [jax.ShapeDtypeStruct((case.b, length), jnp.int32) for length in (case.t, case.s)]
    return (q, kv, kv, *ids)


def attend(case):
    """Returns flash_attention of a case as a function of arrays alone."""

    def run(q, k, v, q_ids=None, kv_ids=None):
        return flash_attention(
            q,
            k,
            v,
            is_causal=case.is_causal,
            local_window_size=case.window,
            q_segment_ids=q_ids,
            kv_segment_ids=kv_ids,
            implementation="mosaic",
            return_lse=True,
        )

    return run


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("case", BENCHMARK, ids=str)
def test_lowers_for_cuda(case, dtype):
    with hardware.assume_device_kind("NVIDIA H200"):
        traced = jax.jit(attend(case)).trace(*arguments(case, dtype))
        assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


def compile_cases():
    """Every shipped config with its mask, and the two masks that share them."""
    for head_dim, mask in tuning.tuned_forward_configs():
        yield Case(
            name=f"{head_dim}_{mask}", b=2, t=4096, s=4096, h=head_dim, is_causal=mask == "causal"
        )
    yield Case(name="packed", b=2, t=4096, s=4096, h=128, is_causal=True, segments="packed")
    yield Case(name="packed_full", b=2, t=1024, s=1024, h=64, segments="packed")
    yield Case(name="cross_ragged", b=1, t=300, s=1000, h=128)
    yield Case(name="window", b=2, t=4001, s=4001, h=128, window=(512, 100))


@pytest.mark.parametrize("case", list(compile_cases()), ids=str)
def test_compiles_for_sm90a_without_spills_or_serialised_wgmmas(case):
    with hardware.assume_device_kind("NVIDIA H200"):
        report = ptxas_report(attend(case), *arguments(case))
    assert report.spilled_bytes == 0, report.text
    assert not report.serialised_wgmmas, report.text


def test_block_ranges_by_hand():
    case = Case(name="packed", b=1, t=8, s=8, n=1, k=1, h=64, is_causal=True, segments="packed")
    # Tiles of 2 queries, blocks of 2 keys; documents are positions 0-2, 3-5 and 6-7.
    ids = jnp.asarray([[[0, 0], [0, 1], [1, 1], [2, 2]]], jnp.int32)
    ranges = sm90.block_ranges(ids, ids, spec_of(case))[0]
    np.testing.assert_array_equal(ranges[:, :2], [[0, 1], [0, 2], [1, 3], [3, 4]])
    # Causal: no diagonal block is whole, and no other block holds a single shared document.
    assert all(start >= stop or start >= 4 for start, stop in np.asarray(ranges[:, 2:]))


def test_block_ranges_find_whole_blocks_and_empty_tiles():
    case = Case(name="x", b=1, t=4, s=8, n=1, k=1, h=64, segments="packed")
    q_ids = jnp.asarray([[[5, 5], [9, 9]]], jnp.int32)
    kv_ids = jnp.asarray([[[4, 5], [5, 5], [5, 5], [5, 6]]], jnp.int32)
    ranges = np.asarray(sm90.block_ranges(q_ids, kv_ids, spec_of(case))[0])
    np.testing.assert_array_equal(ranges[0], [0, 4, 1, 3])
    assert ranges[1, 1] - ranges[1, 0] == 1, "a tile that sees nothing runs one masked block"


UNEQUAL = [
    Case(name="2x8192", b=2, t=8192, s=8192, n=16, k=16, h=128, is_causal=True),
    Case(name="gqa", b=2, t=8192, s=8192, n=32, k=8, h=128, is_causal=True),
    Case(name="8x2048", b=8, t=2048, s=2048, n=16, k=16, h=128, is_causal=True),
    Case(name="packed", b=3, t=1000, s=900, n=6, k=3, h=64, segments="packed"),
]


@pytest.mark.parametrize("case", UNEQUAL, ids=str)
def test_schedule_deals_out_every_tile_once_and_evenly(case):
    plan = sm90_fwd_plan.Plan(spec=spec_of(case), config=ForwardConfig(), sm_count=132)
    assert plan.has_schedule
    schedule = sm90_fwd_plan.make_schedule(plan)
    rows = [row[1 : 1 + row[0]] for row in schedule]
    assert sorted(np.concatenate(rows)) == list(range(case.b * case.n * -(-case.t // 128)))
    assert schedule.shape[1] % 32 == 0
    # By hand for a causal square: tile i of a head has i + 1 blocks of 128 keys, longest first.
    heads = plan.heads_per_section
    assert heads % (case.n // case.k) == 0
    assert heads == case.n // case.k or heads // (case.n // case.k) * case.s * case.h * 4 <= 2**25
    if case.is_causal:
        q_tiles = case.t // 128
        work = [sum(q_tiles - i % (heads * q_tiles) // heads + 1.5 for i in row) for row in rows]
        assert max(work) <= 1.02 * sum(work) / len(work)


def test_no_schedule_where_tiles_are_alike_or_too_many():
    alike = Case(name="x", b=2, t=8192, s=8192, n=16, k=16, h=128)
    many = Case(name="x", b=64, t=32768, s=32768, n=64, k=8, h=128, is_causal=True)
    for case, heads in ((alike, 1), (many, 64 * 64)):
        plan = sm90_fwd_plan.Plan(spec=spec_of(case), config=ForwardConfig(), sm_count=132)
        assert not plan.has_schedule
        assert plan.heads_per_section == heads


def test_shared_memory_of_the_default_config_by_hand():
    case = Case(name="x", b=1, t=128, s=128, n=1, k=1, h=128)
    plan = sm90_fwd_plan.Plan(spec=spec_of(case), config=ForwardConfig(), sm_count=132)
    tile = 128 * 128 * 2  # 128 rows of 128 bf16
    barriers = 8 * (1 + 2 + 2 + 1 + 2 + 2 + 2)
    # Q, out, 2 stages of K and V; and what Mosaic GPU adds.
    assert sm90_fwd_plan.smem_bytes(plan) == 6 * tile + barriers + 2176


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(compute_warpgroups=4), "compute_warpgroups=4 must be one of"),
        (dict(block_kv=96), "block_kv=96 must be 64, 128, 192 or 256"),
        (dict(num_stages=1), "num_stages=1 must be at least 2"),
    ],
)
def test_config_rejects(options, message):
    with pytest.raises(ValueError, match=message):
        ForwardConfig(**options)


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((1, 64, 2, 64), jnp.float32, "q.dtype=float32 is not one of"),
        ((1, 64, 2, 80), jnp.bfloat16, r"q.shape\[3\]=80 is not one of .64, 128, 256."),
    ],
)
def test_refuses_with_the_reason(shape, dtype, message):
    x = jnp.zeros(shape, dtype)
    with (
        hardware.assume_device_kind("NVIDIA H200"),
        pytest.raises(NotImplementedError, match=message),
    ):
        flash_attention(x, x, x, implementation="mosaic")


def test_every_candidate_is_accepted_or_has_a_reason():
    case = Case(name="x", b=2, t=8192, s=8192, n=16, k=16, h=128, is_causal=True)
    candidates = tuning.forward_candidates(spec_of(case))
    accepted = [config for config, reason in candidates if reason is None]
    assert tuning.forward_config(spec_of(case)) in accepted
    assert all(reason is None or len(reason) > 10 for _, reason in candidates)

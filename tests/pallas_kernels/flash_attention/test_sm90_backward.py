"""The sm_90a backward kernel: interpreted against float64, lowered, and compiled for the H200."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

from pallas_kernels import flash_attention, hardware
from pallas_kernels.flash_attention import (
    sm90,
    sm90_bwd_bf16,
    sm90_bwd_loop,
    sm90_bwd_plan,
    tuning,
)
from pallas_kernels.flash_attention.config import BackwardConfig
from pallas_kernels.flash_attention.sm90_bwd_loop import Loop
from pallas_kernels.reference import attention_reference
from tests.pallas_kernels.cases import Case
from tests.pallas_kernels.compile_gate import ptxas_report
from tests.pallas_kernels.flash_attention.test_sm90_forward import BENCHMARK, arguments, spec_of

GRADIENTS = ("dq", "dk", "dv")
# Bytes; the report names each store and each load twice.
SCALARS_OF_A_TILE = 256
AN_ADDRESS = 16


def gradients_of_twin(case, arrays):
    """Returns the gradients of the same-precision reference."""
    q, k, v, dout, dlse = arrays
    spec = spec_of(case)
    q_ids, kv_ids = case.segment_ids()
    twin = functools.partial(
        attention_reference,
        softmax_scale=spec.softmax_scale,
        band=spec.band,
        q_segment_ids=q_ids,
        kv_segment_ids=kv_ids,
    )

    @jax.jit
    def run(q, k, v):
        return jax.vjp(twin, q, k, v)[1]((dout, dlse))

    return run(q, k, v)


def interpreted(case, config, arrays, expected, deterministic=None):
    """Returns the kernel's gradients, from the oracle's output and log-sum-exp."""
    spec = dataclasses.replace(spec_of(case), deterministic=deterministic)
    q, k, v, dout, dlse = arrays
    ids = [None if x is None else jnp.asarray(x) for x in case.segment_ids()]
    out, lse = jnp.asarray(expected.out, q.dtype), jnp.asarray(expected.lse, jnp.float32)
    return sm90.backward(q, k, v, *ids, out, lse, dout, dlse, spec, config=config, interpret=True)


LATE_DQ = BackwardConfig(overlap=False, late_dq=True)
SPLIT = BackwardConfig(split_channels=True, num_do_stages=1)
CAUSAL_GQA = Case(name="causal_gqa", b=1, t=72, s=136, n=2, k=1, h=128, is_causal=True)
INTERPRETED = [  # case, config, deterministic
    (Case(name="full", b=1, t=128, s=256, n=1, k=1, h=64), BackwardConfig(block_q=128), True),
    (Case(name="full_gqa", b=1, t=200, s=256, n=2, k=1, h=64), BackwardConfig(), None),
    (CAUSAL_GQA, BackwardConfig(), True),
    (CAUSAL_GQA, BackwardConfig(), None),
    (CAUSAL_GQA, LATE_DQ, None),
    (Case(name="full", b=1, t=192, s=128, n=1, k=1, h=128), LATE_DQ, None),
    (
        Case(name="window_t_over_s", b=1, t=200, s=70, n=1, k=1, h=128, window=(50, 20)),
        BackwardConfig(overlap=False),
        None,
    ),
    (
        Case(name="padded", b=2, t=130, s=130, n=1, k=1, h=128, segments="padded"),
        BackwardConfig(num_q_stages=3),
        True,
    ),
    (
        Case(name="split", b=1, t=65, s=128, n=1, k=1, h=256, is_causal=True, segments="packed"),
        SPLIT,
        True,
    ),
]


@pytest.mark.parametrize(
    ("case", "config", "deterministic"),
    INTERPRETED,
    ids=[f"{case}{'_in_order' * bool(order)}" for case, _, order in INTERPRETED],
)
def test_interpreted_kernel_is_right_and_free_of_races(case, config, deterministic, monkeypatch):
    # One CTA, so that it walks through several tiles.
    monkeypatch.setattr(sm90, "sm_count", lambda: 1)
    arrays = case.arrays(jnp.bfloat16)
    expected = case.expected(*arrays)
    got = interpreted(case, config, arrays, expected, deterministic)
    assert not interpret_pallas_call.get_races().races_found
    twin = gradients_of_twin(case, arrays)
    for name, x, y in zip(GRADIENTS, got, twin, strict=True):
        want = getattr(expected, name)
        error, error_of_twin = (np.abs(np.asarray(a, np.float64) - want).max() for a in (x, y))
        # Both round their results to bfloat16 last, by up to half a unit.
        half_a_unit = 2.0**-9 * np.abs(want).max()
        assert error <= 2 * error_of_twin + half_a_unit, name


def gradient(case, deterministic=None):
    """Returns the gradients of flash_attention as a function of arrays alone."""

    def loss(q, k, v, q_ids=None, kv_ids=None):
        out, lse = flash_attention(
            q,
            k,
            v,
            is_causal=case.is_causal,
            local_window_size=case.window,
            q_segment_ids=q_ids,
            kv_segment_ids=kv_ids,
            implementation="mosaic",
            deterministic=deterministic,
            return_lse=True,
        )
        return out.astype(jnp.float32).sum() + lse.sum()

    return jax.grad(loss, argnums=(0, 1, 2))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("case", BENCHMARK, ids=str)
def test_lowers_for_cuda(case, dtype):
    with hardware.assume_device_kind("NVIDIA H200"):
        traced = jax.jit(gradient(case)).trace(*arguments(case, dtype))
        assert "flash_attention_bwd" in traced.lower(lowering_platforms=("cuda",)).as_text()


def compile_cases():
    """Every shipped config with its mask, grouped heads, single heads and ragged lengths."""
    for head_dim, mask in tuning.tuned_backward_configs():
        if mask.endswith("in order"):
            continue  # by its mask, in the deterministic mode
        window = (512, 100) if mask == "window" else None
        case = Case(name=f"{head_dim}_{mask}", b=2, t=4096, s=4096, h=head_dim, window=window)
        case = dataclasses.replace(case, is_causal=mask == "causal")
        yield case
        if head_dim < 256:
            yield dataclasses.replace(case, name=f"{case.name}_mha", k=case.n)
        if head_dim == 128:
            yield dataclasses.replace(case, name=f"{case.name}_32_8", n=32, k=8)
    for head_dim in (64, 128, 256):
        yield Case(
            name=f"{head_dim}_packed",
            b=2,
            t=4001,
            s=4001,
            h=head_dim,
            is_causal=True,
            segments="packed",
        )


def ptxas_of_backward(case, deterministic, config=None):
    """Returns ptxas's report on the kernel alone; `sm90_bwd_rows` has a test of its own."""
    spec = dataclasses.replace(spec_of(case), deterministic=deterministic)
    plan = plan_of(case, config or tuning.backward_config(spec), 132, deterministic)
    q, k, v, *ids = arguments(case)
    q, k, v = (jax.eval_shape(sm90.pad_length, x) for x in (q, k, v))
    segments = ()
    if ids:
        pad = functools.partial(sm90._backward_segment_operands, plan)
        segments = jax.eval_shape(pad, *ids)
    length = plan.padded_query_length
    numbers = jax.ShapeDtypeStruct((case.b, case.n, length), jnp.float32)
    dq = jax.ShapeDtypeStruct((case.b, length, case.n, case.h), jnp.float32)
    launch = functools.partial(sm90_bwd_bf16.launch, plan=plan)
    return ptxas_report(launch, q, k, v, q, numbers, numbers, segments, dq)


@pytest.mark.parametrize("deterministic", [True, False], ids=["deterministic", "any_order"])
@pytest.mark.parametrize("case", list(compile_cases()), ids=str)
def test_compiles_for_sm90a_without_spills_or_serialised_wgmmas(case, deterministic):
    with hardware.assume_device_kind("NVIDIA H200"):
        report = ptxas_of_backward(case, deterministic)
    # Head dim 256 keeps a few scalars of its tile on the stack, outside the loop over queries; four
    # query heads to a key head in a window, one address.
    allowed = SCALARS_OF_A_TILE if case.h == 256 and deterministic else 0
    if case.name == "128_window_32_8" and not deterministic:
        allowed = AN_ADDRESS
    assert report.spilled_bytes <= allowed, report.text
    assert not report.serialised_wgmmas, report.text


@pytest.mark.parametrize("k", [16, 4])
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
def test_late_dq_compiles_for_sm90a_without_spills_or_serialised_wgmmas(is_causal, k):
    case = Case(name="late_dq", b=2, t=8192, s=8192, n=16, k=k, h=128, is_causal=is_causal)
    with hardware.assume_device_kind("NVIDIA H200"):
        report = ptxas_of_backward(case, deterministic=False, config=LATE_DQ)
    assert report.spilled_bytes == 0, report.text
    assert not report.serialised_wgmmas, report.text


@pytest.mark.parametrize("bad", [{"overlap": True}, {"overlap": False, "split_channels": True}])
def test_late_dq_is_a_schedule_of_its_own(bad):
    with pytest.raises(ValueError, match=r"late_dq=True needs overlap=False"):
        BackwardConfig(late_dq=True, **bad)


def test_late_dq_refuses_the_fixed_order():
    with pytest.raises(ValueError, match=r"late_dq=True cannot keep the fixed order"):
        plan_of(CAUSAL_GQA, LATE_DQ, deterministic=True)


def plan_of(case, config=BackwardConfig(), sm_count=4, deterministic=True):  # noqa: B008  (frozen)
    spec = dataclasses.replace(spec_of(case), deterministic=deterministic)
    return sm90_bwd_plan.Plan(spec=spec, config=config, sm_count=sm_count)


@pytest.mark.parametrize("group", [1, 3])
def test_steps_go_through_the_blocks_of_one_query_head_after_the_other(group):
    plan = plan_of(Case(name="x", b=1, t=64, s=64, n=3 * group, k=3, h=64))
    tile = sm90_bwd_plan.Tile(jnp.int32(0), jnp.int32(2), jnp.int32(0))
    loop = Loop(plan, None, None, None, None, tile, None, jnp.int32(0), None)
    step = np.arange(5 * group)
    head, position = loop._head_and_position(jnp.asarray(step, jnp.int32), jnp.int32(5))
    np.testing.assert_array_equal(head, 2 * group + step // 5)
    np.testing.assert_array_equal(position, step % 5)


def visits(case, plan):
    """Returns bool [key tiles, query blocks]: which pairs the schedule computes."""
    table = np.zeros((plan.num_kv_tiles, plan.num_q_blocks), bool)
    for j in range(plan.num_kv_tiles):
        tile = sm90_bwd_plan.Tile(jnp.int32(0), jnp.int32(0), jnp.int32(j))
        queries = sm90_bwd_plan.query_range_of(plan, None, tile)
        table[j, int(queries.start) : int(queries.stop)] = True
    return table


SCHEDULES = [
    Case(name="full", b=1, t=300, s=500),
    Case(name="causal", b=1, t=500, s=500, is_causal=True),
    Case(name="causal_more_keys", b=1, t=200, s=900, is_causal=True),
    Case(name="window", b=1, t=700, s=700, window=(130, 70)),
    Case(name="window_left", b=1, t=900, s=300, window=(100, 0), is_causal=True),
]


@pytest.mark.parametrize("case", SCHEDULES, ids=str)
def test_schedule_visits_what_is_seen_and_turns_count_the_tiles_before(case):
    plan = plan_of(case)
    table = visits(case, plan)
    position = np.arange(max(case.t, case.s))
    offset = position[None, : case.s] - position[: case.t, None]
    seen = np.ones((case.t, case.s), bool)
    if case.is_causal:
        seen &= offset <= 0
    if case.window is not None:
        seen &= (-case.window[0] <= offset) & (offset <= case.window[1])
    for j, m in np.ndindex(table.shape):
        block = seen[m * 64 : (m + 1) * 64, j * 128 : (j + 1) * 128]
        # One block of a tile that nobody sees is visited all the same.
        assert table[j, m] == block.any() or table[j].sum() == 1, (j, m)
        if table[j, m]:
            tile = sm90_bwd_plan.Tile(jnp.int32(0), jnp.int32(0), jnp.int32(j))
            assert int(sm90_bwd_plan.turn_of(plan, None, tile, jnp.int32(m))) == table[:j, m].sum()


def test_tiles_wait_only_for_tiles_with_a_smaller_index():
    plan = plan_of(Case(name="x", b=3, t=512, s=512, n=4, k=4))
    tiles = [sm90_bwd_plan.tile_of(plan, jnp.int32(i)) for i in range(plan.num_tiles)]
    tiles = [tuple(map(int, tile)) for tile in tiles]
    assert len(set(tiles)) == plan.num_tiles == 3 * 4 * 4
    for batch, head in {(b, h) for b, h, _ in tiles}:
        assert [j for b, h, j in tiles if (b, h) == (batch, head)] == list(range(4))


@pytest.mark.parametrize("deterministic", [True, False], ids=["deterministic", "any_order"])
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
def test_each_tile_meets_each_block_once(is_causal, deterministic):
    case = Case(name="x", b=1, t=512, s=512, n=2, k=1, is_causal=is_causal)
    plan = plan_of(case, deterministic=deterministic)
    first_blocks = []
    for j in range(plan.num_kv_tiles):
        tile = sm90_bwd_plan.Tile(jnp.int32(0), jnp.int32(0), jnp.int32(j))
        queries = sm90_bwd_plan.query_range_of(plan, None, tile)
        loop = sm90_bwd_loop.Loop(plan, None, None, None, None, tile, queries, jnp.int32(0), None)
        met = [tuple(map(int, loop.block(jnp.int32(i)))) for i in range(int(loop.num_steps))]
        wanted = range(int(queries.start), int(queries.stop))
        assert sorted(met) == [(head, block) for head in range(2) for block in wanted]
        first_blocks.append(met[0])
    assert len(set(first_blocks)) == (1 if deterministic else plan.num_kv_tiles)


def test_turns_of_packed_documents_by_hand():
    case = Case(name="packed", b=1, t=256, s=384, n=1, k=1, h=128, segments="packed")
    plan = plan_of(case)
    # Query blocks of 64 hold documents 0, 0-1, 1, 2; key tiles of 128 hold 0-1, 1, 2.
    q_ids = jnp.asarray(np.repeat([0, 0, 1, 1, 2], [64, 32, 32, 64, 64]), jnp.int32)[None]
    kv_ids = jnp.asarray(np.repeat([0, 1, 1, 2], [64, 64, 128, 128]), jnp.int32)[None]
    *_, ranges, turns = sm90._backward_segment_operands(plan, q_ids, kv_ids)
    np.testing.assert_array_equal(ranges[0, :, :2], [[0, 3], [1, 3], [3, 4]])
    np.testing.assert_array_equal(turns[0], [[0, 0, 0, 0], [1, 1, 1, 0], [1, 2, 2, 0]])


def test_shared_memory_of_the_default_config_by_hand():
    plan = plan_of(Case(name="x", b=1, t=128, s=128, n=1, k=1, h=128))
    k = v = 128 * 128 * 2
    q = do = 2 * 64 * 128 * 2
    ds, dq = 2 * 128 * 64 * 2, 2 * 64 * 64 * 4
    statistics = 2 * 1024  # 2 * 64 floats each, aligned
    barriers = 8 * (2 + 4 * 2 + 1 + 3)
    total = k + v + q + do + ds + dq + statistics + barriers + 2176
    assert sm90_bwd_plan.smem_bytes(plan) == total


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(block_q=96), "block_q=96 must be 64 or 128"),
        (dict(block_q=128, split_channels=True), "block_q=128 must be 64 with split_channels"),
        (dict(num_q_stages=0), "num_q_stages=0 must be at least 1"),
        (dict(num_do_stages=0), "num_do_stages=0 must be at least 1"),
    ],
)
def test_config_rejects(options, message):
    with pytest.raises(ValueError, match=message):
        BackwardConfig(**options)


@pytest.mark.parametrize("h", [64, 128, 256])
def test_every_candidate_is_accepted_or_has_a_reason(h):
    spec = spec_of(Case(name="x", b=2, t=8192, s=8192, n=16, k=16, h=h))
    candidates = tuning.backward_candidates(spec)
    assert any(reason is None for _, reason in candidates)
    assert all(reason is None or len(reason) > 10 for _, reason in candidates)

"""The sm_90a FP8 backward kernel: interpreted against float64 and its twin in XLA, and compiled."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

from pallas_kernels import Fp8Options, flash_attention, hardware
from pallas_kernels.flash_attention import (
    fp8,
    fp8_quantize,
    fp8_xla,
    sm90_bwd_fp8_plan,
    sm90_fp8,
)
from pallas_kernels.flash_attention.config import Fp8BackwardConfig
from pallas_kernels.flash_attention.sm90_fwd_plan import BlockRange
from tests.pallas_kernels.cases import Case
from tests.pallas_kernels.compile_gate import ptxas_report
from tests.pallas_kernels.flash_attention.test_sm90_fp8_forward import arguments, spec_of

SEPARATE = Fp8BackwardConfig(separate_dq=True, early_dv=True, stagger=3)
EARLY = Fp8BackwardConfig(early_dv=True)
INTERPRETED = [
    (Case(name="causal_gqa_ragged", b=1, t=150, s=150, n=2, k=1, h=64, is_causal=True), {}),
    (
        Case(name="window_t_over_s", b=1, t=200, s=260, n=2, k=1, h=64, window=(50, 20)),
        dict(deterministic=True),
    ),
    (
        Case(name="packed_e5m2", b=2, t=140, s=140, n=1, k=1, h=64, segments="padded"),
        dict(gradient_format="e5m2"),
    ),
    (
        Case(name="full_d128", b=1, t=192, s=128, n=1, k=1, h=128),
        dict(quantize_implementation="mosaic"),
    ),
]
INTERPRETED = [
    *((case, options, None) for case, options in INTERPRETED),
    (
        Case(name="separate", b=1, t=330, s=200, n=2, k=1, h=64, is_causal=True),
        {},
        SEPARATE,
    ),
]


@pytest.mark.parametrize(
    ("case", "options", "config"), INTERPRETED, ids=[str(c) for c, *_ in INTERPRETED]
)
def test_interpreted_kernel_rounds_as_the_twin_and_is_free_of_races(case, options, config):
    q, k, v, dout, dlse = case.arrays(jnp.bfloat16)
    expected = case.expected(q, k, v, dout, dlse)
    spec = spec_of(case, **options)
    ids = [None if x is None else jnp.asarray(x) for x in case.segment_ids()]

    @jax.jit
    def operands(q, k, v, dout, dlse):
        inputs = fp8_quantize.quantize_inputs(q, k, v, spec)
        out, statistics = fp8_xla.fp8_forward(inputs, *ids, spec)
        gradients = fp8_quantize.quantize_gradients(inputs, statistics, out, dout, dlse, spec)
        return inputs, gradients, fp8_xla.fp8_backward(inputs, gradients, *ids, spec)

    inputs, gradients, twin = operands(q, k, v, dout, dlse)
    got = sm90_fp8.fp8_backward(inputs, gradients, *ids, spec, config=config, interpret=True)
    assert not interpret_pallas_call.get_races().races_found
    dq, dk, dv = got
    finished = fp8_quantize.add_mean(dq, inputs, gradients, dlse, spec), dk, dv
    for name, x, y, z in zip(("dq", "dk", "dv"), got, twin, finished, strict=True):
        x, y, z = (np.asarray(a, np.float64) for a in (x, y, z))
        # A number between two of E4M3 may go either way for the last bit of an exponential.
        assert np.linalg.norm(x - y) <= 0.01 * np.linalg.norm(y), name
        want = getattr(expected, name)
        error = np.linalg.norm(z - want) / np.linalg.norm(want)
        # Four or five roundings to 3 bits, or 2 for e5m2, of half a unit each at most.
        assert error <= (0.15 if "gradient_format" in options else 0.1), name


COMPILED = [
    Case(name="128_full", b=2, t=8192, s=8192, h=128),
    Case(name="128_causal", b=2, t=8192, s=8192, h=128, is_causal=True),
    Case(name="128_window_ragged", b=1, t=4001, s=3001, h=128, window=(512, 100)),
    Case(name="128_packed", b=2, t=8192, s=8192, h=128, is_causal=True, segments="packed"),
    Case(name="64_packed", b=2, t=8192, s=8192, h=64, is_causal=True, segments="packed"),
]


@pytest.mark.parametrize(
    ("case", "deterministic", "config"),
    [
        *((case, False, None) for case in COMPILED),
        *((case, True, None) for case in COMPILED[1:]),
        *((case, False, SEPARATE) for case in COMPILED[1:3]),
        (COMPILED[3], True, SEPARATE),
        (COMPILED[1], False, EARLY),
    ],
    ids=str,
)
def test_compiles_for_sm90a_without_spills_or_serialised_wgmmas(case, deterministic, config):
    spec = spec_of(case, deterministic=deterministic)
    q, k, v, *ids = arguments(case)

    def operands(q, k, v, out):
        inputs = fp8_quantize.quantize_inputs(q, k, v, spec)
        rows = jnp.zeros((case.b, case.n, case.t))
        dlse = jnp.zeros((case.b, case.t, case.n))
        statistics = fp8.Statistics(rows, rows)
        return inputs, fp8_quantize.quantize_gradients(inputs, statistics, out, out, dlse, spec)

    inputs, gradients = jax.eval_shape(operands, q, k, v, q)

    def backward(inputs, gradients, q_ids=None, kv_ids=None):
        return sm90_fp8.fp8_backward(inputs, gradients, q_ids, kv_ids, spec, config=config)

    with hardware.assume_device_kind("NVIDIA H200"):
        report = ptxas_report(backward, inputs, gradients, *ids)
    assert "flash_attention_bwd_fp8" in report.text
    assert report.spilled_bytes == 0, report.text
    assert not report.serialised_wgmmas, report.text


@pytest.mark.parametrize(
    ("options", "kernels"),
    [
        ({}, 2),  # forward and backward
        # And q, k, v quantised; k, q and dO transposed; dq finished.
        (dict(gradient_format="e5m2", quantize_implementation="mosaic"), 9),
        (dict(backward="bf16"), 3),  # its backward begins with a kernel for lse and delta
    ],
    ids=str,
)
def test_the_whole_gradient_lowers_for_cuda(options, kernels):
    case = Case(name="x", b=2, t=4001, s=4001, n=8, k=2, h=128, is_causal=True)

    def loss(q, k, v):
        return flash_attention(
            q,
            k,
            v,
            is_causal=True,
            precision="fp8",
            fp8_options=Fp8Options(**options),
            implementation="mosaic",
        ).sum()

    with hardware.assume_device_kind("NVIDIA H200"):
        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*arguments(case))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call @mosaic_gpu") == kernels


def test_query_blocks_of_a_causal_mask_and_a_window_by_hand():
    case = Case(name="x", b=1, t=256, s=300, n=1, k=1, h=64, is_causal=True)
    ranges = sm90_fp8.query_block_ranges(sm90_bwd_fp8_plan.Plan(spec=spec_of(case)), None, None)
    # Keys 0-127, 128-255, 256-299; blocks of 64 queries. Keys 256 and up are seen by nobody, and
    # the last tile reaches beyond the keys.
    np.testing.assert_array_equal(ranges[0], [[0, 4, 2, 4], [2, 4, 4, 4], [3, 4, 4, 4]])
    case = dataclasses.replace(case, s=256, is_causal=False, window=(64, 0))
    ranges = sm90_fp8.query_block_ranges(sm90_bwd_fp8_plan.Plan(spec=spec_of(case)), None, None)
    np.testing.assert_array_equal(ranges[0, :, :2], [[0, 3], [2, 4]])


@pytest.mark.parametrize("stagger", [0, 3])
def test_steps_go_through_the_blocks_of_one_query_head_after_the_other(stagger):
    case = Case(name="x", b=1, t=320, s=256, n=6, k=2, h=64)
    plan = sm90_bwd_fp8_plan.Plan(spec=spec_of(case), config=Fp8BackwardConfig(stagger=stagger))
    zero, two, five = jnp.int32(0), jnp.int32(2), jnp.int32(5)
    blocks = BlockRange(zero, five, zero, five)
    tile = sm90_bwd_fp8_plan.Tile(plan, None, None, zero, two, two, blocks, None)
    # 5 blocks of queries; the third tile begins 2 * stagger later.
    want = [(head, (2 * stagger + i) % 5) for head in (6, 7, 8) for i in range(5)]
    assert [tuple(map(int, tile.position(step))) for step in range(15)] == want


def test_turns_of_a_window_by_hand():
    case = Case(name="x", b=1, t=256, s=256, n=1, k=1, h=64, window=(64, 0))
    plan = sm90_bwd_fp8_plan.Plan(spec=spec_of(case, deterministic=True))
    # Keys 0-127 are seen by blocks 0 to 2 of 64 queries, keys 128-255 by blocks 2 and 3.
    turns = sm90_fp8.turns_of(plan, sm90_fp8.query_block_ranges(plan, None, None))
    np.testing.assert_array_equal(turns[0], [[0, 0, 0, 0], [1, 1, 1, 0]])


@pytest.mark.parametrize(
    ("h", "options", "message"),
    [
        (256, {}, r"q.shape\[3\]=256 is not one of .64, 128.*backward='bf16'"),
        (256, dict(quantize_implementation="mosaic"), "quantize_implementation='xla'"),
    ],
)
def test_refuses_to_differentiate_with_the_reason(h, options, message):
    x = jax.ShapeDtypeStruct((1, 64, 1, h), jnp.bfloat16)

    def loss(x):
        options_ = Fp8Options(**options)
        out = flash_attention(
            x, x, x, precision="fp8", fp8_options=options_, implementation="mosaic"
        )
        return out.astype(jnp.float32).sum()

    with (
        hardware.assume_device_kind("NVIDIA H200"),
        pytest.raises(NotImplementedError, match=message),
    ):
        jax.eval_shape(jax.grad(loss), x)

"""Reports of GEMMs from hand-written and compiled programs; error measures by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jfp8
from jfp8 import diagnostics
from jfp8.diagnostics import fp8_dot_count, lowered_dot_count
from tests.jfp8.reference import normal

# As XLA:GPU writes it, less what the report does not read. Operands of a fusion are its parameters.
HLO = """
HloModule jit_step, is_scheduled=true

%gemm_fusion (parameter_0: f8e4m3fn[64,32], parameter_1: f8e5m2[32,16]) -> f32[64,16] {
  %parameter_0 = f8e4m3fn[64,32]{1,0} parameter(0)
  %parameter_1 = f8e5m2[32,16]{1,0} parameter(1)
  ROOT %dot.1 = f32[64,16]{1,0} dot(%parameter_0, %parameter_1), lhs_contracting_dims={1}, \
rhs_contracting_dims={0}, metadata={op_name="jit(step)/fp8_dot/wgrad/dot_general"}
}

%body (p: (s32[], bf16[48,32])) -> (s32[], bf16[48,32]) {
  %p = (s32[], /*index=1*/bf16[48,32]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = bf16[48,32]{1,0} get-tuple-element(%p), index=1
  %q = f8e4m3fn[48,32]{1,0} convert(%x)
  %w = f8e4m3fn[32,32]{0,1} constant({...})
  %one = f32[] constant(1)
  %cublas-gemm.1 = (bf16[48,32]{1,0}, s8[4194304]{0}) custom-call(%q, %w, %one, %one), \
custom_call_target="__cublas$lt$matmul$f8", metadata={op_name="jit(step)/while/body/fp8_dot/fwd/\
dot_general"}, backend_config={"gemm_backend_config":{"dot_dimension_numbers":\
{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"],\
"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]}}}
  %y = bf16[48,32]{1,0} get-tuple-element(%cublas-gemm.1), index=0
  ROOT %t = (s32[], bf16[48,32]{1,0}) tuple(%i, %y)
}

%condition (p: (s32[], bf16[48,32])) -> pred[] {
  %p = (s32[], bf16[48,32]{1,0}) parameter(0)
  ROOT %true = pred[] constant(true)
}

ENTRY %main (a: (s32[], bf16[48,32]), b: bf16[4,16,8], c: bf16[4,8,24]) -> bf16[4,16,24] {
  %a = (s32[], bf16[48,32]{1,0}) parameter(0)
  %b = bf16[4,16,8]{2,1,0} parameter(1)
  %c = bf16[4,8,24]{2,1,0} parameter(2)
  %u = f8e4m3fn[64,32]{1,0} constant({...})
  %v = f8e5m2[32,16]{1,0} constant({...})
  %while.1 = (s32[], bf16[48,32]{1,0}) while(%a), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"24"},"known_init_step":{"init":"0","step":"1"}}
  %while.2 = (s32[], bf16[48,32]{1,0}) while(%while.1), condition=%condition, body=%body
  %fusion.1 = f32[64,16]{1,0} fusion(%u, %v), kind=kCustom, calls=%gemm_fusion, \
backend_config={"fusion_backend_config":{"kind":"__triton_gemm"}}
  ROOT %cublas-gemm.2 = bf16[4,16,24]{2,1,0} custom-call(%b, %c), \
custom_call_target="__cublas$gemm", metadata={op_name="jit(step)/attention/dot_general"}, \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"],\
"rhs_contracting_dimensions":["1"],"lhs_batch_dimensions":["0"],"rhs_batch_dimensions":["0"]}}}
}
"""


def test_every_gemm_of_a_compiled_program():
    report = fp8_dot_count(HLO)
    assert [
        (g.kind, g.batch, g.m, g.k, g.n, g.executions, g.executions_known, g.is_fp8)
        for g in report.gemms
    ] == [
        ("cublaslt_fp8", 1, 48, 32, 32, 24, True, True),
        ("cublaslt_fp8", 1, 48, 32, 32, 1, False, True),
        ("triton", 1, 64, 32, 16, 1, True, True),
        ("cublas", 4, 16, 8, 24, 1, True, False),
    ]
    fp8_flops = 2 * 48 * 32 * 32 * (24 + 1) + 2 * 64 * 32 * 16
    assert (report.fp8_count, report.other_count) == (3, 1)
    assert (report.fp8_flops, report.other_flops) == (fp8_flops, 2 * 4 * 16 * 8 * 24)
    assert report.fp8_flop_fraction == fp8_flops / (fp8_flops + 2 * 4 * 16 * 8 * 24)


def test_filter_by_name():
    assert [g.kind for g in fp8_dot_count(HLO, op_name=r"fp8_dot/wgrad").gemms] == ["triton"]
    assert fp8_dot_count(HLO, op_name=r"(fp8|bf16)_dot/").fp8_flop_fraction == 1
    assert fp8_dot_count(HLO).matching("attention").fp8_flop_fraction == 0
    assert fp8_dot_count(HLO, op_name="nothing").gemms == ()


def test_report_reads_as_a_table():
    text = str(fp8_dot_count(HLO))
    assert text.startswith("3 of 4 GEMMs and 99.") and "x24 48x32x32" in text and "x1+" in text
    assert "16x8x24 b4" in text and "__" not in text


def layers(count: int, recipe: jfp8.Recipe):
    """A gradient of `count` scanned layers [32, 64] . [64, 64], lowered."""
    states = jax.tree.map(lambda a: jnp.stack([a] * count), jfp8.init_state(recipe))

    def loss(weights, states, x):
        def layer(x, stacked):
            w, state = stacked
            return jfp8.dot_general(x, w, (((1,), (0,)), ((), ())), state, recipe=recipe), None

        return lax.scan(layer, x, (weights, states))[0].astype(jnp.float32).sum()

    weights, x = jnp.ones((count, 64, 64)), jnp.ones((32, 64), jnp.bfloat16)
    return jax.jit(jax.grad(loss, argnums=(0, 2))).lower(weights, states, x)


@pytest.mark.parametrize("form", ["object", "text"])
def test_lowered_program(form):
    lowered = layers(5, jfp8.Recipe())
    report = lowered_dot_count(lowered if form == "object" else lowered.as_text(debug_info=True))
    assert [(g.m, g.k, g.n, g.executions) for g in report.gemms] == [
        (32, 64, 64, 5),
        (32, 64, 64, 5),
        (64, 32, 64, 5),
    ]
    assert [(g.lhs_dtype, g.rhs_dtype, g.out_dtype) for g in report.gemms] == [
        ("f8e4m3fn", "f8e4m3fn", "bf16"),
        ("f8e5m2", "f8e4m3fn", "bf16"),
        ("f8e4m3fn", "f8e5m2", "f32"),
    ]
    for gemm, name in zip(report.gemms, ("fwd", "dgrad", "wgrad"), strict=True):
        assert f"fp8_dot/{name}/" in gemm.op_name
    assert report.fp8_flops == 3 * 5 * 2 * 32 * 64 * 64 and report.fp8_flop_fraction == 1


def test_lowered_bf16_program():
    report = lowered_dot_count(layers(2, jfp8.Recipe(name="bf16")), op_name="bf16_dot/")
    assert (report.fp8_count, report.other_count) == (0, 3)
    assert [g.out_dtype for g in report.gemms] == ["bf16", "bf16", "f32"]


def test_a_cpu_program_runs_no_fp8():
    report = fp8_dot_count(layers(2, jfp8.Recipe()).compile())
    assert report.fp8_count == 0 and report.other_flops == 3 * 2 * 2 * 32 * 64 * 64


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: fp8_dot_count("not a program"), "no ENTRY computation"),
        (lambda: lowered_dot_count("not a program"), "not StableHLO"),
        (lambda: lowered_dot_count("module {}"), "must have a function main"),
    ],
)
def test_rejects(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_sqnr_db():
    reference = jnp.asarray([3.0, 4.0])
    assert float(diagnostics.sqnr_db(reference, reference * 0.9)) == pytest.approx(20, abs=1e-4)
    assert float(diagnostics.sqnr_db(reference, reference)) == np.inf


def test_fractions_by_hand():
    x = jnp.asarray([0.0, 1.0, 448.0, 449.0, 2.0**-10, 1.5 * 2.0**-10, -1e9, -(2.0**-30)])
    one = jnp.float32(1)
    assert float(diagnostics.saturated_fraction(x, one, jfp8.E4M3)) == 2 / 8
    assert float(diagnostics.underflowed_fraction(x, one, jfp8.E4M3)) == 2 / 8
    assert float(diagnostics.saturated_fraction(x, 2 * one, jfp8.E4M3)) == 1 / 8


def test_fractions_agree_with_the_cast():
    x = normal(0, 4096) * np.float32(2.0**-8)
    q = jfp8.quantize(x, jnp.float32(1), jfp8.E4M3)
    lost = float(diagnostics.underflowed_fraction(x, jnp.float32(1), jfp8.E4M3))
    assert lost == float(((q == 0) & (x != 0)).mean()) > 0

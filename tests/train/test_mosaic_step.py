"""The train step with the quantising kernels, lowered and compiled for the H200."""

import re
from collections import Counter

import jax
import pytest

from jfp8.diagnostics import fp8_dot_count, lowered_dot_count
from pallas_kernels import hardware
from tests.aot import compile_for_h200, kernel_launches
from train.config import parse
from train.optimizer import make_optimizer
from train.state import initial_state
from train.step import BATCH_DTYPES, make_train_step

LAYER = [
    *("--model.num-layers", "1", "--model.hidden-size", "1024", "--model.ffn-size", "2048"),
    *("--model.num-heads", "8", "--model.num-kv-heads", "4", "--model.vocab-size", "4096"),
    *("--data.sequence-length", "2048", "--data.batch-size", "2", "--data.document-mask", "false"),
    *("--model.layer-loop", "unroll", "--fp8.quantize-implementation", "mosaic"),
]


def step_and_shapes(*options):
    config = parse([*LAYER, *options])
    optimizer = make_optimizer(config.optimizer, config.run.steps)
    state = jax.eval_shape(lambda: initial_state(config, optimizer))
    shape = (config.data.batch_size, config.data.sequence_length)
    batch = {name: jax.ShapeDtypeStruct(shape, dtype) for name, dtype in BATCH_DTYPES.items()}
    return make_train_step(config, optimizer, calibrating=False), state, batch


def test_one_layer_compiles_for_the_h200():
    with hardware.assume_device_kind("NVIDIA H200"):
        compiled = compile_for_h200(*step_and_shapes(), donate_argnums=0)
    text = compiled.as_text()
    calls = [line for line in text.splitlines() if "custom-call" in line and "mosaic_gpu" in line]
    # Four weights; the input of out; the gradients of qkv, out and down. The norms cast the inputs
    # of qkv and gate_up.
    assert Counter(re.findall(r"/(\w*quantize)/mpmd_map", "\n".join(calls))) == {
        "quantize": 4 + 1 + 3,
        "rmsnorm_quantize": 2,
        "swiglu_quantize": 1,
        "swiglu_grad_quantize": 1,
    }
    gemms = [g for g in fp8_dot_count(compiled).gemms if "fp8_dot" in g.op_name]
    assert len(gemms) == 12 and all(g.kind == "cublaslt_fp8" for g in gemms)
    # `out` and `down` add the residual stream as they write the sum, and not over a copy of it.
    adding = [x for x in text.splitlines() if "matmul$f8" in x and '"beta":1,' in x]
    assert len(adding) == 2 and not any("output_to_operand_aliasing" in x for x in adding)
    assert not re.search(r"= bf16\[[\d,]+\]\S* copy\(", text)
    # Nothing is left for XLA to transpose, and no norm of a block is written in 16 bits.
    assert not re.search(r"= f8e\w+\[[\d,]+\]\S* (copy|transpose)\(", text)
    entry = text[text.index("\nENTRY") :]
    assert "/jvp(block)/" in entry
    assert not re.search(r"= bf16\[2,2048,1024\]\S* fusion\(.*/jvp\(block\)/", entry)


@pytest.mark.parametrize("implementation, kernels", [("mosaic_forward", 4), ("mosaic", 12)])
def test_gemms_of_the_blocks_by_the_kernel(implementation, kernels):
    with hardware.assume_device_kind("NVIDIA H200"):
        step, *shapes = step_and_shapes("--fp8.gemm-implementation", implementation)
        lowered = jax.jit(step).trace(*shapes).lower(lowering_platforms=("cuda",))
    report = lowered_dot_count(lowered, op_name="fp8_dot/")
    forward = report.matching("fp8_dot/fwd")
    assert [g.kind for g in forward.gemms] == ["mosaic_fp8"] * 4
    assert sum(g.kind == "mosaic_fp8" for g in report.gemms) == kernels
    assert len(report.gemms) == 12 and report.fp8_flop_fraction == 1
    assert report.fp8_flops == 3 * forward.fp8_flops


@pytest.mark.parametrize(
    "options, casts",
    [
        # The residual stream needs `out` again, and so its two operands.
        (("--model.remat", "dots"), 14),
        # Without the casts of down's weight, input and gradient.
        (("--fp8.skip-layers", "*.down"), 9),
    ],
    ids=str,
)
def test_each_tensor_is_cast_once(options, casts):
    with hardware.assume_device_kind("NVIDIA H200"):
        step, *shapes = step_and_shapes(*options)
        lowered = jax.jit(step).trace(*shapes).lower(lowering_platforms=("cuda",))
    assert kernel_launches(lowered.as_text()) == casts


def test_a_fused_rotation_is_one_kernel_less_and_knows_no_q_k_and_v():
    fp8_attention = ("--fp8.recipe", "bf16", "--model.attention-precision", "fp8")
    texts = []
    for implementation in ("mosaic", "fused"):
        with hardware.assume_device_kind("NVIDIA H200"):
            step, *shapes = step_and_shapes(
                *fp8_attention, "--model.rope-implementation", implementation
            )
            lowered = jax.jit(step).trace(*shapes).lower(lowering_platforms=("cuda",))
        texts.append(lowered.as_text())
    apart, fused = map(kernel_launches, texts)
    assert fused == apart - 1  # the gradient's; the forward rotation is XLA's
    # Keys that are rotated: all of them, or every fourth for their mean, and the first.
    rotated = [re.findall(r"tensor<2x(\d+)x4x128xf32>", text) for text in texts]
    assert {*rotated[0]} >= {"2048"} and {*rotated[1]} == {"512", "1"}

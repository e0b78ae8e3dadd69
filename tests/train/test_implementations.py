"""What "auto" becomes on a machine, and what a machine refuses."""

import types
from pathlib import Path

import jax
import pytest

from pallas_kernels import hardware
from tests.aot import kernel_launches
from train.config import ConfigError, parse
from train.implementations import attention_choice, describe, portable, settle
from train.mesh import make_mesh
from train.optimizer import make_optimizer
from train.state import initial_state
from train.step import BATCH_DTYPES, make_train_step

CONFIGS = Path(__file__).parent.parent.parent / "configs"
ONE, EIGHT = (types.SimpleNamespace(size=size) for size in (1, 8))
OPTIONS = {
    "casts": "fp8.quantize-implementation",
    "norm": "model.norm-implementation",
    "rope": "model.rope-implementation",
    "swiglu": "model.swiglu-implementation",
}
# A layer that every kernel takes.
LAYER = [
    *("--model.num-layers", "1", "--model.hidden-size", "1024", "--model.ffn-size", "2048"),
    *("--model.num-heads", "8", "--model.num-kv-heads", "4", "--model.vocab-size", "4096"),
    *("--data.sequence-length", "2048", "--data.batch-size", "2", "--data.document-mask", "false"),
    *("--model.layer-loop", "unroll"),
]


def on_h200(*options, mesh=ONE):
    with hardware.assume_device_kind("NVIDIA H200"):
        return settle(parse([*LAYER, *options]), mesh)


def chosen(config):
    model = config.model
    return (
        *(config.fp8.quantize_implementation, model.norm_implementation),
        *(model.rope_implementation, model.swiglu_implementation),
    )


def test_on_a_hopper_gpu_the_kernels_run_all_that_they_can():
    config, decisions = on_h200()
    assert chosen(config) == ("mosaic",) * 4
    assert describe(decisions) == "mosaic for casts, norm, rope, swiglu"


def test_on_a_cpu_xla_runs_all_and_the_line_says_why():
    config, decisions = settle(parse([]), make_mesh(parse([]).mesh, jax.devices()[:1]))
    assert chosen(config) == ("xla",) * 4
    assert describe(decisions) == (
        "xla for casts, norm, rope, swiglu (the kernel is for Hopper, but the default device is"
        " 'cpu', not an NVIDIA GPU)"
    )


def test_on_several_devices_xla_runs_what_was_not_asked_of_a_kernel():
    config, decisions = on_h200("--model.rope-implementation", "mosaic", mesh=EIGHT)
    assert chosen(config) == ("xla", "xla", "mosaic", "xla")
    assert describe(decisions) == (
        "mosaic for rope (asked for); xla for casts, norm, swiglu (what each of 8 devices gets is"
        " for XLA to choose)"
    )


# Each of these stands in the way of some kernels, for their own reasons.
INT32 = [
    *("--data.batch-size", "64", "--data.sequence-length", "16384"),
    *("--optimizer.accumulation-steps", "32", "--model.swiglu-implementation", "xla"),
]
OBSTACLES = [
    (
        ["--model.hidden-size", "1536", "--model.head-dim", "128"],
        {"norm": "1536 columns must be a multiple of 1024"},
    ),
    (["--model.head-dim", "256"], {"rope": "head_dim=256 must be one of"}),
    (["--model.qk-norm", "true"], {"rope": "its kernel ends at the projection"}),
    (["--model.ffn-size", "2112"], {"casts": "2112 rows must be", "swiglu": "group=64"}),
    (
        ["--data.sequence-length", "72"],
        {"casts": "144 rows must be a multiple of 128", "rope": "144 tokens must be a multiple"},
    ),
    (["--model.vocab-size", "4112", "--fp8.head", "true"], {"casts": "4112 columns must be"}),
    (
        ["--model.attention-precision", "fp8", "--model.head-dim", "256"],
        {"casts": "head dim 256 of FP8 attention is not one of", "rope": "head_dim=256"},
    ),
    # A microbatch is fine, a whole batch in validation has too many elements.
    (INT32, {"casts": "do not fit int32", "rope": "do not fit int32"}),
]


@pytest.mark.parametrize(("options", "expected"), OBSTACLES, ids=lambda x: str(x)[:40])
def test_what_a_kernel_cannot_take_is_left_to_xla_and_refused_if_asked_for(options, expected):
    config, decisions = on_h200(*options)
    reasons = {d.what: d.reason for d in decisions if d.implementation == "xla"}
    reasons = {what: reason for what, reason in reasons.items() if reason != "asked for"}
    assert reasons.keys() == expected.keys()
    for what, reason in expected.items():
        assert reason in reasons[what]
        with pytest.raises((ConfigError, SystemExit)):
            on_h200(*options, f"--{OPTIONS[what]}", "mosaic")


def test_layers_out_of_fp8_stand_in_no_kernels_way():
    odd = ("--model.ffn-size", "2112")
    skipped = ("--fp8.skip-layers", "*.gate_up", "*.down")
    assert chosen(on_h200(*odd)[0])[0] == "xla"
    assert chosen(on_h200(*odd, *skipped)[0])[0] == "mosaic"


def test_without_fp8_nothing_is_said_of_casts():
    bf16 = ("--fp8.recipe", "bf16")
    assert describe(on_h200(*bf16)[1]) == "mosaic for norm, rope, swiglu"
    decisions = on_h200(*bf16, "--model.attention-precision", "fp8_forward")[1]
    assert describe(decisions) == "mosaic for casts, norm, rope, swiglu"


ODD_LENGTH = ("--data.sequence-length", "2040", "--data.batch-size", "16")
FP8_ATTENTION = ("--model.attention-precision", "fp8")


def test_kernels_that_cast_for_fp8_attention_rotate_too_if_asked_to():
    assert chosen(on_h200(*FP8_ATTENTION)[0]) == ("mosaic",) * 4
    config, decisions = on_h200(*FP8_ATTENTION, "--model.rope-implementation", "fused")
    assert config.model.rope_implementation == "fused"
    assert describe(decisions) == "fused for rope (asked for); mosaic for casts, norm, swiglu"


@pytest.mark.parametrize(
    ("options", "mesh", "message"),
    [
        ((), ONE, "its kernels are those of --model.attention-precision=fp8"),
        (("--model.attention-precision", "fp8_forward"), ONE, "--model.attention-precision=fp8"),
        (FP8_ATTENTION, EIGHT, "XLA would gather what 8 devices have"),
        ((*FP8_ATTENTION, "--fp8.quantize-implementation", "xla"), ONE, "which is not in use"),
        ((*FP8_ATTENTION, *ODD_LENGTH), ONE, "2040 tokens must be a multiple of 16"),
        ((*FP8_ATTENTION, "--model.attention-implementation", "xla"), ONE, "it needs --model"),
    ],
)
def test_what_stands_in_the_way_of_a_fused_rotation(options, mesh, message):
    with pytest.raises(ConfigError, match=f"rope-implementation=fused cannot run: .*{message}"):
        on_h200(*options, "--model.rope-implementation", "fused", mesh=mesh)


@pytest.mark.parametrize("option", OPTIONS.values())
def test_a_kernel_that_is_asked_for_without_a_hopper_gpu_is_refused(option):
    config = parse([f"--{option}", "mosaic"])
    with pytest.raises(ConfigError, match=rf"--{option}=mosaic cannot run: .* Hopper, but .*'cpu'"):
        settle(config, ONE)


@pytest.mark.parametrize(
    ("stem", "attention", "expected"),
    [
        ("llama_125m_fp8", "cudnn", ("mosaic", "xla", "mosaic", "mosaic")),
        ("llama_350m_fp8", "cudnn", ("mosaic",) * 4),
        ("llama_1b_fp8", "cudnn", ("mosaic",) * 4),
        ("llama_8b_slice_bf16", "mosaic", ("mosaic",) * 4),
        ("llama_8b_slice_fp8", "mosaic", ("mosaic",) * 4),
        ("llama_8b_fp8", "mosaic", ("mosaic",) * 4),
    ],
)
def test_what_the_shipped_configs_run_with_on_an_h200(stem, attention, expected):
    asked = parse(["--config", str(CONFIGS / f"{stem}.toml")])
    with hardware.assume_device_kind("NVIDIA H200"):
        config, _ = settle(asked, ONE)
        assert attention_choice(config).implementation == attention
    assert chosen(config) == expected
    assert chosen(asked) == ("auto",) * 4  # what is saved


def test_a_config_of_another_machine_asks_for_nothing():
    words = [word for option in OPTIONS.values() for word in (f"--{option}", "mosaic")]
    words += ["--fp8.gemm-implementation", "mosaic", "--model.attention-implementation", "cudnn"]
    assert portable(parse(words)) == parse([])


def test_the_settled_step_launches_the_kernels_and_an_xla_step_none():
    def launches(*options):
        config, _ = on_h200("--fp8.recipe", "bf16", *options)
        optimizer = make_optimizer(config.optimizer, config.run.steps)
        shape = (config.data.batch_size, config.data.sequence_length)
        batch = {name: jax.ShapeDtypeStruct(shape, dtype) for name, dtype in BATCH_DTYPES.items()}
        step = make_train_step(config, optimizer, calibrating=False)
        state = jax.eval_shape(lambda: initial_state(config, optimizer))
        with hardware.assume_device_kind("NVIDIA H200"):
            lowered = jax.jit(step).trace(state, batch).lower(lowering_platforms=("cuda",))
        return kernel_launches(lowered.as_text())

    # Two norms' gradients, rope's, SwiGLU and its gradient.
    assert launches() == 2 + 1 + 2
    assert launches(*(word for option in OPTIONS.values() for word in (f"--{option}", "xla"))) == 0

"""What a run says of itself, and what it refuses to start with."""

import dataclasses
import json
import types

import jax
import pytest

from jfp8.diagnostics import DotReport
from jfp8.hlo import Gemm
from pallas_kernels import hardware
from train import startup
from train.config import (
    ConfigError,
    DataConfig,
    Fp8Config,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from train.implementations import Decision
from train.mesh import make_mesh
from train.state import abstract_state
from train.step import CompiledSteps

CONFIG = TrainConfig()


def gemm(dtype: str, *, executions: int = 1, name: str = "fp8_dot/fwd") -> Gemm:
    """A GEMM of 2 * 16**3 = 8192 FLOPs a time."""
    return Gemm("dot", 1, 16, 16, 16, dtype, dtype, "f32", f"jit(step)/{name}", executions)


# Three quarters of the FLOPs in FP8: 3 of 4 executions.
MIXED = DotReport((gemm("f8e4m3fn", executions=3), gemm("bf16", name="fp8_dot/wgrad")))


@pytest.fixture
def on_gpu(monkeypatch):
    """As if the default device were a GPU of a compute capability."""

    def pretend(capability: str = "9.0") -> None:
        device = types.SimpleNamespace(
            platform="gpu", device_kind="NVIDIA Test", compute_capability=capability
        )
        fake = types.SimpleNamespace(
            devices=lambda: [device],
            default_backend=lambda: "gpu",
            ShapeDtypeStruct=jax.ShapeDtypeStruct,
        )
        monkeypatch.setattr(startup, "jax", fake)

    return pretend


def test_gemms_on_a_cpu_are_called_emulated():
    assert startup.describe_gemms(CONFIG, MIXED) == (
        "recipe delayed: 1 of 2 block GEMMs in FP8, 75.0% of their FLOPs; emulated: this device"
        " has no FP8 GEMM"
    )


def test_gemms_on_a_gpu_are_not_called_emulated(on_gpu):
    on_gpu()
    line = "recipe delayed: 1 of 2 block GEMMs in FP8, 75.0% of their FLOPs"
    assert startup.describe_gemms(CONFIG, MIXED) == line


def test_nothing_is_emulated_in_bf16():
    config = dataclasses.replace(CONFIG, fp8=Fp8Config(recipe="bf16"))
    report = DotReport((gemm("bf16", name="bf16_dot/fwd"),))
    line = "recipe bf16: 0 of 1 block GEMMs in FP8, 0.0% of their FLOPs"
    assert startup.describe_gemms(config, report) == line


def with_minimum(fraction: float, **fp8: object) -> TrainConfig:
    return dataclasses.replace(CONFIG, fp8=Fp8Config(minimum_fraction=fraction, **fp8))


def programs(lowered: DotReport, compiled: DotReport, monkeypatch) -> CompiledSteps:
    """Steps whose programs hold these GEMMs."""
    for name, reports in (
        ("lowered_dot_count", {"the lowered step": lowered}),
        ("fp8_dot_count", {"the compiled step": compiled}),
    ):
        monkeypatch.setattr(startup.diagnostics, name, reports.__getitem__)
    return CompiledSteps("the compiled step", "the lowered step", None, None)


def test_too_little_fp8_on_a_gpu_is_refused_with_the_gemms_that_are_not(on_gpu):
    on_gpu()
    with pytest.raises(
        ConfigError,
        match=r"only 75\.0% .* less than --fp8\.minimum-fraction=0\.76 of the 100\.0% that were"
        r" asked for; not in FP8: jit\(step\)/fp8_dot/wgrad$",
    ):
        startup.check_fp8_share(with_minimum(0.76), None, MIXED)


def test_enough_fp8_on_a_gpu_is_accepted(on_gpu):
    on_gpu()
    startup.check_fp8_share(with_minimum(0.75), None, MIXED)
    startup.check_fp8_share(with_minimum(1.0, recipe="bf16"), None, MIXED)


def test_layers_that_are_skipped_by_name_are_not_counted(on_gpu, monkeypatch):
    on_gpu()
    config = with_minimum(1.0, skip_layers=("*.down",))
    startup.check_fp8_share(config, programs(MIXED, MIXED, monkeypatch), MIXED)
    none = DotReport((gemm("bf16"),))
    with pytest.raises(ConfigError, match=r"only 0\.0% .*=1\.0 of the 75\.0% that were asked for"):
        startup.check_fp8_share(config, programs(MIXED, none, monkeypatch), none)


def test_a_cpu_emulates_so_any_share_is_accepted():
    startup.check_fp8_share(with_minimum(1.0), None, MIXED)


def test_report_is_of_block_gemms_of_the_program_that_runs(on_gpu, monkeypatch):
    head = gemm("f32", name="dot_general")
    asked_for, compiled = DotReport((*MIXED.gemms, head)), DotReport((head, *MIXED.gemms[:1]))
    steps = programs(asked_for, compiled, monkeypatch)
    assert startup.gemm_report(steps).gemms == MIXED.gemms
    on_gpu()
    assert startup.gemm_report(steps).gemms == MIXED.gemms[:1]


def test_gpu_without_fp8_is_refused(on_gpu):
    on_gpu("8.0")
    with pytest.raises(
        ConfigError, match=r"--fp8\.recipe=delayed needs .* 8\.9 .*NVIDIA Test has 8\.0.*bf16"
    ):
        startup.check_device_support(CONFIG)
    startup.check_device_support(dataclasses.replace(CONFIG, fp8=Fp8Config(recipe="bf16")))
    on_gpu("8.9")
    startup.check_device_support(CONFIG)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"attention_implementation": "cudnn"}, "attention-implementation=cudnn.*Hopper"),
        ({"attention_implementation": "mosaic"}, "attention-implementation=mosaic.*Hopper"),
        (
            {"attention_precision": "fp8", "attention_implementation": "cudnn"},
            "attention-precision=fp8.*Hopper",
        ),
    ],
    ids=str,
)
def test_attention_that_cannot_run_here_is_refused(model, words):
    with pytest.raises(ConfigError, match=words):
        startup.check_device_support(dataclasses.replace(CONFIG, model=ModelConfig(**model)))


def test_attention_choice_names_the_kernel_and_the_reason():
    config = dataclasses.replace(CONFIG, model=ModelConfig(local_window_size=8))
    assert startup.attention_choice(config).startswith("xla (")


def test_attention_choice_names_the_kernel_of_validation_too():
    model = ModelConfig(head_dim=128)
    data = DataConfig(sequence_length=2048, batch_size=1, document_mask=False)
    config = dataclasses.replace(CONFIG, model=model, data=data)
    with hardware.assume_device_kind("NVIDIA H200"):
        line = startup.attention_choice(config)
    assert line == "cudnn (the fastest here); mosaic in validation"


def test_description_counts_parameters_and_tokens():
    model = ModelConfig(
        hidden_size=32, num_layers=2, ffn_size=64, num_heads=2, num_kv_heads=1, vocab_size=64
    )
    config = dataclasses.replace(CONFIG, model=model, optimizer=OptimizerConfig(warmup_steps=0))
    mesh = make_mesh(config.mesh, jax.devices())
    identity = types.SimpleNamespace(init=lambda params: ())
    state = abstract_state(config, identity, mesh)
    decisions = [Decision("norm", "xla", "no kernel"), Decision("rope", "mosaic", "")]
    lines = list(startup.describe(config, decisions, state, mesh))
    # Embedding and head; in each block qkv, out, gate and up, down and two norms; the last norm.
    block = 32 * (32 + 16 + 16) + 32 * 32 + 32 * 128 + 64 * 32 + 2 * 32
    parameters = 2 * 64 * 32 + 2 * block + 32
    assert lines[0] == "devices: 8 x cpu (data 8 x fsdp 1 x tensor 1)"
    assert lines[1] == (f"model: {parameters:,} parameters; 2,048 tokens a step, 614,400 in all")
    assert lines[2].startswith("attention: xla (")
    assert lines[3] == "kernels: mosaic for rope; xla for norm (no kernel)"


def test_memory_is_state_and_temporaries():
    def steps(analysis):
        return CompiledSteps(
            types.SimpleNamespace(memory_analysis=lambda: analysis), None, None, None
        )

    plan = types.SimpleNamespace(argument_size_in_bytes=2**30, temp_size_in_bytes=2**29)
    line = "memory: 1.5 GiB for state and step, by the compiler's plan"
    assert list(startup.describe_memory(steps(plan))) == [line]
    assert list(startup.describe_memory(steps(None))) == []


def test_summary_lists_what_is_there_and_is_written(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    lines = list(startup.summary(tmp_path, 4.0, 3.0, "recipe bf16: ..."))
    assert lines == [
        f"files in {tmp_path}: metrics.jsonl, summary.json",
        "validation loss 3.0000 nats, 25% below the first step's 4.0000",
        "recipe bf16: ...",
    ]
    assert json.loads((tmp_path / "summary.json").read_text()) == {
        "first_loss_nats": 4.0,
        "validation_loss_nats": 3.0,
        "fp8": "recipe bf16: ...",
    }


def test_summary_of_a_loss_that_rose_or_was_never_measured(tmp_path):
    assert "25% above the first step's 4.0000" in list(startup.summary(tmp_path, 4.0, 5.0, ""))[1]
    assert len(list(startup.summary(tmp_path, None, 5.0, "recipe"))) == 2

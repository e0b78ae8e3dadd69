"""What a run says and checks around its steps: the device, what runs in FP8, the summary."""

import json
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.sharding import Mesh

from jfp8 import diagnostics
from train import implementations
from train.config import ConfigError, TrainConfig
from train.implementations import Decision
from train.run_directory import atomic_write
from train.state import TrainState, parameter_count
from train.step import CompiledSteps

# The GEMMs of the decoder blocks, and those of the head if it is meant to run in FP8.
_BLOCK_GEMMS = r"fp8_dot|bf16_dot"
_FP8_COMPUTE_CAPABILITY = 8.9
_RUN_FILES = (
    "metrics.jsonl",
    "config.toml",
    "versions.json",
    "tokenizer.json",
    "summary.json",
    "loss.png",
    "sample.txt",
    "checkpoints",
)


def check_device_support(config: TrainConfig) -> None:
    """Raises ConfigError if the recipe or the attention that was asked for cannot run here."""
    device = jax.devices()[0]
    if config.fp8.recipe != "bf16" and device.platform == "gpu":
        capability = float(device.compute_capability)
        if capability < _FP8_COMPUTE_CAPABILITY:
            raise ConfigError(
                f"--fp8.recipe={config.fp8.recipe} needs a GPU of compute capability"
                f" {_FP8_COMPUTE_CAPABILITY} or more; {device.device_kind} has {capability}."
                " Use --fp8.recipe bf16"
            )
    try:
        attention_choice(config)
    except (NotImplementedError, ValueError) as error:
        raise ConfigError(
            f"--model.attention-implementation={config.model.attention_implementation},"
            f" --model.attention-precision={config.model.attention_precision}: {error}"
        ) from error


def attention_choice(config: TrainConfig) -> str:
    """The attention kernel that will run, and why."""
    choice = implementations.attention_choice(config)
    plain = choice.without_gradient
    elsewhere = f"; {plain} in validation" if plain != choice.implementation else ""
    return f"{choice.implementation} ({choice.reason}){elsewhere}"


def gemm_report(steps: CompiledSteps) -> diagnostics.DotReport:
    """The block GEMMs of the train step: as compiled on a GPU, as asked for elsewhere."""
    if jax.default_backend() != "gpu":
        return _gemms_asked_for(steps)
    return diagnostics.fp8_dot_count(steps.train).matching(_BLOCK_GEMMS)


def _gemms_asked_for(steps: CompiledSteps) -> diagnostics.DotReport:
    return diagnostics.lowered_dot_count(steps.train_lowered).matching(_BLOCK_GEMMS)


def describe_gemms(config: TrainConfig, report: diagnostics.DotReport) -> str:
    """One line on how many block GEMMs, and what share of their FLOPs, run in FP8."""
    emulated = "" if jax.default_backend() == "gpu" else "; emulated: this device has no FP8 GEMM"
    return (
        f"recipe {config.fp8.recipe}: {report.fp8_count} of {len(report.gemms)}"
        f" {_what(config)} GEMMs in FP8, {report.fp8_flop_fraction:.1%} of their FLOPs"
        f"{emulated if report.fp8_count else ''}"
    )


def _what(config: TrainConfig) -> str:
    """Whose GEMMs a `gemm_report` is about."""
    return "block and head" if config.fp8.head and config.fp8.recipe != "bf16" else "block"


def check_fp8_share(
    config: TrainConfig, steps: CompiledSteps, report: diagnostics.DotReport
) -> None:
    """Raises ConfigError if a GPU would run fewer block GEMMs in FP8 than the config demands.

    Args:
      config: `fp8.minimum_fraction` is of the FLOPs that `fp8.skip_layers` leaves to FP8.
      steps: the compiled programs.
      report: from `gemm_report`.
    """
    fp8 = config.fp8
    if fp8.recipe == "bf16" or jax.default_backend() != "gpu":
        return
    asked_for = _gemms_asked_for(steps).fp8_flop_fraction if fp8.skip_layers else 1.0
    if report.fp8_flop_fraction < fp8.minimum_fraction * asked_for:
        others = ", ".join(sorted({gemm.op_name for gemm in report.gemms if not gemm.is_fp8}))
        raise ConfigError(
            f"only {report.fp8_flop_fraction:.1%} of the {_what(config)} GEMM FLOPs were compiled"
            f" to FP8, less than --fp8.minimum-fraction={fp8.minimum_fraction} of the"
            f" {asked_for:.1%} that were asked for; not in FP8: {others[:400]}"
        )


def describe(
    config: TrainConfig, decisions: list[Decision], state: TrainState, mesh: Mesh
) -> Iterator[str]:
    """The lines printed before the step is compiled.

    Args:
      config: that the run trains with.
      decisions: from `implementations.settle`.
      state: to be trained.
      mesh: of the devices.
    """
    device = jax.devices()[0]
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    tokens = config.data.batch_size * config.data.sequence_length
    yield f"devices: {mesh.size} x {device.device_kind} ({axes})"
    yield (
        f"model: {parameter_count(state.params):,} parameters; {tokens:,} tokens a step,"
        f" {tokens * config.run.steps:,} in all"
    )
    yield f"attention: {attention_choice(config)}"
    yield f"kernels: {implementations.describe(decisions)}"


def describe_memory(steps: CompiledSteps) -> Iterator[str]:
    """One line on the memory of the compiled step, where the compiler tells it."""
    memory = steps.train.memory_analysis()
    if memory is not None:
        total = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        yield f"memory: {total / 2**30:.1f} GiB for state and step, by the compiler's plan"


def summary(
    directory: Path, first_loss: float | None, validation_loss: float | None, fp8: str
) -> Iterator[str]:
    """The closing lines of a run; written to summary.json too."""
    result = {"first_loss_nats": first_loss, "validation_loss_nats": validation_loss, "fp8": fp8}
    atomic_write(directory / "summary.json", json.dumps(result, indent=2) + "\n")
    files = [name for name in _RUN_FILES if (directory / name).exists()]
    yield f"files in {directory}: {', '.join(files)}"
    if first_loss is not None and validation_loss is not None:
        change = validation_loss / first_loss - 1
        yield (
            f"validation loss {validation_loss:.4f} nats, {abs(change):.0%}"
            f" {'above' if change > 0 else 'below'} the first step's {first_loss:.4f}"
        )
    yield fp8

"""metrics.jsonl: one JSON object per line, the single source of every number that is shown.

    {"kind": "train", "step": 20, "tokens": 81920, "loss_nats": 6.1, "grad_norm": 1.2, "lr": 0.001,
     "step_time_s": 0.5, "tokens_per_s": 8192.0, "mfu": 0.4, "memory_gib": 9.1, "skipped_steps": 0,
     "fp8/<group>/saturated_fraction": 0.0, ...}
    {"kind": "validation", "step": 100, "tokens": 409600, "validation_loss_nats": 5.2}
    {"kind": "event", "step": 100, "message": "checkpoint 100 was not saved (...)"}
    {"kind": "inspection", "step": 50, "tensors": {"qkv.input": {"amax": [a number for each layer],
     "scale": [...], "saturated_fraction": [...], "underflowed_fraction": [...], "sqnr_db": [...]}}}

Every line also has "time", in seconds since 1970. JSON has no NaN or infinity: such a number is
null, and its text is under "non_finite", as in {"loss_nats": null, "non_finite": {"loss_nats":
"nan"}}.
"""

import dataclasses
import json
import math
import os
import resource
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax

from pallas_kernels.hardware import peak_tflops
from train.config import ModelConfig, TrainConfig
from train.run_directory import METRICS_FILE, atomic_write
from train.sinks import Console, Sink, open_sinks


class MetricsError(ValueError):
    """A run whose metrics cannot be read."""


def model_flops_per_token(model: ModelConfig, sequence_length: int) -> float:
    """Returns the floating-point operations that training needs for one token.

    6 n + 6 layers T heads head_dim, after Chowdhery et al. 2022 (PaLM, arXiv:2204.02311, appendix
    B), with causal attention counted as the half that it is. n is the number of GEMM weights: those
    of the blocks and of the head (tied or not), without the embedding table, which is only looked
    up, and the norms. Recomputation in the backward pass, quantisation and the optimizer are not
    counted: they are not the model's.

    Args:
      model: the model; with a local window W the mean number of keys is W - W^2 / 2T, not T / 2.
      sequence_length: T, tokens of one sequence. Document borders inside it are not counted off.
    """
    attention_width = model.num_heads * model.resolved_head_dim
    kv_width = model.num_kv_heads * model.resolved_head_dim
    block_weights = model.hidden_size * (
        2 * attention_width + 2 * kv_width + 3 * model.ffn_size
    )  # q, out; k, v; gate, up, down
    weights = model.num_layers * block_weights + model.hidden_size * model.vocab_size
    window = min(model.local_window_size or sequence_length, sequence_length)
    mean_keys = window - window**2 / (2 * sequence_length)
    # Two GEMMs (scores, values), two operations a product, thrice (forward, two gradients).
    return 6 * weights + 12 * model.num_layers * attention_width * mean_keys


def mfu(
    tokens_per_s: float, flops_per_token: float, peak_tflops_per_device: float, device_count: int
) -> float:
    """Returns the model FLOPs utilisation: the share of the devices' peak that the model used."""
    return tokens_per_s * flops_per_token / (peak_tflops_per_device * 1e12 * device_count)


class MetricsWriter:
    """Appends to a run's metrics.jsonl, and shows the same numbers elsewhere. A context manager.

    In a run of several processes all construct one, and only that of process 0 does anything.
    """

    def __init__(
        self,
        run_directory: Path,
        config: TrainConfig,
        *,
        resume_step: int,
        device_count: int | None = None,
        sinks: Sequence[Sink] | None = None,
        console: Console | None = None,
    ):
        """Opens the file; lines after `resume_step`, and a torn last one, are dropped.

        Args:
          run_directory: folder of the run.
          config: for tokens per step, model FLOPs and the sinks that are asked for.
          resume_step: optimizer steps that the restored state has done, 0 for a fresh one.
          device_count: devices that train, of all processes; None means all there are.
          sinks: instead of those that `config.log` asks for.
          console: instead of one on standard output.

        Raises:
          ConfigError: a sink's library is missing; `check_sinks` finds that out earlier.
          OSError: the file cannot be written.
        """
        self._is_writer = jax.process_index() == 0
        self._config = config
        self._tokens_per_step = config.data.batch_size * config.data.sequence_length
        self._flops_per_token = model_flops_per_token(config.model, config.data.sequence_length)
        self._device_count = device_count or jax.device_count()
        device = jax.devices()[0]
        self._peak = config.log.peak_tflops or peak_tflops(device.device_kind, "bfloat16")
        self._path = Path(run_directory) / METRICS_FILE
        self._is_broken = False
        if not self._is_writer:
            return
        _drop_after(self._path, resume_step)
        self._descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self._console = console or Console(config.run.steps)
        self._sinks = (
            list(sinks)
            if sinks is not None
            else open_sinks(run_directory, config, resume_step=resume_step)
        )
        devices = f"{self._device_count} x {device.device_kind}"
        self.event(resume_step, f"start at step {resume_step} on {devices}; {self._describe_mfu()}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def train_step(self, step: int, values: Mapping[str, Any], *, step_time_s: float) -> None:
        """Records one optimizer step.

        Args:
          step: optimizer steps done, this one included.
          values: scalars of the step, such as `loss_nats`, `grad_norm`, `lr`, `skipped_steps`.
          step_time_s: wall time of the step [s].
        """
        if not self._is_writer:
            return
        tokens_per_s = self._tokens_per_step / step_time_s if step_time_s > 0 else math.nan
        numbers: dict[str, float | None] = {
            "tokens": step * self._tokens_per_step,
            **values,
            "step_time_s": step_time_s,
            "tokens_per_s": tokens_per_s,
            "mfu": self._mfu(tokens_per_s),
            "memory_gib": peak_memory_gib(),
        }
        self._record("train", step, numbers)
        self._console.train(step, numbers)

    def validation(self, step: int, loss_nats: float) -> None:
        """Records a validation loss [nats per token]."""
        if self._is_writer:
            tokens = step * self._tokens_per_step
            numbers = {"tokens": tokens, "validation_loss_nats": float(loss_nats)}
            self._record("validation", step, numbers)
            self._console.validation(step, loss_nats)

    def inspection(self, step: int, tensors: Mapping[str, Any]) -> None:
        """Records what `train.inspection.to_record` made of the tensors that a step began with."""
        if self._is_writer:
            self._append({"kind": "inspection", "step": step, "tensors": tensors})

    def event(self, step: int, message: str) -> None:
        """Records and prints something worth knowing, such as a skipped step."""
        if self._is_writer:
            self._append({"kind": "event", "step": step, "message": message})
            self._console.message(message)

    def close(self) -> None:
        """Closes the file and the sinks."""
        if self._is_writer:
            self._is_writer = False
            os.close(self._descriptor)
            self._console.close()
            for sink in self._sinks:
                sink.close()

    def _describe_mfu(self) -> str:
        if not self._peak:
            return "no MFU, as the peak of this device is not known (--log.peak-tflops sets it)"
        return f"MFU is the share of {self._peak:g} TFLOP/s a device"

    def _mfu(self, tokens_per_s: float) -> float | None:
        if not self._peak:
            return None
        return mfu(tokens_per_s, self._flops_per_token, self._peak, self._device_count)

    def _record(self, kind: str, step: int, numbers: Mapping[str, Any]) -> None:
        plain = {name: _plain(value) for name, value in numbers.items()}
        self._append({"kind": kind, "step": step, **plain})
        shown = {k: float(v) for k, v in plain.items() if v is not None and k != "step"}
        for sink in self._sinks:
            sink.write(kind, step, shown)

    def _append(self, record: dict[str, Any]) -> None:
        line = _to_json({**record, "time": round(time.time(), 3)}).encode() + b"\n"
        # The newline ends the torn line that a full disk left.
        data = b"\n" + line if self._is_broken else line
        try:
            written = os.write(self._descriptor, data)
            is_broken = written < len(data)
        except OSError as error:
            is_broken = True
            if not self._is_broken:
                self._console.message(
                    f"warning: {self._path} cannot be written ({error.strerror}); training goes on"
                )
        self._is_broken = is_broken


@dataclasses.dataclass(frozen=True)
class Metrics:
    """What a run's metrics.jsonl holds."""

    name: str
    """Name of the run directory."""
    train: list[dict[str, Any]]
    """Records of kind "train", in order."""
    validation: list[dict[str, Any]]
    """Records of kind "validation", in order."""
    events: list[dict[str, Any]]
    """Records of kind "event", in order."""
    inspections: list[dict[str, Any]]
    """Records of kind "inspection", in order."""
    torn_lines: int
    """Lines that are no JSON object: cut short by a kill, or still being written."""


def read_metrics(run_directory: Path) -> Metrics:
    """Reads a run's metrics, also while it trains.

    Raises:
      MetricsError: there is no such folder, or it holds no metrics.jsonl, or no metrics in it.
    """
    run_directory = Path(run_directory)
    path = run_directory / METRICS_FILE
    if not run_directory.is_dir():
        raise MetricsError(f"{run_directory}: no such run directory")
    if not path.is_file():
        raise MetricsError(f"{run_directory} is no run directory: it has no {METRICS_FILE}")
    records, torn_lines = _parse(path.read_bytes())
    kinds = {
        kind: [record for record in records if record.get("kind") == kind]
        for kind in ("train", "validation", "event", "inspection")
    }
    if not kinds["train"]:
        raise MetricsError(
            f"{path} holds no training step yet; train for --log.every steps or more"
        )
    name = run_directory.resolve().name
    return Metrics(
        name,
        kinds["train"],
        kinds["validation"],
        kinds["event"],
        kinds["inspection"],
        torn_lines,
    )


def peak_memory_gib() -> float:
    """Returns the peak memory [GiB]: of the fullest local device, on a CPU of the process."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if s and "peak_bytes_in_use" in s]
    if peaks:
        return max(peaks) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB.


def _drop_after(path: Path, step: int) -> None:
    """Rewrites the file without what a restored run will do again, and without torn lines."""
    if not path.exists():
        return
    before = path.read_bytes()
    records, _ = _parse(before)
    kept = [record for record in records if record["step"] <= step]
    after = "".join(_to_json(record) + "\n" for record in kept).encode()
    if after != before:
        atomic_write(path, after)


def _parse(content: bytes) -> tuple[list[dict[str, Any]], int]:
    """Returns the records with a step, and the number of other lines that are not empty."""
    records, torn_lines = [], 0
    for line in content.split(b"\n"):
        try:
            record = json.loads(line) if line.strip() else None
        except ValueError:
            record = line
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
        elif record is not None:
            torn_lines += 1
    return records, torn_lines


def _to_json(record: Mapping[str, Any]) -> str:
    non_finite = {
        name: str(value)
        for name, value in record.items()
        if isinstance(value, float) and not math.isfinite(value)
    }
    if non_finite:
        record = {k: None if k in non_finite else v for k, v in record.items()}
        record["non_finite"] = non_finite
    return json.dumps(record, allow_nan=False)


def _plain(value: Any) -> float | int | None:
    """Returns a Python number for a scalar of NumPy or JAX."""
    return value.item() if hasattr(value, "item") else value

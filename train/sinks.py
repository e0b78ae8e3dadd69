"""Where metrics are shown besides metrics.jsonl: the console, TensorBoard, Weights & Biases."""

import dataclasses
import importlib
import math
import shutil
import sys
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, TextIO

from train.config import ConfigError, LogConfig, TrainConfig
from train.run_directory import atomic_write

_PLAIN_LINE_EVERY_S = 10.0
_WANDB_ID_FILE = "wandb_id.txt"
_CLEAR_LINE = "\r\x1b[2K"


class Sink(Protocol):
    """Gets a copy of what goes to metrics.jsonl."""

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Shows the numbers of one record; `kind` is "train" or "validation"."""

    def close(self) -> None:
        """Sends what is still held back."""


def check_sinks(config: LogConfig) -> None:
    """Makes sure, before any device work, that the libraries of the sinks asked for are there.

    Raises:
      ConfigError: one is missing; the message holds the command that installs it.
    """
    for option, is_wanted, module in (
        ("--log.tensorboard=True", config.tensorboard, "tensorboardX"),
        (f"--log.wandb-project={config.wandb_project}", config.wandb_project, "wandb"),
    ):
        if is_wanted:
            try:
                importlib.import_module(module)
            except ImportError as error:
                raise ConfigError(
                    f"{option} needs the package {module}, which cannot be imported ({error});"
                    f" run: {Path(sys.executable).name} -m pip install {module}"
                ) from error


def open_sinks(run_directory: Path, config: TrainConfig, *, resume_step: int) -> list[Sink]:
    """Opens the sinks that `config.log` asks for.

    Args:
      run_directory: TensorBoard events and the W&B run id go here.
      config: the run's config; W&B shows it.
      resume_step: what a sink may hold of later steps is withdrawn.

    Raises:
      ConfigError: as `check_sinks`.
    """
    check_sinks(config.log)
    sinks: list[Sink] = []
    if config.log.tensorboard:
        sinks.append(TensorBoardSink(run_directory / "tensorboard", resume_step=resume_step))
    if config.log.wandb_project:
        sinks.append(WandbSink(run_directory, config))
    return sinks


class TensorBoardSink:
    """Writes TensorBoard events through tensorboardX."""

    def __init__(self, directory: Path, *, resume_step: int):
        writer_class = importlib.import_module("tensorboardX").SummaryWriter
        # TensorBoard then hides what a killed start had written after its last checkpoint.
        self._writer = writer_class(str(directory), purge_step=resume_step + 1, flush_secs=10)

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Adds each number under "<kind>/<name>", or its own name if that is a path already."""
        for name, value in values.items():
            self._writer.add_scalar(name if "/" in name else f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Writes the events that are still queued."""
        self._writer.close()


class WandbSink:
    """Logs to one Weights & Biases run, which a resumed training continues."""

    def __init__(self, run_directory: Path, config: TrainConfig):
        wandb = importlib.import_module("wandb")
        id_path = run_directory / _WANDB_ID_FILE
        if not id_path.exists():
            atomic_write(id_path, uuid.uuid4().hex[:12] + "\n")
        self._run = wandb.init(
            project=config.log.wandb_project,
            name=config.run.name or None,
            id=id_path.read_text().strip(),
            resume="allow",
            dir=str(run_directory),
            config=dataclasses.asdict(config),
        )
        # W&B refuses steps that go back, as those of a resumed run do; an own axis allows them.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Logs each number under "<kind>/<name>", or its own name if that is a path already."""
        named = {name if "/" in name else f"{kind}/{name}": v for name, v in values.items()}
        self._run.log({**named, "step": step})

    def close(self) -> None:
        """Uploads the rest and ends the run."""
        self._run.finish()


class Console:
    """The progress line: rewritten in place on a terminal, a plain line now and then elsewhere."""

    def __init__(self, total_steps: int, *, stream: TextIO | None = None):
        """Shows nothing yet.

        Args:
          total_steps: optimizer steps of the whole run.
          stream: where to write; None means standard output.
        """
        self._total = total_steps
        self._stream = stream or sys.stdout
        self._is_terminal = self._stream.isatty()
        self._first: tuple[int, float] | None = None
        self._shown_at = -math.inf
        self._validation = ""
        self._line = ""

    def train(self, step: int, values: Mapping[str, float | None]) -> None:
        """Shows a train record."""
        now = time.monotonic()
        self._first = self._first or (step, now)
        parts = [f"step {step}/{self._total}", f"{step / self._total:4.0%}"]
        if (loss := values.get("loss_nats")) is not None:
            parts.append(f"loss {loss:.4f}")
        parts += [self._validation] if self._validation else []
        if (rate := values.get("tokens_per_s")) is not None:
            parts.append(f"{_short(rate)} tokens/s")
        if (mfu := values.get("mfu")) is not None:
            parts.append(f"MFU {mfu:.1%}")
        if skipped := values.get("skipped_steps"):
            parts.append(f"{skipped:.0f} skipped")
        if step < self._total:
            parts.append(f"ETA {_duration(self._eta_s(step, now, values.get('step_time_s')))}")
        self._line = "  ".join(parts)
        if self._is_terminal:
            self._draw()
            if step >= self._total:
                self.close()
        elif now - self._shown_at >= _PLAIN_LINE_EVERY_S or step >= self._total:
            self._print(self._line)
            self._shown_at = now

    def validation(self, step: int, loss_nats: float) -> None:
        """Shows a validation loss, and keeps it on the progress line."""
        self._validation = f"validation {loss_nats:.4f}"
        self.message(f"step {step}/{self._total}  validation loss {loss_nats:.4f} nats")

    def message(self, text: str) -> None:
        """Prints a line above the progress line."""
        self._print(text)
        if self._is_terminal and self._line:
            self._draw()

    def close(self) -> None:
        """Leaves the cursor on a fresh line."""
        if self._is_terminal and self._line:
            self._stream.write("\n")
            self._stream.flush()
            self._line = ""

    def _eta_s(self, step: int, now: float, step_time_s: float | None) -> float:
        """Seconds to go at the mean pace since the first line, pauses to validate included."""
        assert self._first is not None
        first_step, first_time = self._first
        if step > first_step:
            pace = (now - first_time) / (step - first_step)
        else:
            pace = step_time_s or 0.0
        return pace * (self._total - step)

    def _draw(self) -> None:
        width = shutil.get_terminal_size().columns - 1
        self._stream.write(_CLEAR_LINE + self._line[:width])
        self._stream.flush()

    def _print(self, text: str) -> None:
        clear = _CLEAR_LINE if self._is_terminal else ""
        self._stream.write(f"{clear}{text}\n")
        self._stream.flush()


def _short(value: float) -> str:
    """Returns three significant digits with a decimal prefix: 12345 -> "12.3k"."""
    for factor, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g}{prefix}"
    return f"{value:.3g}"


def _duration(seconds: float) -> str:
    """Returns "4:05", "1:02:03" or "2d 1:02:03"."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    clock = f"{hour}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
    return f"{days}d {clock}" if days else clock

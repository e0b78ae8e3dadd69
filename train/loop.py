"""The training loop: wires the parts together, owns the clock and the signals."""

import dataclasses
import math
import signal
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from train import startup
from train.checkpoint import Checkpointer, CheckpointSaveError
from train.config import TrainConfig
from train.data import build_dataset
from train.environment import keep_compiled_programs
from train.generate import generate
from train.mesh import BATCH_AXES, check_divisibility, make_mesh
from train.metrics import MetricsWriter
from train.optimizer import make_optimizer
from train.plots import plot_loss
from train.run_directory import RunDirectory
from train.sinks import check_sinks
from train.state import TrainState, abstract_state, create_state
from train.step import compile_steps, health_metrics, health_names


class TrainingError(RuntimeError):
    """Training cannot go on: too many non-finite steps in a row, or FP8 that did not run in FP8."""


@dataclasses.dataclass
class StopRequest:
    """Turns SIGINT and SIGTERM into a flag; a second one ends the process at once."""

    signal_number: int = 0

    def __enter__(self) -> "StopRequest":
        self._previous = {
            s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        del frame
        if self.signal_number:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.signal_number = number
        name = signal.Signals(number).name
        print(f"\n{name}: finishing this step and saving; once more to stop at once", flush=True)


def train(config: TrainConfig) -> int:
    """Trains, or resumes, the run that `config` describes.

    Returns: 0 when all steps are done, 128 + signal number when stopped by SIGINT or SIGTERM.

    Raises:
      ConfigError, DataError, CheckpointError: for bad input, before the first step.
      TrainingError: when training cannot go on; the newest checkpoint is good.
    """
    check_sinks(config.log)
    index, count = 0, 1
    if config.mesh.distributed:
        jax.distributed.initialize()
        index, count = jax.process_index(), jax.process_count()
    with RunDirectory.open(config, process_index=index) as run:
        optimizer = make_optimizer(config.optimizer, config.run.steps)
        dataset = build_dataset(config, process_index=index, process_count=count)
        if index == 0:
            dataset.save_tokenizer(run.path / "tokenizer.json")
        mesh = make_mesh(config.mesh)
        check_divisibility(config, mesh)
        startup.check_device_support(config)
        keep_compiled_programs(run.path / "compiled")
        run.set_device(jax.devices()[0].device_kind, mesh.size)
        return _Run(config, run, dataset, optimizer, mesh).execute()


class _Run:
    """One start of a run: the live objects of the loop."""

    def __init__(self, config, run, dataset, optimizer, mesh: Mesh):
        self.config, self.run, self.dataset, self.mesh = config, run, dataset, mesh
        self.optimizer = optimizer
        self.checkpointer = Checkpointer(run.checkpoints, config.checkpoint)
        self.batches = dataset.train_iterator()
        self.validation_loss: float | None = None
        self.first_loss: float | None = None
        self.saved_step = -1
        self.fp8_line = ""

    def execute(self) -> int:
        state = self._restore_or_create()
        step = int(state.step)
        self.writer = MetricsWriter(self.run.path, self.config, resume_step=step)
        try:
            if step >= self.config.run.steps:
                print(f"already trained: {step} of {self.config.run.steps} steps", flush=True)
                self._finish(state)
                return 0
            self.steps = compile_steps(self.config, self.optimizer, self.mesh)
            self.names = health_names(state.scaling)
            for line in startup.describe(self.config, state, self.steps, self.mesh):
                print(line, flush=True)
            startup.check_fp8_share(self.config, self.steps)
            self.fp8_line = startup.describe_gemms(self.config, self.steps)
            with StopRequest() as stop:
                state = self._loop(state, step, stop)
                self._save(state)
                self._wait_for_checkpoint(int(state.step))
            if stop.signal_number and int(state.step) < self.config.run.steps:
                print(f"stopped after step {int(state.step)}; run the same command to go on")
                return 128 + stop.signal_number
            self._finish(state)
            return 0
        finally:
            self.checkpointer.close()
            self.writer.close()

    def _restore_or_create(self) -> TrainState:
        abstract = abstract_state(self.config, self.optimizer, self.mesh)
        restored = self.checkpointer.restore_newest(abstract, must_match=self._identity())
        if restored is None:
            return create_state(self.config, self.optimizer, self.mesh)
        self.batches.set_state(restored.data_state)
        self.first_loss = restored.meta["first_loss_nats"]
        self.validation_loss = restored.meta["validation_loss_nats"]
        self.saved_step = restored.step
        print(f"resumed from the checkpoint of step {restored.step}", flush=True)
        return restored.state

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with for its weights to mean anything here."""
        return {
            "tokenizer_hash": self.dataset.summary["tokenizer_hash"],
            "vocab_size": self.config.model.vocab_size,
        }

    def _meta(self) -> dict[str, Any]:
        losses = {
            "first_loss_nats": self.first_loss,
            "validation_loss_nats": self.validation_loss,
        }
        return self._identity() | losses

    def _loop(self, state: TrainState, step: int, stop: StopRequest) -> TrainState:
        """Runs steps until the last one or a signal. Metrics are read one step late.

        While the host waits for step i - 1, the device already has step i: it never idles, and the
        wait gives the true time of a step.
        """
        config = self.config
        pending: tuple[int, dict] | None = None
        self.clock = time.perf_counter()
        applied = int(state.applied_steps)
        while step < config.run.steps and not stop.signal_number:
            batch = self._to_devices(next(self.batches))
            program = self.steps.train if applied else self.steps.calibrate
            state, metrics = program(state, batch)
            step += 1
            if pending is not None:
                self._record(*pending)
            pending = (step, metrics)
            if not applied:
                applied = int(state.applied_steps)
            last = step == config.run.steps
            if config.log.validate_every and (step % config.log.validate_every == 0 or last):
                self._record(*pending)
                pending = None
                self._validate(state, step)
            if config.checkpoint.every and step % config.checkpoint.every == 0:
                if pending is not None:
                    self._record(*pending)
                    pending = None
                self._save(state)
        if pending is not None:
            self._record(*pending)
        return state

    def _to_devices(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        sharding = jax.sharding.NamedSharding(self.mesh, jax.sharding.PartitionSpec(BATCH_AXES))
        return {
            name: jax.make_array_from_process_local_data(sharding, rows)
            for name, rows in batch.items()
        }

    def _record(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Waits for a step's metrics, checks and writes them."""
        values = jax.device_get(metrics)
        now = time.perf_counter()
        step_time, self.clock = now - self.clock, now
        loss = float(values["loss_nats"])
        if self.first_loss is None and math.isfinite(loss):
            self.first_loss = loss
        skips = int(values["consecutive_skips"])
        if skips:
            self.writer.event(
                step, f"step {step} skipped: loss {loss}, grad norm {values['grad_norm']}"
            )
        if step % self.config.log.every == 0 or step == self.config.run.steps:
            health = values.pop("fp8_health", None)
            row = {name: float(value) for name, value in values.items()}
            if health is not None:
                row |= health_metrics(self.names, health)
            self.writer.train_step(step, row, step_time_s=step_time)
        if skips >= self.config.optimizer.max_consecutive_skips:
            raise TrainingError(
                f"{skips} steps in a row had a non-finite loss or gradient (the last: step {step},"
                f" loss {loss}, grad norm {float(values['grad_norm'])}); the parameters are still"
                " those of the last good step. Lower --optimizer.learning-rate, or try"
                " --fp8.recipe bf16 to see whether FP8 is the cause"
            )

    def _validate(self, state: TrainState, step: int) -> None:
        nll = weight = 0.0
        for batch in self.dataset.validation_batches(self.config.log.validation_batches):
            sums = self.steps.evaluate(state, self._to_devices(batch))
            nll, weight = nll + float(sums["nll_sum"]), weight + float(sums["weight_sum"])
        if weight:
            self.validation_loss = nll / weight
            self.writer.validation(step, self.validation_loss)
        self.clock = time.perf_counter()

    def _save(self, state: TrainState) -> None:
        step = int(state.step)
        if not self.config.checkpoint.every or step == self.saved_step or step == 0:
            return
        try:
            self.checkpointer.save(
                step,
                state,
                data_state=self.batches.get_state(),
                meta=self._meta(),
                validation_loss=self.validation_loss,
            )
            self.saved_step = step
        except CheckpointSaveError as error:
            self.writer.event(step, str(error))
        self.clock = time.perf_counter()

    def _wait_for_checkpoint(self, step: int) -> None:
        try:
            self.checkpointer.wait()
        except CheckpointSaveError as error:
            self.writer.event(step, str(error))

    def _finish(self, state: TrainState) -> None:
        plot_loss([self.run.path], self.run.plot)
        self._sample(state)
        summary = startup.summary(
            self.run.path, self.first_loss, self.validation_loss, self.fp8_line
        )
        for line in summary:
            print(line, flush=True)

    def _sample(self, state: TrainState) -> None:
        log = self.config.log
        if not (log.sample_prompt and log.sample_tokens):
            return
        text = generate(
            self.config,
            state.params,
            state.scaling,
            self.dataset.tokenizer,
            log.sample_prompt,
            tokens=log.sample_tokens,
            seed=self.config.run.seed,
        )
        (self.run.path / "sample.txt").write_text(text + "\n", encoding="utf-8")
        print(f"sample:\n{text}", flush=True)

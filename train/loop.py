"""The training loop: wires the parts together and owns the clock."""

import contextlib
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from train import startup
from train.checkpoint import Checkpointer, CheckpointSaveError
from train.config import ConfigError, MeshConfig, TrainConfig
from train.data import Dataset, build_dataset
from train.diagnosis import first_bad_tensor
from train.environment import keep_compiled_programs
from train.generate import encode_prompt, generate
from train.implementations import Decision, portable, settle
from train.inspection import compile_inspection, to_record
from train.interrupt import Interrupt
from train.mesh import batch_sharding, check_divisibility, make_mesh, replicated
from train.metrics import MetricsError, MetricsWriter
from train.optimizer import make_optimizer
from train.plots import plot_loss
from train.run_directory import RunDirectory, atomic_write
from train.sinks import check_sinks
from train.state import TrainState, abstract_state, create_state
from train.step import compile_steps, health_metrics, health_names

Say = Callable[[str], None]


class TrainingError(RuntimeError):
    """Training cannot go on; the newest checkpoint is good."""


def train(config: TrainConfig, interrupt: Interrupt) -> int:
    """Trains, or resumes, the run that `config` describes.

    Args:
      config: the resolved config.
      interrupt: entered, if signals are to be answered.

    Returns: 0 when all steps are done, 128 + signal number when stopped by SIGINT or SIGTERM.

    Raises:
      ConfigError, DataError, CheckpointError: for bad input, before the first step.
      TrainingError: when training cannot go on; the newest checkpoint is good.
      OSError: when a file of the run cannot be written.
    """
    check_sinks(config.log)
    optimizer = make_optimizer(config.optimizer, config.run.steps)
    index, count = _join_processes(config.mesh)
    say = _print if index == 0 else _keep_silent
    interrupt.is_silent = index != 0
    with RunDirectory.open(config, process_index=index, report=say) as run:
        dataset = build_dataset(config, process_index=index, process_count=count, log=say)
        if config.log.sample_prompt:
            encode_prompt(dataset.tokenizer, config.log.sample_prompt)
        mesh = make_mesh(config.mesh)
        check_divisibility(config, mesh)
        startup.check_device_support(config)
        config, decisions = settle(config, mesh)
        keep_compiled_programs(run.path / "compiled")
        run.set_device(jax.devices()[0].device_kind, mesh.size)
        return _Run(config, decisions, run, dataset, optimizer, mesh, say).execute(interrupt)


def _join_processes(config: MeshConfig) -> tuple[int, int]:
    """Returns the index of this process and the number of processes."""
    if not config.distributed:
        return 0, 1
    # It would take SIGTERM for itself; `_Run._must_stop` does the same, and for SIGINT too.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize()
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"--mesh.distributed=True: the processes of this job were not found ({error}); start"
            " it under SLURM, Open MPI or Kubernetes"
        ) from error
    return jax.process_index(), jax.process_count()


def _print(line: str) -> None:
    print(line, flush=True)


def _keep_silent(line: str) -> None:
    del line


class _Pending(NamedTuple):
    """A step whose results are still being computed."""

    step: int
    batch: dict[str, jax.Array]
    metrics: dict[str, jax.Array]
    inspection: dict[str, Any] | None


class _Run:
    """One start of a run: the live objects of the loop."""

    def __init__(
        self,
        config: TrainConfig,
        decisions: list[Decision],
        run: RunDirectory,
        dataset: Dataset,
        optimizer: optax.GradientTransformation,
        mesh: Mesh,
        say: Say,
    ):
        self.config, self.run, self.dataset, self.mesh = config, run, dataset, mesh
        self.decisions, self.optimizer, self.say = decisions, optimizer, say
        self.batches = dataset.train_iterator()
        self.validation_loss: float | None = None
        self.validated_step = -1
        self.first_loss: float | None = None
        self.saved_step = -1
        self.fp8_line = ""
        self.pending: _Pending | None = None
        # The signal to stop for, of this process or, with several, of any; 0 for none.
        self.stop_number = 0
        self._next_stop_number: jax.Array | int = 0
        self._maximum = jax.jit(jnp.max, out_shardings=replicated(mesh))

    def execute(self, interrupt: Interrupt) -> int:
        config, checkpoints = self.config.checkpoint, self.run.checkpoints
        with (
            Checkpointer(checkpoints, config, report=self.say) as self.checkpointer,
            contextlib.closing(self.batches),
        ):
            state = self._restore_or_create()
            if jax.process_index() == 0:
                # Not before: a tokenizer that the checkpoint refuses must not replace its own.
                self.dataset.save_tokenizer(self.run.path / "tokenizer.json")
            if int(state.step) >= self.config.run.steps:
                self.say(f"already trained: {int(state.step)} of {self.config.run.steps} steps")
            else:
                state = self._train(state, interrupt)
                if self.stop_number:
                    self.say(f"stopped after step {int(state.step)}; {self._describe_saved(state)}")
                    return 128 + self.stop_number
            self._finish(state)
            return 0

    def _restore_or_create(self) -> TrainState:
        abstract = abstract_state(self.config, self.optimizer, self.mesh)
        restored = self.checkpointer.restore_newest(abstract, must_match=self._identity())
        if restored is None:
            return create_state(self.config, self.optimizer, self.mesh)
        assert isinstance(restored.data_state, dict)
        self.batches.set_state(restored.data_state)
        self.first_loss = restored.meta["first_loss_nats"]
        self.validation_loss = restored.meta["validation_loss_nats"]
        self.fp8_line = restored.meta["fp8"]
        self.saved_step = restored.step
        self.say(f"resumed from the checkpoint of step {restored.step}")
        return restored.state

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with for its weights to mean anything here."""
        return {
            "tokenizer_hash": self.dataset.summary["tokenizer_hash"],
            "vocab_size": self.config.model.vocab_size,
            "embedding_multiplier": self.config.model.embedding_multiplier,
        }

    def _train(self, state: TrainState, interrupt: Interrupt) -> TrainState:
        """Compiles and runs the steps that are left; saves the last state."""
        for line in startup.describe(self.config, self.decisions, state, self.mesh):
            self.say(line)
        self.say("compiling the step")
        self.steps = compile_steps(self.config, self.optimizer, self.mesh)
        self.inspect = (
            compile_inspection(self.config, self.optimizer, self.mesh)
            if self.config.fp8.inspect_every
            else None
        )
        report = startup.gemm_report(self.steps)
        startup.check_fp8_share(self.config, self.steps, report)
        self.fp8_line = startup.describe_gemms(self.config, report)
        for line in (self.fp8_line, *startup.describe_memory(self.steps)):
            self.say(line)
        self.health_names = health_names(state.scaling)
        with (
            interrupt.deferred(),
            MetricsWriter(
                self.run.path,
                self.config,
                resume_step=int(state.step),
                device_count=self.mesh.size,
            ) as self.writer,
        ):
            state = self._loop(state, interrupt)
            self._save(state)
            self._report_failures(self.checkpointer.wait)
            self._must_stop(interrupt)
        return state

    def _loop(self, state: TrainState, interrupt: Interrupt) -> TrainState:
        """Runs steps until the last one or a signal. Metrics are read one step late.

        While the host waits for step i - 1, the device already has step i: it never idles, and the
        wait gives the true time of a step.
        """
        log, total = self.config.log, self.config.run.steps
        step = int(state.step)
        is_calibrated = self.config.fp8.recipe != "delayed" or int(state.applied_steps) > 0
        self.clock = time.perf_counter()
        while step < total and not self._must_stop(interrupt):
            batch = self._to_devices(next(self.batches))
            step += 1
            inspection = None
            if self.inspect and is_calibrated and step % self.config.fp8.inspect_every == 0:
                inspection = self.inspect(state, batch)
            program = self.steps.train if is_calibrated else self.steps.calibrate
            state, metrics = program(state, batch)
            self._record_pending(state)
            self.pending = _Pending(step, batch, metrics, inspection)
            is_calibrated = is_calibrated or int(state.applied_steps) > 0
            validates = log.validate_every and (step % log.validate_every == 0 or step == total)
            saves = self.config.checkpoint.every and step % self.config.checkpoint.every == 0
            if validates or saves:
                self._record_pending(state)
            if validates:
                self._validate(state, step)
            if saves:
                self._save(state)
        self._record_pending(state)
        return state

    def _must_stop(self, interrupt: Interrupt) -> bool:
        """Looks for a signal; all processes see the same, to stop after the same step."""
        if jax.process_count() == 1:
            self.stop_number = interrupt.number
        else:
            # The maximum over all is computed behind this step and read behind the next one, so
            # that the devices never wait for the host.
            local = np.full(jax.local_device_count(), interrupt.number, np.int32)
            sharding = NamedSharding(self.mesh, PartitionSpec(self.mesh.axis_names))
            numbers = jax.make_array_from_process_local_data(sharding, local)
            self.stop_number = int(self._next_stop_number)
            self._next_stop_number = self._maximum(numbers)
        return self.stop_number > 0

    def _to_devices(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        sharding = batch_sharding(self.mesh)
        return {
            name: jax.make_array_from_process_local_data(sharding, rows)
            for name, rows in batch.items()
        }

    def _record_pending(self, state: TrainState) -> None:
        """Waits for the metrics of the pending step, checks and writes them.

        A step that ends the run has left parameters and FP8 state in `state` as they were.
        """
        if self.pending is None:
            return
        pending, self.pending = self.pending, None
        step, values = pending.step, jax.device_get(pending.metrics)
        now = time.perf_counter()
        step_time, self.clock = now - self.clock, now
        loss, grad_norm = float(values["loss_nats"]), float(values["grad_norm"])
        if self.first_loss is None and math.isfinite(loss):
            self.first_loss = loss
        skips = int(values["consecutive_skips"])
        if skips:
            self.writer.event(step, f"step {step} skipped: loss {loss}, grad norm {grad_norm}")
        if step % self.config.log.every == 0 or step == self.config.run.steps:
            health = values.pop("fp8_health", None)
            row = {name: value.item() for name, value in values.items()}
            if health is not None:
                row |= health_metrics(self.health_names, health)
            self.writer.train_step(step, row, step_time_s=step_time)
        if pending.inspection is not None:
            tensors = jax.device_get(pending.inspection["tensors"])
            self.writer.inspection(step, to_record(tensors))
        # A run shorter than that must not end well without a single good step.
        if skips >= min(self.config.optimizer.max_consecutive_skips, self.config.run.steps):
            culprit = first_bad_tensor(self.config, state, pending.batch)
            raise TrainingError(
                f"{skips} steps in a row had a non-finite loss or gradient (the last: step {step},"
                f" loss {loss}, grad norm {grad_norm}; the first tensor to go bad: {culprit}); they"
                " changed nothing, and the same command goes on from the newest checkpoint. Lower"
                " --optimizer.learning-rate in a new run, or try --fp8.recipe bf16 there to see"
                " whether FP8 is the cause"
            )

    def _validate(self, state: TrainState, step: int) -> None:
        nll = weight = 0.0
        for batch in self.dataset.validation_batches(self.config.log.validation_batches):
            sums = self.steps.evaluate(state, self._to_devices(batch))
            nll, weight = nll + float(sums["nll_sum"]), weight + float(sums["weight_sum"])
        if weight:
            self.validation_loss, self.validated_step = nll / weight, step
            self.writer.validation(step, self.validation_loss)
        self.clock = time.perf_counter()

    def _save(self, state: TrainState) -> None:
        """Starts to save the state, unless that is done already."""
        step = int(state.step)
        if not self.config.checkpoint.every or step in (0, self.saved_step):
            return
        if not _is_finite((state.params, state.opt_state)):
            raise TrainingError(
                f"after step {step} the parameters or moments hold infinities or NaN, although loss"
                " and gradient were finite; this state is not saved, and the same command goes on"
                " from the newest checkpoint. Lower --optimizer.learning-rate in a new run"
            )
        self.saved_step = step
        self._report_failures(
            lambda: self.checkpointer.save(
                step,
                state,
                data_state=self.batches.get_state(),
                meta=self._identity()
                | {
                    "first_loss_nats": self.first_loss,
                    "validation_loss_nats": self.validation_loss,
                    "fp8": self.fp8_line,
                },
                validation_loss=self.validation_loss if self.validated_step == step else None,
            )
        )
        self.clock = time.perf_counter()

    def _report_failures(self, call: Callable[[], None]) -> None:
        """Calls `call`; training goes on without the checkpoints that it says were not saved."""
        try:
            call()
        except CheckpointSaveError as error:
            self.writer.event(max(error.failures), str(error))
            if self.saved_step in error.failures:
                self.saved_step = -1

    def _describe_saved(self, state: TrainState) -> str:
        """Where the same command would go on from."""
        steps = self.checkpointer.steps()
        newest = f"step {steps[-1]}" if steps else "the start"
        if self.saved_step == int(state.step):
            return "its state is saved; run the same command to go on"
        return f"its state is NOT saved; the same command goes on from {newest}"

    def _finish(self, state: TrainState) -> None:
        """Leaves the plot, a sample and the summary."""
        text = self._sample(state)
        if jax.process_index() != 0:
            return
        try:
            if text:
                atomic_write(self.run.path / "sample.txt", text + "\n")
                self.say(f"sample:\n{text}")
            plot_loss([self.run.path], self.run.plot)
            summary = startup.summary(
                self.run.path, self.first_loss, self.validation_loss, self.fp8_line
            )
            for line in summary:
                self.say(line)
        except (OSError, MetricsError) as error:  # The state is what counts, and it is safe.
            self.say(f"warning: plot, sample or summary is missing: {error}")
        if self.config.checkpoint.every and self.saved_step != int(state.step):
            self.say(f"step {int(state.step)} is done; {self._describe_saved(state)}")

    def _sample(self, state: TrainState) -> str:
        """The continuation of the prompt that the config gives; empty if it gives none."""
        log = self.config.log
        if not (log.sample_prompt and log.sample_tokens):
            return ""
        return generate(
            portable(self.config),
            state.params,
            state.scaling,
            self.dataset.tokenizer,
            log.sample_prompt,
            tokens=log.sample_tokens,
            seed=self.config.run.seed,
        )


@jax.jit
def _is_finite(tree: Any) -> jax.Array:
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.stack([jnp.isfinite(x).all() for x in floats]).all()

"""Our trainer: the very program that `train.loop` runs, on random tokens."""

import time
from typing import Any

import jax
import numpy as np

from benchmarks.common import time_steps
from benchmarks.contenders import jax_device
from jfp8 import diagnostics
from train import startup
from train.config import TrainConfig, parse
from train.implementations import describe, settle
from train.mesh import check_divisibility, make_mesh
from train.optimizer import make_optimizer
from train.state import create_state, make_recipe
from train.step import abstract_batch, compile_steps


class OurStep:
    """The compiled train step, its state and one random batch; `launch` queues a step."""

    def __init__(self, config: TrainConfig):
        optimizer, mesh = make_optimizer(config.optimizer, config.run.steps), make_mesh(config.mesh)
        check_divisibility(config, mesh)
        startup.check_device_support(config)
        config, self.decisions = settle(config, mesh)
        self.config = config
        started = time.perf_counter()
        self.steps = compile_steps(config, optimizer, mesh)
        self.compile_time_s = time.perf_counter() - started
        self.state = create_state(config, optimizer, mesh)
        self.batch = {
            name: jax.device_put(values, abstract_batch(config, mesh)[name].sharding)
            for name, values in random_batch(config).items()
        }
        self.metrics: dict[str, jax.Array] = {}
        recipe = make_recipe(config.fp8)
        if recipe.calibrating() != recipe:
            # As in a run: the first step takes its scales from its own tensors.
            self.state, self.metrics = self.steps.calibrate(self.state, self.batch)

    def launch(self) -> jax.Array:
        """Queues one step; returns its loss."""
        self.state, self.metrics = self.steps.train(self.state, self.batch)
        return self.metrics["loss_nats"]


def random_batch(config: TrainConfig) -> dict[str, np.ndarray]:
    """A full batch of uniformly random tokens, one document a row."""
    shape = (config.data.batch_size, config.data.sequence_length)
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, config.model.vocab_size, (2, *shape), dtype=np.int32)
    return {
        "tokens": tokens[0],
        "targets": tokens[1],
        "segment_ids": np.ones(shape, np.int32),
        "positions": np.tile(np.arange(shape[1], dtype=np.int32), (shape[0], 1)),
        "loss_weights": np.ones(shape, np.float32),
    }


def run(task: dict[str, Any]) -> dict[str, Any]:
    """Times our step. See `benchmarks.contenders`."""
    config = parse(task["config_arguments"])
    step = OurStep(config)
    times = time_steps(
        step.launch, jax.block_until_ready, warmup=task["warmup"], steps=task["steps"]
    )
    if jax.default_backend() == "gpu":
        whole = diagnostics.fp8_dot_count(step.steps.train)
    else:
        whole = diagnostics.lowered_dot_count(step.steps.train_lowered)
    return jax_device.describe() | {
        "step_times_s": times.step_times_s,
        "launch_times_s": times.launch_times_s,
        "compile_time_s": step.compile_time_s,
        "planned_memory_gib": jax_device.planned_memory_gib(step.steps.train),
        "loss_nats": float(step.metrics["loss_nats"]),
        "skipped_steps": int(step.metrics["skipped_steps"]),
        "attention": startup.attention_choice(step.config),
        "kernels": describe(step.decisions),
        "block_gemms": jax_device.gemms(startup.gemm_report(step.steps)),
        "gemms": jax_device.gemms(whole),
    }

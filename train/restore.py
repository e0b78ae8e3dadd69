"""Loads a trained model from its run directory."""

import dataclasses
from pathlib import Path

import jax
import tokenizers

from train.checkpoint import Checkpointer
from train.config import ConfigError, TrainConfig, parse
from train.mesh import make_mesh
from train.optimizer import make_optimizer
from train.state import TrainState, abstract_state


def load_run(directory: Path) -> tuple[TrainConfig, TrainState, tokenizers.Tokenizer]:
    """The config, newest good state and tokenizer of a run.

    Raises:
      ConfigError: if the directory is no run, or holds no checkpoint yet.
      CheckpointError: if no checkpoint in it is good.
    """
    for name in ("config.toml", "tokenizer.json"):
        if not (directory / name).is_file():
            raise ConfigError(f"{directory} is no run directory: it has no {name}")
    config = parse(["--config", str(directory / "config.toml")])
    mesh = make_mesh(dataclasses.replace(config.mesh, data=1, fsdp=1, tensor=1), jax.devices()[:1])
    abstract = abstract_state(config, make_optimizer(config.optimizer, config.run.steps), mesh)
    with Checkpointer(directory / "checkpoints", config.checkpoint) as checkpointer:
        restored = checkpointer.restore_newest(abstract)
    if restored is None:
        raise ConfigError(f"{directory} has no checkpoint yet; train it first")
    tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    return config, restored.state, tokenizer

"""Loads a trained model from its run directory."""

import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax
import tokenizers

from train.checkpoint import Checkpointer, Restored
from train.config import ConfigError, MeshConfig, TrainConfig, parse
from train.data.tokenizer import load_tokenizer
from train.implementations import portable
from train.mesh import make_mesh
from train.state import abstract_state


class TrainedModel(NamedTuple):
    """What text is generated with."""

    config: TrainConfig
    params: Any  # float32 tree
    scaling: Any  # tree of jfp8.ScalingState, {} without FP8
    tokenizer: tokenizers.Tokenizer


def load_model(directory: Path) -> TrainedModel:
    """The newest good weights of a run, on the first device; nothing else of it is read.

    Its implementations become "auto": the machine need not be the one that trained.

    Raises:
      ConfigError: if the directory is no run, or holds no checkpoint yet.
      CheckpointError: if no checkpoint in it is good.
      DataError: if its tokenizer is gone.
    """
    config, restored = restore_run(directory)
    tokenizer = load_tokenizer(directory / "tokenizer.json")
    return TrainedModel(config, restored.state.params, restored.state.scaling, tokenizer)


def restore_run(directory: Path) -> tuple[TrainConfig, Restored]:
    """A run's config, and its newest good checkpoint without the optimizer's moments.

    The state is a `TrainState` on the first device; the implementations become "auto".

    Raises:
      ConfigError: if the directory is no run, or holds no checkpoint yet.
      CheckpointError: if no checkpoint in it is good.
    """
    if not directory.is_dir():
        raise ConfigError(f"{directory}: no such run directory")
    if not (directory / "config.toml").is_file():
        raise ConfigError(f"{directory} is no run directory: it has no config.toml")
    config = portable(parse(["--config", str(directory / "config.toml")]))
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    state = abstract_state(config, optax.identity(), mesh)
    report = lambda line: print(line, file=sys.stderr)  # noqa: E731
    folder = directory / "checkpoints"
    with Checkpointer(folder, config.checkpoint, report=report) as checkpointer:
        wanted = {"embedding_multiplier": config.model.embedding_multiplier}
        restored = checkpointer.restore_newest(state, wanted, is_partial=True)
    if restored is None:
        raise ConfigError(f"{directory} has no checkpoint yet; train it first")
    return config, restored

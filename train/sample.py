"""Generates text from a run's newest checkpoint: `python -m train.sample RUN --prompt "..."`."""

import dataclasses
import sys
from pathlib import Path

import jax
import tokenizers
import tyro

from train.checkpoint import Checkpointer, CheckpointError
from train.config import ConfigError, TrainConfig, parse
from train.generate import generate
from train.mesh import make_mesh
from train.optimizer import make_optimizer
from train.state import TrainState, abstract_state


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SampleConfig:
    """Continues a prompt with a trained model."""

    run: tyro.conf.Positional[Path]
    """Run directory, such as runs/tiny_cpu."""
    prompt: str = "def "
    """Text to continue."""
    tokens: int = 64
    """Tokens to generate; stops earlier at the end of the text."""
    temperature: float = 0.8
    """0 takes the likeliest token; 1 samples from the model's own distribution."""
    seed: int = 0
    """Seed of the sampling."""

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ConfigError(f"--tokens={self.tokens} must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"--temperature={self.temperature} must be >= 0 and finite")


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


def main(arguments: list[str] | None = None) -> int:
    """Entry point of `python -m train.sample`; 0, or 2 for bad input."""
    try:
        options = tyro.cli(SampleConfig, prog="python -m train.sample", args=arguments)
        config, state, tokenizer = load_run(options.run)
        text = generate(
            config,
            state.params,
            state.scaling,
            tokenizer,
            options.prompt,
            tokens=options.tokens,
            temperature=options.temperature,
            seed=options.seed,
        )
    except (ConfigError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

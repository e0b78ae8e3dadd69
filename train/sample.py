"""Generates text from a run's newest checkpoint: `python -m train.sample RUN --prompt "..."`."""

import dataclasses
import sys
from pathlib import Path

import tyro

from train.config import ConfigError
from train.environment import prepare_environment


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


def main(arguments: list[str] | None = None) -> int:
    """Entry point of `python -m train.sample`; 0, or 2 for bad input."""
    prepare_environment()
    # Imported late: the environment must be set before JAX is.
    from train.checkpoint_content import CheckpointError
    from train.data import DataError
    from train.generate import generate
    from train.restore import load_model

    try:
        options = tyro.cli(SampleConfig, prog="python -m train.sample", args=arguments)
        text = generate(
            *load_model(options.run),
            options.prompt,
            tokens=options.tokens,
            temperature=options.temperature,
            seed=options.seed,
        )
    except (ConfigError, CheckpointError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

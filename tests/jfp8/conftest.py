"""Quick compiles: these tests compile far more than they compute."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True)
def quick_compiles() -> Iterator[None]:
    """Overridden where a test is about what XLA makes of a program."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)

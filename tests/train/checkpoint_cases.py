"""Checkpoints to test with, and what must come back of them."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from train.checkpoint import Checkpointer
from train.config import CheckpointConfig

DATA = {"epoch": 1, "position": 640}


def bits(array: jax.Array) -> tuple:
    """Everything that must come back: dtype, shape and the raw bytes."""
    host = np.asarray(array)
    return host.dtype, host.shape, host.tobytes()


def make_state(seed: int = 0) -> dict:
    """A state with each dtype that training uses, in the containers of optax."""
    random = np.random.default_rng(seed)
    words = random.integers(0, 2**16, (6, 8), dtype=np.uint16)  # All bfloat16 patterns, NaN too.
    kernel = jnp.asarray(random.standard_normal((8, 16)), jnp.float32)
    return {
        "params": {"kernel": kernel, "bias": jnp.zeros((3,), jnp.bfloat16)},
        "opt_state": optax.adamw(1e-3).init({"kernel": kernel}),
        "moment": jax.lax.bitcast_convert_type(jnp.asarray(words), jnp.bfloat16),
        "scaling": jnp.asarray([np.inf, -0.0, np.nan, 1e-45], jnp.float32),
        "fp8": jnp.arange(-3, 5, dtype=jnp.float32).astype(jnp.float8_e4m3fn),
        "key": jax.random.key_data(jax.random.key(seed)),
        "step": jnp.int32(seed),
        "empty": jnp.zeros((0, 4), jnp.float32),
        "is_calibrated": jnp.asarray(True),
    }


def abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def assert_bitwise_equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for path, (a, b) in zip(
        jax.tree_util.tree_leaves_with_path(expected),
        zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True),
        strict=True,
    ):
        assert bits(a) == bits(b), path[0]


def save(directory: Path, steps, *, keep: int = 9, **options) -> None:
    with Checkpointer(directory, CheckpointConfig(keep=keep)) as checkpointer:
        for step in steps:
            checkpointer.save(step, make_state(step), data_state={**DATA, "step": step}, **options)
        checkpointer.wait()


def restore(directory: Path, state=None, reports: list | None = None, **options):
    report = [].append if reports is None else reports.append
    with Checkpointer(directory, CheckpointConfig(), report=report) as checkpointer:
        return checkpointer.restore_newest(abstract(state or make_state()), **options)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())

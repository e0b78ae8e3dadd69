"""What a run saved, and quick compilation for runs in this process."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from train.checkpoint import Checkpointer
from train.config import CheckpointConfig, TrainConfig, parse
from train.mesh import make_mesh
from train.optimizer import make_optimizer
from train.state import abstract_state


def saved_arrays(arguments: list[str]) -> dict[str, tuple]:
    """Every array of the newest checkpoint: {name: (dtype, shape, bytes)}."""
    config = parse(arguments)
    restored = restore(config)
    leaves = jax.tree_util.tree_leaves_with_path(restored.state)
    return {jax.tree_util.keystr(path): _bits(leaf) for path, leaf in leaves}


def restore(config: TrainConfig):
    """The newest checkpoint of a run, on one device."""
    optimizer = make_optimizer(config.optimizer, config.run.steps)
    mesh = make_mesh(type(config.mesh)(data=1), jax.devices()[:1])
    abstract = abstract_state(config, optimizer, mesh)
    folder = Path(config.run.directory) / "checkpoints"
    with Checkpointer(folder, CheckpointConfig()) as checkpointer:
        restored = checkpointer.restore_newest(abstract)
    assert restored is not None
    return restored


def _bits(leaf: jax.Array) -> tuple:
    array = np.asarray(leaf)
    return str(array.dtype), array.shape, array.tobytes()


@contextlib.contextmanager
def quick_compilation(xla_cache: Path) -> Iterator[None]:
    """Compiles without optimisation, and each program once, in this process."""
    wanted = {
        "jax_disable_most_optimizations": True,
        "jax_compilation_cache_dir": str(xla_cache),
        "jax_persistent_cache_min_compile_time_secs": 0,
    }
    earlier = {name: jax.config.values[name] for name in wanted}
    for name, value in wanted.items():
        jax.config.update(name, value)
    try:
        yield
    finally:
        for name, value in earlier.items():
            jax.config.update(name, value)

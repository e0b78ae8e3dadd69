"""The device mesh and where each array lives on it.

One mesh with the axes `data`, `fsdp` and `tensor`; batches are split over the first two, weights
and moments over the last two (ZeRO-3, arXiv:1910.02054; Megatron, arXiv:1909.08053). The compiler
inserts the collectives.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from train.config import ConfigError, MeshConfig, TrainConfig

BATCH_AXES = ("data", "fsdp")

# The last two axes of a weight, by the end of its path. Column-parallel, then row-parallel GEMMs.
_WEIGHT_SPECS = {
    "qkv/kernel": ("fsdp", "tensor"),
    "gate_up/kernel": ("fsdp", "tensor"),
    "out/kernel": ("tensor", "fsdp"),
    "down/kernel": ("tensor", "fsdp"),
    "embedding": ("tensor", "fsdp"),
    "head": ("fsdp", "tensor"),
}


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices.

    Raises:
      ConfigError: if the axes' sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.tensor]
    if -1 in sizes:
        known = -int(np.prod(sizes))
        sizes[sizes.index(-1)] = len(devices) // known if len(devices) % known == 0 else 0
    if int(np.prod(sizes)) != len(devices):
        raise ConfigError(
            f"--mesh.data={config.data} x --mesh.fsdp={config.fsdp} x --mesh.tensor={config.tensor}"
            f" does not make {len(devices)} devices; let one of them be -1"
        )
    return jax.make_mesh(
        tuple(sizes), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3, devices=devices
    )


def check_divisibility(config: TrainConfig, mesh: Mesh) -> None:
    """Raises ConfigError where the mesh does not divide the batch or the weights."""
    replicas, fsdp, tensor = (
        mesh.shape["data"] * mesh.shape["fsdp"],
        mesh.shape["fsdp"],
        mesh.shape["tensor"],
    )
    model = config.model
    microbatch = config.data.batch_size // config.optimizer.accumulation_steps
    for what, size, axis, parts in (
        ("batch-size / accumulation-steps", microbatch, "data x fsdp", replicas),
        ("--model.hidden-size", model.hidden_size, "fsdp", fsdp),
        ("--model.num-kv-heads", model.num_kv_heads, "tensor", tensor),
        ("--model.ffn-size", model.ffn_size, "tensor", tensor),
        ("--model.vocab-size", model.vocab_size, "tensor", tensor),
    ):
        if size % parts:
            raise ConfigError(f"{what}={size} must be a multiple of the mesh's {axis}={parts}")


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of scalars and small state: a copy on every device."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of [B, T] arrays: sequences over `data` and `fsdp`."""
    return NamedSharding(mesh, P(BATCH_AXES))


def parameter_shardings(params: Any, mesh: Mesh) -> Any:
    """A tree of shardings for a tree of weights, or of anything shaped and named alike (moments).

    Args:
      params: tree of arrays or shapes; leaves are matched by the end of their path and their rank.
      mesh: from `make_mesh`.
    """

    def sharding(path: tuple, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        for ending, axes in _WEIGHT_SPECS.items():
            if name.endswith(ending) and leaf.ndim >= 2:
                return NamedSharding(mesh, P(*[None] * (leaf.ndim - 2), *axes))
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(sharding, params)

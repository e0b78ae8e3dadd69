"""Batch and heads may be sharded over a mesh, and mapped by vmap: attention is independent in both.

`call` wraps a function of whole arrays so that XLA's partitioner runs it on each device's own batch
rows and heads (lengths and head dim stay whole), and so that vmap folds its axis into the batch.
"""

# Shapes: b batch, t query, s key, n query heads, k key/value heads, h head dim; n = k * g.

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import Array
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels.flash_attention.config import AttentionSpec

Function = Callable[..., tuple[Array, ...]]


def call(
    function: Function,
    layouts: Sequence[str],
    result_layouts: Sequence[str],
    arrays: Sequence[Array],
    spec: AttentionSpec,
) -> tuple[Array, ...]:
    """Returns `function(*arrays, spec)`, with the spec of what each device or vmap gets.

    Args:
      function: takes arrays and a spec, returns arrays.
      layouts: for each array its axes, such as "btnh"; the first is that of q, the second of k.
      result_layouts: the same for the results.
      arrays: the arguments.
      spec: describes the arrays.
    """

    @custom_vmap
    def run(*arrays: Array) -> tuple[Array, ...]:
        return _partitioned(function, layouts, result_layouts, spec)(*arrays)

    @run.def_vmap
    def _(size: int, is_mapped: Sequence[bool], *arrays: Array) -> Any:
        whole = [
            x if mapped else jax.numpy.broadcast_to(x, (size, *x.shape))
            for x, mapped in zip(arrays, is_mapped, strict=True)
        ]
        folded = [x.reshape(-1, *x.shape[2:]) for x in whole]
        folded_spec = dataclasses.replace(spec, batch_size=size * spec.batch_size)
        results = call(function, layouts, result_layouts, folded, folded_spec)
        results = tuple(x.reshape(size, spec.batch_size, *x.shape[1:]) for x in results)
        return results, (True,) * len(results)

    return run(*arrays)


def _partitioned(
    function: Function,
    layouts: Sequence[str],
    result_layouts: Sequence[str],
    spec: AttentionSpec,
) -> Callable[..., tuple[Array, ...]]:
    """Returns `function` with a rule for XLA's partitioner."""

    def local(*arrays: Array) -> tuple[Array, ...]:
        (batch, _, heads, _), kv_heads = arrays[0].shape, arrays[1].shape[2]
        return function(
            *arrays,
            dataclasses.replace(spec, batch_size=batch, num_heads=heads, num_kv_heads=kv_heads),
        )

    # jit keeps the constants of a kernel's trace inside; the partitioner accepts none.
    run = custom_partitioning(jax.jit(local))

    def partition(mesh: Any, shapes: Any, result_shapes: Any) -> Any:
        del result_shapes
        to_sharding = functools.partial(_sharding, mesh, *_shared_axes(mesh, shapes, spec))
        arguments = tuple(map(to_sharding, layouts))
        return mesh, local, tuple(map(to_sharding, result_layouts)), arguments

    def infer(mesh: Any, shapes: Any, result_shapes: Any) -> Any:
        return partition(mesh, shapes, result_shapes)[2]

    # Query heads are a factor of key/value heads and one of their groups; factors of size 1 are not
    # written.
    group = spec.num_heads // spec.num_kv_heads
    heads = "k" if group == 1 else "g" if spec.num_kv_heads == 1 else "(k g)"
    run.def_partition(
        partition=partition,
        infer_sharding_from_operands=infer,
        sharding_rule=f"{_rule(layouts, heads)} -> {_rule(result_layouts, heads)}",
        # In the order in which they appear first.
        need_replication_factors=("t", *(("g",) if group > 1 else ()), "h", "s"),
        **({"g": group} if heads == "(k g)" else {}),
    )
    return run


def _rule(layouts: Sequence[str], heads: str) -> str:
    """Writes layouts as one side of a sharding rule."""
    return ", ".join(" ".join(heads if axis == "n" else axis for axis in x) for x in layouts)


def _shared_axes(mesh: Any, shapes: Any, spec: AttentionSpec) -> tuple[Any, Any]:
    """Returns the mesh axes of the batch, and of the heads where q and k agree on them."""
    (batch, _, heads, *_), (_, _, kv_heads, *_) = (
        (*x.sharding.spec, None, None, None, None)[:4] for x in shapes[:2]
    )
    if heads != kv_heads or spec.num_kv_heads % _size(mesh, heads):
        heads = None
    return batch, heads


def _size(mesh: Any, axes: Any) -> int:
    """Returns the number of devices along one or more axes of a mesh."""
    names = () if axes is None else (axes,) if isinstance(axes, str) else axes
    size = 1
    for name in names:
        size *= mesh.shape[name]
    return size


def _sharding(mesh: Any, batch: Any, heads: Any, layout: str) -> NamedSharding:
    """Returns how an array of some layout is sharded."""
    axes = {"b": batch, "n": heads, "k": heads}
    return NamedSharding(mesh, PartitionSpec(*(axes.get(axis) for axis in layout)))

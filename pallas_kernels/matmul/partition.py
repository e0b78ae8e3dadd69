"""Runs the FP8 product on each device's part of sharded matrices.

The kernel is opaque to XLA's partitioner, which would otherwise gather its operands on every
device. Each device multiplies its rows of lhs by its rows of rhs_t; where K is split too, the
partial products are added over the devices, in the type of the result, as for a dot of XLA's.
"""

# Shapes: M rows of lhs, N rows of rhs_t, K contracted.

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import Array, lax
from jax.custom_batching import sequential_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from pallas_kernels.interpreter import is_interpreting

Product = Callable[[Array, Array, Array], Array]


def per_device(local: Product, lhs: Array, rhs_t: Array, scale: Array) -> Array:
    """Calls `local(lhs, rhs_t, scale)` on the shards; one after the other under vmap.

    Args:
      local: `[M, K]`, `[N, K]` and `()` to `[M, N]`.
      lhs: `[M, K]`.
      rhs_t: `[N, K]`.
      scale: float32 `()`.
    """
    return sequential_vmap(functools.partial(_partitioned, local))(lhs, rhs_t, scale)


def _partitioned(local: Product, lhs: Array, rhs_t: Array, scale: Array) -> Array:
    mesh = jax.sharding.get_abstract_mesh()
    if AxisType.Manual in mesh.axis_types or is_interpreting() or jax.device_count() == 1:
        # The interpreter's callbacks cannot be partitioned; it is for single devices' tests.
        return local(lhs, rhs_t, scale)
    if AxisType.Explicit in jax.typeof(lhs).sharding.mesh.axis_types:
        specs = [jax.typeof(x).sharding.spec for x in (lhs, rhs_t)]
        run, given, wanted = _on_shards(local, *specs)
        lhs, rhs_t = jax.sharding.reshard(lhs, wanted[0]), jax.sharding.reshard(rhs_t, wanted[1])
        run = jax.shard_map(run, in_specs=wanted, out_specs=given, check_vma=False)
        return run(lhs, rhs_t, scale)
    call = custom_partitioning(lambda *operands: local(*operands))
    call.def_partition(
        partition=functools.partial(_partition, local),
        sharding_rule="m k, n k,  -> m n",
        reduction_factors=("k",),
    )
    return call(lhs, rhs_t, scale)


def _partition(local: Product, mesh: Any, operands: Any, results: Any) -> Any:
    """The callback of custom_partitioning: what each device runs, and the shardings it wants."""
    del results
    run, given, wanted = _on_shards(local, *(x.sharding.spec for x in operands[:2]))
    sharding = functools.partial(NamedSharding, mesh)
    return mesh, run, sharding(given), tuple(map(sharding, wanted))


def _on_shards(
    local: Product, lhs: PartitionSpec, rhs_t: PartitionSpec
) -> tuple[Product, PartitionSpec, tuple[PartitionSpec, ...]]:
    """What a device runs, how the result is split, and how the operands must be.

    Of a mesh axis that splits two dimensions M goes first, then N; K is split only as lhs is.
    """
    m = _names(lhs, 0)
    n = tuple(name for name in _names(rhs_t, 0) if name not in m)
    k = tuple(name for name in _names(lhs, 1) if name not in (*m, *n))

    def run(lhs: Array, rhs_t: Array, scale: Array) -> Array:
        out = local(lhs, rhs_t, scale)
        return lax.psum(out, k) if k else out

    spec = PartitionSpec
    return (
        run,
        spec(m or None, n or None),
        (spec(m or None, k or None), spec(n or None, k or None), spec()),
    )


def _names(spec: PartitionSpec, dimension: int) -> tuple[str, ...]:
    """The mesh axes that split a dimension."""
    entry = (*spec, None, None)[dimension]
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)

"""Runs a quantising kernel on each device's part of a sharded matrix; never gathers one.

A kernel is opaque to XLA's partitioner, which would otherwise gather its operands on every device.
What happens depends on where the call is traced:

  jit over one device, or inside shard_map   the kernel, on the array at hand
  jit over several devices                   the kernel, on each device's shard: rows and columns
                                             may be split; an amax is the maximum over the devices
                                             that split columns, and stays apart for those that
                                             split rows
  vmap                                       one matrix after the other
"""

# Shapes: M rows, K columns.

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
from jax import Array, lax
from jax.custom_batching import sequential_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, NamedSharding, PartitionSpec, reshard

from pallas_kernels.quantize.contract import AMAX_PARTS, sees_parts

Kind = Literal["rows", "columns", "parts", "whole_rows", "whole_columns", "row_values", "sum"]
"""Of a result: `[M, K]`, `[K, M]`, the 128 parts of an amax; `[M, K]` or `[K, M]` with all of K on
every device, `[M]`, or `[K]`, a sum over the rows."""


def per_device(
    local: Callable[..., tuple[Array, ...]],
    arrays: Sequence[Array],
    scale: Array,
    kinds: Sequence[Kind],
    *,
    widths: Sequence[int | None],
    result_width: int,
) -> tuple[Array, ...]:
    """Calls `local(*arrays, scale)` on the shards of the arrays.

    Args:
      local: the kernel; its results are of `kinds`.
      arrays: `[M, widths[i] * K]` each, or with None for a width `[M, anything]`, of which every
        device has all columns.
      scale: float32 `()` or a vector; every device has all of it.
      kinds: of the results; for those without a split of K the first array has None for a width.
      widths: of the arrays, as multiples of K.
      result_width: that of the results.

    Raises:
      NotImplementedError: if the rows are split over a number of devices that does not divide 128.
    """
    run = sequential_vmap(
        lambda *operands: _partitioned(local, operands, kinds, widths, result_width)
    )
    axes = frozenset[str]().union(*map(_varying, (*arrays, scale)))
    results = run(*arrays, scale)
    missing = [tuple(sorted(axes - _varying(x))) for x in results]
    return tuple(
        lax.pcast(x, names, to="varying") if names else x
        for x, names in zip(results, missing, strict=True)
    )


def _varying(x: Array) -> frozenset[str]:
    """The mesh axes over which x differs, under shard_map."""
    aval = jax.typeof(x)
    # JAX 0.11.2 keeps the axes under `.mat`; releases before and after it say `.vma`.
    return aval.mat.varying if hasattr(aval, "mat") else aval.vma


def _partitioned(
    local: Callable[..., tuple[Array, ...]],
    operands: tuple[Array, ...],
    kinds: Sequence[Kind],
    widths: Sequence[int | None],
    result_width: int,
) -> tuple[Array, ...]:
    if sees_parts():
        return local(*operands)
    sharding = jax.typeof(operands[0]).sharding
    if AxisType.Explicit in sharding.mesh.axis_types:
        return _explicit(local, operands, kinds, widths, sharding)
    rows = operands[0].shape[0]
    has_parts = "parts" in kinds
    if has_parts and rows % AMAX_PARTS:
        raise NotImplementedError(
            f"the {rows} rows of an array on several devices must be a multiple of {AMAX_PARTS};"
            " pad them, or use implementation='xla'"
        )
    call = custom_partitioning(lambda *operands: local(*operands))
    call.def_partition(
        partition=functools.partial(_partition, local, kinds, widths),
        sharding_rule=_rule(kinds, widths, result_width, operands[-1].ndim),
        **({"r": rows // AMAX_PARTS} if has_parts else {}),
        **{f"t{width}": width for width in {*widths, result_width} - {None, 1}},
    )
    return call(*operands)


def _rule(
    kinds: Sequence[Kind], widths: Sequence[int | None], result_width: int, scale_ndim: int
) -> str:
    """Shardy's rule: rows are (p r), so that the parts of an amax are split as the rows are."""
    rows = "(p r)" if "parts" in kinds else "r"

    def columns(width: int) -> str:
        return "k" if width == 1 else f"(k t{width})"

    forms = {
        "rows": f"{rows} {columns(result_width)}",
        "columns": f"{columns(result_width)} {rows}",
        "parts": "p",
        "whole_rows": f"{rows} w0",
        "whole_columns": f"w0 {rows}",
        "row_values": rows,
        "sum": "w0",
    }
    operands = [
        f"{rows} {f'w{i}' if width is None else columns(width)}" for i, width in enumerate(widths)
    ]
    scale = "v" if scale_ndim else ""
    return ", ".join([*operands, scale]) + " -> " + ", ".join(forms[kind] for kind in kinds)


def _names(entry: Any) -> tuple[str, ...]:
    """The mesh axes of one entry of a PartitionSpec."""
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


def _specs(kinds: Sequence[Kind], rows: Any, columns: Any) -> tuple[PartitionSpec, ...]:
    specs = {
        "rows": PartitionSpec(rows, columns),
        "columns": PartitionSpec(columns, rows),
        "parts": PartitionSpec(rows),
        "whole_rows": PartitionSpec(rows, None),
        "whole_columns": PartitionSpec(None, rows),
        "row_values": PartitionSpec(rows),
        "sum": PartitionSpec(),
    }
    return tuple(specs[kind] for kind in kinds)


def _on_shards(
    local: Callable[..., tuple[Array, ...]],
    kinds: Sequence[Kind],
    sizes: dict[str, int],
    rows: Any,
    columns: Any,
) -> Callable[..., tuple[Array, ...]]:
    """`local` followed by what the amax or the sum of a shard needs to become the global one."""
    count = 1
    for name in _names(rows):
        count *= sizes[name]
    if "parts" in kinds and AMAX_PARTS % count:
        raise NotImplementedError(
            f"the rows are split over {count} devices, which must divide {AMAX_PARTS}; use a mesh"
            " with a power of two, or implementation='xla'"
        )

    def run(*operands: Array) -> tuple[Array, ...]:
        results = []
        for kind, result in zip(kinds, local(*operands), strict=True):
            if kind == "parts":
                result = result.reshape(-1, count).max(axis=1)
                if _names(columns):
                    result = lax.pmax(result, _names(columns))
            if kind == "sum" and _names(rows):
                result = lax.psum(result, _names(rows))
            results.append(result)
        return tuple(results)

    return run


def _rows_and_columns(spec: PartitionSpec) -> tuple[Any, Any]:
    rows, columns = (*spec, None, None)[:2]
    return rows, columns


def _matrix_specs(
    widths: Sequence[int | None], rows: Any, columns: Any
) -> tuple[PartitionSpec, ...]:
    return tuple(PartitionSpec(rows, None if width is None else columns) for width in widths)


def _partition(
    local: Any,
    kinds: Sequence[Kind],
    widths: Sequence[int | None],
    mesh: Any,
    operands: Any,
    results: Any,
) -> Any:
    """The callback of custom_partitioning: what each device runs, and the shardings it wants."""
    del results
    rows, columns = _rows_and_columns(operands[0].sharding.spec)
    run = _on_shards(local, kinds, dict(mesh.shape), rows, columns)
    matrices = (NamedSharding(mesh, spec) for spec in _matrix_specs(widths, rows, columns))
    wanted = (*matrices, NamedSharding(mesh, PartitionSpec()))
    given = tuple(NamedSharding(mesh, spec) for spec in _specs(kinds, rows, columns))
    return mesh, run, given, wanted


def _explicit(
    local: Any,
    operands: tuple[Array, ...],
    kinds: Sequence[Kind],
    widths: Sequence[int | None],
    sharding: NamedSharding,
) -> tuple[Array, ...]:
    """Under a mesh with explicit axes the sharding is part of the type: shard_map says it all."""
    rows, columns = _rows_and_columns(sharding.spec)
    run = _on_shards(local, kinds, dict(sharding.mesh.shape), rows, columns)
    specs = *_matrix_specs(widths, rows, columns), PartitionSpec()
    operands = tuple(
        reshard(x, NamedSharding(sharding.mesh, spec))
        for x, spec in zip(operands, specs, strict=True)
    )
    return jax.shard_map(
        run,
        in_specs=specs,
        out_specs=_specs(kinds, rows, columns),
        check_vma=False,
    )(*operands)

"""Quantising sharded matrices: each device its own part, nothing gathered."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.quantize.contract import amax_bits, quantize_xla
from pallas_kernels.quantize.partition import per_device

SCALE = jnp.float32(0.5)
X = jax.random.normal(jax.random.key(0), (256, 512))


def local(x, scale):
    """Stands in for the kernel, which CPU devices cannot run: the parts of an amax of any shape."""
    return tuple(quantize_xla(x, scale, dtype=jnp.float8_e4m3fn, layouts="both"))


def doubled(x, scale):
    """A kernel whose input is twice as wide as its output."""
    return local(x.reshape(len(x), -1, 2, 64).sum(axis=2).reshape(len(x), -1), scale)


def call(x, scale, function=local, width=1):
    kinds = ("rows", "columns", "parts")
    return per_device(function, (x,), scale, kinds, widths=(width,), result_width=1)


def assert_same(results, expected):
    for got, want in zip(results[:2], expected[:2], strict=True):
        np.testing.assert_array_equal(
            np.asarray(got).view(np.uint8), np.asarray(want).view(np.uint8)
        )
    assert int(results[2].max()) == int(expected[2].max())


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(
    "spec", [P("data"), P("data", "tensor"), P(("data", "tensor")), P(None, "tensor"), P()], ids=str
)
@pytest.mark.parametrize("function, width", [(local, 1), (doubled, 2)])
def test_sharded_matrices_are_not_gathered(spec, axis_type, function, width):
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(axis_type,) * 2)
    run = jax.jit(lambda x, scale: call(x, scale, function, width))
    with jax.set_mesh(mesh):
        x = jax.device_put(X, NamedSharding(mesh, spec))
        compiled = run.lower(x, SCALE).compile()
        results = compiled(x, SCALE)
    assert_same(results, function(X, SCALE))
    collectives = re.findall(r"= (\S+) (?:all-\w+|collective-\w+)\(", compiled.as_text())
    # Where columns are split the amax is the maximum over their devices; all else stays put.
    assert len(collectives) == ("tensor" in str(spec) and spec != P(("data", "tensor")))
    assert all(shape.startswith("s32[") for shape in collectives)


def test_without_an_amax_any_split_of_the_rows_will_do():
    def run(x, scale):
        double = lambda x, scale: (x * scale,)  # noqa: E731
        return per_device(double, (x,), scale, ["rows"], widths=(1,), result_width=1)[0]

    mesh = jax.make_mesh((6,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:6])
    with jax.set_mesh(mesh):
        x = jax.device_put(X[:96], NamedSharding(mesh, P("data")))
        compiled = jax.jit(run).lower(x, SCALE).compile()
        np.testing.assert_array_equal(compiled(x, SCALE), SCALE * X[:96])
    assert "all-gather" not in compiled.as_text()


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_arrays_of_several_widths_are_split_alike_or_by_rows_alone(axis_type):
    def local(wide, narrow, table, scale):
        out = wide.reshape(len(wide), -1, 2) * narrow[..., None] + table.sum(axis=1)[:, None, None]
        return (scale * jnp.concatenate([out, narrow[..., None]], axis=2).reshape(len(wide), -1),)

    def run(*arrays):
        options = dict(widths=(2, 1, None), result_width=3)
        return per_device(local, arrays, SCALE, ["rows"], **options)[0]

    whole = jnp.round(4 * X)  # so that no sum is rounded
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(axis_type,) * 2)
    with jax.set_mesh(mesh):
        arrays = [
            jax.device_put(x, NamedSharding(mesh, P("data", columns)))
            for x, columns in ((whole, "tensor"), (whole[:, :256], "tensor"), (whole[:, :3], None))
        ]
        compiled = jax.jit(run).lower(*arrays).compile()
        np.testing.assert_array_equal(compiled(*arrays), local(*arrays, SCALE)[0])
    assert not re.search(r"= \S+ (?:all-\w+|collective-\w+)\(", compiled.as_text())


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [P("data"), P(("data", "tensor")), P()], ids=str)
def test_whole_rows_and_sums_over_the_rows(spec, axis_type):
    def local(x, column, weight):
        return x * column * weight, (x * column).sum(axis=0)

    def run(*arrays):
        options = dict(widths=(None, None), result_width=1)
        return per_device(local, arrays[:2], arrays[2], ["whole_rows", "sum"], **options)

    whole = jnp.round(4 * X)  # so that no sum is rounded
    arrays = whole, whole[:, :1], whole[0]
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(axis_type,) * 2)
    with jax.set_mesh(mesh):
        split = [jax.device_put(x, NamedSharding(mesh, spec)) for x in arrays[:2]]
        split.append(jax.device_put(arrays[2], NamedSharding(mesh, P())))
        compiled = jax.jit(run).lower(*split).compile()
        for got, want in zip(compiled(*split), local(*arrays), strict=True):
            np.testing.assert_array_equal(got, want)
    collectives = re.findall(r"= (\S+) (?:all-\w+|collective-\w+)\(", compiled.as_text())
    assert len(collectives) == (spec != P()) and all("f32[512]" in c for c in collectives)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [P("data"), P("data", "tensor"), P()], ids=str)
def test_results_of_whole_rows(spec, axis_type):
    def local(x, vector):
        return x * vector[-1], x.T, x.sum(axis=1), amax_bits(x)

    kinds = ["whole_rows", "whole_columns", "row_values", "parts"]
    run = lambda x, v: per_device(local, (x,), v, kinds, widths=(None,), result_width=1)  # noqa: E731
    whole, vector = jnp.round(4 * X), jnp.arange(5.0)
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(axis_type,) * 2)
    with jax.set_mesh(mesh):
        split = jax.device_put(whole, NamedSharding(mesh, spec))
        results = jax.jit(run)(split, vector)
    *results, parts = zip(results, local(whole, vector), strict=True)
    for got, want in results:
        np.testing.assert_array_equal(got, want)
    assert int(parts[0].max()) == int(parts[1].max())


def test_shard_map_sees_its_own_part():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):
        mapped = jax.shard_map(
            call, in_specs=(P("data"), P()), out_specs=(P("data"), P(None, "data"), P("data"))
        )
        assert_same(jax.jit(mapped)(X, SCALE), local(X, SCALE))


def test_vmap_takes_one_after_the_other():
    results = jax.vmap(call)(jnp.stack([X, 3 * X]), jnp.stack([SCALE, 2 * SCALE]))
    for i, factor in enumerate((1, 3)):
        assert_same([x[i] for x in results], local(factor * X, (i + 1) * SCALE))


def test_refuses_rows_that_do_not_split():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    with (
        jax.set_mesh(mesh),
        pytest.raises(NotImplementedError, match="the 192 rows of an array on"),
    ):
        jax.jit(call).lower(X[:192], SCALE)
    mesh = jax.make_mesh(
        (3,), ("data",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:3]
    )
    with jax.set_mesh(mesh), pytest.raises(NotImplementedError, match="split over 3 devices"):
        jax.jit(call)(jax.device_put(jnp.ones((384, 64)), P("data")), SCALE)

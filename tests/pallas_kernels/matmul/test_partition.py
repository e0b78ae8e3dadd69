"""Products of sharded matrices: each device its own part, gathered only where they disagree."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.matmul.api import matmul_xla
from pallas_kernels.matmul.partition import per_device
from tests.pallas_kernels.matmul.reference import E4M3, integers, product

SCALE = jnp.float32(0.5)
LHS, RHS_T = integers(0, 256, 512, E4M3), integers(1, 128, 512, E4M3)


def local(lhs, rhs_t, scale):
    """Stands in for the kernel, which CPU devices cannot run."""
    return matmul_xla(lhs, rhs_t, scale, out_dtype=jnp.float32)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(
    ("lhs", "rhs_t", "collectives"),
    [
        (P("data"), P(), []),  # data parallel
        (P("data"), P("tensor"), []),  # columns of a tensor-parallel layer
        (P("data", "tensor"), P(None, "tensor"), ["all-reduce"]),  # and its rows
        (P("data"), P("data"), ["all-gather"]),  # fully sharded weights
        (P("data"), P(None, "data"), ["all-gather"]),
        (P(), P(), []),
    ],
    ids=str,
)
def test_sharded_products(lhs, rhs_t, collectives, axis_type):
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(axis_type,) * 2)
    with jax.set_mesh(mesh):
        x = jax.device_put(LHS, NamedSharding(mesh, lhs))
        y = jax.device_put(RHS_T, NamedSharding(mesh, rhs_t))
        run = jax.jit(lambda *operands: per_device(local, *operands))
        compiled = run.lower(x, y, SCALE).compile()
        got = compiled(x, y, SCALE)
    np.testing.assert_array_equal(np.asarray(got, np.float64), product(LHS, RHS_T, SCALE))
    found = re.findall(r" (all-\w+|collective-\w+)(?:-start)?\(", compiled.as_text())
    assert found == collectives


def test_inside_shard_map_and_vmap():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    run = jax.shard_map(
        lambda x, y: per_device(local, x, y, SCALE),
        mesh=mesh,
        in_specs=(P("data"), P()),
        out_specs=P("data"),
    )
    want = product(LHS, RHS_T, SCALE)
    np.testing.assert_array_equal(np.asarray(jax.jit(run)(LHS, RHS_T), np.float64), want)
    got = jax.vmap(lambda x: per_device(local, x, RHS_T, SCALE))(LHS.reshape(2, 128, 512))
    np.testing.assert_array_equal(np.asarray(got, np.float64).reshape(256, 128), want)

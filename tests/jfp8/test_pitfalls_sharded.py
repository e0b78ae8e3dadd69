"""The pitfalls of FP8 scaling state on several devices: rows 7 to 10 (see test_pitfalls.py)."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jfp8
from tests.jfp8 import reference
from tests.jfp8.pitfall_cases import (
    DIMENSIONS,
    RECIPE,
    ZERO,
    K,
    N,
    W,
    assert_naive_amax_is_wrong,
    calibrated,
    dot,
    lhs_exponent,
    naive_dot,
    normal,
    observe,
)


@pytest.fixture(name="state")
def state_fixture() -> jfp8.ScalingState:
    return calibrated()


SHARDED = normal(6, 128, K) * jnp.repeat(jnp.asarray([1.0, 50, 3, 7, 2, 2, 2, 2]), 16)[:, None]


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))


def sharded_loss(f, x, w, s):
    return f(x, w, s).sum()


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_row_07_jit_sharding_is_the_global_maximum(state, axis_type):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        x = jax.device_put(SHARDED, NamedSharding(mesh, P("data")))
        w, s = jax.device_put((W, state), NamedSharding(mesh, P()))
        observed = observe(functools.partial(sharded_loss, dot), x, w, s)
    assert lhs_exponent(observed) == reference.amax_exponent("e4m3", SHARDED)


def test_row_07_jit_sharding_needs_one_collective_per_dot(mesh):
    recipe = jfp8.Recipe(calibration="explicit")
    rows, replicated = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())

    def collectives(f, s):
        weight = jax.ShapeDtypeStruct((128, 128), jnp.float32)
        shapes = (jax.ShapeDtypeStruct((1024, 128), jnp.float32, sharding=rows),)
        shapes += jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=replicated), (weight, s)
        )
        gradient = jax.grad(lambda x, w, s: jnp.square(f(x, w, s)).sum(), argnums=(1, 2))
        text = jax.jit(gradient).lower(*shapes).compile().as_text()
        results = re.findall(r"= (\S+|\(.*?\)) all-(?:reduce|gather)(?:-start)?\(", text)
        arrays = re.findall(r"(\w+\[[\d,]*\])", " ".join(results))
        return [array for array in arrays if array != "f32[128,128]"]  # the weight's gradient

    def ours(x, w, s):
        return jfp8.dot_general(x, w, DIMENSIONS, s, recipe=recipe)

    assert len(collectives(ours, jfp8.init_state(recipe))) == 1

    @jax.custom_vjp
    def naive(x, w, amax):
        return x @ w

    naive.defvjp(
        lambda x, w, amax: (x @ w, (x, w, jnp.abs(x).max())),
        lambda saved, g: (
            g @ saved[1].T, saved[0].T @ g, jnp.stack([saved[2], jnp.abs(g).max()])
        ),
    )  # fmt: skip
    assert len(collectives(naive, jnp.zeros(2))) > 1


def test_row_08_shard_map_with_check_vma(mesh):
    def grad(f, s):
        return jax.jit(
            jax.shard_map(
                jax.grad(
                    lambda x, w, s: lax.psum(sharded_loss(f, x, w, s), "data"), argnums=(0, 1, 2)
                ),
                mesh=mesh,
                in_specs=(P("data"), P(), P()),
                out_specs=(P("data"), P(), P()),
                check_vma=True,
            )
        )(SHARDED, W, s)

    _, dw, observed = grad(dot, jfp8.init_state(RECIPE))
    assert lhs_exponent(observed) == reference.amax_exponent("e4m3", SHARDED)
    columns = reference.f64(SHARDED).sum(axis=0)
    assert reference.sqnr_db(np.tile(columns[:, None], (1, N)), dw) > 22
    with pytest.raises(
        ValueError, match="same type as the args"
    ):  # the naive backward does not even type-check
        grad(naive_dot, ZERO)


@pytest.mark.parametrize("check_vma", [True, False])
def test_row_09_shard_map_with_the_gradient_outside(state, mesh, check_vma):
    def loss(f, s):
        mapped = jax.shard_map(
            f,
            mesh=mesh,
            in_specs=(P("data"), P(), P()),
            out_specs=P("data"),
            check_vma=check_vma,
        )
        return mapped(SHARDED, W, s).sum()

    observed = observe(functools.partial(loss, dot), state)
    assert lhs_exponent(observed) == reference.amax_exponent("e4m3", SHARDED)
    if not check_vma:  # with it the naive one raises, as in row 8
        assert_naive_amax_is_wrong(observe(functools.partial(loss, naive_dot), ZERO), SHARDED)


@pytest.mark.parametrize("reduce", [lax.psum, lax.pmean])
def test_row_10_shard_map_unchecked_with_the_gradient_inside(state, mesh, reduce):
    """The observation is reduced as the gradients of the parameters are, by psum or pmean."""

    def step(f, x, w, s):
        grads = jax.grad(functools.partial(sharded_loss, f), argnums=(1, 2))(x, w, s)
        return jax.tree.map(lambda g: reduce(g, "data"), grads)

    def run(f, s):
        return jax.jit(
            jax.shard_map(
                functools.partial(step, f),
                mesh=mesh,
                in_specs=(P("data"), P(), P()),
                out_specs=P(),
                check_vma=False,
            )
        )(SHARDED, W, s)[1]

    assert lhs_exponent(run(dot, state)) == reference.amax_exponent("e4m3", SHARDED)
    assert_naive_amax_is_wrong(run(naive_dot, ZERO), SHARDED)

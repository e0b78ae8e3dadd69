"""Linen layers with jfp8.linen.Fp8DotGeneral."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

import jfp8
from jfp8.linen import Fp8DotGeneral
from tests.jfp8 import reference

RECIPE = jfp8.Recipe()
X = reference.normal(0, 4, 16, 32)


def dense(features: int, recipe: jfp8.Recipe = RECIPE) -> linen.Dense:
    return linen.Dense(features, dot_general_cls=functools.partial(Fp8DotGeneral, recipe=recipe))


def test_dense_trains():
    layer = dense(48)
    variables = layer.init(jax.random.key(1), X)
    params, fp8 = variables["params"], variables["fp8"]

    @jax.jit
    def gradients(params, fp8):
        loss = lambda params, fp8: layer.apply({"params": params, "fp8": fp8}, X).sum()  # noqa: E731
        return jax.grad(loss, argnums=(0, 1))(params, fp8)

    grads, observed = gradients(params, fp8)
    columns = reference.f64(X).sum(axis=(0, 1))
    assert reference.sqnr_db(np.tile(columns[:, None], (1, 48)), grads["kernel"]) > 22
    state = jax.tree.leaves(
        jfp8.update(fp8, observed, RECIPE), is_leaf=lambda x: isinstance(x, jfp8.ScalingState)
    )
    assert len(state) == 1
    kernel = params["kernel"]
    expected = [reference.amax_exponent(f, t) for f, t in (("e4m3", X), ("e4m3", kernel))]
    assert np.log2(state[0].scale[:2]).tolist() == expected


class Shared(linen.Module):
    @linen.compact
    def __call__(self, x):
        layer = dense(32)
        return layer(100 * layer(x))


def test_shared_layer_sees_the_larger_input():
    module = Shared()
    variables = module.init(jax.random.key(1), X)
    loss = lambda fp8: module.apply({**variables, "fp8": fp8}, X).sum()  # noqa: E731
    (observed,) = jax.tree.leaves(
        jax.jit(jax.grad(loss))(variables["fp8"]), is_leaf=lambda x: isinstance(x, tuple)
    )
    kernel = reference.f64(jax.tree.leaves(variables["params"])[1])
    second = 100 * reference.f64(X).reshape(-1, 32) @ kernel
    seen = reference.top_exponent(observed.observation[0])
    assert seen == reference.amax_exponent("e4m3", second) > reference.amax_exponent("e4m3", X)


class Layer(linen.Module):
    @linen.compact
    def __call__(self, x, _):
        return dense(32)(x), None


def test_scan_over_layers_carries_the_state_of_each():
    scan = linen.scan(
        Layer, variable_axes={"params": 0, "fp8": 0}, split_rngs={"params": True}, length=3
    )()
    variables = scan.init(jax.random.key(1), X, None)
    loss = lambda fp8: scan.apply({**variables, "fp8": fp8}, X, None)[0].sum()  # noqa: E731
    observed = jax.jit(jax.grad(loss))(variables["fp8"])
    (state,) = jax.tree.leaves(
        jfp8.update(variables["fp8"], observed, RECIPE),
        is_leaf=lambda x: isinstance(x, jfp8.ScalingState),
    )
    kernels = jax.tree.leaves(variables["params"])[1]
    assert kernels.shape == (3, 32, 32)
    assert np.log2(state.scale[:, 1]).tolist() == [
        reference.amax_exponent("e4m3", kernel) for kernel in kernels
    ]


def test_bf16_has_no_state():
    variables = dense(7, jfp8.Recipe(name="bf16")).init(jax.random.key(1), X)
    assert set(variables) == {"params"}


@pytest.mark.parametrize(
    "argument, value",
    [("precision", "highest"), ("preferred_element_type", jnp.float16), ("out_sharding", "x")],
)
def test_rejects_what_the_recipe_decides(argument, value):
    module = Fp8DotGeneral(RECIPE)
    dimensions = (((2,), (0,)), ((), ()))
    with pytest.raises(ValueError, match=f"{argument}=.* must be left at None"):
        module.init(jax.random.key(0), X, jnp.ones((32, 32)), dimensions, **{argument: value})

"""Kernels cast once for several dots: the same bits as cast anew each time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jfp8
import jfp8.nnx
from tests.jfp8.pitfall_cases import DIMENSIONS, RECIPE, K, N, W, X, calibrated, normal

EINSUM = (((0,), (1,)), ((), ()))


def assert_equal(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def loss(x, w, s, prepared=None):
    out = jfp8.dot_general(x, w, DIMENSIONS, s, recipe=RECIPE, kernel_cast=prepared)
    return (out**2).sum()


def test_dot_with_a_prepared_kernel_is_the_same():
    state = calibrated()
    prepared = jfp8.cast_kernel(W, state, RECIPE)
    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    assert_equal(gradient(X, W, state, prepared), gradient(X, W, state))
    assert_equal(loss(X, W, state, prepared), loss(X, W, state))


def test_the_prepared_kernel_is_what_is_multiplied():
    prepared = jfp8.cast_kernel(3 * W, calibrated(), RECIPE)
    assert_equal(loss(X, W, calibrated(), prepared), loss(X, 3 * W, calibrated()))


def test_swiglu_mlp_with_prepared_kernels_is_the_same():
    x, w1, w2 = normal(0, 32, 32).astype(jnp.bfloat16), normal(1, 32, 64), normal(2, 32, 32)
    state = jfp8.init_state(RECIPE)
    casts = tuple(jfp8.cast_kernel(w, state, RECIPE) for w in (w1, w2))

    def total(x, w1, w2, s1, s2, **options):
        out = jfp8.swiglu_mlp(x, w1, w2, s1, s2, group=16, recipe=RECIPE, **options)
        return (out.astype(jnp.float32) ** 2).sum()

    gradient = jax.value_and_grad(total, argnums=(0, 1, 2, 3, 4))
    args = x, w1, w2, state, state
    assert_equal(gradient(*args, kernel_casts=casts), gradient(*args))


class Model(nnx.Module):
    """A stack of layers to scan over, a layer, and one that stays in bf16."""

    def __init__(self):
        create = nnx.vmap(lambda rngs: jfp8.nnx.Linear(K, K, recipe=RECIPE, rngs=rngs))
        self.stack = create(nnx.Rngs(0).split(3))
        self.last = jfp8.nnx.Linear(K, N, recipe=RECIPE, rngs=nnx.Rngs(1))
        self.head = jfp8.nnx.Linear(N, 16, recipe=jfp8.Recipe(name="bf16"), rngs=nnx.Rngs(2))

    def __call__(self, x):
        graph, stacked = nnx.split(self.stack)
        x, _ = jax.lax.scan(lambda x, s: (jnp.tanh(nnx.merge(graph, s)(x)), None), x, stacked)
        return self.head(self.last(x))


def test_layers_stacked_and_single_use_their_casts():
    graph, params, scaling = nnx.split(Model(), nnx.Param, jfp8.nnx.Scaling)

    def total(params, scaling, casts=None):
        model = nnx.merge(graph, params, scaling)
        if casts is not None:
            jfp8.nnx.attach_kernel_casts(model, casts)
        return (model(X.astype(jnp.bfloat16)).astype(jnp.float32) ** 2).sum()

    casts = jfp8.nnx.cast_kernels(nnx.merge(graph, params, scaling))
    shapes = sorted(cast.rows.shape for cast in casts if cast is not None)
    assert shapes == [(3, K, K), (K, N)] and casts.count(None) == 1
    gradient = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))
    assert_equal(gradient(params, scaling, casts), gradient(params, scaling))


def test_rejects_a_kernel_that_is_not_plain():
    prepared = jfp8.cast_kernel(W, calibrated(), RECIPE)
    with pytest.raises(ValueError, match="kernel_cast is for rhs .K, N., contracted in its"):
        jfp8.dot_general(X.T, W.T, EINSUM, calibrated(), recipe=RECIPE, kernel_cast=prepared)

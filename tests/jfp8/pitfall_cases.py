"""What the tests of the pitfalls share: small operands, our dot, and the dot of other libraries."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import jfp8
from jfp8.scaling import LHS
from tests.jfp8 import reference

DIMENSIONS = (((1,), (0,)), ((), ()))
RECIPE = jfp8.Recipe()
M, K, N = 64, 32, 48


def normal(seed: int, *shape: int, factor: float = 1.0) -> jax.Array:
    return factor * reference.normal(seed, *shape)


X, W = normal(0, M, K), normal(1, K, N, factor=0.1)


@functools.cache
def calibrated() -> jfp8.ScalingState:
    """A state that has seen X and W, and a gradient of ones."""
    fresh = jfp8.init_state(RECIPE)
    return jfp8.update(fresh, observe(lambda s: dot(X, W, s).sum(), fresh), RECIPE)


def dot(x: jax.Array, w: jax.Array, state: jfp8.ScalingState) -> jax.Array:
    return jfp8.dot_general(x, w, DIMENSIONS, state, recipe=RECIPE)


def observe(loss: Callable[..., jax.Array], *args: jax.Array) -> jfp8.ScalingState:
    """The gradient of `loss` with respect to its last argument."""
    return jax.jit(jax.grad(loss, argnums=len(args) - 1))(*args)


def lhs_exponent(observed: jfp8.ScalingState) -> int | None:
    return reference.top_exponent(observed.observation[LHS])


@jax.custom_vjp
def naive_dot(x: jax.Array, w: jax.Array, amax: jax.Array) -> jax.Array:
    """The gradient of `amax` is the amax of x: to be overwritten with."""
    del amax
    return x @ w


naive_dot.defvjp(
    lambda x, w, amax: (x @ w, (x, w)),
    lambda saved, g: (g @ saved[1].T, saved[0].T @ g, jnp.abs(saved[0]).max()),
)

ZERO = jnp.zeros(())


def assert_naive_amax_is_wrong(naive: jax.Array, *tensors: jax.Array) -> None:
    true = max(float(jnp.abs(x).max()) for x in tensors)
    assert not np.isclose(float(naive), true, rtol=1e-3)

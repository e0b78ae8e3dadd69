"""A norm that is cast as it is computed, with the dots that read it, against float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jfp8
from jfp8.scaling import EXPONENTS
from pallas_kernels import rmsnorm
from pallas_kernels.interpreter import interpret_kernels
from tests.jfp8 import reference
from tests.jfp8.reference import normal, sqnr_db

B, T, D, F, N, GROUP, EPS = 2, 64, 256, 128, 64, 128, 1e-5
RECIPE = jfp8.Recipe(quantize_implementation="mosaic", calibration="explicit")
X = (3 * normal(0, B, T, D)).astype(jnp.bfloat16)
WEIGHT = 1 + normal(1, D) / 4
W, W1, W2 = normal(2, D, N) / 16, normal(3, D, 2 * F) / 16, normal(4, F, D) / 8
GRADS = normal(5, B, T, N).astype(jnp.bfloat16), normal(6, B, T, D).astype(jnp.bfloat16)


def state(*exponents):
    fresh = jfp8.init_state(RECIPE)
    return fresh._replace(scale=jnp.exp2(jnp.asarray(exponents, jnp.float32)))


STATE, STATES = state(-6, -9, -13), (state(-6, -9, -13), state(-6, -8, -12))


def normed(x, weight, state, is_cast):
    if is_cast:
        return jfp8.rmsnorm_cast(x, weight, state, eps=EPS, recipe=RECIPE)
    return *rmsnorm(x, weight, eps=EPS, implementation="xla"), None


def dot(is_cast, x, weight, w, state):
    """x through norm and dot, and x itself."""
    y, x, cast = normed(x, weight, state, is_cast)
    dimensions = (((2,), (0,)), ((), ()))
    return jfp8.dot_general(y, w, dimensions, state, recipe=RECIPE, lhs_cast=cast), x


def mlp(is_cast, x, weight, states):
    y, _, cast = normed(x, weight, states[0], is_cast)
    return jfp8.swiglu_mlp(y, W1, W2, *states, group=GROUP, recipe=RECIPE, x_cast=cast)


@functools.cache
def results(is_cast):
    """out, and the gradients of x, weight, w and the state."""

    def run(*args):
        (out, _), vjp = jax.vjp(functools.partial(dot, is_cast), *args)
        return out, *vjp(GRADS)

    with interpret_kernels():
        return jax.jit(run)(X, WEIGHT, W, STATE)


def exact():
    """out and the gradients of x, weight and w in float64."""
    x, weight, w, dout, g = (reference.f64(a) for a in (X, WEIGHT, W, *GRADS))
    rstd = 1 / np.sqrt((x * x).mean(axis=-1, keepdims=True) + EPS)
    normed = x * rstd
    dy = dout @ w.T
    c = (dy * weight * normed).mean(axis=-1, keepdims=True)
    dx = g + rstd * (dy * weight - normed * c)
    dw = np.einsum("btd,btn->dn", normed * weight, dout)
    return (normed * weight) @ w, dx, (dy * normed).sum(axis=(0, 1)), dw


def test_as_exact_as_norm_and_dot():
    fused, composed = results(True), results(False)
    for name, want, got, peer in zip(
        ("out", "dx", "dweight", "dw"), exact(), fused, composed, strict=False
    ):
        # One rounding less, to 16 bits between norm and cast.
        assert sqnr_db(want, got) >= sqnr_db(want, peer) - 0.5, name


def test_observation_is_that_of_norm_and_dot():
    fused, composed = (np.asarray(results(x)[4].observation) for x in (True, False))
    highest = [(x[:, EXPONENTS - 1 :: -1] > 0).argmax(-1) for x in (fused, composed)]
    np.testing.assert_array_equal(*highest)
    np.testing.assert_allclose(fused[:, EXPONENTS + 1 :], composed[:, EXPONENTS + 1 :], atol=3)


def test_mlp_reads_the_cast():
    with interpret_kernels():
        fused, composed = (
            jax.jit(functools.partial(mlp, is_cast))(X, WEIGHT, STATES) for is_cast in (True, False)
        )
    x, weight, w1, w2 = (reference.f64(a) for a in (X, WEIGHT, W1, W2))
    y = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + EPS) * weight
    gate, up = np.split(y @ w1, 2, axis=-1)
    want = (gate / (1 + np.exp(-gate)) * up) @ w2
    assert not (fused == composed).all()  # one rounding less, to 16 bits between norm and cast
    assert sqnr_db(want, fused) >= sqnr_db(want, composed) - 0.5


def test_rejects():
    for change in ({"name": "current"}, {"calibration": "inline"}):
        with pytest.raises(ValueError, match="must be 'delayed', 'explicit' and 'mosaic'"):
            recipe = dataclasses.replace(RECIPE, **change)
            jfp8.rmsnorm_cast(X, WEIGHT, STATE, eps=EPS, recipe=recipe)
    cast = jfp8.CastInput(*(jnp.zeros(()) for _ in range(4)))
    with pytest.raises(ValueError, match=r"lhs_cast is for lhs \[..., K\], contracted in its last"):
        dimensions = (((0,), (0,)), ((), ()))
        jfp8.dot_general(W, W, dimensions, STATE, recipe=RECIPE, lhs_cast=cast)

"""Embedding lookup and its gradient against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.embedding import embed, sum_rows

V, D = 37, 5


def expected_sum(values, ids):
    table = np.zeros((V, values.shape[1]))
    np.add.at(table, ids, np.asarray(values, np.float64))
    return table


ID_CASES = {
    "random": lambda rng: rng.integers(0, V, 1000),
    "one token": lambda rng: np.array([3]),
    "one id over many chunks": lambda rng: np.full(600, 36),
    "long runs": lambda rng: np.repeat([0, 4, 5, 36], [300, 1, 127, 512]),
    "exactly one chunk each": lambda rng: np.repeat([7, 2, 9], 128),
    "all different": lambda rng: rng.permutation(V),
    "runs that end with a chunk": lambda rng: np.repeat([1, 2, 3, 4], [64, 64, 100, 28]),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("case", ID_CASES)
def test_sum_rows_matches_float64(case, dtype):
    rng = np.random.default_rng(0)
    ids = ID_CASES[case](rng)
    values = jnp.asarray(rng.normal(size=(len(ids), D)), dtype)
    ids = rng.permutation(ids)
    got = jax.jit(sum_rows, static_argnums=2)(values, jnp.int32(ids), V)
    expected = expected_sum(np.asarray(values, np.float64), ids)
    assert got.dtype == jnp.float32
    # One float32 rounding per addition.
    np.testing.assert_allclose(got, expected, rtol=0, atol=len(ids) * 2**-24 * 4)


def test_result_does_not_depend_on_the_order_of_other_tokens():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, V, 500)
    values = jnp.float32(rng.normal(size=(500, D)))
    half = np.where(ids < 20, ids, V - 1)
    got = [np.asarray(sum_rows(values, jnp.int32(i), V))[:20] for i in (ids, half)]
    np.testing.assert_allclose(got[0], got[1], atol=500 * 2**-24)


@pytest.mark.parametrize("seed", range(5))
def test_gradient_is_the_sum_over_the_tokens(seed):
    rng = np.random.default_rng(seed)
    ids = rng.choice(V, size=(4, 75), p=rng.dirichlet(np.full(V, 0.2)))
    table, grad = rng.normal(size=(V, D)), rng.normal(size=(4, 75, D))
    run = lambda t: embed(t, jnp.int32(ids), jnp.float32, multiplier=3)  # noqa: E731
    out, pullback = jax.vjp(run, jnp.float32(table))
    np.testing.assert_array_equal(out, 3 * np.float32(table)[ids])
    expected = 3 * expected_sum(grad.reshape(-1, D), ids.reshape(-1))
    np.testing.assert_allclose(pullback(jnp.float32(grad))[0], expected, atol=3e-4)

"""SwiGLU and its gradient against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np

from train.swiglu import swiglu


def test_value_and_gradient_match_float64():
    rng = np.random.default_rng(0)
    pairs = rng.normal(size=(3, 4, 2, 8)) * 3
    cotangent = rng.normal(size=(3, 32))
    gate, up = pairs[..., 0, :], pairs[..., 1, :]
    sigmoid = 1 / (1 + np.exp(-gate))
    g = cotangent.reshape(gate.shape)
    expected = gate * sigmoid * up
    dgate = g * up * (sigmoid + gate * sigmoid * (1 - sigmoid))
    out, pullback = jax.vjp(swiglu, jnp.float32(pairs))
    np.testing.assert_allclose(out, expected.reshape(3, 32), rtol=2e-5, atol=1e-6)
    got = pullback(jnp.float32(cotangent))[0]
    np.testing.assert_allclose(got[..., 0, :], dgate, rtol=2e-5, atol=1e-5)
    np.testing.assert_allclose(got[..., 1, :], g * gate * sigmoid, rtol=2e-5, atol=1e-6)


def test_keeps_the_dtype_and_only_its_input():
    pairs = jnp.ones((2, 4, 2, 8), jnp.bfloat16)
    out, pullback = jax.vjp(swiglu, pairs)
    assert out.dtype == jnp.bfloat16
    kept = jax.tree.leaves(pullback)
    assert [(x.shape, x.dtype) for x in kept if x.size > 1] == [(pairs.shape, pairs.dtype)]

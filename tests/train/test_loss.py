"""Chunked cross-entropy against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train import loss as loss_module
from train.loss import cross_entropy

B, T, D, V = 2, 12, 8, 50


def reference(hidden, head, targets, weights, z_loss):
    """Loss, nll and gradients, in float64."""
    logits = hidden @ head
    top = logits.max(-1, keepdims=True)
    lse = np.log(np.exp(logits - top).sum(-1)) + top[..., 0]
    nll = lse - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    total = (weights * (nll + z_loss * lse**2)).sum()
    softmax = np.exp(logits - lse[..., None])
    dlogits = (1 + 2 * z_loss * lse)[..., None] * softmax - np.eye(V)[targets]
    dlogits *= weights[..., None]
    dhead = np.einsum("btd,btv->dv", hidden, dlogits)
    return total, (weights * nll).sum(), dlogits @ head.T, dhead


@pytest.fixture
def inputs():
    rng = np.random.default_rng(0)
    return (
        rng.normal(size=(B, T, D)),
        rng.normal(size=(D, V)),
        rng.integers(0, V, (B, T)),
        rng.random((B, T)) * (rng.random((B, T)) > 0.3),
    )


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("max_chunk_logits", [1 << 26, B * T * V // 4, 1])
def test_loss_and_gradients_match_float64(inputs, z_loss, max_chunk_logits, monkeypatch):
    monkeypatch.setattr(loss_module, "_MAX_CHUNK_LOGITS", max_chunk_logits)
    hidden, head, targets, weights = inputs
    total, nll, dhidden, dhead = reference(*inputs, z_loss)

    def run(hidden, head):
        return cross_entropy(hidden, head, targets, jnp.float32(weights), z_loss=z_loss)

    f32 = jnp.float32(hidden), jnp.float32(head)
    (got_total, got_nll), grads = jax.value_and_grad(run, argnums=(0, 1), has_aux=True)(*f32)
    np.testing.assert_allclose(got_total, total, rtol=1e-5)
    np.testing.assert_allclose(got_nll, nll, rtol=1e-5)
    np.testing.assert_allclose(grads[0], dhidden, atol=2e-5)
    np.testing.assert_allclose(grads[1], dhead, atol=2e-5)
    np.testing.assert_allclose(run(*f32)[0], total, rtol=1e-5)  # without differentiation


def test_gradient_scales_with_the_cotangent(inputs):
    hidden, head, targets, weights = inputs
    grad = jax.grad(lambda h: 3 * cross_entropy(h, jnp.float32(head), targets, weights)[0])
    dhidden = reference(*inputs, 0.0)[2]
    np.testing.assert_allclose(grad(jnp.float32(hidden)), 3 * dhidden, atol=5e-5)


def test_chunks_bound_the_logits(monkeypatch):
    monkeypatch.setattr(loss_module, "_MAX_CHUNK_LOGITS", 4 * B * V)
    hidden, head = jnp.zeros((B, 16, D)), jnp.zeros((D, V))
    targets = jnp.zeros((B, 16), jnp.int32)
    jaxpr = jax.make_jaxpr(jax.grad(lambda h: cross_entropy(h, head, targets, targets + 1.0)[0]))(
        hidden
    )
    assert f"[{B},4,{V}]" in str(jaxpr)
    assert f"[{B},16,{V}]" not in str(jaxpr)


def test_bfloat16_error_is_that_of_its_inputs(inputs):
    hidden, head, targets, weights = inputs
    rounded = [np.asarray(jnp.bfloat16(x), np.float64) for x in (hidden, head)]
    expected = reference(*rounded, targets, weights, 0.0)[1]
    got = cross_entropy(jnp.bfloat16(hidden), jnp.float32(head), targets, jnp.float32(weights))[1]
    np.testing.assert_allclose(got, expected, rtol=1e-5)

"""Learning-rate schedules and optax chains against hand arithmetic."""

import jax.numpy as jnp
import numpy as np
import pytest

from train.config import ConfigError, OptimizerConfig
from train.optimizer import learning_rate_schedule, make_optimizer


def rates(config, steps, peak=1.0):
    schedule = learning_rate_schedule(config, steps, peak)
    return np.array([float(schedule(step)) for step in range(steps + 1)])


def test_cosine_rises_linearly_and_ends_at_the_ratio():
    config = OptimizerConfig(warmup_steps=4, final_learning_rate_ratio=0.1)
    got = rates(config, 24)
    np.testing.assert_allclose(got[:4], [0.25, 0.5, 0.75, 1.0])
    expected = 0.1 + 0.9 * (1 + np.cos(np.pi * np.arange(21) / 20)) / 2
    np.testing.assert_allclose(got[4:], expected, atol=1e-6)


def test_wsd_is_flat_and_then_falls_linearly():
    config = OptimizerConfig(
        schedule="wsd", warmup_steps=2, decay_fraction=0.25, final_learning_rate_ratio=0.2
    )
    got = rates(config, 16)
    np.testing.assert_allclose(got[:2], [0.5, 1.0])
    np.testing.assert_allclose(got[2:13], 1.0)
    np.testing.assert_allclose(got[12:], [1.0, 0.8, 0.6, 0.4, 0.2], atol=1e-6)


def test_constant_without_warmup():
    np.testing.assert_allclose(
        rates(OptimizerConfig(schedule="constant", warmup_steps=0), 5, 0.3), 0.3, rtol=1e-6
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (OptimizerConfig(warmup_steps=10), "must be less than --run.steps=10"),
        (OptimizerConfig(schedule="wsd", warmup_steps=5, decay_fraction=0.9), "overlap"),
    ],
)
def test_schedule_that_does_not_fit_is_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        learning_rate_schedule(config, 10, 1.0)


PARAMS = {
    "blocks": {"qkv": {"kernel": jnp.full((2, 4, 6), 0.5)}, "norm": {"weight": jnp.ones((2, 4))}},
    "embedding": jnp.full((8, 4), 0.5),
}


def first_update(config, grads):
    optimizer = make_optimizer(config, 10)
    return optimizer.update(grads, optimizer.init(PARAMS), PARAMS)[0]


def test_adamw_first_step_is_sign_plus_decay_and_spares_norms():
    config = OptimizerConfig(
        learning_rate=0.1, schedule="constant", warmup_steps=0, weight_decay=0.2, clip_norm=0
    )
    grads = {
        "blocks": {
            "qkv": {"kernel": jnp.full((2, 4, 6), -3.0)},
            "norm": {"weight": jnp.full((2, 4), 7.0)},
        },
        "embedding": jnp.full((8, 4), 2.0),
    }
    got = first_update(config, grads)
    np.testing.assert_allclose(got["embedding"], -0.1 * (1 + 0.2 * 0.5), rtol=1e-5)
    np.testing.assert_allclose(got["blocks"]["qkv"]["kernel"], 0.1 - 0.1 * 0.2 * 0.5, rtol=1e-5)
    np.testing.assert_allclose(got["blocks"]["norm"]["weight"], -0.1, rtol=1e-5)


def test_muon_orthogonalises_each_layer_of_a_stack():
    config = OptimizerConfig(
        name="muon", schedule="constant", warmup_steps=0, weight_decay=0.0, clip_norm=0
    )
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(2, 4, 6))
    kernel[1] *= 1e-3  # a layer with small gradients moves as far as the other
    grads = {
        "blocks": {"qkv": {"kernel": jnp.float32(kernel)}, "norm": {"weight": jnp.ones((2, 4))}},
        "embedding": jnp.ones((8, 4)),
    }
    update = np.asarray(first_update(config, grads)["blocks"]["qkv"]["kernel"], np.float64)
    for layer in update:
        singular = np.linalg.svd(layer, compute_uv=False)
        # Newton-Schulz brings them near one; 0.2 * sqrt(6) is the scale to AdamW's RMS.
        assert np.all(np.abs(singular / (config.muon_learning_rate * 0.2 * 6**0.5) - 1) < 0.35)


def test_clipping_bounds_the_gradient_that_moments_see():
    config = OptimizerConfig(clip_norm=1.0, warmup_steps=0)
    optimizer = make_optimizer(config, 10)
    grads = {
        "blocks": {
            "qkv": {"kernel": jnp.zeros((2, 4, 6))},
            "norm": {"weight": jnp.zeros((2, 4))},
        },
        "embedding": jnp.full((8, 4), 100.0),
    }
    _, state = optimizer.update(grads, optimizer.init(PARAMS), PARAMS)
    moment = state[1][0].mu["embedding"]
    np.testing.assert_allclose(np.linalg.norm(moment), 0.1, rtol=1e-5)  # (1 - beta1) * 1

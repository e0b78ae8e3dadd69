"""Training with attention in FP8: on the CPU, through its XLA implementation."""

import dataclasses

import numpy as np
import pytest

from pallas_kernels import Fp8Options
from tests.train.test_step import CONFIG, make_batch, replace, run
from train.config import ConfigError, ModelConfig
from train.model import attention_options

STEPS = 8
BF16 = replace(CONFIG, fp8=dict(recipe="bf16"), model=dict(num_layers=1))


def losses_of(config):
    """Losses on one batch, over and over."""
    return np.asarray(run(config, STEPS, [make_batch(config)] * STEPS)[1])


def test_learns_like_bf16_attention():
    expected = losses_of(BF16)
    for precision in ("fp8", "fp8_forward"):
        losses = losses_of(replace(BF16, model=dict(attention_precision=precision)))
        assert not np.array_equal(losses, expected), "FP8 must change the last bits at least"
        # The memorised batch's loss falls by far more than the two differ.
        assert losses[0] - losses[-1] > 0.5, precision
        np.testing.assert_allclose(losses, expected, atol=0.03, err_msg=precision)


def test_options_of_the_call():
    model = ModelConfig(attention_precision="fp8_forward")
    options = attention_options(model, "xla")
    assert options["precision"] == "fp8" and options["fp8_options"].backward == "bf16"
    options = attention_options(dataclasses.replace(model, attention_precision="fp8"), "mosaic")
    assert options["fp8_options"] == Fp8Options(quantize_implementation="mosaic")
    assert attention_options(ModelConfig(), "xla") == dict(implementation=None, deterministic=None)
    model = ModelConfig(attention_deterministic=True)
    assert attention_options(model, "xla")["deterministic"] is True


def test_a_head_dim_that_cannot_be_rotated_is_refused():
    with pytest.raises(ConfigError, match="attention-precision=fp8 .*power of two, not 24"):
        ModelConfig(attention_precision="fp8", head_dim=24)

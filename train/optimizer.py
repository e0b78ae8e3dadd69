"""The optimizer: an optax chain and its learning-rate schedule, built from the config.

optax only ever sees the parameters. FP8 scaling state is no parameter: clipping, weight decay and
moments never touch it.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from train.config import ConfigError, OptimizerConfig


def learning_rate_schedule(config: OptimizerConfig, steps: int, peak: float) -> optax.Schedule:
    """Learning rate of each optimizer step: linear warm-up, then cosine, WSD or constant.

    Args:
      config: the schedule's shape.
      steps: optimizer steps of the whole run, where cosine and WSD end.
      peak: rate after the warm-up.

    Returns: a function from the step (from 0) to the rate, float32. The first step is at
      `peak / warmup_steps`, not at zero, so that no step is wasted.

    Raises:
      ConfigError: if the warm-up is not shorter than the run, or overlaps the decay of WSD.
    """
    warmup = config.warmup_steps
    if warmup >= steps:
        raise ConfigError(
            f"--optimizer.warmup-steps={warmup} must be less than --run.steps={steps}"
        )
    final = peak * config.final_learning_rate_ratio
    if config.schedule == "constant":
        main, boundary = [optax.constant_schedule(peak)], []
    elif config.schedule == "cosine":
        ratio = config.final_learning_rate_ratio
        main, boundary = [optax.cosine_decay_schedule(peak, max(steps - warmup, 1), ratio)], []
    else:
        decay = max(round(config.decay_fraction * steps), 1)
        if warmup + decay > steps:
            raise ConfigError(
                f"--optimizer.warmup-steps={warmup} and the decay over the last {decay} steps"
                f" (--optimizer.decay-fraction={config.decay_fraction}) overlap in"
                f" --run.steps={steps}; shorten one of them"
            )
        main = [optax.constant_schedule(peak), optax.linear_schedule(peak, final, decay)]
        boundary = [steps - decay]
    if warmup == 0:
        return optax.join_schedules(main, boundary)
    rise = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, *main], [warmup, *boundary])


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipping by the global norm, then AdamW, or Muon with AdamW for what is no block matrix.

    Muon (Jordan et al. 2024) orthogonalises the momentum of each block matrix; a leading layer axis
    of scanned blocks is a batch of matrices. Its update is scaled to AdamW's RMS
    (arXiv:2502.16982), so both parts share the order of their rates.

    Args:
      config: which optimizer, and its constants.
      steps: optimizer steps of the whole run.
    """
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    rate = learning_rate_schedule(config, steps, config.learning_rate)
    moment_dtype = jnp.dtype(config.moment_dtype)
    if config.name == "adamw":
        adamw = optax.adamw(
            rate,
            b1=config.beta1,
            b2=config.beta2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=_is_matrix,
            mu_dtype=moment_dtype,
        )
        return optax.chain(clip, adamw)
    muon = optax.contrib.muon(
        learning_rate_schedule(config, steps, config.muon_learning_rate),
        weight_decay=config.weight_decay,
        mu_dtype=moment_dtype,
        adam_b1=config.beta1,
        adam_b2=config.beta2,
        adam_weight_decay=0.0,
        adam_learning_rate=rate,
        muon_weight_dimension_numbers=_muon_dimension_numbers,
        consistent_rms=0.2,
    )
    return optax.chain(clip, muon)


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _is_matrix(params: Any) -> Any:
    """True for embedding, head and GEMM kernels, False for norms and biases."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not _name(path).endswith(("weight", "bias")), params
    )


def _muon_dimension_numbers(params: Any) -> Any:
    numbers = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    return jax.tree_util.tree_map_with_path(
        lambda path, _: numbers if _name(path).endswith("kernel") else None, params
    )

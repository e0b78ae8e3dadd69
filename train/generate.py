"""Text generation with a trained model.

Every new token runs the whole window through the model: simple, exact, and the same GEMMs in the
same precision as in training. There is no key/value cache.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import nnx

from train.config import FP8_ALIGNMENT, ConfigError, TrainConfig
from train.data.tokenizer import end_of_text_id
from train.state import make_graph, make_recipe, merge


def generate(
    config: TrainConfig,
    params: Any,
    scaling: Any,
    tokenizer: tokenizers.Tokenizer,
    prompt: str,
    *,
    tokens: int,
    temperature: float = 0.8,
    seed: int = 0,
) -> str:
    """Continues `prompt`; the same arguments give the same text.

    Args:
      config: of the run that trained the weights, for any machine (`implementations.portable`).
      params: its parameters.
      scaling: its FP8 state; read, never updated.
      tokenizer: its tokenizer.
      prompt: text to continue; its last `config.data.sequence_length` tokens are seen.
      tokens: how many to generate at most; an end-of-text token ends it.
      temperature: divides the logits; 0 is greedy.
      seed: of the sampling.

    Returns: the prompt and its continuation.

    Raises:
      ConfigError: if the prompt has no tokens.
    """
    ids = encode_prompt(tokenizer, prompt)
    end = end_of_text_id(tokenizer)
    window = -(-config.data.sequence_length // FP8_ALIGNMENT) * FP8_ALIGNMENT
    next_token = make_next_token(config, make_graph(config, make_recipe(config.fp8)))
    key = jax.random.key(seed)
    for _ in range(tokens):
        key, step_key = jax.random.split(key)
        recent = ids[-config.data.sequence_length :]
        padded = np.zeros((1, window), np.int32)
        padded[0, : len(recent)] = recent
        new = int(next_token(params, scaling, padded, len(recent) - 1, temperature, step_key))
        if new == end:
            break
        ids.append(new)
    return tokenizer.decode(ids)


def encode_prompt(tokenizer: tokenizers.Tokenizer, prompt: str) -> list[int]:
    """The tokens of a prompt, at least one.

    Raises:
      ConfigError: if it has none.
    """
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    if not ids:
        raise ConfigError(f"the prompt {prompt!r} has no tokens; give at least one character")
    return ids


def make_next_token(config: TrainConfig, graph: nnx.GraphDef) -> Callable:
    """Builds (params, scaling, tokens [1, T], last index, temperature, key) -> token id."""

    @jax.jit
    def next_token(params, scaling, tokens, last, temperature, key):
        model = merge(graph, params, scaling)
        positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        hidden = model(tokens, positions, None)[0, last].astype(jnp.float32)
        logits = hidden @ model.head_kernel()
        sampled = jax.random.categorical(key, logits / jnp.maximum(temperature, 1e-6))
        return jnp.where(temperature > 0, sampled, jnp.argmax(logits))

    return next_token

"""Peer: the same Llama shapes in plain flax.linen, in bf16 or with Flax's own FP8.

Flax's best ordinary settings: scanned layers (or `-unroll`), cuDNN attention, `optax.adamw`, a
donated state, XLA's default flags; FP8 is `nn.Fp8DirectDotGeneralOp` (delayed scaling, direct
quantisation) in every dense layer but the head.
"""

import dataclasses
import functools
import time
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState

from benchmarks.common import time_steps
from benchmarks.contenders import jax_device
from jfp8 import diagnostics

_LEARNING_RATE = 1e-4


@dataclasses.dataclass(frozen=True)
class Shape:
    """The Llama shape, and how it is computed."""

    hidden_size: int
    num_layers: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rope_theta: float
    norm_eps: float
    attention: Literal["cudnn", "xla"]
    fp8: bool
    unroll: bool


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary positions on x [B, T, N, H]; cos and sin bfloat16 [1, T, 1, H // 2]."""
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate((a * cos - b * sin, b * cos + a * sin), axis=-1).astype(x.dtype)


class Block(nn.Module):
    """Pre-norm decoder block on x [B, T, D]."""

    shape: Shape

    @nn.compact
    def __call__(self, x: jax.Array, angles: tuple[jax.Array, jax.Array]):
        """Returns the block's output, and nothing for `nn.scan` to stack."""
        shape = self.shape
        dense = functools.partial(
            nn.Dense,
            use_bias=False,
            dtype=jnp.bfloat16,
            dot_general_cls=nn.Fp8DirectDotGeneralOp if shape.fp8 else None,
        )
        norm = functools.partial(nn.RMSNorm, epsilon=shape.norm_eps, dtype=jnp.bfloat16)

        def heads(y: jax.Array, count: int) -> jax.Array:
            return dense(count * shape.head_dim)(y).reshape(*y.shape[:2], count, shape.head_dim)

        y = norm()(x)
        q = rotate(heads(y, shape.num_heads), *angles)
        k = rotate(heads(y, shape.num_kv_heads), *angles)
        v = heads(y, shape.num_kv_heads)
        attended = jax.nn.dot_product_attention(
            q, k, v, is_causal=True, implementation=shape.attention
        )
        x = x + dense(shape.hidden_size)(attended.reshape(*x.shape[:2], -1))
        y = norm()(x)
        hidden = nn.silu(dense(shape.ffn_size)(y)) * dense(shape.ffn_size)(y)
        return x + dense(shape.hidden_size)(hidden), None


class LanguageModel(nn.Module):
    """Logits [B, T, V] in bfloat16 of tokens int32 [B, T]; untied head."""

    shape: Shape

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """See the class."""
        shape = self.shape
        frequency = shape.rope_theta ** (-np.arange(0, shape.head_dim, 2) / shape.head_dim)
        angle = np.outer(np.arange(tokens.shape[1]), frequency)[None, :, None]
        angles = (
            jnp.asarray(np.cos(angle), jnp.bfloat16),
            jnp.asarray(np.sin(angle), jnp.bfloat16),
        )
        x = nn.Embed(shape.vocab_size, shape.hidden_size, dtype=jnp.bfloat16)(tokens)
        blocks = nn.scan(
            Block,
            variable_axes={"params": 0, "_overwrite_with_gradient": 0},
            split_rngs={"params": True},
            length=shape.num_layers,
            in_axes=nn.broadcast,
            unroll=shape.num_layers if shape.unroll else 1,
        )
        x, _ = blocks(shape)(x, angles)
        x = nn.RMSNorm(epsilon=shape.norm_eps, dtype=jnp.bfloat16)(x)
        return nn.Dense(shape.vocab_size, use_bias=False, dtype=jnp.bfloat16)(x)


def train_step(state: TrainState, tokens: jax.Array, targets: jax.Array):
    """One AdamW step; returns the state and the mean loss in nats."""

    def loss(params: Any) -> jax.Array:
        logits = state.apply_fn(params, tokens).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    value, gradients = jax.value_and_grad(loss)(state.params)
    return state.apply_gradients(grads=gradients), value


def make_shape(task: dict[str, Any]) -> Shape:
    """The shape of a task's model."""
    fields = {field.name for field in dataclasses.fields(Shape)}
    return Shape(
        **{name: value for name, value in task["model"].items() if name in fields},
        attention="cudnn" if jax.default_backend() == "gpu" else "xla",
        fp8=task["variant"].startswith("fp8"),
        unroll=task["variant"].endswith("unroll"),
    )


def make_state(shape: Shape, tokens: jax.Array) -> TrainState:
    """Fresh parameters, FP8 state and moments; pure."""
    model = LanguageModel(shape)
    return TrainState.create(
        apply_fn=model.apply,
        params=model.init(jax.random.key(0), tokens),
        tx=optax.adamw(_LEARNING_RATE),
    )


def run(task: dict[str, Any]) -> dict[str, Any]:
    """Times the peer's step. See `benchmarks.contenders`."""
    shape = make_shape(task)
    size = (2, task["batch_size"], task["sequence_length"])
    tokens, targets = jnp.asarray(
        np.random.default_rng(0).integers(0, shape.vocab_size, size, dtype=np.int32)
    )
    create = functools.partial(make_state, shape)
    started = time.perf_counter()
    jitted = jax.jit(train_step, donate_argnums=0)
    compiled = jitted.lower(jax.eval_shape(create, tokens), tokens, targets).compile()
    compile_time_s = time.perf_counter() - started
    state, loss = jax.jit(create)(tokens), jnp.zeros(())

    def launch() -> jax.Array:
        nonlocal state, loss
        state, loss = compiled(state, tokens, targets)
        return loss

    times = time_steps(launch, jax.block_until_ready, warmup=task["warmup"], steps=task["steps"])
    return jax_device.describe() | {
        "step_times_s": times.step_times_s,
        "launch_times_s": times.launch_times_s,
        "compile_time_s": compile_time_s,
        "planned_memory_gib": jax_device.planned_memory_gib(compiled),
        "loss_nats": float(loss),
        "attention": shape.attention,
        "gemms": jax_device.gemms(diagnostics.fp8_dot_count(compiled)),
    }

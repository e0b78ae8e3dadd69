"""The model: a Llama-family decoder in Flax NNX whose GEMMs go through `jfp8`.

RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467), rotary positions (Su et al. 2021,
arXiv:2104.09864), grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245) and SwiGLU
(Shazeer 2020, arXiv:2002.05202). Embedding and norms stay out of FP8; the head if it is skipped.

Between the blocks and in each addition the residual stream is a matrix: cuBLASLt then adds it in
the epilogue of the GEMMs of `out` and `down`, rounding once, into an array of its own. Of a stream
[B, T, D] the addition alone would read the reshaped one that the GEMM needs; XLA lets the sum take
that one's place, and copies the stream for it because others read it, 134 MB at 16384 x 4096.

Shapes: B batch, T tokens, M = B T, D hidden, N query heads, K key/value heads, H head dim, F ffn,
  V vocabulary.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

import jfp8
import jfp8.nnx
from pallas_kernels import (
    Fp8Options,
    flash_attention,
    rmsnorm,
    rope_flash_attention,
    rope_qkv,
    swiglu,
)
from pallas_kernels.flash_attention.config import RESIDUAL_NAMES as ATTENTION_RESIDUAL_NAMES
from pallas_kernels.fused.rmsnorm import RESIDUAL_NAME as NORM_RESIDUAL_NAME
from pallas_kernels.fused.rope import rotate, split_heads
from pallas_kernels.quantize.contract import Implementation
from train.config import KernelImplementation, ModelConfig, RopeImplementation
from train.embedding import embed
from train.taps import Taps, apply_linear, see_attention

COMPUTE_DTYPE = jnp.bfloat16
_MAX_FFN_GROUP = 128


class RMSNorm(nnx.Module):
    """x * rsqrt(mean(x^2) + eps) * weight over the last axis, computed in float32."""

    def __init__(
        self, size: int, eps: float, implementation: KernelImplementation = "xla", gain: float = 1.0
    ):
        self.weight = nnx.Param(jnp.full((size,), gain, jnp.float32))
        self.eps = eps
        self.implementation = _asked_for(implementation)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., size] -> [..., size], in the dtype of `x`."""
        return self.with_residual(x)[0]

    def with_residual(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The norm of x, and x for the residual connection; see `pallas_kernels.rmsnorm`."""
        return rmsnorm(x, self.weight[...], eps=self.eps, implementation=self.implementation)

    def for_dot(
        self, x: jax.Array, layer: jfp8.nnx.Linear, taps: Taps | None
    ) -> tuple[jax.Array, jax.Array, jfp8.CastInput | None]:
        """`with_residual` and, where a kernel makes it, the cast of the norm for `layer`."""
        # Taps read the norm in 16 bits.
        if taps is not None or layer.scaling is None or not jfp8.can_cast_norm(layer.recipe):
            return *self.with_residual(x), None
        return jfp8.rmsnorm_cast(
            x,
            self.weight[...],
            layer.scaling.get_value(),
            eps=self.eps,
            recipe=layer.recipe,
            gradient_implementation=self.implementation,
        )


def _asked_for(implementation: RopeImplementation) -> Implementation | None:
    """An option as the kernels take it. `train.implementations` leaves no "auto" to a run; without
    it, each call chooses, as where q and k are wanted of a rotation that is "fused".
    """
    return None if implementation in ("auto", "fused") else implementation


def rotary_angles(positions: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """cos and sin, float32 [B, T, 1, head_dim // 2], of positions int32 [B, T]."""
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    return jnp.cos(angle), jnp.sin(angle)


class Attention(nnx.Module):
    """Causal grouped-query self-attention with one fused QKV projection.

    The fused kernel's columns are grouped by key/value head, [K, N / K + 2, H]: a split over the
    `tensor` mesh axis then leaves whole groups on each device.
    """

    def __init__(
        self, config: ModelConfig, recipe: jfp8.Recipe, rngs: nnx.Rngs, *, has_taps: bool = False
    ):
        heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.resolved_head_dim
        self.config = config
        self.quantize_implementation = recipe.quantize_implementation
        std, residual_std = _kernel_stds(config)
        self.qkv = _linear(
            "qkv", config.hidden_size, (heads + 2 * kv_heads) * head_dim, recipe, rngs, std
        )
        self.out = _linear("out", heads * head_dim, config.hidden_size, recipe, rngs, residual_std)
        self.q_norm = RMSNorm(head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(head_dim, config.norm_eps) if config.qk_norm else None
        self.taps = Taps(recipe, ("qkv", "out"), sees_attention=True) if has_taps else None

    def __call__(
        self,
        x: jax.Array,
        angles: tuple[jax.Array, jax.Array],
        segment_ids: jax.Array | None,
        x_cast: jfp8.CastInput | None = None,
    ) -> jax.Array:
        """[B, T, D] -> [B, T, D]; `segment_ids` int32 [B, T] keeps packed documents apart."""
        config = self.config
        batch, length, _ = x.shape
        heads, head_dim = config.num_heads, config.resolved_head_dim
        qkv = checkpoint_name(apply_linear(self.taps, "qkv", self.qkv, x, x_cast), "qkv")
        # Taps read q, k and v in 16 bits.
        if config.rope_implementation == "fused" and self.taps is None:
            attended = rope_flash_attention(
                qkv,
                *angles,
                segment_ids=segment_ids,
                **fused_attention_options(config, self.quantize_implementation),
            )
        else:
            attended = self._attend(qkv, angles, segment_ids)
        return apply_linear(
            self.taps, "out", self.out, attended.reshape(batch, length, heads * head_dim)
        )

    def _attend(
        self,
        qkv: jax.Array,
        angles: tuple[jax.Array, jax.Array],
        segment_ids: jax.Array | None,
    ) -> jax.Array:
        """[B, T, (N + 2 K) H] -> [B, T, N, H], with q, k and v in 16 bits between."""
        config = self.config
        kv_heads, head_dim = config.num_kv_heads, config.resolved_head_dim
        if self.q_norm is not None and self.k_norm is not None:
            q, k, v = split_heads(qkv, kv_heads, head_dim)
            q, k = rotate(self.q_norm(q), *angles), rotate(self.k_norm(k), *angles)
        else:
            q, k, v = rope_qkv(
                qkv,
                *angles,
                num_kv_heads=kv_heads,
                head_dim=head_dim,
                implementation=_asked_for(config.rope_implementation),
            )
        attended = flash_attention(
            q,
            k,
            v,
            is_causal=True,
            local_window_size=_window(config),
            q_segment_ids=segment_ids,
            kv_segment_ids=segment_ids,
            **attention_options(config, self.quantize_implementation),
        )
        return see_attention(self.taps, q, k, v, attended)


def _window(config: ModelConfig) -> tuple[int, int] | None:
    """Keys that a token sees on both sides, if not all."""
    return (config.local_window_size, 0) if config.local_window_size else None


def fused_attention_options(
    config: ModelConfig, quantize_implementation: KernelImplementation
) -> dict[str, Any]:
    """The arguments of `rope_flash_attention` besides arrays."""
    options = attention_options(config, quantize_implementation)
    return {
        "num_kv_heads": config.num_kv_heads,
        "head_dim": config.resolved_head_dim,
        "is_causal": True,
        "local_window_size": _window(config),
        "fp8_options": options["fp8_options"],
        "implementation": "mosaic",
        "deterministic": options["deterministic"],
    }


def attention_options(
    config: ModelConfig, quantize_implementation: KernelImplementation
) -> dict[str, Any]:
    """The arguments of `flash_attention` that say in which precision, and by whom."""
    choice, precision = config.attention_implementation, config.attention_precision
    options: dict[str, Any] = {
        "implementation": None if choice == "auto" else choice,
        "deterministic": config.attention_deterministic or None,
    }
    if precision == "bf16":
        return options
    backward = "bf16" if precision == "fp8_forward" else "fp8"
    by_kernels = quantize_implementation == "mosaic"
    fp8_options = Fp8Options(
        backward=backward, quantize_implementation="mosaic" if by_kernels else "xla"
    )
    return options | {"precision": "fp8", "fp8_options": fp8_options}


def ffn_group(config: ModelConfig) -> int:
    """Columns of gate, and then of up, that stand together in the fused projection."""
    return math.gcd(config.ffn_size, _MAX_FFN_GROUP)


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x)) with one fused gate/up projection.

    Gate and up alternate in groups of 128 columns, [F / 128, 2, 128]: a split over the `tensor`
    mesh axis keeps each pair on one device, and a kernel's tile finds both side by side.
    """

    def __init__(
        self, config: ModelConfig, recipe: jfp8.Recipe, rngs: nnx.Rngs, *, has_taps: bool = False
    ):
        self.group = ffn_group(config)
        self.implementation = _asked_for(config.swiglu_implementation)
        std, residual_std = _kernel_stds(config)
        self.gate_up = _linear(
            "gate_up", config.hidden_size, 2 * config.ffn_size, recipe, rngs, std
        )
        self.down = _linear("down", config.ffn_size, config.hidden_size, recipe, rngs, residual_std)
        self.taps = Taps(recipe, ("gate_up", "down"), sees_attention=False) if has_taps else None

    def __call__(self, x: jax.Array, x_cast: jfp8.CastInput | None = None) -> jax.Array:
        """[B, T, D] -> [B, T, D]."""
        if self._is_fused():
            layers = self.gate_up, self.down
            return jfp8.nnx.swiglu_mlp(*layers, x, group=self.group, x_cast=x_cast)
        gate_up = apply_linear(self.taps, "gate_up", self.gate_up, x, x_cast)
        gate_up = checkpoint_name(gate_up, "gate_up")
        hidden = swiglu(gate_up, group=self.group, implementation=self.implementation)
        return apply_linear(self.taps, "down", self.down, hidden)

    def _is_fused(self) -> bool:
        """Whether kernels quantise the hidden layer as they compute it; taps want it in 16 bits."""
        recipe = self.gate_up.recipe
        mosaic = recipe.quantizes and recipe.quantize_implementation == "mosaic"
        return mosaic and recipe == self.down.recipe and self.taps is None


class Block(nnx.Module):
    """Pre-norm decoder block: x + attention(norm(x)), then x + swiglu(norm(x))."""

    def __init__(
        self, config: ModelConfig, recipe: jfp8.Recipe, rngs: nnx.Rngs, *, has_taps: bool = False
    ):
        norm = functools.partial(
            RMSNorm, config.hidden_size, config.norm_eps, config.norm_implementation
        )
        self.attention_norm = norm()
        self.attention = Attention(config, recipe, rngs, has_taps=has_taps)
        self.ffn_norm = norm()
        self.ffn = SwiGLU(config, recipe, rngs, has_taps=has_taps)

    def __call__(
        self, x: jax.Array, angles: tuple[jax.Array, jax.Array], segment_ids: jax.Array | None
    ) -> jax.Array:
        """[M, D] -> [M, D], the rows of all sequences; `angles` of positions [B, T]."""
        with jax.named_scope("block"):
            attention, ffn = self.attention, self.ffn
            x = x.reshape(*angles[0].shape[:2], -1)
            normed, x, cast = self.attention_norm.for_dot(x, attention.qkv, attention.taps)
            x = _rows(x) + _rows(attention(normed, angles, segment_ids, cast))
            x = x.reshape(normed.shape)
            normed, x, cast = self.ffn_norm.for_dot(x, ffn.gate_up, ffn.taps)
            return _rows(x) + _rows(ffn(normed, cast))


def _rows(x: jax.Array) -> jax.Array:
    return x.reshape(-1, x.shape[-1])


class HeadDot(nnx.Module):
    """FP8 state of the dot with the output head; the loss computes it, in chunks."""

    def __init__(self, recipe: jfp8.Recipe):
        self.recipe = recipe
        state = jfp8.init_state(recipe) if recipe.quantizes else None
        self.scaling = nnx.data(None if state is None else jfp8.nnx.Scaling(state))

    @property
    def state(self) -> jfp8.ScalingState | None:
        """None if the head is not in FP8."""
        return None if self.scaling is None else self.scaling.get_value()


class Transformer(nnx.Module):
    """Embedding, blocks and final norm; the head's matrix is applied by the loss, in chunks.

    With `layer_loop="scan"` the blocks are one `Block` whose arrays have a leading layer axis; with
    "unroll" they are a list. The two train alike but have different parameter trees.
    """

    def __init__(
        self, config: ModelConfig, recipe: jfp8.Recipe, *, rngs: nnx.Rngs, has_taps: bool = False
    ):
        """Creates the parameters.

        Args:
          config: sizes and choices.
          recipe: of the GEMMs of the blocks, and of the head where it does not skip `head`.
          rngs: seeds the parameters.
          has_taps: the tensors of the blocks can be measured; see `train.taps`.
        """
        self.config = config
        shape = (config.vocab_size, config.hidden_size)
        embedding_std, gain = _embedding_std_and_gain(config)
        normal = nnx.initializers.normal
        self.embedding = nnx.Param(normal(embedding_std)(rngs.params(), shape, jnp.float32))
        if config.layer_loop == "scan":
            create = nnx.vmap(
                lambda block_rngs: Block(config, recipe, block_rngs, has_taps=has_taps)
            )
            self.blocks = create(rngs.split(config.num_layers))
        else:
            self.blocks = nnx.List(
                Block(config, recipe, rngs, has_taps=has_taps) for _ in range(config.num_layers)
            )
        self.final_norm = RMSNorm(config.hidden_size, config.norm_eps, gain=gain)
        if not config.tie_embeddings:
            head = normal(_kernel_stds(config)[0])
            self.head = nnx.Param(head(rngs.params(), shape[::-1], jnp.float32))
        self.logits = HeadDot(recipe.for_layer("head"))

    def __call__(
        self, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array | None
    ) -> jax.Array:
        """Final hidden states [B, T, D] in bfloat16.

        Args:
          tokens: int32 [B, T], ids below the vocabulary size.
          positions: int32 [B, T], the rotary position of each token in its document.
          segment_ids: int32 [B, T], equal inside one document; None lets every token see all before
            it.
        """
        multiplier = self.config.embedding_multiplier
        x = _rows(embed(self.embedding[...], tokens, COMPUTE_DTYPE, multiplier=multiplier))
        # Keeps XLA from moving that reshape to each reader, of which the addition would be one.
        x = jax.lax.optimization_barrier(x)
        angles = rotary_angles(positions, self.config.resolved_head_dim, self.config.rope_theta)
        x = self._apply_blocks(x, angles, segment_ids)
        return self.final_norm(x.reshape(*tokens.shape, -1))

    def head_kernel(self) -> jax.Array:
        """The output projection, float32 [D, V]."""
        if self.config.tie_embeddings:
            # XLA would fold this into the GEMM of the gradient, which it cannot run on a CPU then.
            return jax.lax.optimization_barrier(self.embedding[...].T)
        return self.head[...]

    def _apply_blocks(self, x, angles, segment_ids):
        if self.config.layer_loop == "unroll":
            assert isinstance(self.blocks, nnx.List)
            for block in self.blocks:
                graph, state = nnx.split(block)
                apply = _rematerialised(
                    lambda state, x, graph=graph: nnx.merge(graph, state)(x, angles, segment_ids),
                    self.config,
                )
                x = apply(state, x)
            return x
        graph, stacked = nnx.split(self.blocks)
        apply = _rematerialised(
            lambda state, x: nnx.merge(graph, state)(x, angles, segment_ids), self.config
        )
        return jax.lax.scan(lambda x, state: (apply(state, x), None), x, stacked)[0]


# What the backward finds saved. Under remat="dots" that is GEMM and attention outputs, and each
# GEMM's 8-bit operands in place of the 16-bit values they were made from.
_SAVED_NAMES = {
    "dots": (
        *("qkv", "gate_up", NORM_RESIDUAL_NAME),
        *ATTENTION_RESIDUAL_NAMES,
        *jfp8.RESIDUAL_NAMES,
    ),
    "attention": ATTENTION_RESIDUAL_NAMES,
    "block": (),
}


def _rematerialised(function: Callable, config: ModelConfig) -> Callable:
    if config.remat == "none":
        return function
    policy = jax.checkpoint_policies.save_only_these_names(*_SAVED_NAMES[config.remat])
    return jax.checkpoint(function, policy=policy)


def _linear(
    name: str,
    in_features: int,
    out_features: int,
    recipe: jfp8.Recipe,
    rngs: nnx.Rngs,
    std: float,
) -> jfp8.nnx.Linear:
    return jfp8.nnx.Linear(
        in_features,
        out_features,
        recipe=recipe.for_layer(f"block.{name}"),
        dtype=COMPUTE_DTYPE,
        param_dtype=jnp.float32,
        kernel_init=nnx.initializers.normal(std),
        rngs=rngs,
    )


def _kernel_stds(config: ModelConfig) -> tuple[float, float]:
    """Of kernels that read the residual stream, the head's too, and of those that add to it.

    sqrt(2 / 5D) (Nguyen & Salazar 2019, arXiv:1910.05895), for the latter divided by
    sqrt(2 layers), so that the stream's variance does not grow with depth (GPT-2).
    """
    std = math.sqrt(2 / (5 * config.hidden_size))
    return std, std / math.sqrt(2 * config.num_layers)


def _embedding_std_and_gain(config: ModelConfig) -> tuple[float, float]:
    """Standard deviation of the embeddings, and gain of the final norm.

    Times the multiplier the former is 1: the residual stream is large beside what the blocks add to
    it, and the norms do not amplify gradients, as they do behind small embeddings ("Spike No More",
    Takase et al. 2023, arXiv:2312.16903). But the embedding itself has to be small: Adam moves any
    parameter by about the learning rate in a step, so that at 3e-4 one of 1 stays what it was drawn
    as for a thousand steps.

    A tied embedding has to be as small as a head. The stream of a token begins as its embedding,
    so its logit for itself is gain * std * D: the gain makes that half of ln V, which leaves the
    loss at ln V. With a gain of 1 it would be tens of nats in a wide model.
    """
    if not config.tie_embeddings:
        return 1 / config.embedding_multiplier, 1.0
    std = _kernel_stds(config)[0]
    return std, min(1.0, math.log(config.vocab_size) / (2 * std * config.hidden_size))

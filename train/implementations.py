"""Settles, once and before anything is compiled, every `*-implementation` option that says "auto".

"auto" takes the Mosaic kernel on one Hopper GPU, where it can run all that the option is about, and
XLA elsewhere. Whether a kernel can run is for its own checks to say. On several devices it is XLA,
too: what each of them gets is for the partitioner to choose, in pieces that may be too small for a
kernel, and nothing has been measured there. Rotary positions that are "fused" with the casts of FP8
attention have to be asked for: those kernels have not been measured either. Attention is not among
these options: `flash_attention` chooses for itself.
"""

# Shapes: M tokens; the GEMMs of a dot are those of [M, K] and [K, N].

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jfp8.scaling import LHS
from pallas_kernels import flash_attention_choice
from pallas_kernels.flash_attention import rope_attention
from pallas_kernels.flash_attention.api import Choice
from pallas_kernels.flash_attention.sm90_quantize_fp8 import HEAD_DIMS as FP8_CAST_HEAD_DIMS
from pallas_kernels.fused import rmsnorm, rope, swiglu
from pallas_kernels.quantize import api as quantize
from train.config import ConfigError, ModelConfig, RopeImplementation, TrainConfig
from train.model import COMPUTE_DTYPE, attention_options, ffn_group, fused_attention_options
from train.state import make_recipe

_OPTIONS = {
    "casts": ("fp8", "quantize_implementation"),
    "norm": ("model", "norm_implementation"),
    "rope": ("model", "rope_implementation"),
    "swiglu": ("model", "swiglu_implementation"),
}


class Decision(NamedTuple):
    """Who runs one kind of operation."""

    what: str
    implementation: Literal["xla", "mosaic", "fused"]
    reason: str
    """Why not Mosaic, or "asked for"; empty for a kernel that was chosen."""


def settle(config: TrainConfig, mesh: Mesh) -> tuple[TrainConfig, list[Decision]]:
    """The config to train with on a mesh, and what was decided.

    Args:
      config: as asked for; this is the one to save.
      mesh: of the devices.

    Returns: the config with "xla", "mosaic" or "fused" for each "auto"; and what was decided.

    Raises:
      ConfigError: if "mosaic" or "fused" is asked for where its kernels cannot run.
    """
    decisions = []
    for what, (section, field) in _OPTIONS.items():
        asked = getattr(getattr(config, section), field)
        taken, reason = _take(what, asked, config, mesh)
        if reason is not None and asked != "auto":
            option = f"--{section}.{field.replace('_', '-')}"
            raise ConfigError(f"{option}={asked} cannot run: {reason}. Use auto, or xla")
        # The way out, which reasons end with, has been taken.
        why = "asked for" if asked != "auto" else (reason or "").partition(";")[0]
        if what != "casts" or _casts_anything(config):
            decisions.append(Decision(what, taken, why))
        config = _with(config, section, field, taken)
    return config, decisions


def _take(
    what: str, asked: RopeImplementation, config: TrainConfig, mesh: Mesh
) -> tuple[Literal["xla", "mosaic", "fused"], str | None]:
    """What runs instead of `asked`; and what stands in the way of Mosaic."""
    if asked == "xla":
        return "xla", None
    if asked == "fused":
        # The option of casts, which the fused kernels are some of, is settled by now.
        return "fused", _fused_rope_reason(config, mesh)
    reason = _REASONS[what](config)
    if reason is None and asked == "auto" and mesh.size > 1:
        reason = f"what each of {mesh.size} devices gets is for XLA to choose; ask for mosaic"
    return "mosaic" if reason is None else "xla", reason


def _with(config: TrainConfig, section: str, field: str, value: object) -> TrainConfig:
    changes: dict[str, Any] = {field: value}
    sections: dict[str, Any] = {section: dataclasses.replace(getattr(config, section), **changes)}
    return dataclasses.replace(config, **sections)


def portable(config: TrainConfig) -> TrainConfig:
    """The config with every choice of an implementation left to the machine at hand."""
    for section, field in (*_OPTIONS.values(), ("model", "attention_implementation")):
        config = _with(config, section, field, "auto")
    return _with(config, "fp8", "gemm_implementation", "xla")


def describe(decisions: list[Decision]) -> str:
    """One line: "mosaic for casts, rope; xla for norm (the 768 columns must be ...)"."""
    groups: dict[tuple[str, str], list[str]] = {}
    for decision in sorted(decisions, key=lambda d: d.implementation):
        groups.setdefault(decision[1:], []).append(decision.what)
    return "; ".join(
        f"{implementation} for {', '.join(names)}{f' ({reason})' if reason else ''}"
        for (implementation, reason), names in groups.items()
    )


def attention_choice(config: TrainConfig) -> Choice:
    """The attention kernel of the training step.

    Raises:
      NotImplementedError, ValueError: as `flash_attention`.
    """
    model, data = config.model, config.data
    rows = data.batch_size // config.optimizer.accumulation_steps
    shape = lambda heads: _array(  # noqa: E731
        rows, data.sequence_length, heads, model.resolved_head_dim
    )
    segment_ids = (
        jax.ShapeDtypeStruct((rows, data.sequence_length), "int32") if data.document_mask else None
    )
    window = model.local_window_size
    return flash_attention_choice(
        shape(model.num_heads),
        shape(model.num_kv_heads),
        shape(model.num_kv_heads),
        is_causal=True,
        local_window_size=(window, 0) if window else None,
        q_segment_ids=segment_ids,
        kv_segment_ids=segment_ids,
        **attention_options(model, config.fp8.quantize_implementation),
    )


def _array(*shape: int, dtype: jax.typing.DTypeLike = COMPUTE_DTYPE) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _tokens(config: TrainConfig) -> set[int]:
    """Of a microbatch, and of a batch in validation."""
    tokens = config.data.batch_size * config.data.sequence_length
    return {tokens // config.optimizer.accumulation_steps, tokens}


def _first(reasons: Iterable[str | None]) -> str | None:
    return next((reason for reason in reasons if reason is not None), None)


def _norm_reason(config: TrainConfig) -> str | None:
    width = config.model.hidden_size
    return _first(rmsnorm.unsupported_reason(_array(m, width)) for m in _tokens(config))


def _rope_reason(config: TrainConfig) -> str | None:
    model = config.model
    if model.qk_norm:
        return "its kernel ends at the projection, and --model.qk-norm comes between"
    heads = dict(num_kv_heads=model.num_kv_heads, head_dim=model.resolved_head_dim)
    width = _gemms(model)["block.qkv"][1]
    return _first(rope.unsupported_reason(_array(1, m, width), **heads) for m in _tokens(config))


def _fused_rope_reason(config: TrainConfig, mesh: Mesh) -> str | None:
    """Why the kernels that cast for FP8 attention cannot rotate q and k."""
    model, data = config.model, config.data
    if model.attention_precision != "fp8":
        return "its kernels are those of --model.attention-precision=fp8"
    if model.qk_norm:
        return "its kernels begin at the projection, and --model.qk-norm comes between"
    if mesh.size > 1:
        return f"XLA would gather what {mesh.size} devices have; use mosaic"
    if config.fp8.quantize_implementation != "mosaic":
        return "its kernels are those of --fp8.quantize-implementation=mosaic, which is not in use"
    if model.attention_implementation == "xla":
        return "it needs --model.attention-implementation=mosaic"
    options = fused_attention_options(model, config.fp8.quantize_implementation)
    del options["implementation"]
    tokens, width = data.sequence_length, _gemms(model)["block.qkv"][1]
    ids = lambda m: _array(m, tokens, dtype=jnp.int32) if data.document_mask else None  # noqa: E731
    return _first(
        rope_attention.unsupported_reason(
            _array(rows, tokens, width), ids(rows), rope_attention.Options(**options)
        )
        for rows in (m // tokens for m in _tokens(config))
    )


def _swiglu_reason(config: TrainConfig) -> str | None:
    group, width = ffn_group(config.model), 2 * config.model.ffn_size
    return _first(swiglu.unsupported_reason(_array(m, width), group) for m in _tokens(config))


def _casts_anything(config: TrainConfig) -> bool:
    return config.fp8.recipe != "bf16" or config.model.attention_precision != "bf16"


def _casts_reason(config: TrainConfig) -> str | None:
    """Of the GEMMs' operands, of the norm and SwiGLU that cast, and of FP8 attention."""
    head_dim = config.model.resolved_head_dim
    if config.model.attention_precision != "bf16" and head_dim not in FP8_CAST_HEAD_DIMS:
        return f"the head dim {head_dim} of FP8 attention is not one of {FP8_CAST_HEAD_DIMS}"
    return _first(_gemm_cast_reasons(config))


def _gemm_cast_reasons(config: TrainConfig) -> Iterator[str | None]:
    model, recipe = config.model, make_recipe(config.fp8)
    dtype = recipe.formats[LHS].dtype  # a gradient's makes no difference
    gemms = {name: kn for name, kn in _gemms(model).items() if recipe.for_layer(name).quantizes}
    for k, n in gemms.values():
        yield quantize.unsupported_reason(_array(k, n, dtype=jnp.float32), dtype=dtype)
    for m, (name, (k, n)) in itertools.product(_tokens(config), gemms.items()):
        yield quantize.unsupported_reason(_array(m, k), dtype=dtype)
        if name != "head":  # the gradient of the logits is cast by XLA
            yield quantize.unsupported_reason(_array(m, n), dtype=dtype)
        if name in ("block.qkv", "block.gate_up"):
            yield rmsnorm.quantize_unsupported_reason(_array(m, k), dtype=dtype)
        if name == "block.gate_up" and "block.down" in gemms:
            group = ffn_group(model)
            yield swiglu.quantize_unsupported_reason(_array(m, n), group, dtype=dtype)


def _gemms(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """K and N of the GEMMs, by the names that recipes know them by."""
    attended = model.num_heads * model.resolved_head_dim
    kv = model.num_kv_heads * model.resolved_head_dim
    return {
        "block.qkv": (model.hidden_size, attended + 2 * kv),
        "block.out": (attended, model.hidden_size),
        "block.gate_up": (model.hidden_size, 2 * model.ffn_size),
        "block.down": (model.ffn_size, model.hidden_size),
        "head": (model.hidden_size, model.vocab_size),
    }


_REASONS = {
    "casts": _casts_reason,
    "norm": _norm_reason,
    "rope": _rope_reason,
    "swiglu": _swiglu_reason,
}

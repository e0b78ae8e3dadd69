"""Settles, once and before anything is compiled, every `*-implementation` option that says "auto".

"auto" takes the Mosaic kernel where it can run all that the option is about, as the mesh divides
it among the devices; XLA elsewhere. Whether a kernel can run is for its own checks to say.
Attention is not among these options: `flash_attention` chooses for itself.
"""

# Shapes: M tokens of a device, D hidden, F ffn, V vocabulary; see `train.model`.

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from pallas_kernels import flash_attention_choice
from pallas_kernels.flash_attention.api import Choice
from pallas_kernels.flash_attention.sm90_quantize_fp8 import HEAD_DIMS as FP8_CAST_HEAD_DIMS
from pallas_kernels.fused import rmsnorm, rope, swiglu
from pallas_kernels.quantize import api as quantize
from pallas_kernels.quantize.partition import row_split_reason
from train.config import ConfigError, TrainConfig
from train.model import COMPUTE_DTYPE, attention_options, ffn_group
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
    implementation: Literal["xla", "mosaic"]
    reason: str
    """Why not Mosaic, or "asked for"; empty for a kernel that was chosen."""


def settle(config: TrainConfig, mesh: Mesh) -> tuple[TrainConfig, list[Decision]]:
    """The config to train with on a mesh, and what was decided.

    Args:
      config: as asked for; this is the one to save.
      mesh: divides its sizes (`train.mesh.check_divisibility`).

    Returns: the config with "xla" or "mosaic" for each "auto"; and what was decided.

    Raises:
      ConfigError: if "mosaic" is asked for where its kernels cannot run.
    """
    decisions = []
    for what, (section, field) in _OPTIONS.items():
        asked = getattr(getattr(config, section), field)
        reason = None if asked == "xla" else _REASONS[what](config, mesh)
        if asked == "mosaic" and reason is not None:
            option = f"--{section}.{field.replace('_', '-')}"
            raise ConfigError(f"{option}=mosaic cannot run: {reason}. Use auto, or xla")
        taken = "xla" if asked == "xla" or reason is not None else "mosaic"
        # The way out, which reasons end with, has been taken.
        why = "asked for" if asked != "auto" else (reason or "").partition(";")[0]
        if what != "casts" or _casts_anything(config):
            decisions.append(Decision(what, taken, why))
        config = _with(config, section, field, taken)
    return config, decisions


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


def _rows(config: TrainConfig, mesh: Mesh) -> set[int]:
    """Sequences that a device has at once: of a microbatch, and of a batch in validation."""
    replicas = mesh.shape["data"] * mesh.shape["fsdp"]
    batch = config.data.batch_size // replicas
    return {batch // config.optimizer.accumulation_steps, batch}


def _first(reasons: Iterator[str | None]) -> str | None:
    return next((reason for reason in reasons if reason is not None), None)


def _norm_reason(config: TrainConfig, mesh: Mesh) -> str | None:
    width = config.model.hidden_size
    return _first(
        rmsnorm.unsupported_reason(_array(rows, config.data.sequence_length, width))
        for rows in _rows(config, mesh)
    )


def _rope_reason(config: TrainConfig, mesh: Mesh) -> str | None:
    model = config.model
    if model.qk_norm:
        return "its kernel ends at the projection, and --model.qk-norm comes between"
    kv_heads = model.num_kv_heads // mesh.shape["tensor"]
    group, head_dim = model.num_heads // model.num_kv_heads, model.resolved_head_dim
    width = kv_heads * (group + 2) * head_dim
    return _first(
        rope.unsupported_reason(
            _array(rows, config.data.sequence_length, width),
            num_kv_heads=kv_heads,
            head_dim=head_dim,
        )
        for rows in _rows(config, mesh)
    )


def _gate_up_parts(config: TrainConfig, mesh: Mesh) -> Iterator[jax.ShapeDtypeStruct]:
    """What the devices have of the gate/up projection, [M, 2 F]."""
    for rows in _rows(config, mesh):
        width = 2 * (config.model.ffn_size // mesh.shape["tensor"])
        yield _array(rows * config.data.sequence_length, width)


def _swiglu_reason(config: TrainConfig, mesh: Mesh) -> str | None:
    group = ffn_group(config.model)
    parts = _gate_up_parts(config, mesh)
    return _first(swiglu.unsupported_reason(part, group) for part in parts)


def _casts_anything(config: TrainConfig) -> bool:
    return config.fp8.recipe != "bf16" or config.model.attention_precision != "bf16"


def _casts_reason(config: TrainConfig, mesh: Mesh) -> str | None:
    """Of the casts of the GEMMs, of the norm and SwiGLU before them, and of FP8 attention."""
    if config.fp8.recipe != "bf16":
        reason = _first(_cast_reasons(config, mesh))
        if reason is not None:
            return reason
    head_dim = config.model.resolved_head_dim
    if config.model.attention_precision == "bf16" or head_dim in FP8_CAST_HEAD_DIMS:
        return None
    return f"the head dim {head_dim} of FP8 attention is not one of {FP8_CAST_HEAD_DIMS}"


def _cast_reasons(config: TrainConfig, mesh: Mesh) -> Iterator[str | None]:
    fsdp, tensor = mesh.shape["fsdp"], mesh.shape["tensor"]
    dtype = make_recipe(config.fp8).formats[0].dtype  # which of the two makes no difference
    for count in (mesh.shape["data"] * fsdp, fsdp, tensor):
        yield row_split_reason(count)
    activations, kernels = _gemm_widths(config, fsdp=fsdp, tensor=tensor)
    for rows in _rows(config, mesh):
        tokens = rows * config.data.sequence_length
        for width in activations:
            yield quantize.unsupported_reason(_array(tokens, width), dtype=dtype)
        hidden = _array(tokens, config.model.hidden_size)
        yield rmsnorm.quantize_unsupported_reason(hidden, dtype=dtype)
    for shape in kernels:
        yield quantize.unsupported_reason(_array(*shape, dtype=jnp.float32), dtype=dtype)
    for part in _gate_up_parts(config, mesh):
        group = ffn_group(config.model)
        yield swiglu.quantize_unsupported_reason(part, group, dtype=dtype)


def _gemm_widths(
    config: TrainConfig, *, fsdp: int, tensor: int
) -> tuple[set[int], set[tuple[int, int]]]:
    """Of one device: widths of inputs and output gradients, and shapes of kernels, that are cast.

    `train.mesh` splits the columns of qkv, gate_up and head over `tensor` and the rows over `fsdp`,
    those of out and down the other way round.
    """
    model, recipe = config.model, make_recipe(config.fp8)
    heads, head_dim = model.num_heads, model.resolved_head_dim
    columns = {
        "block.qkv": (heads + 2 * model.num_kv_heads) * head_dim,
        "block.gate_up": 2 * model.ffn_size,
        "head": model.vocab_size,
    }
    rows = {"block.out": heads * head_dim, "block.down": model.ffn_size}
    widths, kernels = set(), set()
    for name, width in (columns | rows).items():
        if not recipe.for_layer(name).quantizes:
            continue
        width //= tensor
        widths |= {model.hidden_size, width} if name != "head" else {model.hidden_size}
        shape = (model.hidden_size // fsdp, width)
        kernels.add(shape if name in columns else shape[::-1])
    return widths, kernels


_REASONS = {
    "casts": _casts_reason,
    "norm": _norm_reason,
    "rope": _rope_reason,
    "swiglu": _swiglu_reason,
}

"""SwiGLU's two dots with the activation between them, which never leaves 16 bits in memory.

    gate_up = x . W1,   h = silu(gate) up,   out = h . W2

h is quantised as it is computed, and so is its gradient with respect to gate_up. Composed of
`dot_general`s, h and that gradient would be written in 16 bits, read again and cast. This is one
custom_vjp because an 8-bit tensor and its transpose cannot ride a cotangent.
"""

# Shapes: M tokens, D hidden size, F hidden columns of the MLP.

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

import pallas_kernels
from jfp8.gemms import (
    Cast,
    CastInput,
    CastKernel,
    cast,
    chosen_scale,
    decided,
    dgrad_gemm,
    explicit_sharding,
    forward_gemm,
    from_bytes,
    lhs_of,
    matrix_shape,
    rhs_of,
    same_varying,
    save_for_dgrad,
    save_for_wgrad,
    wgrad_dtype,
    wgrad_gemm,
)
from jfp8.quantize import observe, sample_rows, sample_statistics, sampled_elements
from jfp8.recipe import Recipe
from jfp8.scaling import GRAD, LHS, RHS, ScalingState
from jfp8.validation import validate_operands, validated_state
from pallas_kernels import Quantized
from pallas_kernels.fused.swiglu import activation, gradient, quantize_unsupported_reason
from pallas_kernels.quantize.contract import Implementation, Layouts


@dataclasses.dataclass(frozen=True, slots=True)
class _Static:
    """What the custom_vjp knows at trace time."""

    recipe: Recipe
    group: int
    x_dtype: np.dtype
    kernel_dtypes: tuple[np.dtype, np.dtype]


def swiglu_mlp(
    x: jax.Array,
    gate_up_kernel: jax.Array,
    down_kernel: jax.Array,
    gate_up_state: ScalingState | None,
    down_state: ScalingState | None,
    *,
    group: int,
    recipe: Recipe,
    kernel_casts: tuple[CastKernel | None, CastKernel | None] = (None, None),
    x_cast: CastInput | None = None,
) -> jax.Array:
    """Computes (silu(x . gate) * (x . up)) . down in FP8; differentiable.

    The gradients with respect to the two states are the observations of the two dots, as with
    `jfp8.dot_general`. The hidden layer is rounded once, from float32 to 8 bits; composed of two
    `dot_general`s it is rounded to bfloat16 in between.

    Args:
      x: `[..., D]`, bfloat16.
      gate_up_kernel: `[D, 2 F]`, bfloat16 or float32: groups of columns of gate, then of up.
      down_kernel: `[F, D]`, likewise.
      gate_up_state: of the first dot.
      down_state: of the second dot.
      group: columns of a group; 128 for `Recipe.quantize_implementation="mosaic"`.
      recipe: of both dots; not bf16.
      kernel_casts: of the two kernels, as in `jfp8.dot_general`.
      x_cast: of x, as `lhs_cast` there.

    Returns: `[..., D]`, bfloat16.

    Raises:
      ValueError: for a dtype, a size or a state that the recipe cannot take.
      NotImplementedError: on a mesh with explicit axes.

    References: Shazeer 2020, arXiv:2002.05202; Micikevicius et al. 2022, arXiv:2209.05433.
    """
    if not recipe.quantizes:
        raise ValueError(f"{recipe.name=} must quantise; compose two jfp8.dot_general instead")
    if x.dtype != jnp.bfloat16:
        raise ValueError(f"x.dtype={x.dtype} must be bfloat16; cast it, or compose two dots")
    if explicit_sharding(x) is not None:
        raise NotImplementedError(
            "swiglu_mlp does not say how its results are sharded on a mesh with explicit axes;"
            " compose two jfp8.dot_general, or use a mesh with AxisType.Auto"
        )
    rows = x.reshape(-1, x.shape[-1])
    width = gate_up_kernel.shape[-1]
    if gate_up_kernel.shape != (rows.shape[1], width) or down_kernel.shape[0] * 2 != width:
        raise ValueError(
            f"gate_up_kernel.shape={gate_up_kernel.shape} must be ({rows.shape[1]}, 2 F) for"
            f" x.shape={x.shape}, and down_kernel.shape={down_kernel.shape} (F, D)"
        )
    m, k = rows.shape
    validate_operands(rows, gate_up_kernel, recipe, m=m, k=k, n=width)
    validate_operands(rows, down_kernel, recipe, m=m, k=width // 2, n=down_kernel.shape[1])
    states = [validated_state(state, recipe) for state in (gate_up_state, down_state)]
    recipe = _decided(recipe, rows, gate_up_kernel, down_kernel, group)
    static = _Static(recipe, group, x.dtype, (gate_up_kernel.dtype, down_kernel.dtype))
    arrays = [rows, gate_up_kernel, down_kernel]
    arrays += [array for state in states for array in (state.scale, state.observation)]
    leaves, structure = jax.tree.flatten((arrays, kernel_casts, x_cast))
    arrays, *casts = jax.tree.unflatten(structure, same_varying(*leaves))
    out = _mlp(static, *arrays, *casts)
    return out.reshape(*x.shape[:-1], down_kernel.shape[1])


def _decided(recipe: Recipe, x: jax.Array, w1: jax.Array, w2: jax.Array, group: int) -> Recipe:
    gate_up = jax.ShapeDtypeStruct((len(x), w1.shape[1]), x.dtype)
    out = jax.ShapeDtypeStruct((len(x), w2.shape[1]), x.dtype)
    reason = quantize_unsupported_reason(gate_up, group, dtype=recipe.formats[LHS].dtype)
    return decided(recipe, x, w1, w2, out, unsupported_reason=reason)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mlp(static, x, w1, w2, scale1, probe1, scale2, probe2, casts, x_cast):
    return _mlp_fwd(static, x, w1, w2, scale1, probe1, scale2, probe2, casts, x_cast)[0]


def _mlp_fwd(static, x, w1, w2, scale1, probe1, scale2, probe2, casts, x_cast):
    del probe1, probe2  # only their cotangents matter
    recipe = static.recipe
    with jax.named_scope("fp8_dot/quantize_lhs"):
        cast_x, saved_x = save_for_wgrad(lhs_of(x, x_cast, scale1[LHS], recipe), "fp8_lhs")
    with jax.named_scope("fp8_dot/quantize_rhs"):
        cast_w1 = rhs_of(w1, casts[0], scale1[RHS], recipe)
        cast_w2 = rhs_of(w2, casts[1], scale2[RHS], recipe)
        cast_w1, saved_w1 = save_for_dgrad(cast_w1, "fp8_rhs")
        cast_w2, saved_w2 = save_for_dgrad(cast_w2, "fp8_rhs")
    with jax.named_scope("fp8_dot/fwd"):
        gate_up = forward_gemm(cast_x, cast_w1, static.x_dtype, recipe.gemm_implementation)
        gate_up = checkpoint_name(gate_up, "gate_up")
    with jax.named_scope("fp8_dot/quantize_lhs"):
        hidden, saved_hidden = save_for_wgrad(_cast_hidden(static, gate_up, scale2), "fp8_lhs")
    with jax.named_scope("fp8_dot/fwd"):
        out = forward_gemm(hidden, cast_w2, static.x_dtype, recipe.gemm_implementation)
    first = _statistics(cast_x, cast_w1, scale1[GRAD])
    second = _statistics(hidden, cast_w2, scale2[GRAD])
    return out, (gate_up, (saved_x, saved_w1, *first), (saved_hidden, saved_w2, *second))


def _mlp_bwd(static, residuals, grad):
    gate_up, (saved_x, saved_w1, scale1, seen1), (saved_hidden, saved_w2, scale2, seen2) = residuals
    recipe = static.recipe
    implementation = recipe.gemm_implementation
    q_x, q_w1 = from_bytes(saved_x, LHS, recipe), from_bytes(saved_w1, RHS, recipe)
    q_hidden, q_w2 = from_bytes(saved_hidden, LHS, recipe), from_bytes(saved_w2, RHS, recipe)
    with jax.named_scope("fp8_dot/quantize_grad"):
        cast_grad = cast(grad, scale2[GRAD], GRAD, recipe)
    with jax.named_scope("fp8_dot/dgrad"):
        dhidden = dgrad_gemm(
            cast_grad, q_w2, scale2[RHS], static.x_dtype, implementation=implementation
        )
    with jax.named_scope("fp8_dot/quantize_grad"):
        dgate_up = _cast_gradient(static, gate_up, dhidden, scale1)
    with jax.named_scope("fp8_dot/wgrad"):
        dtypes = [wgrad_dtype(recipe, dtype) for dtype in static.kernel_dtypes]
        dw1 = wgrad_gemm(
            q_x, scale1[LHS], dgate_up, dtypes[0], implementation=implementation
        ).astype(static.kernel_dtypes[0])
        dw2 = wgrad_gemm(q_hidden, scale2[LHS], cast_grad, dtypes[1], implementation=implementation)
        dw2 = dw2.astype(static.kernel_dtypes[1])
    with jax.named_scope("fp8_dot/dgrad"):
        dx = dgrad_gemm(dgate_up, q_w1, scale1[RHS], static.x_dtype, implementation=implementation)
    with jax.named_scope("fp8_dot/observe"):
        m, f = dhidden.shape
        first = _observation(static, (m, q_w1.shape[0]), q_w1, (m, 2 * f), seen1, dgate_up)
        second = _observation(static, (m, f), q_w2, matrix_shape(grad), seen2, cast_grad)
    return dx, dw1, dw2, None, first, None, second, None, None


_mlp.defvjp(_mlp_fwd, _mlp_bwd)


def _statistics(lhs: Cast, rhs: Cast, grad_scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The scales of a dot's slots, and what was seen of its operands."""
    scales = checkpoint_name(jnp.stack([lhs.scale, rhs.scale, grad_scale]), "fp8_statistics")
    return scales, checkpoint_name(jnp.stack([lhs.seen, rhs.seen]), "fp8_statistics")


def _observation(
    static: _Static,
    lhs_shape: tuple[int, int],
    q_rhs: jax.Array,
    grad_shape: tuple[int, int],
    seen: jax.Array,
    grad: Cast,
) -> jax.Array:
    shapes = lhs_shape, matrix_shape(q_rhs), grad_shape
    counted = tuple(sampled_elements(*shape) for shape in shapes)
    return observe(jnp.concatenate([seen, grad.seen[None]]), counted, static.recipe.formats)


def _cast_hidden(static: _Static, gate_up: jax.Array, scales: jax.Array) -> Cast:
    """silu(gate) * up in 8 bits."""
    recipe = static.recipe
    scale, _ = chosen_scale(activation(gate_up, static.group), scales[LHS], LHS, recipe)
    quantized = pallas_kernels.swiglu_quantize(
        gate_up,
        scale,
        group=static.group,
        dtype=recipe.formats[LHS].dtype,
        layouts=_layouts(recipe),
        implementation=_implementation(recipe),
    )
    sample = activation(sample_rows(gate_up), static.group)
    return _as_cast(quantized, sample, scale, LHS, recipe)


def _cast_gradient(
    static: _Static, gate_up: jax.Array, dhidden: jax.Array, scales: jax.Array
) -> Cast:
    """The gradient of gate_up in 8 bits."""
    recipe = static.recipe
    # Without the barrier XLA finds the forward's float32 sigmoid here, and keeps it for all layers.
    gate_up, dhidden = jax.lax.optimization_barrier((gate_up, dhidden))
    scale, _ = chosen_scale(gradient(gate_up, dhidden, static.group), scales[GRAD], GRAD, recipe)
    quantized, _ = pallas_kernels.swiglu_grad_quantize(
        gate_up,
        dhidden,
        scale,
        group=static.group,
        dtype=recipe.formats[GRAD].dtype,
        layouts=_layouts(recipe),
        implementation=_implementation(recipe),
    )
    sample = gradient(sample_rows(gate_up), sample_rows(dhidden), static.group)
    return _as_cast(quantized, sample, scale, GRAD, recipe)


def _implementation(recipe: Recipe) -> Implementation:
    return "mosaic" if recipe.quantize_implementation == "mosaic" else "xla"


def _layouts(recipe: Recipe) -> Layouts:
    """XLA transposes the 8-bit rows where it needs columns."""
    return "both" if _implementation(recipe) == "mosaic" else "rows"


def _as_cast(
    quantized: Quantized, sample: jax.Array, scale: jax.Array, slot: int, recipe: Recipe
) -> Cast:
    seen = sample_statistics(sample, quantized.amax_bits, scale, recipe.formats[slot])
    return Cast(quantized.q, quantized.q_t, scale, seen)

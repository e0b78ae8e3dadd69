"""Cross-entropy over the vocabulary whose three GEMMs run in FP8.

As in `train.loss`, chunk by chunk and with the gradient formed while the logits are there:

    logits  = q(hidden) . q(head)                          float32, C tokens at a time
    dlogits = (softmax(logits) - onehot(target)) * weight  cast to 8 bits at once
    dhidden = q(dlogits) . q(head)^T                       of the chunk
    dhead   = q(hidden)^T . q(dlogits)                     of all tokens, after the last chunk

The 8-bit gradients of all logits are kept, a quarter of the float32 logits: the head's gradient is
then one GEMM instead of a float32 sum that every chunk reads and writes. Scales are per tensor.
"""

# Shapes: B batch, T tokens, C tokens of a chunk, D hidden, V vocabulary, M = B T.

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jfp8.gemms import Cast, cast, decided, dgrad_gemm, forward_gemm, wgrad_dtype, wgrad_gemm
from jfp8.quantize import current_scale, observe, sampled_elements
from jfp8.recipe import Recipe
from jfp8.scaling import GRAD, LHS, RHS, ScalingState
from jfp8.validation import ALIGNMENT, validate_operands, validated_state
from train.loss import chunk_count, token_losses


@dataclasses.dataclass(frozen=True, slots=True)
class _Static:
    """What the custom_vjp knows at trace time."""

    recipe: Recipe
    z_loss: float


def fp8_cross_entropy(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    state: ScalingState | None,
    *,
    recipe: Recipe,
    z_loss: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """`train.loss.cross_entropy` with FP8 GEMMs.

    Where the recipe takes scales from the tensors at hand, that of the logits' gradient comes from
    its bound, the largest weight: the amax of all of them is not known before the last chunk.

    Args:
      hidden: [B, T, D], bfloat16.
      head: float32 [D, V].
      targets: int32 [B, T].
      weights: float32 [B, T]; constants, no gradient flows to them.
      state: of the dot of hidden and head; its gradient is the observation for `jfp8.update`.
      recipe: of that dot; not bf16.
      z_loss: as in `cross_entropy`.

    Returns: as `cross_entropy`.

    Raises:
      ValueError: for a dtype, a size or a state that the recipe cannot take.
    """
    rows = hidden.reshape(-1, hidden.shape[-1])
    validate_operands(rows, head, recipe, m=len(rows), k=rows.shape[1], n=head.shape[1])
    state = validated_state(state, recipe)
    static = _Static(decided(recipe, rows, head), z_loss)
    total, nll = _cross_entropy(
        static, hidden, head, targets, weights, state.scale, state.observation
    )
    return total, lax.stop_gradient(nll)


class _Operands(NamedTuple):
    """The casts of a dot's two operands."""

    hidden: Cast  # [M, D]
    head: Cast  # [D, V]


def _cast_operands(static: _Static, hidden: jax.Array, head: jax.Array, scale: jax.Array):
    rows = hidden.reshape(-1, hidden.shape[-1])
    with jax.named_scope("head/fp8_dot/quantize_lhs"):
        lhs = cast(rows, scale[LHS], LHS, static.recipe)
    with jax.named_scope("head/fp8_dot/quantize_rhs"):
        rhs = cast(head, scale[RHS], RHS, static.recipe)
        if rhs.columns is None:  # XLA would transpose it for each chunk
            assert rhs.rows is not None
            rhs = rhs._replace(columns=lax.optimization_barrier(rhs.rows.T))
    return _Operands(lhs, rhs)


def _rows_of(x: Cast) -> jax.Array:
    """The row-major copy of a cast, which the recipe of a head always makes."""
    assert x.rows is not None
    return x.rows


def _chunk_logits(operands: _Operands, part: jax.Array) -> jax.Array:
    """float32 [B, C, V] of the 8-bit hidden states [B, C, D] of a chunk."""
    lhs = operands.hidden._replace(rows=part.reshape(-1, part.shape[-1]))
    with jax.named_scope("head/fp8_dot/fwd"):
        logits = forward_gemm(lhs, operands.head, np.dtype(np.float32))
    return logits.reshape(*part.shape[:2], -1)


def _part(x: jax.Array, index: jax.Array, size: int) -> jax.Array:
    """Chunk `index` of [B, T, ...]: [B, C, ...]."""
    return lax.dynamic_slice_in_dim(x, index * size, size, axis=1)


def _write(x: jax.Array, part: jax.Array, index: jax.Array, size: int) -> jax.Array:
    """x with chunk `index` replaced by the matrix `part`, [B C, ...]."""
    part = part.reshape(x.shape[0], size, x.shape[2])
    return lax.dynamic_update_slice_in_dim(x, part, index * size, axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(static, hidden, head, targets, weights, scale, probe):
    del probe
    operands = _cast_operands(static, hidden, head, scale)
    batch, length = targets.shape
    count = chunk_count(batch, length, head.shape[1], row_multiple=ALIGNMENT)
    q_hidden = _rows_of(operands.hidden).reshape(hidden.shape)

    def add_chunk(sums, index):
        part, target, weight = (
            _part(x, index, length // count) for x in (q_hidden, targets, weights)
        )
        loss, nll, _ = token_losses(_chunk_logits(operands, part), target, weight, static.z_loss)
        return (sums[0] + loss, sums[1] + nll), None

    zero = jnp.zeros((), jnp.float32)
    return lax.scan(add_chunk, (zero, zero), jnp.arange(count))[0]


class _Carry(NamedTuple):
    """What the loop over the chunks fills."""

    loss: jax.Array
    nll: jax.Array
    dhidden: jax.Array  # [B, T, D]
    q_dlogits: jax.Array  # [B, T, V], 8 bits


def _cross_entropy_fwd(static, hidden, head, targets, weights, scale, probe):
    del probe  # only its cotangent matters
    operands = _cast_operands(static, hidden, head, scale)
    batch, length, vocab = *targets.shape, head.shape[1]
    count = chunk_count(batch, length, vocab, row_multiple=ALIGNMENT)
    size = length // count
    q_hidden = _rows_of(operands.hidden).reshape(hidden.shape)
    grad_scale = _gradient_scale(static.recipe, weights, scale[GRAD])
    # With the scale given, XLA casts dlogits as it computes them: no kernel could read less.
    given = dataclasses.replace(
        static.recipe, name="delayed", calibration="explicit", quantize_implementation="xla"
    )

    def add_chunk(carry: _Carry, index: jax.Array):
        part, target, weight = (_part(x, index, size) for x in (q_hidden, targets, weights))
        logits = _chunk_logits(operands, part)
        loss, nll, dlogits = token_losses(logits, target, weight, static.z_loss)
        with jax.named_scope("head/fp8_dot/quantize_grad"):
            grad = cast(dlogits.reshape(-1, vocab), grad_scale, GRAD, given)
        with jax.named_scope("head/fp8_dot/dgrad"):
            assert operands.head.rows is not None
            dhidden = dgrad_gemm(grad, operands.head.rows, operands.head.scale, hidden.dtype)
        assert grad.rows is not None
        new = _Carry(
            loss=carry.loss + loss,
            nll=carry.nll + nll,
            dhidden=_write(carry.dhidden, dhidden, index, size),
            q_dlogits=_write(carry.q_dlogits, grad.rows, index, size),
        )
        return new, grad.seen

    carry = _Carry(
        loss=jnp.zeros((), jnp.float32),
        nll=jnp.zeros((), jnp.float32),
        dhidden=jnp.zeros_like(hidden),
        q_dlogits=jnp.zeros((batch, length, vocab), static.recipe.formats[GRAD].dtype),
    )
    carry, seen = lax.scan(add_chunk, carry, jnp.arange(count))
    grad = Cast(carry.q_dlogits.reshape(-1, vocab), None, grad_scale, _combine(seen))
    dhead = _head_gradient(static, operands.hidden, grad, head.dtype)
    counted = (
        sampled_elements(batch * length, hidden.shape[2]),
        sampled_elements(*head.shape),
        count * sampled_elements(batch * size, vocab),
    )
    seen = jnp.stack([operands.hidden.seen, operands.head.seen, grad.seen])
    observation = observe(seen, counted, static.recipe.formats)
    return (carry.loss, carry.nll), (carry.dhidden, dhead, observation)


def _cross_entropy_bwd(static, residuals, cotangents):
    del static
    dhidden, dhead, observation = residuals
    factor = cotangents[0]
    dhidden = (dhidden * factor).astype(dhidden.dtype)
    return dhidden, dhead * factor, None, None, None, observation


_cross_entropy.defvjp(_cross_entropy_fwd, _cross_entropy_bwd)


def _gradient_scale(recipe: Recipe, weights: jax.Array, scale: jax.Array) -> jax.Array:
    """The scale of dlogits, of which none is larger than the largest weight (but for z_loss)."""
    if recipe.name != "current" and recipe.calibration == "explicit":
        return scale
    bits = lax.bitcast_convert_type(jnp.abs(weights).max(), jnp.int32)
    bound = current_scale(bits, recipe.formats[GRAD])
    return bound if recipe.name == "current" else jnp.where(jnp.isnan(scale), bound, scale)


def _head_gradient(static: _Static, hidden: Cast, grad: Cast, dtype: np.dtype) -> jax.Array:
    """hidden^T . dlogits, `[D, V]` in `dtype`."""
    q_hidden = hidden.rows
    if hidden.columns is not None:
        assert grad.rows is not None
        q_hidden, grad = hidden.columns, grad._replace(columns=grad.rows.T)
    assert q_hidden is not None
    with jax.named_scope("head/fp8_dot/wgrad"):
        dhead = wgrad_gemm(q_hidden, hidden.scale, grad, wgrad_dtype(static.recipe, dtype))
    return dhead.astype(dtype)


def _combine(seen: jax.Array) -> jax.Array:
    """`jfp8.quantize.statistics` of a tensor from its chunks', int32 [chunks, GROUPS, 3]."""
    return jnp.concatenate([seen[..., :1].max(axis=0), seen[..., 1:].sum(axis=0)], axis=-1)

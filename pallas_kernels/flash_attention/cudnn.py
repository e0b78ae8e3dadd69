"""Attention by cuDNN's fused kernels, through JAX's own bindings.

`jax.nn.dot_product_attention` rounds the log-sum-exp to bfloat16 and drops its gradient, so this
module calls the layer below it (`jax._src.cudnn`, pinned with JAX) and adds what is missing:
the gradient of the log-sum-exp, and packed documents (as an additive mask of B * T * S 16-bit
numbers).
"""

# Shapes: B batch, T query, S key, N query heads, K key/value heads, H head dim.

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from pallas_kernels import hardware
from pallas_kernels.flash_attention.config import RESIDUAL_NAMES, AttentionSpec
from pallas_kernels.flash_attention.masks import dense_mask

SUPPORTED_DTYPES = ("bfloat16", "float16")
MAX_HEAD_DIM = 256
HEAD_DIM_MULTIPLE = 8
# Stands in for the installed version when lowering without a GPU.
_ASSUMED_CUDNN_VERSION = 91000

Attention = Callable[[Array, Array, Array], tuple[Array, Array]]


def unsupported_reason(spec: AttentionSpec) -> str | None:
    """Returns why cuDNN cannot run `spec` on the default device, or None if it can."""
    is_gpu, found = hardware.require_gpu((9, 0))
    rules = (
        (is_gpu, f"cuDNN attention needs a Hopper GPU, but {found}; use implementation='xla'"),
        (
            spec.precision == "bf16",
            f"precision={spec.precision!r} is not wired to cuDNN; use precision='bf16'",
        ),
        (
            not spec.deterministic,
            "cuDNN's backward adds in any order; deterministic=True needs implementation='mosaic'"
            " or 'xla'",
        ),
        (
            spec.dtype in SUPPORTED_DTYPES,
            f"q.dtype={spec.dtype} is not one of {SUPPORTED_DTYPES}; cast q, k and v",
        ),
        (
            spec.head_dim <= MAX_HEAD_DIM and spec.head_dim % HEAD_DIM_MULTIPLE == 0,
            f"q.shape[3]={spec.head_dim} must be a multiple of {HEAD_DIM_MULTIPLE} and at most"
            f" {MAX_HEAD_DIM}; pad the head dim or use implementation='xla'",
        ),
        (
            spec.band.right in (None, 0)
            and not (spec.band.left is not None and spec.band.right is None),
            f"cuDNN has a window on the left of a causal mask only, not {spec.band};"
            " set is_causal=True or use implementation='xla'",
        ),
        (
            not spec.band.has_empty_row(spec.query_length, spec.key_length),
            f"{spec.band} leaves queries without a key (T={spec.query_length},"
            f" S={spec.key_length}), for which cuDNN defines no result; use implementation='xla'",
        ),
        (
            not spec.has_segments or spec.query_length % 2 == spec.key_length % 2 == 0,
            f"T={spec.query_length} and S={spec.key_length} must be even for cuDNN with segment"
            " ids; pad them or use implementation='xla'",
        ),
    )
    return next((reason for holds, reason in rules if not holds), None)


def attention(
    q: Array,
    k: Array,
    v: Array,
    q_segment_ids: Array | None,
    kv_segment_ids: Array | None,
    spec: AttentionSpec,
) -> tuple[Array, Array | None]:
    """Computes out, and lse `[B, T, N]` if `spec.return_lse`; differentiable in both."""
    bias = sees_a_key = None
    if q_segment_ids is not None and kv_segment_ids is not None:
        bias, sees_a_key = _segment_bias(q_segment_ids, kv_segment_ids, spec)

    if spec.return_lse:

        def run(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
            out, lse = _attend(q, k, v, bias, spec)
            return out, lse.transpose(0, 2, 1)

        out, lse = add_lse_gradient(run, spec.softmax_scale)(q, k, v)
    else:
        out, lse = _attend(q, k, v, bias, spec)
    if sees_a_key is not None:
        # cuDNN averages all values where every key is masked.
        out = jnp.where(sees_a_key[..., None, None], out, 0)
        lse = None if lse is None else jnp.where(sees_a_key[..., None], lse, -jnp.inf)
    return out, lse


def add_lse_gradient(attention: Attention, softmax_scale: float) -> Attention:
    """Makes the log-sum-exp of `attention` differentiable, by two more calls of it where that
    gradient is used.

    With P the probabilities, d lse = P d(softmax_scale * q k^T). So dq gains softmax_scale * dlse *
    (P k), which is attention with k in the place of v, and dk gains P^T (softmax_scale * dlse * q),
    that call's gradient of v.

    Args:
      attention: maps q, k, v to `(out, lse)`; its own gradient takes no notice of lse. lse is `[B,
        T, N]`.
      softmax_scale: factor on the logits.
    """

    @jax.custom_vjp
    def run(q, k, v):
        return attention(q, k, v)

    def forward(q, k, v):
        q, k, v = (x.value for x in (q, k, v))
        outputs, vjp = jax.vjp(attention, q, k, v)
        return outputs, (vjp, q, k)

    def backward(residuals, gradients):
        vjp, q, k = residuals
        dout, dlse = (_instantiate(g) for g in gradients)
        dq, dk, dv = vjp((dout, jnp.zeros_like(dlse)))
        if isinstance(gradients[1], SymbolicZero):
            return dq, dk, dv
        weight = softmax_scale * dlse[..., None]
        p_k, vjp_of_v = jax.vjp(lambda values: attention(q, k, values)[0], k)
        (p_q,) = vjp_of_v((weight * q).astype(q.dtype))
        return (dq + weight * p_k).astype(q.dtype), dk + p_q, dv

    run.defvjp(forward, backward, symbolic_zeros=True)
    return run


def _instantiate(gradient: Array | SymbolicZero) -> Array:
    """Turns the marker of an unused output into zeros."""
    if isinstance(gradient, SymbolicZero):
        aval = gradient.aval
        assert isinstance(aval, jax.core.ShapedArray), f"an array has no aval {aval}"
        return jnp.zeros(aval.shape, aval.dtype)
    return gradient


def _segment_bias(
    q_segment_ids: Array, kv_segment_ids: Array, spec: AttentionSpec
) -> tuple[Array, Array]:
    """Returns the additive mask `[B, 1, T, S]`, and which queries see a key at all, `[B, T]`."""
    q_positions = jnp.arange(spec.query_length, dtype=jnp.int32)
    kv_positions = jnp.arange(spec.key_length, dtype=jnp.int32)
    mask = dense_mask(spec.band, q_positions, kv_positions, q_segment_ids, kv_segment_ids)
    assert mask is not None, "segment ids always make a mask"
    dtype = jnp.dtype(spec.dtype)
    bias = jnp.where(mask[:, None], jnp.zeros((), dtype), cudnn.get_large_negative_number(dtype))
    return bias, mask.any(axis=-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(
    q: Array, k: Array, v: Array, bias: Array | None, spec: AttentionSpec
) -> tuple[Array, Array | None]:
    """Returns out, and lse `[B, N, T]` if `spec.return_lse`.

    JAX's binding has a gradient already, but one whose residuals have no names: rematerialised, it
    runs the forward kernel again for the log-sum-exp, whatever the policy saves.
    """
    if spec.return_lse:
        return cudnn._dot_product_attention(*_operands(q, k, v, bias), *_options(bias, spec, True))
    out = cudnn._dot_product_attention(*_operands(q, k, v, bias), *_options(bias, spec, False))
    return out, None


def _attend_fwd(q, k, v, bias, spec):
    arguments = (*_operands(q, k, v, bias), *_options(bias, spec, True))
    outputs, _ = cudnn._dot_product_attention_fwd_rule(*arguments)
    out, lse = map(checkpoint_name, outputs, RESIDUAL_NAMES)
    return (out, lse if spec.return_lse else None), (q, k, v, bias, out, lse)


def _attend_bwd(spec, residuals, gradients):
    q, k, v, bias, out, lse = residuals
    saved = (*_operands(q, k, v, bias), lse, out)
    arguments = (*_options(bias, spec, True), saved, (gradients[0], None))
    dq, dk, dv, *_ = cudnn._dot_product_attention_bwd_rule(*arguments)
    return dq, dk, dv, None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _operands(q: Array, k: Array, v: Array, bias: Array | None) -> tuple[Array, ...]:
    """The arrays of JAX's binding."""
    unused = jnp.zeros(0, q.dtype)
    # After the bias: sequence lengths, offsets and page tables of other features.
    return q, k, v, unused if bias is None else bias, *(unused,) * 6


def _options(bias: Array | None, spec: AttentionSpec, return_lse: bool) -> tuple[Any, ...]:
    """The static arguments of JAX's binding."""
    return (
        spec.softmax_scale,
        0,  # dropout seed
        0.0,  # dropout rate
        (bias is not None, False),  # has a bias, wants its gradient
        cudnn.MaskType.CAUSAL if spec.band.right == 0 else cudnn.MaskType.NO_MASK,
        cudnn.AttentionLayout.BTNH.value,
        # cuDNN counts the query itself: it sees keys in (t - length, t].
        None if spec.band.left is None else spec.band.left + 1,
        _cudnn_version(),
        return_lse,
    )


def _cudnn_version() -> int:
    """Version of the installed cuDNN, as 90100 for 9.1.0."""
    if hardware.is_device_assumed():
        return _ASSUMED_CUDNN_VERSION
    return cudnn.check_cudnn_version()

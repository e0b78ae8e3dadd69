"""Rotary positions (Su et al. 2021, arXiv:2104.09864) on the heads of a fused QKV projection.

The two halves of a head are the coordinates (a, b) of its H / 2 planes, the layout of Llama's
published Hugging Face weights: R (a, b) = (a cos - b sin, b cos + a sin), in float32.
"""

# Shapes: B batch, T tokens, N query heads, K key/value heads, g = N / K, H head dim, M = B T.

import functools

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.fused import sm90_rope
from pallas_kernels.interpreter import is_interpreting
from pallas_kernels.quantize.contract import Implementation, device_reason, uses_mosaic
from pallas_kernels.quantize.partition import per_device


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotates the heads of `x`.

    Args:
      x: `[B, T, N, H]`, bfloat16 or float32.
      cos: of the angles, float32 `[B, T, 1, H / 2]`.
      sin: like cos.

    Returns: `[B, T, N, H]` in the dtype of x.
    """
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate((a * cos - b * sin, b * cos + a * sin), axis=-1).astype(x.dtype)


def split_heads(qkv: Array, num_kv_heads: int, head_dim: int) -> tuple[Array, Array, Array]:
    """q `[B, T, N, H]`, k and v `[B, T, K, H]` of a projection, `[B, T, K (g + 2) H]`."""
    batch, length, _ = qkv.shape
    qkv = qkv.reshape(batch, length, num_kv_heads, -1, head_dim)
    group = qkv.shape[3] - 2
    # `split`, and not slices: its gradient is one concatenation, not a sum of padded arrays.
    q, k, v = jnp.split(qkv, [group, group + 1], axis=3)
    return q.reshape(batch, length, -1, head_dim), k[:, :, :, 0], v[:, :, :, 0]


def rope_qkv(
    qkv: Array,
    cos: Array,
    sin: Array,
    *,
    num_kv_heads: int,
    head_dim: int,
    implementation: Implementation | None = None,
) -> tuple[Array, Array, Array]:
    """Splits a fused QKV projection into heads and rotates those of q and k; differentiable.

    Args:
      qkv: `[B, T, K (g + 2) H]`, bfloat16 or float16 (float32 too with "xla"): for each key/value
        head its g query heads, the key and the value.
      cos: float32 `[B, T, 1, H / 2]`; constants, no gradient flows to them.
      sin: like cos.
      num_kv_heads: K.
      head_dim: H.
      implementation: of the gradient; the forward pass, which XLA does at memory speed, is always
        XLA's. "mosaic" needs a Hopper GPU, H of 64 or 128, and B T a multiple of 64. None as in
        `pallas_kernels.quantize`.

    Returns: q `[B, T, N, H]`, k and v `[B, T, K, H]` in the dtype of qkv.

    Raises:
      ValueError: if an argument has the wrong shape or value.
      NotImplementedError: if `implementation` cannot run this call on this device; says why.
    """
    check(qkv, cos, sin, num_kv_heads, head_dim)
    heads = dict(num_kv_heads=num_kv_heads, head_dim=head_dim)
    if uses_mosaic(implementation, functools.partial(unsupported_reason, qkv, **heads)):
        return _rope_mosaic(qkv, cos, sin, num_kv_heads, head_dim)
    return _rope_xla(qkv, cos, sin, num_kv_heads, head_dim)


def check(qkv: Array, cos: Array, sin: Array, num_kv_heads: int, head_dim: int) -> None:
    """Raises ValueError if the shapes do not fit."""
    batch, length, width = qkv.shape
    if width % (num_kv_heads * head_dim) or width < 3 * num_kv_heads * head_dim:
        raise ValueError(
            f"qkv.shape[2]={width} must be num_kv_heads * (g + 2) * head_dim, with g >= 1, for"
            f" {num_kv_heads=} and {head_dim=}"
        )
    if cos.shape != (batch, length, 1, head_dim // 2) or sin.shape != cos.shape:
        raise ValueError(
            f"cos.shape={cos.shape} and sin.shape={sin.shape} must be"
            f" {(batch, length, 1, head_dim // 2)} for qkv.shape={qkv.shape} and {head_dim=}"
        )


def unsupported_reason(
    qkv: Array | jax.ShapeDtypeStruct, *, num_kv_heads: int, head_dim: int
) -> str | None:
    """Why "mosaic" cannot run the gradient of `rope_qkv` on qkv, one device's part with as many
    key/value heads, on the default device; None if it can.
    """
    batch, length, width = qkv.shape
    plan = sm90_rope.RopePlan(
        tokens=batch * length,
        num_kv_heads=num_kv_heads,
        group=width // (num_kv_heads * head_dim) - 2,
        head_dim=head_dim,
        dtype=qkv.dtype,
    )
    return device_reason() or sm90_rope.unsupported_reason(plan)


def _rope_xla(qkv: Array, cos: Array, sin: Array, num_kv_heads: int, head_dim: int):
    q, k, v = split_heads(qkv, num_kv_heads, head_dim)
    return rotate(q, cos, sin), rotate(k, cos, sin), v


_rope_mosaic = jax.custom_vjp(_rope_xla, nondiff_argnums=(3, 4))


def _rope_mosaic_fwd(qkv: Array, cos: Array, sin: Array, num_kv_heads: int, head_dim: int):
    return _rope_xla(qkv, cos, sin, num_kv_heads, head_dim), (cos, sin)


def _rope_mosaic_bwd(num_kv_heads: int, head_dim: int, angles, grads):
    del num_kv_heads
    batch, length, *_ = grads[0].shape
    rows = [x.reshape(batch * length, -1) for x in (*grads, *angles)]
    group = rows[0].shape[1] // rows[1].shape[1]
    (dqkv,) = per_device(
        functools.partial(_launch, head_dim),
        rows,
        jnp.float32(1),
        ["rows"],
        widths=(group, 1, 1, None, None),
        result_width=group + 2,
    )
    return dqkv.reshape(batch, length, -1), None, None


_rope_mosaic.defvjp(_rope_mosaic_fwd, _rope_mosaic_bwd)


def _launch(
    head_dim: int, dq: Array, dk: Array, dv: Array, cos: Array, sin: Array, _: Array
) -> tuple[Array]:
    plan = sm90_rope.RopePlan(
        tokens=dq.shape[0],
        num_kv_heads=dk.shape[1] // head_dim,
        group=dq.shape[1] // dk.shape[1],
        head_dim=head_dim,
        dtype=dq.dtype,
        interpret=is_interpreting(),
    )
    reason = sm90_rope.unsupported_reason(plan)
    if reason is not None:
        raise NotImplementedError(f"implementation='mosaic' cannot run one device's part: {reason}")
    return (sm90_rope.launch(plan, dq, dk, dv, cos, sin),)

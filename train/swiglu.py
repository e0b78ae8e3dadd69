"""SwiGLU's activation, silu(gate) * up, on a fused gate/up projection (arXiv:2002.05202)."""

import jax
import jax.numpy as jnp


@jax.custom_vjp
def swiglu(pairs: jax.Array) -> jax.Array:
    """silu(gate) * up, computed in float32.

    The backward keeps `pairs` alone and computes the sigmoid again: left to itself, autodiff writes
    float32 copies of the hidden layer to memory. It returns both gradients in one array.

    Args:
      pairs: [..., F / g, 2, g], bfloat16 or float32: groups of g columns of gate, then of up.

    Returns: [..., F] in the dtype of `pairs`.
    """
    gate, up = _split(pairs)
    return _merge(jax.nn.sigmoid(gate) * gate * up, pairs)


def _swiglu_fwd(pairs: jax.Array) -> tuple[jax.Array, jax.Array]:
    return swiglu(pairs), pairs


def _swiglu_bwd(pairs: jax.Array, grad: jax.Array) -> tuple[jax.Array]:
    # Without the barrier XLA sees the forward's sigmoid in the backward's, and keeps it after all.
    pairs, grad = jax.lax.optimization_barrier((pairs, grad))
    gate, up = _split(pairs)
    grad = grad.reshape(gate.shape).astype(jnp.float32)
    sigmoid = jax.nn.sigmoid(gate)
    dgate = grad * up * sigmoid * (1 + gate * (1 - sigmoid))
    # The same sigmoid, written differently: what both halves of the concatenation share XLA writes
    # to memory first, and each half may as well compute its own.
    dup = grad * gate * (0.5 + 0.5 * jnp.tanh(0.5 * gate))
    return (jnp.concatenate([dgate, dup], axis=-2).astype(pairs.dtype),)


swiglu.defvjp(_swiglu_fwd, _swiglu_bwd)


def _split(pairs: jax.Array) -> list[jax.Array]:
    return [x.astype(jnp.float32) for x in jnp.split(pairs, 2, axis=-2)]


def _merge(hidden: jax.Array, pairs: jax.Array) -> jax.Array:
    return hidden.reshape(*pairs.shape[:-3], -1).astype(pairs.dtype)

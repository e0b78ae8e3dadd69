"""Cross-entropy over the vocabulary without ever holding all logits.

For each chunk of tokens: logits = hidden @ head, nll = logsumexp(logits) - logits[target]. Under
differentiation the chunk's gradient, (softmax(logits) - onehot(target)) * weight, is formed while
its logits are still there, so the backward needs neither the logits nor a second GEMM for them
(the idea of Liger-Kernel's fused linear cross-entropy, arXiv:2410.10989).

Shapes: B batch, T tokens, C tokens of a chunk, D hidden, V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp

_MAX_CHUNK_LOGITS = 1 << 27  # float32 logits of one chunk: 512 MiB


def cross_entropy(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    z_loss: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """Weighted sums of the loss over all tokens.

    Args:
      hidden: [B, T, D], bfloat16 or float32.
      head: float32 [D, V]; multiplied in the dtype of `hidden`, accumulated in float32.
      targets: int32 [B, T].
      weights: float32 [B, T]; constants, no gradient flows to them.
      z_loss: factor of logsumexp(logits)^2 in the first result (PaLM, arXiv:2204.02311).

    Returns: sum of weight * (nll + z_loss * logsumexp^2), differentiable, and the sum of weight *
      nll in nats, not differentiable; both float32 scalars.
    """
    total, nll = _cross_entropy(hidden, head, targets, weights, z_loss)
    return total, jax.lax.stop_gradient(nll)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _cross_entropy(hidden, head, targets, weights, z_loss):
    kernel = head.astype(hidden.dtype)

    def add_chunk(sums, chunk):
        loss, nll, _ = _chunk_loss(chunk, kernel, z_loss)
        return (sums[0] + loss, sums[1] + nll), None

    zero = jnp.zeros((), jnp.float32)
    return jax.lax.scan(add_chunk, (zero, zero), _chunks(hidden, targets, weights, head.shape[1]))[
        0
    ]


def _cross_entropy_fwd(hidden, head, targets, weights, z_loss):
    kernel = head.astype(hidden.dtype)

    def add_chunk(carry, chunk):
        loss_sum, nll_sum, dhead = carry
        loss, nll, dlogits = _chunk_loss(chunk, kernel, z_loss)
        with jax.named_scope("head"):
            dhidden = jnp.einsum("bcv,dv->bcd", dlogits, kernel)
            dhead = dhead + jnp.einsum(
                "bcd,bcv->dv", chunk[0], dlogits, preferred_element_type=jnp.float32
            )
        return (loss_sum + loss, nll_sum + nll, dhead), dhidden

    zero = jnp.zeros((), jnp.float32)
    carry = (zero, zero, jnp.zeros(head.shape, jnp.float32))
    (loss, nll, dhead), dhidden = jax.lax.scan(
        add_chunk, carry, _chunks(hidden, targets, weights, head.shape[1])
    )
    dhidden = jnp.moveaxis(dhidden, 0, 1).reshape(hidden.shape)
    return (loss, nll), (dhidden, dhead.astype(head.dtype))


def _cross_entropy_bwd(z_loss, residuals, cotangents):
    del z_loss
    dhidden, dhead = residuals
    factor = cotangents[0]
    return (dhidden * factor).astype(dhidden.dtype), dhead * factor, None, None


_cross_entropy.defvjp(_cross_entropy_fwd, _cross_entropy_bwd)


def _chunk_loss(chunk, kernel, z_loss):
    """Loss sum, nll sum and dlogits [B, C, V] (in the dtype of `hidden`) of one chunk [B, C]."""
    hidden, targets, weights = chunk
    with jax.named_scope("head"):
        logits = jnp.einsum("bcd,dv->bcv", hidden, kernel, preferred_element_type=jnp.float32)
    loss, nll, dlogits = token_losses(logits, targets, weights, z_loss)
    return loss, nll, dlogits.astype(hidden.dtype)


def token_losses(
    logits: jax.Array, targets: jax.Array, weights: jax.Array, z_loss: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Loss sum and nll sum, and the gradient of the former, of the tokens of a chunk.

    Args:
      logits: float32 [B, C, V].
      targets: int32 [B, C].
      weights: float32 [B, C].
      z_loss: as in `cross_entropy`.

    Returns: two float32 scalars, and dlogits float32 [B, C, V].
    """
    lse = jax.nn.logsumexp(logits, axis=-1)
    target_logit = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    nll = (lse - target_logit) * weights
    loss = nll + z_loss * jnp.square(lse) * weights
    softmax = jnp.exp(logits - lse[..., None])
    onehot = targets[..., None] == jnp.arange(logits.shape[-1])
    slope = (1 + 2 * z_loss * lse)[..., None] * softmax
    dlogits = jnp.where(onehot, slope - 1, slope) * weights[..., None]
    return loss.sum(), nll.sum(), dlogits


def chunk_count(batch: int, length: int, vocab_size: int, *, row_multiple: int = 1) -> int:
    """Into how many chunks each row of tokens is cut.

    Args:
      batch: B.
      length: T.
      vocab_size: V.
      row_multiple: that the tokens of a chunk, of all rows together, are a multiple of.
    """
    count = 1
    while (
        length % (2 * count) == 0
        and batch * length // (2 * count) % row_multiple == 0
        and batch * length // count * vocab_size > _MAX_CHUNK_LOGITS
    ):
        count *= 2
    return count


def _chunks(hidden, targets, weights, vocab_size):
    """Splits [B, T, ...] along T into [chunks, B, C, ...]: a sharded batch stays sharded."""
    batch, length = targets.shape
    count = chunk_count(batch, length, vocab_size)
    return tuple(
        jnp.moveaxis(x.reshape(batch, count, length // count, *x.shape[2:]), 1, 0)
        for x in (hidden, targets, weights)
    )

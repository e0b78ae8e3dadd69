"""Taps: what leaves a model about its own tensors, forward and backward.

What a tap sees rides the cotangent of a `Sink`, an array of zeros: the gradient of the loss with
respect to the sinks is the measurement, layer by layer, under `scan` and `jax.checkpoint` alike.
A model without taps has no trace of them. Unlike the FP8 state's observations these do not add up:
a tapped model is called once, with one microbatch.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

import jfp8
import jfp8.nnx
from jfp8.diagnostics import QUANTITIES, inspect_tensor
from jfp8.formats import Format

GEMM_TENSORS = ("input", "kernel", "output_grad")
ATTENTION_TENSORS = ("q", "k", "v", "output_grad")


class Sink(nnx.Variable[jax.Array]):
    """float32 `[tensors, quantities]`, zero; its cotangent is what was seen."""


class Taps(nnx.Module):
    """The sinks of one attention or FFN layer."""

    def __init__(self, recipe: jfp8.Recipe, gemms: tuple[str, ...], *, sees_attention: bool):
        self.recipe = recipe
        self.sinks = nnx.data(
            {name: Sink(_zeros(len(GEMM_TENSORS))) for name in gemms}
            | ({"attention": Sink(_zeros(len(ATTENTION_TENSORS)))} if sees_attention else {})
        )


def apply_linear(
    taps: Taps | None,
    name: str,
    layer: jfp8.nnx.Linear,
    x: jax.Array,
    x_cast: jfp8.CastInput | None = None,
) -> jax.Array:
    """`layer(x, x_cast)`; with taps, input, kernel and output gradient are seen.

    They are measured with the scales that the layer uses; a layer in bf16 as if it had the
    `current` recipe.
    """
    out = layer(x, x_cast)
    if taps is None:
        return out
    formats = layer.recipe.formats
    scales: list[jax.Array | None] = [None] * len(formats)
    if layer.recipe.name == "delayed" and layer.scaling is not None:
        scales = list(layer.scaling.get_value().scale)
    tensors = (x.astype(layer.dtype), layer.kernel.get_value())
    seen = jnp.stack(
        [
            inspect_tensor(jax.lax.stop_gradient(tensor), scale, format)
            for tensor, scale, format in zip(tensors, scales[:2], formats[:2], strict=True)
        ]
    )
    return _watch(formats[2], out, seen, scales[2], taps.sinks[name].get_value())


def see_attention(
    taps: Taps | None, q: jax.Array, k: jax.Array, v: jax.Array, out: jax.Array
) -> jax.Array:
    """`out`, the output of attention; with taps, q, k, v and its gradient are seen.

    They are measured as if each were cast with the scale of its own amax.
    """
    if taps is None:
        return out
    forward, _, backward = taps.recipe.formats
    tensors = [jax.lax.stop_gradient(x) for x in (q, k, v)]
    seen = jnp.stack([inspect_tensor(x, None, forward) for x in tensors])
    return _watch(backward, out, seen, None, taps.sinks["attention"].get_value())


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _watch(format: Format, out, seen, grad_scale, sink):
    """`out`; the cotangent of `sink` is `seen`, and below it what is seen of that of `out`."""
    del format, seen, grad_scale, sink
    return out


def _watch_fwd(format, out, seen, grad_scale, sink):
    del format, sink
    return out, (seen, grad_scale)


def _watch_bwd(format, residuals, grad):
    seen, grad_scale = residuals
    seen_grad = inspect_tensor(grad, grad_scale, format)
    return grad, None, None, jnp.concatenate([seen, seen_grad[None]])


_watch.defvjp(_watch_fwd, _watch_bwd)


def _zeros(tensors: int) -> jax.Array:
    return jnp.zeros((tensors, len(QUANTITIES)), jnp.float32)

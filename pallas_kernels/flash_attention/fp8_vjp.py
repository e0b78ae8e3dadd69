"""FP8 attention as one differentiable call; `fp8` has the maths, `Kernels` the work."""

# Shapes: B batch, T query, S key, N query heads, K key/value heads, H head dim.

import functools
from typing import Protocol

import jax
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.flash_attention.config import RESIDUAL_NAMES, AttentionSpec
from pallas_kernels.flash_attention.fp8 import Gradients, Inputs, Statistics, dot_with_mean
from pallas_kernels.flash_attention.fp8_quantize import add_mean, quantize_gradients
from pallas_kernels.numerics import LN2


class Kernels(Protocol):
    """An implementation of the kernels; a module has these as functions."""

    def quantize_inputs(self, q: Array, k: Array, v: Array, spec: AttentionSpec) -> Inputs:
        """Centres, rotates and rounds q, k and v."""
        ...

    def fp8_forward(
        self,
        inputs: Inputs,
        q_segment_ids: Array | None,
        kv_segment_ids: Array | None,
        spec: AttentionSpec,
    ) -> tuple[Array, Statistics]:
        """Returns out `[B, T, N, H]` in spec.dtype, and the statistics."""
        ...

    def fp8_backward(
        self,
        inputs: Inputs,
        gradients: Gradients,
        q_segment_ids: Array | None,
        kv_segment_ids: Array | None,
        spec: AttentionSpec,
    ) -> tuple[Array, Array, Array]:
        """Returns dq `[B, T, N, H]` without dlse m, and dk and dv `[B, S, K, H]`, in spec.dtype."""
        ...

    def bf16_backward(
        self,
        q: Array,
        k: Array,
        v: Array,
        q_segment_ids: Array | None,
        kv_segment_ids: Array | None,
        outputs: tuple[Array, Array],
        gradients: tuple[Array, Array],
        spec: AttentionSpec,
    ) -> tuple[Array, Array, Array]:
        """Returns dq, dk, dv from `(out, lse)`, lse `[B, T, N]`, and `(dout, dlse)`."""
        ...


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def attention(q, k, v, q_segment_ids, kv_segment_ids, spec: AttentionSpec, kernels: Kernels):
    """Computes `(out, lse)` like `flash_attention` with precision="fp8", by `kernels`."""
    return _attention_fwd(q, k, v, q_segment_ids, kv_segment_ids, spec, kernels)[0]


def _attention_fwd(q, k, v, q_segment_ids, kv_segment_ids, spec, kernels):
    inputs = kernels.quantize_inputs(q, k, v, spec)
    ids = q_segment_ids, kv_segment_ids
    out, statistics = named(*kernels.fp8_forward(inputs, *ids, spec))
    lse = statistics.lse2.transpose(0, 2, 1) * LN2
    if inputs.key_mean is not None:
        lse += spec.softmax_scale * dot_with_mean(q, inputs.key_mean)
    if spec.fp8.backward == "bf16":
        return (out, lse), (q, k, v, ids, out, lse)
    return (out, lse), (inputs._replace(v_columns=None), ids, out, statistics)


def named(out: Array, statistics: Statistics) -> tuple[Array, Statistics]:
    """The same, with the names by which a remat policy knows them."""
    out_name, lse_name = RESIDUAL_NAMES
    out = checkpoint_name(out, out_name)
    return out, Statistics(*(checkpoint_name(x, lse_name) for x in statistics))


def _attention_bwd(spec, kernels, residuals, cotangents):
    dout, dlse = cotangents
    if spec.fp8.backward == "bf16":
        q, k, v, ids, out, lse = residuals
        outputs = out, lse
        grads = kernels.bf16_backward(q, k, v, *ids, outputs, (dout, dlse), spec)
    else:
        inputs, ids, out, statistics = residuals
        gradients = quantize_gradients(inputs, statistics, out, dout, dlse, spec)
        dq, dk, dv = kernels.fp8_backward(inputs, gradients, *ids, spec)
        grads = add_mean(dq, inputs, gradients, dlse, spec), dk, dv
    return *grads, *map(no_gradient, ids)


def no_gradient(ids: Array | None) -> np.ndarray | None:
    """What a vjp returns for segment ids."""
    return None if ids is None else np.zeros(ids.shape, jax.dtypes.float0)


attention.defvjp(_attention_fwd, _attention_bwd)

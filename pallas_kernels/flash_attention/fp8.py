"""Attention with 8-bit factors: what is rounded where; every implementation follows this.

A tensor x is held as x ~= q * scale, q in float8 (E4M3 unless said otherwise) and scale a power of
two for each batch row and key/value head; the query heads of a group share theirs, so that dK and
dV of the group add up in one accumulator. A power of two changes no bit of the significand: finer
scales would only move the point where numbers underflow, 15 binades below the largest.

Inputs    k' = k - mean(k),  q8 ~ (q M) / sq,  k8 ~ (k' M) / sk,  v8 ~ v / sv;  M is a
  Hadamard matrix with random signs, M M^T = H.  c = softmax_scale / H * log2(e) * sq * sk
Forward, over blocks j of BLOCK_KV keys from the last to the first, x_ij = c q8_i . k8_j:
  u = max(u, rowmax_j(x)),  r_j = max(rowmax_j(x), u - MAX_RISE)   the block's own maximum
  P = exp2(x - r_j + P_BITS), rounded to E4M3 for P v8,   l += rowsum(P) before that rounding
  O and l are kept relative to r_j: * exp2(r_{j+1} - r_j) from one block to the next
  out = sv O / l,   lse2 = r + log2(l) - P_BITS,   lse = lse2 ln 2 + softmax_scale q . mean(k)
The block's own maximum lets P use the full range of E4M3 in every block, so that one key with a
huge logit (an attention sink) does not flush the others to zero.
Backward, all normalisers powers of two (integers E, R for each row, t for each head):
  E = floor(lse2 - u),  D = rowsum(dO8 * out) - dlse,  2^R >= (|dO| max_j |v_j| + |dlse|) 256 / 448
  P' = exp2(x - lse2 + E + P_BITS) in [0, 256],   dS' = P' (dO . v - D) 2^-R in [-448, 448] or so
  dV = 2^-P_BITS P'^T (dO 2^-E),   dK = softmax_scale 2^(t - P_BITS) dS'^T (q 2^(R - E - t))
  dQ = softmax_scale 2^(R - E - P_BITS) dS' k
  with P', dS', dO, dO 2^-E and q 2^(R - E - t) rounded to 8 bits; their bounds are known ahead
  dq = dQ M^T + softmax_scale dlse mean(k),   dk = dK M^T;  D contains dlse already

A NaN or infinity in q, k or v makes NaN of everything that shares its scale, masked or not.
(Hadamard: Tseng et al. 2024, arXiv:2402.04396; key mean: Zhang et al. 2024, arXiv:2410.02367.)
"""

# Shapes: B batch, T query, S key, N query heads, K key/value heads, G = N // K, H head dim.

import functools
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.flash_attention.config import RESIDUAL_NAMES, AttentionSpec
from pallas_kernels.numerics import E4M3_MAX, E5M2_MAX, LN2, LOG2E

E4M3 = jnp.float8_e4m3fn
E5M2 = jnp.float8_e5m2
BLOCK_KV = 128
"""Keys that share a reference maximum."""
P_BITS = 8
"""Probabilities are scaled by 2**P_BITS, to just below the largest E4M3 number."""
MAX_RISE = 40.0
"""Bits by which a block's reference maximum may lie below the running one: bounds the sums."""
NO_ROW = 1e30
"""Stands for lse2 of a row that sees no key: exp2(x - NO_ROW) is 0."""

_F32 = jnp.float32
_FORMATS = {"e4m3": (E4M3, E4M3_MAX), "e5m2": (E5M2, E5M2_MAX)}


class Inputs(NamedTuple):
    """q, k and v in 8 bits, with what belongs to them."""

    q: Array  # [B, T, N, H], E4M3: q M / q_scale
    k: Array  # [B, S, K, H], E4M3: (k - mean) M / k_scale
    v: Array  # [B, S, K, H], E4M3
    q_scale: Array  # [B, K], float32, powers of two
    k_scale: Array  # [B, K]
    v_scale: Array  # [B, K]
    v_norm: Array  # [B, K], float32: largest Euclidean length of a row of v
    key_mean: Array | None  # [B, K, H], float32


class Statistics(NamedTuple):
    """The forward's softmax, base 2, of the logits that it computed."""

    lse2: Array  # [B, N, T], float32: log2 of the sum of exp2(x)
    row_max: Array  # [B, N, T], float32: u, the largest x


class Source(NamedTuple):
    """What the 8-bit query side of the backward is made of, for who makes it in one pass."""

    dout: Array  # [B, T, N, H], spec.dtype
    dout_inverse: Array  # [B, N], float32: Gradients.dout is dout times this
    dout_factor: Array  # [B, N, T], float32: Gradients.dout_rows is dout times this
    q_factor: Array  # [B, N, T], float32: Gradients.q_rows is Inputs.q times this


class Gradients(NamedTuple):
    """What the backward kernels multiply, beside `Inputs`."""

    dout: Array  # [B, T, N, H], 8 bits: dO / its scale
    dout_rows: Array  # [B, T, N, H], 8 bits: dO 2^-E / dv_factor
    q_rows: Array  # [B, T, N, H], E4M3: q 2^(R - E - t)
    offset: Array  # [B, N, T], float32: lse2 - E - P_BITS, so that P' = exp2(x - offset)
    slope: Array  # [B, N, T], float32: dS' = P' (slope (dout . v) - delta)
    delta: Array  # [B, N, T], float32
    dq_factor: Array  # [B, N, T], float32: the sums times these are dQ, dK, dV
    dk_factor: Array  # [B, K], float32
    dv_factor: Array  # [B, K], float32
    source: Source


class Kernels(Protocol):
    """An implementation of the products; a module has these as functions."""

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
        """Returns the sums for dQ `[B, T, N, H]`, dK and dV `[B, S, K, H]`, float32."""
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
    inputs = quantize_inputs(q, k, v, spec)
    out, statistics = kernels.fp8_forward(inputs, q_segment_ids, kv_segment_ids, spec)
    out_name, lse_name = RESIDUAL_NAMES
    out = checkpoint_name(out, out_name)
    statistics = Statistics(*(checkpoint_name(x, lse_name) for x in statistics))
    lse = statistics.lse2.transpose(0, 2, 1) * LN2
    if inputs.key_mean is not None:
        lse += spec.softmax_scale * dot_with_mean(q, inputs.key_mean)
    ids = q_segment_ids, kv_segment_ids
    if spec.fp8.backward == "bf16":
        return (out, lse), (q, k, v, ids, out, lse)
    return (out, lse), (inputs, ids, out, statistics)


def _attention_bwd(spec, kernels, residuals, cotangents):
    dout, dlse = cotangents
    if spec.fp8.backward == "bf16":
        q, k, v, ids, out, lse = residuals
        outputs = out, lse
        grads = kernels.bf16_backward(q, k, v, *ids, outputs, (dout, dlse), spec)
    else:
        inputs, ids, out, statistics = residuals
        gradients = quantize_gradients(inputs, statistics, out, dout, dlse, spec)
        sums = kernels.fp8_backward(inputs, gradients, *ids, spec)
        grads = finish_gradients(sums, inputs, gradients, dlse, spec)
    no_gradient = (None if i is None else np.zeros(i.shape, jax.dtypes.float0) for i in ids)
    return *grads, *no_gradient


attention.defvjp(_attention_fwd, _attention_bwd)


def quantize_inputs(q: Array, k: Array, v: Array, spec: AttentionSpec) -> Inputs:
    """Centres, rotates and rounds q, k and v."""
    mean = None
    if spec.fp8.center_keys:
        mean = k.astype(_F32).mean(axis=1)
        k = (k.astype(_F32) - mean[:, None]).astype(k.dtype)
    if spec.fp8.rotate:
        q, k = rotate(q), rotate(k)
    q_scale = scale_of(head_amax(q, spec), E4M3_MAX)
    k_scale = scale_of(head_amax(k, spec), E4M3_MAX)
    v_scale = scale_of(head_amax(v, spec), E4M3_MAX)
    v_norm = jnp.sqrt(jnp.square(v.astype(_F32)).sum(axis=3)).max(axis=1)
    return Inputs(
        to_8_bits(q, rows_of(q_scale, q)),
        to_8_bits(k, rows_of(k_scale, k)),
        to_8_bits(v, rows_of(v_scale, v)),
        q_scale,
        k_scale,
        v_scale,
        v_norm,
        mean,
    )


def quantize_gradients(
    inputs: Inputs,
    statistics: Statistics,
    out: Array,
    dout: Array,
    dlse: Array,
    spec: AttentionSpec,
) -> Gradients:
    """Rounds the output's gradient and works out the backward's normalisers."""
    dtype, largest = _FORMATS[spec.fp8.gradient_format]
    wide = dout.astype(_F32)
    dlse = dlse.transpose(0, 2, 1)
    row_amax = jnp.abs(wide).max(axis=3).transpose(0, 2, 1)
    row_norm = jnp.sqrt(jnp.square(wide).sum(axis=3)).transpose(0, 2, 1)
    sees_a_key = statistics.lse2 > -jnp.inf
    lse2 = jnp.where(sees_a_key, statistics.lse2, 0.0)
    spread = jnp.floor(jnp.where(sees_a_key, lse2 - statistics.row_max, 0.0))
    to_heads = functools.partial(_to_query_heads, spec=spec)
    bound = row_norm * to_heads(inputs.v_norm) + jnp.abs(dlse)
    bound = jnp.where(sees_a_key, bound * (2.0**P_BITS / E4M3_MAX), 0.0)
    is_used = bound > 0.0
    reach = jnp.where(is_used, _ceil_log2(jnp.where(is_used, bound, 1.0)), 0.0)
    shift = jnp.where(is_used, reach - spread, -jnp.inf)
    top = _over_group(shift, spec)
    top = jnp.where(top == -jnp.inf, 0.0, top)
    dout_scale = scale_of(_over_group(row_amax, spec), largest)
    dv_scale = scale_of(_over_group(row_amax * jnp.exp2(-spread), spec), largest)
    scaled = wide / rows_of(dout_scale, dout)
    # From what the kernel multiplies, not from dout: where one key has all the weight, dO . v - D
    # is then 0, and not the rounding error of dO. A conversion to 8 bits and back would not do: XLA
    # may drop it. (Below the smallest normal number this keeps more bits than 8 have.)
    rounded = lax.reduce_precision(scaled, 8, jnp.finfo(dtype).nmant)
    products = (rounded * out.astype(_F32)).sum(axis=3).transpose(0, 2, 1)
    delta = products * to_heads(dout_scale) - dlse
    rows = lambda x: x.transpose(0, 2, 1)[..., None]  # noqa: E731
    q_factor = jnp.exp2(shift - to_heads(top))
    source = Source(
        dout, 1.0 / to_heads(dout_scale)[..., 0], jnp.exp2(-spread) / to_heads(dv_scale), q_factor
    )
    factor = logits_scale(spec) * 2.0**-P_BITS
    return Gradients(
        dout=to_8_bits(scaled, 1.0, dtype, largest),
        dout_rows=to_8_bits(
            wide * rows(jnp.exp2(-spread)), rows_of(dv_scale, dout), dtype, largest
        ),
        q_rows=to_8_bits(inputs.q.astype(_F32) * rows(q_factor), 1.0),
        offset=jnp.where(sees_a_key, lse2 - spread - P_BITS, NO_ROW),
        slope=to_heads(dout_scale * inputs.v_scale) * jnp.exp2(-reach),
        delta=delta * jnp.exp2(-reach),
        dq_factor=factor * to_heads(inputs.k_scale) * jnp.exp2(reach - spread),
        dk_factor=factor * inputs.q_scale * jnp.exp2(top),
        dv_factor=dv_scale * 2.0**-P_BITS,
        source=source,
    )


def finish_gradients(
    sums: tuple[Array, Array, Array],
    inputs: Inputs,
    gradients: Gradients,
    dlse: Array,
    spec: AttentionSpec,
) -> tuple[Array, Array, Array]:
    """Turns the sums of `Kernels.fp8_backward` into dq, dk and dv in spec.dtype."""
    dq = sums[0] * gradients.dq_factor.transpose(0, 2, 1)[..., None]
    dk = sums[1] * gradients.dk_factor[:, None, :, None]
    dv = sums[2] * gradients.dv_factor[:, None, :, None]
    if spec.fp8.rotate:
        dq, dk = (rotate(x.astype(spec.dtype), inverse=True).astype(_F32) for x in (dq, dk))
    if inputs.key_mean is not None:
        mean = jnp.repeat(inputs.key_mean, spec.num_heads // spec.num_kv_heads, axis=1)
        sees_a_key = (gradients.offset < NO_ROW).transpose(0, 2, 1)
        dlse = jnp.where(sees_a_key, dlse, 0.0)
        dq += spec.softmax_scale * dlse[..., None] * mean[:, None]
    return dq.astype(spec.dtype), dk.astype(spec.dtype), dv.astype(spec.dtype)


def logits_scale(spec: AttentionSpec) -> float:
    """The factor on the product of the rotated q and k: softmax_scale without M's own growth."""
    return spec.softmax_scale / (spec.head_dim if spec.fp8.rotate else 1)


def exponent_factor(inputs: Inputs, spec: AttentionSpec) -> Array:
    """c, `[B, K]`: exp2(c q8 . k8) is the exponential of the logit."""
    return (logits_scale(spec) * LOG2E) * inputs.q_scale * inputs.k_scale


def scale_of(amax: Array, largest: float) -> Array:
    """The smallest power of two with amax / scale <= largest; 1 for 0, NaN if not finite."""
    mantissa, exponent = jnp.frexp(amax.astype(_F32) / largest)
    exponent = jnp.where(mantissa == 0.5, exponent - 1, exponent)
    scale = jnp.ldexp(jnp.ones_like(mantissa), jnp.clip(exponent, -126, 127))
    scale = jnp.where(amax == 0.0, 1.0, scale)
    return jnp.where(jnp.isfinite(amax), scale, jnp.nan)


def to_8_bits(
    x: Array, scale: Array | float, dtype: jnp.dtype | type = E4M3, largest: float = E4M3_MAX
) -> Array:
    """Rounds x / scale to the nearest 8-bit number, ties to even; saturates."""
    scaled = x.astype(_F32) * (1.0 / scale)
    return jnp.clip(scaled, -largest, largest).astype(dtype)


def head_amax(x: Array, spec: AttentionSpec) -> Array:
    """Largest magnitude of `[B, length, N or K, H]` in each group of heads, `[B, K]`, float32."""
    grouped = x.reshape(*x.shape[:2], spec.num_kv_heads, -1)
    return jnp.abs(grouped).max(axis=(1, 3)).astype(_F32)


def rows_of(scale: Array, x: Array) -> Array:
    """Repeats `[B, K]` for the heads of x, `[B, length, N or K, H]`, to `[B, 1, N or K, 1]`."""
    return jnp.repeat(scale, x.shape[2] // scale.shape[1], axis=1)[:, None, :, None]


def dot_with_mean(q: Array, key_mean: Array) -> Array:
    """q . mean(k), `[B, T, N]`, float32."""
    mean = jnp.repeat(key_mean, q.shape[2] // key_mean.shape[1], axis=1)
    return jnp.einsum("btnh,bnh->btn", q.astype(_F32), mean, precision=lax.Precision.HIGHEST)


@functools.cache
def rotation(head_dim: int) -> np.ndarray:
    """M: Sylvester's Hadamard matrix with random row signs, `[H, H]`, entries +-1, M M^T = H.

    The signs are the same in every run.
    """
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < head_dim:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    assert len(matrix) == head_dim, f"{head_dim=} is no power of two"
    return np.sign(np.random.default_rng(0).random((head_dim, 1), np.float32) - 0.5) * matrix


def rotate(x: Array, *, inverse: bool = False) -> Array:
    """x M, or x M^T, of `[..., H]`, in x's dtype."""
    matrix = jnp.asarray(rotation(x.shape[-1]), x.dtype)
    return lax.dot_general(
        x,
        matrix,
        (((x.ndim - 1,), (1 if inverse else 0,)), ((), ())),
        precision=lax.Precision.HIGHEST if x.dtype == _F32 else None,
        preferred_element_type=x.dtype,
    )


def permute_16(x: Array, axis: int) -> Array:
    """Puts element 8a + 2t + b of every 16 at position 4t + 2a + b: the order in which the
    registers of an accumulator are the registers of an 8-bit operand.
    """
    axis %= x.ndim
    split = x.reshape(*x.shape[:axis], -1, 2, 4, 2, *x.shape[axis + 1 :])
    return jnp.swapaxes(split, axis + 1, axis + 2).reshape(x.shape)


def permute_28(x: Array, axis: int) -> Array:
    """Puts element 8a + g of every 16 at position 2g + a: the order in which pairs of rows 8 apart
    are stored as 16-bit units.
    """
    axis %= x.ndim
    split = x.reshape(*x.shape[:axis], -1, 2, 8, *x.shape[axis + 1 :])
    return jnp.swapaxes(split, axis + 1, axis + 2).reshape(x.shape)


def _to_query_heads(x: Array, spec: AttentionSpec) -> Array:
    """Repeats `[B, K]` to `[B, N, 1]`."""
    return jnp.repeat(x, spec.num_heads // spec.num_kv_heads, axis=1)[..., None]


def _over_group(x: Array, spec: AttentionSpec) -> Array:
    """Maximum of `[B, N, T]` over each group of heads, `[B, K]`."""
    return x.reshape(x.shape[0], spec.num_kv_heads, -1).max(axis=2)


def _ceil_log2(x: Array) -> Array:
    """ceil(log2 x) of positive numbers, exactly."""
    mantissa, exponent = jnp.frexp(x)
    return jnp.where(mantissa == 0.5, exponent - 1, exponent).astype(_F32)

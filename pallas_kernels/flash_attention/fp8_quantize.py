"""Quantisation of FP8 attention in plain JAX, on any device; the maths is `fp8`'s."""

# Shapes: B batch, T query, S key, N query heads, K key/value heads, H head dim.

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.flash_attention import fp8
from pallas_kernels.flash_attention.config import AttentionSpec
from pallas_kernels.numerics import E4M3_MAX, E5M2_MAX

_F32 = jnp.float32
_FORMATS = {"e4m3": (fp8.E4M3, E4M3_MAX), "e5m2": (fp8.E5M2, E5M2_MAX)}
_MEAN_KEYS = 512
"""Keys that the mean is taken of, at least."""


def quantize_inputs(q: Array, k: Array, v: Array, spec: AttentionSpec) -> fp8.Inputs:
    """Centres, rotates and rounds q, k and v."""
    mean = key_mean(k) if spec.fp8.center_keys else None
    plain_q, plain_k = q, k
    if mean is not None:
        k = (k.astype(_F32) - mean[:, None]).astype(k.dtype)
    if spec.fp8.rotate:
        q, k = fp8.rotate(q), fp8.rotate(k)
    (q_8, q_scale), (k_8, k_scale), (v_8, v_scale) = (quantize_blocks(x) for x in (q, k, v))
    v_norm = jnp.sqrt(jnp.square(v.astype(_F32)).sum(axis=3)).max(axis=1)
    inputs = fp8.Inputs(q_8, k_8, v_8, q_scale, k_scale, v_scale, v_norm, mean)
    return with_first_key(inputs, plain_q, plain_k, spec)


def with_first_key(inputs: fp8.Inputs, q: Array, k: Array, spec: AttentionSpec) -> fp8.Inputs:
    """Adds `first_key`, if the options ask for it."""
    if not spec.fp8.exact_first_key:
        return inputs
    key = to_query_heads(first_key_of(k, inputs.key_mean), spec)
    # As an elementwise product, because XLA fuses that with the conversion.
    products = (q.astype(_F32) * key[:, None]).sum(axis=3).transpose(0, 2, 1)
    gain = spec.head_dim if spec.fp8.rotate else 1
    return inputs._replace(first_key=products * (gain / first_key_scale(inputs, spec)))


def first_key_of(k: Array, mean: Array | None) -> Array:
    """k' of the first key, `[B, K, H]`, float32."""
    key = k[:, 0].astype(_F32)
    return key if mean is None else key - mean


def first_key_scale(inputs: fp8.Inputs, spec: AttentionSpec) -> Array:
    """sq sk of each query and the first key, `[B, N, T]`."""
    q_scale = fp8.rows_of(inputs.q_scale, spec.query_length)
    return q_scale * _to_query_heads(inputs.k_scale[:, :, 0], spec)


def key_mean(k: Array) -> Array:
    """m, `[B, K, H]`, float32: the mean of some keys, which are enough.

    The softmax is the same whatever is subtracted from all keys of a head, so m need not be exact.
    """
    return k[:, :: mean_stride(k.shape[1])].astype(_F32).mean(axis=1)


def mean_stride(key_length: int) -> int:
    """The mean is taken of one key in so many."""
    return max(1, key_length // _MEAN_KEYS)


def quantize_blocks(x: Array) -> tuple[Array, Array]:
    """Rounds `[B, L, heads, H]` to E4M3 with one scale for each block, `[B, heads, blocks]`."""
    amax = _amax(fp8.blocks_of(x), (2, 4)).swapaxes(1, 2)
    scale = fp8.scale_of(amax, E4M3_MAX, fp8.MIN_SCALE)
    return fp8.to_8_bits(x, fp8.heads_last(fp8.rows_of(scale, x.shape[1]))), scale


def _amax(x: Array, axis: int | tuple[int, ...]) -> Array:
    """Largest magnitude, float32; not finite if one is not (XLA's own maximum may lose a NaN)."""
    bits = lax.bitcast_convert_type(jnp.abs(x), jnp.uint16 if x.dtype.itemsize == 2 else jnp.uint32)
    return lax.bitcast_convert_type(bits.max(axis=axis), x.dtype).astype(_F32)


def quantize_gradients(
    inputs: fp8.Inputs,
    statistics: fp8.Statistics,
    out: Array,
    dout: Array,
    dlse: Array,
    spec: AttentionSpec,
) -> fp8.Gradients:
    """Rounds the output's gradient and works out the backward's normalisers."""
    dtype, largest = _FORMATS[spec.fp8.gradient_format]
    wide = dout.astype(_F32)
    dlse = dlse.transpose(0, 2, 1)
    # From what the kernel multiplies, not from dout: where one key has all the weight, dO . v - D
    # is then 0, and not the rounding error of dO. A conversion to 8 bits and back would not do: XLA
    # may drop it. (Below the smallest normal number this keeps more bits than 8 have.)
    rounded = lax.reduce_precision(wide, 8, jnp.finfo(dtype).nmant)
    products = (rounded * out.astype(_F32)).sum(axis=3).transpose(0, 2, 1)
    row_amax = _amax(dout, 3).transpose(0, 2, 1)
    row_norm = jnp.sqrt(jnp.square(wide).sum(axis=3)).transpose(0, 2, 1)

    sees_a_key = statistics.lse2 > -jnp.inf
    lse2 = jnp.where(sees_a_key, statistics.lse2, 0.0)
    spread = jnp.floor(jnp.where(sees_a_key, lse2 - statistics.row_max, 0.0))  # E
    v_norm = _to_query_heads(inputs.v_norm, spec)
    bound = (row_norm * v_norm + jnp.abs(dlse)) * (2.0**fp8.P_BITS / E4M3_MAX)
    bound = jnp.where(sees_a_key, bound, 0.0)
    is_used = bound > 0.0
    reach = jnp.where(is_used, fp8.ceil_log2(jnp.where(is_used, bound, 1.0)), 0.0)  # R
    # g: |dO| 2^-R is at most 448 / 256 / max |v|.
    has_values = inputs.v_norm > 0.0
    norm = jnp.where(has_values, inputs.v_norm, 1.0) * 2.0**fp8.P_BITS
    gain = fp8.pow2(-fp8.ceil_log2(1.0 / norm))

    q_scale = fp8.rows_of(inputs.q_scale, spec.query_length)
    shift = jnp.where(is_used, reach - spread + fp8.ceil_log2(q_scale), -jnp.inf)
    top = _over_group(shift, spec)  # t
    top = jnp.where(top == -jnp.inf, 0.0, top)
    smallest = 2.0**-100  # so that its inverse is finite
    dv_scale = fp8.scale_of(_over_group(row_amax * fp8.pow2(-spread), spec), largest, smallest)  # z
    k_top = inputs.k_scale.max(axis=2)
    source = fp8.Source(
        dout=dout,
        dout_factor=fp8.pow2(-reach) * _to_query_heads(gain, spec),
        dout_rows_factor=fp8.pow2(-spread) / _to_query_heads(dv_scale, spec),
        q_factor=fp8.pow2(shift - _to_query_heads(top, spec)),
        k_factor=fp8.rows_of(inputs.k_scale / k_top[..., None], spec.key_length),
    )

    def rows(x: Array, factor: Array, dtype=fp8.E4M3, largest=E4M3_MAX) -> Array:
        return fp8.to_8_bits(x.astype(_F32) * fp8.heads_last(factor), 1.0, dtype, largest)

    factor = fp8.logits_scale(spec) * 2.0**-fp8.P_BITS
    return fp8.Gradients(
        dout=rows(dout, source.dout_factor, dtype, largest),
        dout_rows=rows(dout, source.dout_rows_factor, dtype, largest),
        q_rows=rows(inputs.q, source.q_factor),
        k_rows=rows(inputs.k, source.k_factor),
        offset=jnp.where(sees_a_key, lse2 - spread - fp8.P_BITS, fp8.NO_ROW),
        delta=(products - dlse) * fp8.pow2(-reach),
        slope=inputs.v_scale / gain[..., None],
        dq_factor=factor * _to_query_heads(k_top, spec) * fp8.pow2(reach - spread),
        dk_factor=factor * fp8.pow2(top),
        dv_factor=dv_scale * 2.0**-fp8.P_BITS,
        source=source,
    )


def finish_dq(sums: Array, gradients: fp8.Gradients, spec: AttentionSpec) -> Array:
    """Turns the sums of dS' k' into dq without dlse m, in spec.dtype."""
    dq = (sums * fp8.heads_last(gradients.dq_factor)).astype(spec.dtype)
    return fp8.rotate(dq, inverse=True) if spec.fp8.rotate else dq


def add_mean(
    dq: Array, inputs: fp8.Inputs, gradients: fp8.Gradients, dlse: Array, spec: AttentionSpec
) -> Array:
    """Adds softmax_scale dlse m to dq; without log-sum-exp dlse is 0."""
    if inputs.key_mean is None or not spec.return_lse:
        return dq
    mean = jnp.repeat(inputs.key_mean, spec.num_heads // spec.num_kv_heads, axis=1)
    sees_a_key = (gradients.offset < fp8.NO_ROW).transpose(0, 2, 1)
    dlse = jnp.where(sees_a_key, dlse, 0.0)
    return (dq + spec.softmax_scale * dlse[..., None] * mean[:, None]).astype(spec.dtype)


def _to_query_heads(x: Array, spec: AttentionSpec) -> Array:
    """Repeats `[B, K]` to `[B, N, 1]`."""
    return to_query_heads(x, spec)[..., None]


def to_query_heads(x: Array, spec: AttentionSpec) -> Array:
    """Repeats `[B, K, ...]` to `[B, N, ...]`."""
    return jnp.repeat(x, spec.num_heads // spec.num_kv_heads, axis=1)


def _over_group(x: Array, spec: AttentionSpec) -> Array:
    """Maximum of `[B, N, T]` over each group of heads, `[B, K]`."""
    return x.reshape(x.shape[0], spec.num_kv_heads, -1).max(axis=2)

"""`rope_flash_attention`: FP8 self-attention straight from a fused QKV projection."""

# Shapes: B batch, T tokens, N query heads, K key/value heads, g = N / K, H head dim.

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.flash_attention import fp8_quantize, fp8_vjp, sm90_fp8, sm90_rope_fp8
from pallas_kernels.flash_attention.api import ArrayLike, flash_attention, plan_call
from pallas_kernels.flash_attention.config import AttentionSpec, Fp8Options
from pallas_kernels.fused import rope
from pallas_kernels.interpreter import is_interpreting
from pallas_kernels.quantize.contract import Implementation, uses_mosaic


class Options(NamedTuple):
    """Arguments of `rope_flash_attention` that say what is computed."""

    num_kv_heads: int
    head_dim: int
    is_causal: bool = False
    softmax_scale: float | None = None
    local_window_size: int | tuple[int, int] | None = None
    fp8_options: Fp8Options | None = None
    deterministic: bool | None = None

    def spec(self, qkv: ArrayLike, segment_ids: ArrayLike | None) -> AttentionSpec:
        """What attention computes of the heads of qkv."""
        batch, length, width = qkv.shape
        heads = width // self.head_dim
        shape = lambda n: jax.ShapeDtypeStruct((batch, length, n, self.head_dim), qkv.dtype)  # noqa: E731
        kv = shape(self.num_kv_heads)
        return plan_call(
            shape(heads - 2 * self.num_kv_heads),
            kv,
            kv,
            is_causal=self.is_causal,
            softmax_scale=self.softmax_scale,
            local_window_size=self.local_window_size,
            q_segment_ids=segment_ids,
            kv_segment_ids=segment_ids,
            precision="fp8",
            fp8_options=self.fp8_options or Fp8Options(quantize_implementation="mosaic"),
            implementation="xla",
            deterministic=self.deterministic,
            return_lse=False,
        )[0]


def rope_flash_attention(
    qkv: Array,
    cos: Array,
    sin: Array,
    *,
    num_kv_heads: int,
    head_dim: int,
    is_causal: bool = False,
    softmax_scale: float | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    segment_ids: Array | None = None,
    fp8_options: Fp8Options | None = None,
    implementation: Implementation | None = None,
    deterministic: bool | None = None,
) -> Array:
    """`flash_attention(*rope_qkv(qkv, cos, sin), precision="fp8")`; differentiable.

    "mosaic" never writes q, k and v in 16 bits: the kernels that quantise them read the projection
    and turn them in registers, rounded to 16 bits as `rope_qkv` does; so both agree to the last bit
    but where a sum of two products was rounded otherwise. The gradient, likewise, is written once.

    Args:
      qkv: `[B, T, K (g + 2) H]`, bfloat16 or float16 (float32 too with "xla"): for each key/value
        head its g query heads, the key and the value.
      cos: float32 `[B, T, 1, H / 2]`; constants, no gradient flows to them.
      sin: like cos.
      num_kv_heads: K.
      head_dim: H.
      is_causal: as in `flash_attention`, and so are `softmax_scale`, `local_window_size` and
        `deterministic`.
      softmax_scale: see is_causal.
      local_window_size: see is_causal.
      segment_ids: `[B, T]`, int32: number of the document of each token; or None.
      fp8_options: as in `flash_attention`; None for the defaults, with "mosaic" to quantise.
      implementation: "mosaic" runs as said above; it needs a Hopper GPU, H of 64 or 128, T a
        multiple of 16, and quantising by "mosaic" and a backward in "fp8" in fp8_options. "xla"
        runs `rope_qkv` and then `flash_attention`, both by XLA, on any device. None is "mosaic"
        where it can run and all the array is on one device, else the same two, each of which
        chooses for itself.
      deterministic: see is_causal.

    Returns:
      Output `[B, T, N, H]` in qkv's dtype.

    Raises:
      ValueError: if an argument has the wrong shape, dtype or value.
      NotImplementedError: if `implementation` cannot run this call on this device; says why.
    """
    rope.check(qkv, cos, sin, num_kv_heads, head_dim)
    options = Options(
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        is_causal=is_causal,
        softmax_scale=softmax_scale,
        local_window_size=local_window_size,
        fp8_options=fp8_options,
        deterministic=deterministic,
    )
    spec = options.spec(qkv, segment_ids)
    reason = functools.partial(sm90_rope_fp8.unsupported_reason, spec)
    if uses_mosaic(implementation, reason):
        return _attention(qkv, cos, sin, segment_ids, spec)
    heads = dict(num_kv_heads=num_kv_heads, head_dim=head_dim)
    return flash_attention(
        *rope.rope_qkv(qkv, cos, sin, **heads, implementation=implementation),
        is_causal=is_causal,
        softmax_scale=softmax_scale,
        local_window_size=local_window_size,
        q_segment_ids=segment_ids,
        kv_segment_ids=segment_ids,
        precision="fp8",
        fp8_options=fp8_options,
        implementation=implementation,
        deterministic=deterministic,
    )


def unsupported_reason(
    qkv: ArrayLike, segment_ids: ArrayLike | None, options: Options
) -> str | None:
    """Why "mosaic" cannot run `rope_flash_attention` on the default device; None if it can."""
    return sm90_rope_fp8.unsupported_reason(options.spec(qkv, segment_ids))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(qkv, cos, sin, segment_ids, spec: AttentionSpec):
    return _attention_fwd(qkv, cos, sin, segment_ids, spec)[0]


def _attention_fwd(qkv, cos, sin, segment_ids, spec):
    interpret = is_interpreting()
    inputs = sm90_rope_fp8.quantize_qkv(qkv, cos, sin, spec, interpret=interpret)
    ids = segment_ids, segment_ids
    outputs = sm90_fp8.fp8_forward(inputs, *ids, spec, interpret=interpret)
    out, statistics = fp8_vjp.named(*outputs)
    return out, (inputs._replace(v_columns=None), cos, sin, segment_ids, out, statistics)


def _attention_bwd(spec, residuals, dout):
    inputs, cos, sin, ids, out, statistics = residuals
    dlse = jnp.zeros(out.shape[:3], jnp.float32)  # there is no log-sum-exp
    gradients = fp8_quantize.quantize_gradients(inputs, statistics, out, dout, dlse, spec)
    interpret = is_interpreting()
    sums = sm90_fp8.backward_sums(inputs, gradients, ids, ids, spec, interpret=interpret)
    factor = gradients.dq_factor
    dqkv = sm90_rope_fp8.finish_dqkv(sums, factor, cos, sin, spec, interpret=interpret)
    return dqkv, None, None, fp8_vjp.no_gradient(ids)


_attention.defvjp(_attention_fwd, _attention_bwd)

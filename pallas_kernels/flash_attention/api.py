"""`flash_attention`: checks the arguments, picks an implementation, and calls it."""

# Shapes: B batch, T query, S key, N query heads, K key/value heads, H head dim.

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args, overload

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.flash_attention import cudnn, sm90, sm90_fp8, tuning, xla
from pallas_kernels.flash_attention.config import (
    AttentionSpec,
    Fp8Options,
    Implementation,
    Precision,
)
from pallas_kernels.flash_attention.masks import make_band

ArrayLike = Array | jax.ShapeDtypeStruct

_MODULES = {"cudnn": cudnn, "mosaic": sm90, "xla": xla}
# Tried in this order when the caller leaves the choice; xla runs everywhere.
_PREFERENCE: dict[Precision, tuple[Implementation, ...]] = {
    "bf16": ("cudnn", "mosaic", "xla"),
    "fp8": ("mosaic", "xla"),
}


class _Range(NamedTuple):
    """Calls in 16 bits for which Mosaic goes before cuDNN."""

    head_dims: tuple[int, ...]
    masks: tuple[str, ...]
    """Of `tuning.mask_kind`."""
    shortest: int
    """Queries and keys at least."""

    def holds(self, spec: AttentionSpec) -> bool:
        length = min(spec.query_length, spec.key_length)
        is_measured = spec.head_dim in self.head_dims and tuning.mask_kind(spec) in self.masks
        return is_measured and length >= self.shortest


# Measured on an H200 at head dim 128 and 16,384 tokens, Mosaic | cuDNN, in ms; what has not been
# measured is cuDNN's. benchmarks/results/attention_h200_2026-11-23b.json:
#                      causal 2x8192   32/8 heads     full 2x8192   causal 8x2048
#   forward            .82 | .96       1.69 | 1.97    1.72 | 1.76   .29 | .35
#   and backward       3.73 | 4.09     7.53 | 7.62    7.2 | 7.1     1.47 | 1.32
# and attention_forward_h200_2026-11-23.json: a window of 1024 in 8192 at 482 | 408 TFLOP/s.
_MOSAIC_FASTER_FORWARD = _Range((128,), ("causal", "full", "window"), shortest=2048)
_MOSAIC_FASTER_BOTH_WAYS = _Range((128,), ("causal",), shortest=8192)


class Choice(NamedTuple):
    """Which implementation a call uses."""

    implementation: Implementation
    """Its name."""
    reason: str
    """One sentence: why this one, and why not the ones before it."""
    without_gradient: Implementation
    """The implementation where the call is not differentiated."""


@overload
def flash_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    is_causal: bool = ...,
    softmax_scale: float | None = ...,
    local_window_size: int | tuple[int, int] | None = ...,
    q_segment_ids: Array | None = ...,
    kv_segment_ids: Array | None = ...,
    precision: Precision = ...,
    fp8_options: Fp8Options | None = ...,
    implementation: Implementation | None = ...,
    deterministic: bool | None = ...,
    return_lse: Literal[False] = ...,
) -> Array: ...


@overload
def flash_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    is_causal: bool = ...,
    softmax_scale: float | None = ...,
    local_window_size: int | tuple[int, int] | None = ...,
    q_segment_ids: Array | None = ...,
    kv_segment_ids: Array | None = ...,
    precision: Precision = ...,
    fp8_options: Fp8Options | None = ...,
    implementation: Implementation | None = ...,
    deterministic: bool | None = ...,
    return_lse: Literal[True],
) -> tuple[Array, Array]: ...


def flash_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    is_causal: bool = False,
    softmax_scale: float | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    q_segment_ids: Array | None = None,
    kv_segment_ids: Array | None = None,
    precision: Precision = "bf16",
    fp8_options: Fp8Options | None = None,
    implementation: Implementation | None = None,
    deterministic: bool | None = None,
    return_lse: bool = False,
) -> Array | tuple[Array, Array]:
    """Computes softmax(softmax_scale * q k^T + mask) v; differentiable.

    Each group of N / K query heads shares one key/value head (GQA; MQA for K = 1, MHA for K = N).
    Query t may see key s if s <= t (`is_causal`; positions count from the start, also for T != S),
    if t - left <= s <= t + right (`local_window_size`) and if their segment ids are equal; all
    three must hold. A query that sees no key gets output 0, log-sum-exp -inf and zero gradients.

    Args:
      q: `[B, T, N, H]`, bfloat16 or float16 (float32 too with "xla").
      k: `[B, S, K, H]`, same dtype; N is a multiple of K.
      v: like k.
      is_causal: no query sees a later key.
      softmax_scale: factor on the logits; 1 / sqrt(H) if None.
      local_window_size: `(left, right)` neighbours seen on each side, or one int for both, as in
        `jax.nn.dot_product_attention`.
      q_segment_ids: `[B, T]`, int32: number of the document each query belongs to. Given together
        with kv_segment_ids, or not at all.
      kv_segment_ids: `[B, S]`, int32.
      precision: "bf16" multiplies in q's dtype and accumulates in float32. "fp8" rounds all factors
        to 8 bits, in the backward too; `flash_attention.fp8` has the equations. "int8" is to come.
      fp8_options: what "fp8" leaves open; the defaults if None.
      implementation: "xla" runs on any device; memory is bounded by recomputing chunks. "cudnn"
        needs a Hopper GPU; segment ids cost it a mask of B * T * S 16-bit numbers. "mosaic" needs
        one too, and a head dim of 64, 128 or 256. None takes the one that was measured to be
        fastest for such a call, differentiated or not; see `flash_attention_choice`.
      deterministic: gradients are the same bit for bit on every run. None leaves it to the
        implementation: "xla" is deterministic then; "mosaic" and "cudnn" add to dq in any order, in
        float32. With True "mosaic" adds in a fixed order, which takes its backward about 35 %
        longer; "cudnn" refuses True.
      return_lse: return the log-sum-exp of the logits too.

    Returns:
      Output `[B, T, N, H]` in q's dtype; with `return_lse`, also the natural-log log-sum-exp `[B,
      T, N]`, float32.

    Raises:
      ValueError: if an argument has the wrong shape, dtype or value.
      NotImplementedError: if `implementation` cannot run this call on this device; says why.

    References: Dao 2023, arXiv:2307.08691; Shah et al. 2024, arXiv:2407.08608.
    """
    spec, choice = plan_call(
        q,
        k,
        v,
        is_causal=is_causal,
        softmax_scale=softmax_scale,
        local_window_size=local_window_size,
        q_segment_ids=q_segment_ids,
        kv_segment_ids=kv_segment_ids,
        precision=precision,
        fp8_options=fp8_options,
        implementation=implementation,
        deterministic=deterministic,
        return_lse=return_lse,
    )
    run = functools.partial(_run, spec, choice.implementation)
    if choice.without_gradient != choice.implementation:
        plain = functools.partial(_run, spec, choice.without_gradient)
        return _by_use(lambda *qkv: run(*qkv)[0], lambda *qkv: plain(*qkv)[0])(q, k, v)
    out, lse = run(q, k, v, q_segment_ids, kv_segment_ids)
    if not return_lse:
        return out
    assert lse is not None, f"{choice.implementation} returned no log-sum-exp"
    return out, lse


def _run(
    spec: AttentionSpec,
    implementation: Implementation,
    q: Array,
    k: Array,
    v: Array,
    q_segment_ids: Array | None = None,
    kv_segment_ids: Array | None = None,
) -> tuple[Array, Array | None]:
    """Returns out, and lse if the implementation has it or the spec asks for it."""
    return _module(spec, implementation).attention(q, k, v, q_segment_ids, kv_segment_ids, spec)


def _by_use(differentiated: Callable[..., Array], plain: Callable[..., Array]) -> Callable:
    """A function that is `differentiated` where its gradient is taken, `plain` elsewhere."""
    attend = jax.custom_vjp(plain)
    attend.defvjp(
        lambda *arrays: jax.vjp(differentiated, *arrays), lambda vjp, gradient: vjp(gradient)
    )
    return attend


def flash_attention_choice(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    is_causal: bool = False,
    softmax_scale: float | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    q_segment_ids: ArrayLike | None = None,
    kv_segment_ids: ArrayLike | None = None,
    precision: Precision = "bf16",
    fp8_options: Fp8Options | None = None,
    implementation: Implementation | None = None,
    deterministic: bool | None = None,
    return_lse: bool = False,
) -> Choice:
    """Tells which implementation `flash_attention` would use for the same arguments here, and why.

    Arrays may be `jax.ShapeDtypeStruct`. Raises what `flash_attention` would raise.
    """
    return plan_call(
        q,
        k,
        v,
        is_causal=is_causal,
        softmax_scale=softmax_scale,
        local_window_size=local_window_size,
        q_segment_ids=q_segment_ids,
        kv_segment_ids=kv_segment_ids,
        precision=precision,
        fp8_options=fp8_options,
        implementation=implementation,
        deterministic=deterministic,
        return_lse=return_lse,
    )[1]


def plan_call(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    is_causal: bool,
    softmax_scale: float | None,
    local_window_size: int | tuple[int, int] | None,
    q_segment_ids: ArrayLike | None,
    kv_segment_ids: ArrayLike | None,
    precision: Precision,
    fp8_options: Fp8Options | None,
    implementation: Implementation | None,
    deterministic: bool | None,
    return_lse: bool,
) -> tuple[AttentionSpec, Choice]:
    """Checks all arguments; returns what is to be computed and by whom."""
    _check_arrays(q, k, v)
    _check_segment_ids(q, k, q_segment_ids, kv_segment_ids)
    _check_option("precision", precision, get_args(Precision))
    _check_option("implementation", implementation, (*get_args(Implementation), None))
    _check_option("deterministic", deterministic, (True, False, None))
    if softmax_scale is None:
        softmax_scale = 1.0 / math.sqrt(q.shape[3])
    # A kernel folds the factor into its constants, so it cannot be a traced array.
    if not (isinstance(softmax_scale, int | float) and 0.0 < softmax_scale < math.inf):
        raise ValueError(
            f"softmax_scale={softmax_scale!r} must be a positive Python float;"
            " multiply q by anything else"
        )
    _check_fp8_options(q, precision, fp8_options)
    spec = AttentionSpec(
        batch_size=q.shape[0],
        query_length=q.shape[1],
        key_length=k.shape[1],
        num_heads=q.shape[2],
        num_kv_heads=k.shape[2],
        head_dim=q.shape[3],
        dtype=jnp.dtype(q.dtype).name,
        band=make_band(is_causal, local_window_size, q.shape[1], k.shape[1]),
        has_segments=q_segment_ids is not None,
        softmax_scale=float(softmax_scale),
        return_lse=return_lse,
        precision=precision,
        fp8=fp8_options or Fp8Options(),
        deterministic=deterministic,
    )
    return spec, _choose(spec, implementation)


def _choose(spec: AttentionSpec, implementation: Implementation | None) -> Choice:
    """Picks the implementation; raises if the one asked for, or every one, cannot run."""
    if spec.precision not in _PREFERENCE:
        raise NotImplementedError(
            f"precision={spec.precision!r} needs the {spec.precision} sm_90 kernels, which"
            " this version does not have; use precision='bf16' or 'fp8'"
        )
    if implementation is not None:
        reason = _unsupported_reason(spec, implementation)
        if reason is not None:
            raise NotImplementedError(f"implementation={implementation!r} cannot run: {reason}")
        return Choice(implementation, "asked for", implementation)
    best, reason = _first_supported(spec, is_mosaic_first=_MOSAIC_FASTER_BOTH_WAYS.holds(spec))
    forward_only = best
    # Two implementations of one call would each have to answer for the gradient of lse.
    if not spec.return_lse:
        is_mosaic_first = _MOSAIC_FASTER_FORWARD.holds(spec)
        forward_only, _ = _first_supported(spec, is_mosaic_first=is_mosaic_first)
    return Choice(best, reason, forward_only)


def _first_supported(spec: AttentionSpec, *, is_mosaic_first: bool) -> tuple[Implementation, str]:
    """The implementation to take, and why."""
    candidates = _PREFERENCE[spec.precision]
    if is_mosaic_first:
        candidates = ("mosaic", *(x for x in candidates if x != "mosaic"))
    rejected = []
    for candidate in candidates:
        reason = _unsupported_reason(spec, candidate)
        if reason is None:
            return candidate, "; ".join(rejected) or "the fastest here"
        rejected.append(f"not {candidate}: {reason}")
    raise NotImplementedError("; ".join(rejected))


def _unsupported_reason(spec: AttentionSpec, implementation: Implementation) -> str | None:
    """Why `implementation` cannot run `spec` here; None if it can."""
    return _module(spec, implementation).unsupported_reason(spec)


def _module(spec: AttentionSpec, implementation: Implementation) -> Any:
    """The module that implements `spec`."""
    if implementation == "mosaic" and spec.precision == "fp8":
        return sm90_fp8
    return _MODULES[implementation]


def _check_fp8_options(q: ArrayLike, precision: Precision, options: Fp8Options | None) -> None:
    """Raises ValueError if the options do not fit the call."""
    if options is not None and precision != "fp8":
        raise ValueError(f"{precision=} takes no fp8_options; use precision='fp8' or drop them")
    head_dim = q.shape[3]
    if precision == "fp8" and (options or Fp8Options()).rotate and head_dim & (head_dim - 1):
        raise ValueError(
            f"q.shape[3]={head_dim} must be a power of two for the Hadamard rotation of"
            " precision='fp8'; pad it or pass fp8_options=Fp8Options(rotate=False)"
        )


def _check_option(name: str, value: object, allowed: tuple[object, ...]) -> None:
    """Raises ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} must be one of {allowed}")


def _check_arrays(q: ArrayLike, k: ArrayLike, v: ArrayLike) -> None:
    """Raises ValueError unless q, k and v fit together."""
    arrays = (("q", q), ("k", k), ("v", v))
    for name, x in arrays:
        if x.ndim != 4 or 0 in x.shape:
            raise ValueError(
                f"{name}.shape={x.shape} must be [batch, length, heads, head_dim] with no empty"
                " dimension; add the missing axis, or use jax.vmap"
            )
    for name, x in arrays:
        if x.dtype != q.dtype or x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
            raise ValueError(
                f"{name}.dtype={x.dtype} must be bfloat16, float16 or float32 and the same for q, k"
                f" and v (q.dtype={q.dtype}); cast with .astype"
            )
        if x.shape[0] != q.shape[0] or x.shape[3] != q.shape[3]:
            raise ValueError(
                f"{name}.shape={x.shape} must have the batch and head dim of q.shape={q.shape};"
                " only the length and the number of heads may differ"
            )
    if v.shape != k.shape:
        raise ValueError(f"v.shape={v.shape} must equal k.shape={k.shape}")
    if q.shape[2] % k.shape[2] != 0:
        raise ValueError(
            f"q.shape[2]={q.shape[2]} query heads must be a multiple of k.shape[2]={k.shape[2]}"
            " key/value heads; repeat k and v, or change the number of heads"
        )


def _check_segment_ids(
    q: ArrayLike, k: ArrayLike, q_segment_ids: ArrayLike | None, kv_segment_ids: ArrayLike | None
) -> None:
    """Raises ValueError unless both segment ids are absent, or both fit q and k."""
    for name, ids, other, x in (
        ("q_segment_ids", q_segment_ids, kv_segment_ids, q),
        ("kv_segment_ids", kv_segment_ids, q_segment_ids, k),
    ):
        if ids is None:
            if other is not None:
                raise ValueError(
                    f"{name}=None must be given when the other segment ids are; pass both"
                )
            continue
        if ids.shape != x.shape[:2] or ids.dtype != jnp.int32:
            raise ValueError(
                f"{name} is {ids.dtype}{list(ids.shape)}, must be int32{list(x.shape[:2])}: one id"
                " for each position; reshape it or cast with .astype(jnp.int32)"
            )

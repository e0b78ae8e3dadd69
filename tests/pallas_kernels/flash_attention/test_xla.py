"""The XLA implementation (and so the kernels' reference) against float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import flash_attention
from pallas_kernels.flash_attention import xla
from tests.pallas_kernels.cases import CASES, Case

# Rounding of a float32 sum of 24 products of unit normals, with room for exp and log.
F32_ATOL = 2e-5
# One rounding to bfloat16 of a number below 4: half a unit in the last of 8 bits.
BF16_OUTPUT_ATOL = 4 * 2.0**-9


@functools.partial(jax.jit, static_argnums=0)
def by_xla(case, q, k, v):
    """Returns (out, lse)."""
    return flash_attention(q, k, v, implementation="xla", return_lse=True, **case.options())


@functools.partial(jax.jit, static_argnums=0)
def gradients(case, q, k, v, dout, dlse):
    """Returns (out, lse) and (dq, dk, dv)."""
    (out, lse), vjp = jax.vjp(lambda *qkv: by_xla(case, *qkv), q, k, v)
    return (out, lse), vjp((dout.astype(out.dtype), dlse))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32_matches_float64_forward_and_backward(case):
    arrays = case.arrays(jnp.float32)
    expected = case.expected(*arrays)
    (out, lse), (dq, dk, dv) = gradients(case, *arrays)
    np.testing.assert_allclose(out, expected.out, atol=F32_ATOL)
    np.testing.assert_allclose(lse, expected.lse, atol=F32_ATOL)
    for name, got in (("dq", dq), ("dk", dk), ("dv", dv)):
        want = getattr(expected, name)
        atol = F32_ATOL * max(1.0, np.abs(want).max())
        np.testing.assert_allclose(got, want, atol=atol, err_msg=name)


@pytest.mark.parametrize("case", CASES[::4], ids=str)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_rounds_the_probabilities_and_the_output_only(case, dtype):
    q, k, v, *_ = case.arrays(dtype)
    expected = case.expected(q, k, v)
    out, lse = by_xla(case, q, k, v)
    assert out.dtype == dtype and lse.dtype == jnp.float32
    # A weighted mean of |v| <= 4 with each weight off by half a unit, then one rounding.
    np.testing.assert_allclose(np.asarray(out, np.float64), expected.out, atol=2 * BF16_OUTPUT_ATOL)
    np.testing.assert_allclose(lse, expected.lse, atol=F32_ATOL)


def test_a_query_without_keys_gives_zero_and_no_gradient():
    case = Case(name="padded", segments="padded")
    q, k, v, dout, dlse = case.arrays(jnp.float32)
    q_ids, kv_ids = case.segment_ids()
    empty = ~(q_ids[:, :, None] == kv_ids[:, None, :]).any(axis=2)
    unseen = ~(q_ids[:, :, None] == kv_ids[:, None, :]).any(axis=1)
    assert empty.any() and unseen.any()
    (out, lse), (dq, dk, dv) = gradients(case, q, k, v, dout, dlse)
    assert np.all(np.asarray(out)[empty] == 0)
    assert np.all(np.asarray(lse)[empty] == -np.inf)
    assert np.all(np.asarray(dq)[empty] == 0)
    assert np.all(np.asarray(dk)[unseen] == 0) and np.all(np.asarray(dv)[unseen] == 0)
    assert all(np.isfinite(x).all() for x in (dq, dk, dv))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["k", "v"])
def test_what_stands_at_a_masked_key_reaches_neither_output_nor_gradient(where, bad):
    case = Case(name="padded", segments="padded")
    q, k, v, dout, dlse = case.arrays(jnp.float32)
    q_ids, kv_ids = case.segment_ids()
    unseen = ~(q_ids[:, :, None] == kv_ids[:, None, :]).any(axis=1)
    assert unseen.any()
    spoilt = {"k": k, "v": v}
    spoilt[where] = jnp.where(unseen[..., None, None], bad, spoilt[where])
    clean = gradients(case, q, k, v, dout, dlse)
    got = gradients(case, q, spoilt["k"], spoilt["v"], dout, dlse)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(clean), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_a_nan_shows_in_exactly_the_rows_that_see_it(where):
    case = Case(name="causal", b=1, t=8, s=8, n=2, k=1, is_causal=True)
    arrays = dict(zip("qkv", case.arrays(jnp.float32), strict=False))
    arrays[where] = arrays[where].at[0, 5, 0, 3].set(jnp.nan)
    out, lse = by_xla(case, **arrays)
    rows = np.zeros((8, 2), bool)
    if where == "q":
        rows[5, 0] = True
    else:
        rows[5:] = True
    np.testing.assert_array_equal(np.isnan(out[0]).all(-1), rows)
    np.testing.assert_array_equal(np.isnan(out[0]).any(-1), rows)
    np.testing.assert_array_equal(np.isnan(lse[0]), rows if where != "v" else np.zeros_like(rows))
    dout = jnp.ones_like(out)
    grads = gradients(case, *arrays.values(), dout, jnp.zeros_like(lse))[1]
    assert any(np.isnan(g).any() for g in grads), "a NaN that is seen must not vanish"


@pytest.mark.parametrize("value", [1e4, -1e4, 0.0])
def test_extreme_inputs_stay_finite(value):
    case = Case(name="causal", is_causal=True)
    q, k, v, dout, dlse = case.arrays(jnp.bfloat16)
    k = jnp.full_like(k, value)
    v = v.at[:, 3].set(value)
    (out, lse), grads = gradients(case, q, k, v, dout, dlse)
    expected = case.expected(q, k, v)
    atol = 2 * BF16_OUTPUT_ATOL * max(1.0, abs(value) / 4)
    np.testing.assert_allclose(np.asarray(out, np.float64), expected.out, atol=atol)
    np.testing.assert_allclose(lse, expected.lse, rtol=1e-5, atol=F32_ATOL)
    assert all(np.isfinite(np.asarray(g, np.float32)).all() for g in grads)


@pytest.mark.parametrize(("t", "segments"), [(23, ""), (24, "padded")])
def test_chunks_agree_with_the_whole(t, segments, monkeypatch):
    case = Case(name="chunked", t=t, is_causal=True, window=(9, 0), segments=segments)
    arrays = case.arrays(jnp.float32)
    whole = gradients(case, *arrays)
    by_xla.clear_cache()
    gradients.clear_cache()
    monkeypatch.setattr(xla, "MAX_LOGITS_BYTES", 1)
    monkeypatch.setattr(xla, "_MIN_CHUNK", 7)  # divides neither 23 nor 24
    chunked = gradients(case, *arrays)
    for x, y in zip(jax.tree.leaves(chunked), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(x, y, atol=F32_ATOL * max(1.0, largest(y)))


def largest(x):
    """Returns the largest finite magnitude; the log-sum-exp of an empty row is -inf."""
    x = np.asarray(x)
    return np.abs(x[np.isfinite(x)]).max()


def test_long_sequences_hold_only_a_chunk_of_the_logits():
    b, t, n, h = 1, 8192, 8, 64
    x = jax.ShapeDtypeStruct((b, t, n, h), jnp.bfloat16)

    def loss(q, k, v):
        return flash_attention(q, k, v, is_causal=True, implementation="xla").sum()

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x).compile()
    all_logits = 4 * b * n * t * t
    assert all_logits >= 2 * xla.MAX_LOGITS_BYTES
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * all_logits


def test_vmap_remat_scan_and_jit_agree_with_the_plain_call():
    case = Case(name="causal", is_causal=True)
    q, k, v, *_ = case.arrays(jnp.float32)

    def attend(q, k, v):
        return flash_attention(q, k, v, is_causal=True, implementation="xla")

    def loss(q, k, v):
        return (attend(q, k, v) ** 2).sum()

    plain = jax.jit(attend)(q, k, v)
    one_by_one = jax.jit(jax.vmap(lambda *qkv: attend(*(x[None] for x in qkv))[0]))(q, k, v)
    np.testing.assert_allclose(one_by_one, plain, atol=F32_ATOL)
    scanned = jax.lax.scan(lambda c, qkv: (c, attend(*(x[None] for x in qkv))[0]), 0, (q, k, v))[1]
    np.testing.assert_allclose(scanned, plain, atol=F32_ATOL)
    want = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)
    got = jax.jit(jax.grad(jax.checkpoint(loss), argnums=(0, 1, 2)))(q, k, v)
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, atol=10 * F32_ATOL)

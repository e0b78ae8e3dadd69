"""The bf16 kernels on the GPU: every feature, forward and backward, against the float32 oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import attention_worker
from pallas_kernels import flash_attention
from pallas_kernels.flash_attention import tuning
from pallas_kernels.flash_attention.config import BackwardConfig

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("check", attention_worker._CHECKS, ids=lambda check: check.name)
def test_error_is_at_most_twice_the_reference_in_bf16_and_repeats(check, direction, monkeypatch):
    rows = []
    monkeypatch.setattr(attention_worker, "emit", lambda **row: rows.append(row))
    getattr(attention_worker, f"_check_{direction}")(check)
    assert rows and not [row for row in rows if row["verdict"] != "ok"]


@pytest.mark.parametrize("h", [64, 128, 256])
def test_any_order_agrees_with_the_deterministic_order(h):
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, dout = (jax.random.normal(key, (2, 1024, 4, h), jnp.bfloat16) for key in keys)

    def gradients(deterministic):
        def attend(q, k, v):
            return flash_attention(
                q, k, v, is_causal=True, implementation="mosaic", deterministic=deterministic
            )

        return jax.jit(lambda q, k, v: jax.vjp(attend, q, k, v)[1](dout))(q, k, v)

    for ordered, free in zip(gradients(True), gradients(False), strict=True):
        # Float32 sums in another order, then one rounding to bfloat16.
        ordered, free = (np.asarray(x, np.float32) for x in (ordered, free))
        np.testing.assert_allclose(free, ordered, atol=2.0**-8 * np.abs(ordered).max())


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
def test_late_dq_agrees_with_the_shipped_schedule(is_causal, monkeypatch):
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, dout = (jax.random.normal(key, (2, 2048, 8, 128), jnp.bfloat16) for key in keys)

    def gradients():
        def attend(q, k, v):
            return flash_attention(q, k, v, is_causal=is_causal, implementation="mosaic")

        return jax.jit(lambda q, k, v: jax.vjp(attend, q, k, v)[1](dout))(q, k, v)

    shipped = gradients()
    config = BackwardConfig(overlap=False, late_dq=True)
    monkeypatch.setattr(tuning, "backward_config", lambda spec: config)
    jax.clear_caches()
    for x, late in zip(shipped, gradients(), strict=True):
        # Float32 sums in another order, then one rounding to bfloat16.
        x, late = (np.asarray(y, np.float32) for y in (x, late))
        np.testing.assert_allclose(late, x, atol=2.0**-8 * np.abs(x).max())


@pytest.mark.parametrize("h", [64, 128, 256])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_stays_with_its_document(h, value):
    keys = jax.random.split(jax.random.key(0), 4)
    arrays = [jax.random.normal(key, (2, 1024, 4, h), jnp.bfloat16) for key in keys]
    # Of documents of 150 tokens, only that of token 400 may notice.
    ids = jnp.tile(jnp.arange(1024, dtype=jnp.int32) // 150, (2, 1))
    is_bad = np.asarray(ids[0]) == 400 // 150

    def run(q, k, v, dout):
        def attend(q, k, v):
            return flash_attention(
                q,
                k,
                v,
                is_causal=True,
                q_segment_ids=ids,
                kv_segment_ids=ids,
                implementation="mosaic",
            )

        out, vjp = jax.vjp(attend, q, k, v)
        return out, *vjp(dout)

    clean = jax.jit(run)(*arrays)
    for which in range(4):
        spoiled = [x.at[:, 400, :, 3].set(value) if i == which else x for i, x in enumerate(arrays)]
        got = jax.jit(run)(*spoiled)
        for i, (x, y) in enumerate(zip(got, clean, strict=True)):
            x, y = (np.asarray(a, np.float32)[:, ~is_bad] for a in (x, y))
            # Gradients of queries are added in any order.
            np.testing.assert_allclose(x, y, atol=2.0**-8 * np.abs(y).max() if i == 1 else 0.0)
        # The gradients of this query or key, if not its output, tell of it.
        assert not np.isfinite(np.asarray(got[1 + min(which, 2)], np.float32)[:, 400]).all()

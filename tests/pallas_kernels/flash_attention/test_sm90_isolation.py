"""What is not finite reaches no position that may not see it: the sm_90a kernels, interpreted."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

from pallas_kernels.flash_attention import sm90
from pallas_kernels.flash_attention.config import BackwardConfig, ForwardConfig
from pallas_kernels.reference import attention_reference
from tests.pallas_kernels import oracle
from tests.pallas_kernels.cases import Case
from tests.pallas_kernels.flash_attention.test_sm90_backward import gradients_of_twin
from tests.pallas_kernels.flash_attention.test_sm90_forward import spec_of

# The interpreter multiplies with NumPy, which warns of 0 * inf, and of what it makes of 3e38.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{what} encountered in matmul")
    for what in ("invalid value", "overflow")
]

NAN, INF = np.nan, np.inf


def visible(case):
    """Returns bool [B, T, S]."""
    q_ids, kv_ids = case.segment_ids()
    rows = [(None, None) if q_ids is None else (q_ids[b], kv_ids[b]) for b in range(case.b)]
    return np.stack(
        [oracle.visible(case.t, case.s, case.is_causal, case.window, *ids) for ids in rows]
    )


def spoil(x, positions, value):
    """Puts a value into one channel of some positions of head 0."""
    x = np.array(x, np.float32)
    for channel, position in enumerate(positions):
        x[:, position, 0, channel] = value
    return jnp.asarray(x, jnp.bfloat16)


def marks(length, positions):
    """Returns bool [length], True at the positions."""
    return np.isin(np.arange(length), positions)


FORWARD = [
    # The diagonal of the first and of the last tile, and the last key of a block.
    (Case(name="causal", b=1, t=192, s=192, n=1, k=1, h=64, is_causal=True), (5, 63, 190), "kv"),
    # Both edges of the window; T and S are ragged.
    (Case(name="window", b=1, t=150, s=140, n=2, k=1, h=64, window=(40, 9)), (0, 70, 139), "v"),
    (
        Case(name="packed", b=1, t=160, s=160, n=1, k=1, h=128, is_causal=True, segments="packed"),
        (0, 100, 159),
        "kv",
    ),
    # The first keys are padding that no query sees.
    (Case(name="padded", b=1, t=130, s=130, n=1, k=1, h=64, segments="padded"), (3, 21), "kv"),
]


@pytest.mark.parametrize(("case", "positions", "where"), FORWARD, ids=[str(c) for c, *_ in FORWARD])
def test_forward(case, positions, where, monkeypatch):
    monkeypatch.setattr(sm90, "sm_count", lambda: 2)
    q, k, v, *_ = case.arrays(jnp.bfloat16)
    spec, config = spec_of(case), ForwardConfig(block_kv=64)
    ids = [None if x is None else jnp.asarray(x) for x in case.segment_ids()]
    bad_k = spoil(k, positions[:1], NAN) if "k" in where else k
    bad_v = spoil(v, positions, -INF if "k" in where else NAN)
    out, lse = sm90.forward(q, bad_k, bad_v, *ids, spec, config=config, interpret=True)
    assert not interpret_pallas_call.get_races().races_found
    expected = case.expected(q, k, v)
    twin, _ = attention_reference(
        q,
        k,
        v,
        softmax_scale=spec.softmax_scale,
        band=spec.band,
        q_segment_ids=ids[0],
        kv_segment_ids=ids[1],
    )
    sees_bad = visible(case)[:, :, list(positions)].any(axis=2)
    assert not sees_bad.all()
    assert case.segments == "padded" or sees_bad.any()
    got, twin = np.asarray(out, np.float64), np.asarray(twin, np.float64)
    assert np.isnan(got[sees_bad]).all()
    error, bound = (np.abs(x - expected.out)[~sees_bad].max() for x in (got, twin))
    assert error <= 2 * bound
    lse = np.asarray(lse)[:, :, : case.t].transpose(0, 2, 1)
    np.testing.assert_allclose(lse[~sees_bad], expected.lse[~sees_bad], atol=1e-5)


SPLIT = BackwardConfig(split_channels=True, num_do_stages=1)
BACKWARD = [
    # A later key cannot be reached from these queries. The first tile has whole blocks, too.
    (
        Case(name="causal", b=1, t=200, s=200, n=2, k=1, h=64, is_causal=True),
        BackwardConfig(),
        dict(q=(5, 71), dout=(63,)),
        NAN,
    ),
    (
        Case(name="window", b=1, t=300, s=290, n=1, k=1, h=64, window=(30, 9)),
        BackwardConfig(overlap=False, num_q_stages=3),
        dict(q=(0,), dout=(290,), k=(127,), v=(136,)),
        INF,
    ),
    (
        Case(name="packed", b=1, t=160, s=160, n=1, k=1, h=128, is_causal=True, segments="packed"),
        BackwardConfig(),
        dict(k=(100,), v=(105,), dout=(3,)),
        NAN,
    ),
    # Queries that see no key, and keys that no query sees.
    (
        Case(name="padded", b=1, t=130, s=130, n=1, k=1, h=64, segments="padded"),
        BackwardConfig(block_q=128),
        dict(q=(120, 129), dout=(110, 129), k=(3,), v=(20,)),
        NAN,
    ),
    (
        Case(name="split", b=1, t=65, s=128, n=1, k=1, h=256, is_causal=True, segments="packed"),
        SPLIT,
        dict(q=(3,), k=(40, 127), v=(100,)),
        -INF,
    ),
]


@pytest.mark.parametrize(
    ("case", "config", "positions", "value"), BACKWARD, ids=[str(c) for c, *_ in BACKWARD]
)
def test_backward(case, config, positions, value, monkeypatch):
    monkeypatch.setattr(sm90, "sm_count", lambda: 1)
    arrays = case.arrays(jnp.bfloat16)
    expected = case.expected(*arrays)
    twin = gradients_of_twin(case, arrays)
    named = dict(zip(("q", "k", "v", "dout"), arrays, strict=False))
    bad = {name: spoil(x, positions.get(name, ()), value) for name, x in named.items()}
    seen = visible(case)[0]
    spoiled_keys = marks(case.s, (*positions.get("k", ()), *positions.get("v", ())))
    sees_bad = (seen & spoiled_keys).any(axis=1)
    # What the forward makes of it, for each head.
    forward_bad = np.tile(sees_bad[:, None], (1, case.n))
    forward_bad[:, 0] |= marks(case.t, positions.get("q", ())) & seen.any(axis=1)
    out = np.where(forward_bad[None, :, :, None], NAN, expected.out)
    lse = np.where(forward_bad[None], NAN, expected.lse)
    ids = [None if x is None else jnp.asarray(x) for x in case.segment_ids()]
    got = sm90.backward(
        bad["q"],
        bad["k"],
        bad["v"],
        *ids,
        jnp.asarray(out, jnp.bfloat16),
        jnp.asarray(lse, jnp.float32),
        bad["dout"],
        arrays[4],
        spec_of(case),
        config=config,
        interpret=True,
    )
    assert not interpret_pallas_call.get_races().races_found
    bad_queries = forward_bad.copy()
    bad_queries[:, 0] |= marks(case.t, positions.get("dout", ())) & seen.any(axis=1)
    bad_keys = (seen & bad_queries.any(axis=1)[:, None]).any(axis=0)
    assert not bad_queries.all() and not bad_keys.all()
    reached = dict(dq=bad_queries, dk=bad_keys[:, None], dv=bad_keys[:, None])
    for (name, is_bad), x, y in zip(reached.items(), got, twin, strict=True):
        want = getattr(expected, name)[0]
        x, y = (np.asarray(a, np.float64)[0] for a in (x, y))
        assert not np.isfinite(x[is_bad]).any(), name
        error, bound = (np.abs(a - want)[~is_bad].max() for a in (x, y))
        assert error <= 2 * bound + 2.0**-9 * np.abs(want).max(), name

"""What is not finite reaches no position that may not see it: the sm_90a kernels, interpreted."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

from pallas_kernels.flash_attention import sm90
from pallas_kernels.flash_attention.config import ForwardConfig
from pallas_kernels.reference import attention_reference
from tests.pallas_kernels import oracle
from tests.pallas_kernels.cases import Case
from tests.pallas_kernels.flash_attention.test_sm90_forward import spec_of

# The interpreter multiplies with NumPy, which warns of 0 * inf.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")

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


FORWARD = [
    # The diagonal of the first and of the last tile, and the last key of a block.
    (Case(name="causal", b=1, t=192, s=192, n=1, k=1, h=64, is_causal=True), (5, 63, 190)),
    # Both edges of the window; T and S are ragged.
    (Case(name="window", b=1, t=150, s=140, n=2, k=1, h=64, window=(40, 9)), (0, 70, 139)),
    (
        Case(name="packed", b=1, t=160, s=160, n=1, k=1, h=128, is_causal=True, segments="packed"),
        (0, 100, 159),
    ),
    # The first keys are padding that no query sees.
    (Case(name="padded", b=1, t=130, s=130, n=1, k=1, h=64, segments="padded"), (3, 21)),
]


@pytest.mark.parametrize("where", ["v", "kv"])
@pytest.mark.parametrize(("case", "positions"), FORWARD, ids=[str(c) for c, _ in FORWARD])
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

"""The sm_90a FP8 forward kernel: interpreted against float64 and its twin in XLA, and compiled."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

from pallas_kernels import Fp8Options, flash_attention, hardware
from pallas_kernels.flash_attention import fp8_quantize, fp8_xla, sm90, sm90_fp8, tuning
from pallas_kernels.flash_attention.config import AttentionSpec, ForwardConfig
from pallas_kernels.flash_attention.masks import make_band
from tests.pallas_kernels.cases import Case
from tests.pallas_kernels.compile_gate import ptxas_report


def spec_of(case, deterministic=None, **options):
    return AttentionSpec(
        batch_size=case.b,
        query_length=case.t,
        key_length=case.s,
        num_heads=case.n,
        num_kv_heads=case.k,
        head_dim=case.h,
        dtype="bfloat16",
        band=make_band(case.is_causal, case.window, case.t, case.s),
        has_segments=bool(case.segments),
        softmax_scale=case.h**-0.5,
        return_lse=True,
        precision="fp8",
        fp8=Fp8Options(**options),
        deterministic=deterministic,
    )


FREE = ForwardConfig(compute_warpgroups=2, ping_pong=False, overlap=False, persistent=False)
TURNS = ForwardConfig(compute_warpgroups=2, overlap=False)
INTERPRETED = [
    (
        Case(name="causal_ragged_gqa", b=1, t=200, s=200, n=2, k=1, h=64, is_causal=True),
        TURNS,
    ),
    (Case(name="window_t_over_s", b=1, t=300, s=130, n=1, k=1, h=64, window=(50, 20)), FREE),
    (
        Case(name="packed", b=2, t=140, s=260, n=1, k=1, h=64, segments="packed"),
        ForwardConfig(compute_warpgroups=3, overlap=False, num_stages=3),
    ),
    (Case(name="overlap_d128", b=1, t=128, s=384, n=1, k=1, h=128), ForwardConfig()),
]


@pytest.mark.parametrize(("case", "config"), INTERPRETED, ids=[str(c) for c, _ in INTERPRETED])
def test_interpreted_kernel_rounds_as_the_twin_and_is_free_of_races(case, config, monkeypatch):
    # Three CTAs, so that one of them walks through several tiles.
    monkeypatch.setattr(sm90, "sm_count", lambda: 3)
    q, k, v, *_ = case.arrays(jnp.bfloat16)
    expected = case.expected(q, k, v)
    spec = spec_of(case, center_keys=False)
    ids = [None if x is None else jnp.asarray(x) for x in case.segment_ids()]
    inputs = jax.jit(lambda *qkv: fp8_quantize.quantize_inputs(*qkv, spec))(q, k, v)
    out, statistics = sm90_fp8.fp8_forward(inputs, *ids, spec, config=config, interpret=True)
    assert not interpret_pallas_call.get_races().races_found
    twin, twin_statistics = fp8_xla.fp8_forward(inputs, *ids, spec)
    out, twin = (np.asarray(x, np.float64) for x in (out, twin))
    error = np.linalg.norm(out - expected.out)
    assert error <= 1.05 * np.linalg.norm(twin - expected.out)
    # A probability between two E4M3 numbers may go either way for the last bit of an exponential.
    assert np.linalg.norm(out - twin) <= 0.01 * np.linalg.norm(twin)
    for got, want in zip(statistics, twin_statistics, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-4, rtol=1e-5)


def arguments(case):
    """Returns the shapes of q, k, v and the segment ids."""
    q = jax.ShapeDtypeStruct((case.b, case.t, case.n, case.h), jnp.bfloat16)
    kv = jax.ShapeDtypeStruct((case.b, case.s, case.k, case.h), jnp.bfloat16)
    if not case.segments:
        return (q, kv, kv)
    ids = [jax.ShapeDtypeStruct((case.b, length), jnp.int32) for length in (case.t, case.s)]
    return (q, kv, kv, *ids)


def compile_cases():
    """Every shipped config with its mask, and lengths that are no multiple of a tile."""
    masks = {
        "full": {},
        "causal": dict(is_causal=True),
        "window": dict(window=(512, 100)),
        "packed": dict(is_causal=True, segments="packed"),
    }
    for head_dim, mask in tuning.tuned_forward_configs("fp8"):
        yield Case(name=f"{head_dim}_{mask}", b=2, t=8192, s=8192, h=head_dim, **masks[mask])
    yield Case(name="ragged", b=2, t=4001, s=4001, h=128)
    yield Case(name="ragged_causal", b=2, t=4001, s=4001, h=128, is_causal=True)
    yield Case(name="ragged_window", b=2, t=4001, s=4001, h=128, window=(512, 100))
    yield Case(name="window_256", b=2, t=4096, s=4096, h=256, window=(512, 100))


THREE_IN_TURNS = ForwardConfig(compute_warpgroups=3, num_stages=4, overlap=False, persistent=False)


@pytest.mark.parametrize(
    ("case", "config"),
    [
        *((case, None) for case in compile_cases()),
        (Case(name="turns", b=2, t=8192, s=8192, h=128, is_causal=True), THREE_IN_TURNS),
    ],
    ids=str,
)
def test_compiles_for_sm90a_without_spills_or_serialised_wgmmas(case, config):
    spec = spec_of(case)
    q, k, v, *ids = arguments(case)
    inputs = jax.eval_shape(lambda *qkv: fp8_quantize.quantize_inputs(*qkv, spec), q, k, v)

    def forward(inputs, q_ids=None, kv_ids=None):
        return sm90_fp8.fp8_forward(inputs, q_ids, kv_ids, spec, config=config)

    with hardware.assume_device_kind("NVIDIA H200"):
        report = ptxas_report(forward, inputs, *ids)
    assert report.spilled_bytes == 0, report.text
    assert not report.serialised_wgmmas, report.text


def test_lowers_for_many_keys():
    """TMA copies at most 256 elements along an axis: of the scales of all blocks, too."""
    x = jax.ShapeDtypeStruct((1, 131072, 1, 128), jnp.bfloat16)
    attend = functools.partial(flash_attention, precision="fp8", implementation="mosaic")
    with hardware.assume_device_kind("NVIDIA H200"):
        traced = jax.jit(functools.partial(attend, is_causal=True)).trace(x, x, x)
        assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_every_candidate_is_accepted_or_has_a_reason():
    case = Case(name="x", b=2, t=8192, s=8192, n=16, k=16, h=128, is_causal=True)
    candidates = tuning.forward_candidates(spec_of(case))
    accepted = [config for config, reason in candidates if reason is None]
    assert tuning.forward_config(spec_of(case)) in accepted
    assert THREE_IN_TURNS in accepted
    assert dataclasses.replace(THREE_IN_TURNS, persistent=True) not in accepted  # it spills
    assert len(accepted) >= 6
    assert all(reason is None or len(reason) > 10 for _, reason in candidates)


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((1, 64, 2, 64), jnp.float32, "q.dtype=float32 is not one of"),
        ((1, 64, 2, 32), jnp.bfloat16, r"q.shape\[3\]=32 is not one of .64, 128, 256."),
    ],
)
def test_refuses_with_the_reason(shape, dtype, message):
    x = jnp.zeros(shape, dtype)
    with (
        hardware.assume_device_kind("NVIDIA H200"),
        pytest.raises(NotImplementedError, match=message),
    ):
        flash_attention(x, x, x, precision="fp8", implementation="mosaic")

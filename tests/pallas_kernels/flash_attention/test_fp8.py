"""FP8 attention in plain JAX: its errors against float64, its pieces by hand."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import Fp8Options, flash_attention
from pallas_kernels.flash_attention import fp8, fp8_xla
from pallas_kernels.flash_attention.config import RESIDUAL_NAMES
from tests.pallas_kernels.cases import CASES, Case

OFF = Fp8Options(rotate=False, center_keys=False)
# E4M3 keeps 3 bits: a relative error of 2^-4 at most and 2^-4 / sqrt(12) or so in the mean square.
# An output has the errors of v and of P, and, through the softmax, those of q and k.
RELATIVE_ERROR = 0.055
GRADIENT_ERROR = 0.07
GRADIENT_COSINE = 0.9975


def relative(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def cosine(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return (got * want).sum() / np.linalg.norm(got) / np.linalg.norm(want)


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(case, options, q, k, v, dout, dlse):
    """Returns (out, lse) and the gradients."""

    def attend(q, k, v):
        return flash_attention(
            q,
            k,
            v,
            precision="fp8",
            fp8_options=options,
            implementation="xla",
            return_lse=True,
            **case.options(),
        )

    (out, lse), vjp = jax.vjp(attend, q, k, v)
    return (out, lse), vjp((dout.astype(out.dtype), dlse))


@functools.partial(jax.jit, static_argnums=(0, 1))
def exact(case, is_causal, q, k, v, dout):
    """Attention of float32 arrays, and its gradients."""
    del case
    attend = functools.partial(flash_attention, is_causal=is_causal, implementation="xla")
    out, vjp = jax.vjp(attend, q, k, v)
    return out, vjp(dout)


def normal(length, seed=0, heads=2, h=128):
    keys = jax.random.split(jax.random.key(seed), 4)
    return [jax.random.normal(key, (1, length, heads, h)) for key in keys]


@pytest.mark.parametrize(("options", "is_causal"), [(Fp8Options(), True), (OFF, False)])
def test_errors_on_normal_inputs_meet_the_goals(options, is_causal):
    q, k, v, dout = normal(768)
    case = Case(name="x", b=1, t=768, s=768, n=2, k=2, h=128, is_causal=is_causal)
    (out, _), grads = run(case, options, q, k, v, dout, jnp.zeros(q.shape[:3]))
    want, want_grads = exact(case, is_causal, q, k, v, dout)
    assert relative(out, want) <= RELATIVE_ERROR
    for name, got, expected in zip(("dq", "dk", "dv"), grads, want_grads, strict=True):
        assert relative(got, expected) <= GRADIENT_ERROR, name
        assert cosine(got, expected) >= GRADIENT_COSINE, name


def test_rotation_halves_the_error_of_outliers_and_the_mean_that_of_a_biased_key():
    q, k, v, dout = normal(768)
    case = Case(name="x", b=1, t=768, s=768, n=2, k=2, h=128)
    dlse = jnp.zeros(q.shape[:3])

    def error(options, q, k, v):
        return relative(
            run(case, options, q, k, v, dout, dlse)[0][0], exact(case, False, q, k, v, dout)[0]
        )

    spikes = [
        jax.random.bernoulli(jax.random.key(i), 0.001, q.shape) * 10 * x
        for i, x in enumerate(normal(768, seed=1)[:2])
    ]
    spiky = q + spikes[0], k + spikes[1], v
    assert error(OFF, *spiky) > 1.5 * RELATIVE_ERROR, "without rotation outliers hurt"
    assert error(Fp8Options(center_keys=False), *spiky) <= RELATIVE_ERROR
    bias = 8.0 * jax.random.normal(jax.random.key(9), (1, 1, 2, 128)) * (jnp.arange(128) % 16 == 0)
    assert error(OFF, q, k + bias, v) > 1.3 * RELATIVE_ERROR, "without centring a bias hurts"
    assert error(Fp8Options(rotate=False), q, k + bias, v) <= RELATIVE_ERROR


def test_a_sink_does_not_flush_the_other_probabilities():
    """The first key has a logit 8 above the others' and a small value; q, k, v have 8 bits."""
    q, k, v, dout = (x.astype(jnp.float8_e4m3fn).astype(jnp.float32) for x in normal(2048))
    q = q.at[..., 0].set(1.0)
    k = k.at[..., 0].set(0.0).at[:, 0].set(0.0).at[:, 0, :, 0].set(88.0)  # logit 7.8
    v = v.at[:, 0].multiply(0.0625)
    case = Case(name="x", b=1, t=2048, s=2048, n=2, k=2, h=128)
    (out, _), _ = run(case, OFF, q, k, v, dout, jnp.zeros(q.shape[:3]))
    assert relative(out, exact(case, False, q, k, v, dout)[0]) <= 0.03


def test_a_sink_at_the_first_key_has_the_logit_that_q_and_k_say():
    """As above, but nothing has 8 bits; the sink's logit is 8."""
    q, k, v, dout = normal(512)
    q = q.at[..., 0].set(1.0)
    k = k.at[..., 0].set(0.0).at[:, 0].set(0.0).at[:, 0, :, 0].set(8 * 128**0.5)
    v = v.at[:, 0].multiply(0.0625)
    case = Case(name="x", b=1, t=512, s=512, n=2, k=2, h=128)
    want, want_grads = exact(case, False, q, k, v, dout)

    def errors(options):
        (out, _), grads = run(case, options, q, k, v, dout, jnp.zeros(q.shape[:3]))
        return relative(out, want), relative(grads[0], want_grads[0])

    out, dq = errors(Fp8Options())
    assert out <= RELATIVE_ERROR and dq <= GRADIENT_ERROR
    assert errors(Fp8Options(exact_first_key=False))[0] > 1.5 * RELATIVE_ERROR


# The band and the documents are `dense_mask`'s, tested in test_xla.
FEATURES = [
    c
    for c in CASES
    if c.name in ("causal_mqa_odd_length", "window_left_of_all_keys", "padded_rows", "large_scale")
]


@pytest.mark.parametrize("case", FEATURES, ids=str)
def test_every_feature_forward_and_backward(case):
    arrays = case.arrays(jnp.float32)
    expected = case.expected(*arrays)
    (out, lse), grads = run(case, Fp8Options(), *arrays)
    # Few keys average fewer errors than the 768 of the test above; a scale of 3 triples those of
    # the logits.
    worse = 2.5 if case.softmax_scale is None else 6.0
    empty = np.isneginf(expected.lse)
    np.testing.assert_array_equal(np.isneginf(lse), empty)
    assert np.all(np.asarray(out)[empty] == 0) and np.all(np.asarray(grads[0])[empty] == 0)
    assert relative(out, expected.out) <= worse * RELATIVE_ERROR
    for name, got in zip(("dq", "dk", "dv"), grads, strict=True):
        want = getattr(expected, name)
        assert relative(got, want) <= worse * GRADIENT_ERROR, name


def test_inputs_that_8_bits_hold_exactly_lose_only_the_rounding_of_p():
    case = Case(name="x", b=1, t=8, s=8, n=1, k=1, h=16)
    q, k, v, dout, dlse = case.arrays(jnp.float32)
    q, k, v = (jnp.round(x) for x in (q, k, v))
    k = jnp.zeros_like(k)  # all probabilities 1 / 8: 256 / 8 is exact in E4M3
    expected = case.expected(q, k, v)
    (out, lse), _ = run(case, OFF, q, k, v, dout, dlse)
    np.testing.assert_allclose(out, expected.out, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(lse, np.log(8.0), rtol=1e-6)


def test_chunks_agree_with_the_whole(monkeypatch):
    case = Case(name="chunked", t=23, is_causal=True, window=(9, 0), segments="padded", s=24)
    arrays = case.arrays(jnp.float32)
    whole = run(case, Fp8Options(), *arrays)
    run.clear_cache()
    monkeypatch.setattr(fp8_xla, "MAX_LOGITS_BYTES", 1)
    monkeypatch.setattr(fp8_xla, "_MIN_CHUNK", 7)  # divides neither 23 nor 24
    for x, y in zip(
        jax.tree.leaves(run(case, Fp8Options(), *arrays)), jax.tree.leaves(whole), strict=True
    ):
        np.testing.assert_allclose(x, y, atol=1e-4, rtol=1e-4)
    run.clear_cache()


def test_bf16_backward_is_the_gradient_of_bf16_attention():
    case = Case(name="x", is_causal=True, segments="packed")
    arrays = case.arrays(jnp.float32)
    expected = case.expected(*arrays)
    _, grads = run(case, Fp8Options(backward="bf16"), *arrays)
    for name, got in zip(("dq", "dk", "dv"), grads, strict=True):
        np.testing.assert_allclose(got, getattr(expected, name), atol=1e-4, err_msg=name)


def test_e5m2_gradients_have_twice_the_error_and_run():
    q, k, v, dout = normal(256)
    case = Case(name="x", b=1, t=256, s=256, n=2, k=2, h=128)
    _, grads = run(case, Fp8Options(gradient_format="e5m2"), q, k, v, dout, jnp.zeros(q.shape[:3]))
    _, want = exact(case, False, q, k, v, dout)
    assert all(relative(g, w) <= 0.1 for g, w in zip(grads, want, strict=True))
    # 2 bits instead of 3 in dO.
    assert relative(grads[2], want[2]) > RELATIVE_ERROR


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
def test_rounding_in_float32_has_every_bit_of_the_conversion(dtype):
    rng = np.random.default_rng(0)
    x = rng.standard_normal(20000).astype(np.float32) * np.exp2(rng.integers(-22, 18, 20000))
    every = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)
    every = np.sort(every[np.isfinite(every)])
    ties = (every[1:] + every[:-1]) / 2
    x = np.concatenate([x, every, ties, [1e30, -1e30]]).astype(np.float32)
    largest = float(ml_dtypes.finfo(dtype).max)
    want = np.clip(x, -largest, largest).astype(dtype).astype(np.float32)
    got = jax.jit(fp8.round_like, static_argnums=1)(x, dtype)
    np.testing.assert_array_equal(got, want)
    assert np.isnan(fp8.round_like(jnp.float32(np.nan), dtype))


@pytest.mark.parametrize("amax", [448.0, 449.0, 1.0, 0.75, 1e-30, 3e30])
def test_scale_is_the_smallest_power_of_two_that_fits(amax):
    scale = float(fp8.scale_of(jnp.float32(amax), 448.0))
    assert np.log2(scale) == round(np.log2(scale))
    assert amax / scale <= 448.0 < 2 * amax / scale


def test_scale_of_zero_is_the_smallest_and_of_infinity_nan():
    assert fp8.scale_of(jnp.float32(0), 448.0, 2.0**-40) == 2.0**-40
    assert np.isnan(fp8.scale_of(jnp.float32(np.inf), 448.0))
    assert np.isnan(fp8.scale_of(jnp.float32(np.nan), 448.0))


@pytest.mark.parametrize("where", ["k", "v"])
def test_a_nan_makes_its_head_nan(where):
    case = Case(name="x", b=1, t=8, s=8, n=2, k=2, is_causal=True)
    arrays = dict(zip("qkv", case.arrays(jnp.float32), strict=False))
    arrays[where] = arrays[where].at[0, 5, 0, 3].set(jnp.nan)
    (out, _), _ = run(
        case, Fp8Options(), **arrays, dout=jnp.ones((1, 8, 2, 16)), dlse=jnp.zeros((1, 8, 2))
    )
    assert np.isnan(out[:, :, 0]).all() and np.isfinite(out[:, :, 1]).all()


@pytest.mark.parametrize("value", [-1e4, 0.0, 1e-20])
def test_extreme_inputs_stay_finite(value):
    case = Case(name="x", is_causal=True)
    q, k, v, dout, dlse = case.arrays(jnp.bfloat16)
    k = jnp.full_like(k, value)
    v = v.at[:, 3].set(value)
    (out, lse), grads = run(case, Fp8Options(), q, k, v, 0 * dout, dlse)
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in (out, lse, *grads))
    expected = case.expected(q, k, v)
    assert relative(out, expected.out) <= 2.5 * RELATIVE_ERROR


@pytest.mark.parametrize(
    ("permute", "first"),
    [
        (fp8.permute_16, [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]),
        (fp8.permute_28, [0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15]),
    ],
)
def test_permutations_by_hand(permute, first):
    x = jnp.arange(64).reshape(2, 32)
    got = np.asarray(permute(x, 1))
    np.testing.assert_array_equal(got[0, :16], first)
    np.testing.assert_array_equal(got[1, 16:], np.array(first) + 48)


def test_the_rotation_is_orthogonal_up_to_its_factor():
    matrix = fp8.rotation(64)
    np.testing.assert_array_equal(matrix @ matrix.T, 64 * np.eye(64))
    x = jax.random.normal(jax.random.key(0), (3, 64))
    np.testing.assert_allclose(fp8.rotate(fp8.rotate(x), inverse=True) / 64, x, atol=1e-5)


def test_the_matrix_products_take_float8():
    """In the kernels' operands, that is: the arrays that `quantize_inputs` hands over."""
    case = Case(name="x", is_causal=True)
    q, k, v, dout, dlse = case.arrays(jnp.bfloat16)
    jaxpr = str(jax.make_jaxpr(functools.partial(run, case, Fp8Options()))(q, k, v, dout, dlse))
    assert jaxpr.count("f8_e4m3fn") >= 6  # q, k, v; dO twice and q again


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(gradient_format="e3m4"), "gradient_format='e3m4' must be one of"),
        (dict(backward="int8"), "backward='int8' must be one of"),
    ],
)
def test_options_reject(options, message):
    with pytest.raises(ValueError, match=message):
        Fp8Options(**options)


def test_call_rejects_what_the_options_cannot_do():
    x = jnp.zeros((1, 8, 1, 80))
    with pytest.raises(ValueError, match=r"q.shape\[3\]=80 must be a power of two"):
        flash_attention(x, x, x, precision="fp8")
    with pytest.raises(ValueError, match="precision='bf16' takes no fp8_options"):
        flash_attention(x, x, x, fp8_options=OFF)
    assert flash_attention(x, x, x, precision="fp8", fp8_options=OFF).shape == x.shape


def test_a_remat_policy_that_saves_the_named_residuals_runs_no_forward_twice():
    x = jax.ShapeDtypeStruct((1, 8, 2, 16), jnp.bfloat16)
    policy = jax.checkpoint_policies.save_only_these_names(*RESIDUAL_NAMES)

    @functools.partial(jax.checkpoint, policy=policy)
    def attend(q):
        return flash_attention(q, q, q, precision="fp8", implementation="xla")

    jaxpr = str(jax.make_jaxpr(jax.grad(lambda q: attend(q).astype(jnp.float32).sum()))(x))
    assert jaxpr.count("cummax") == 1, "the running maximum is the forward's alone"

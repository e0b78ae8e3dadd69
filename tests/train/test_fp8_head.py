"""FP8 cross-entropy against float64 NumPy, with and without the rounding to 8 bits."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jfp8
from jfp8.diagnostics import fp8_dot_count
from pallas_kernels import hardware
from pallas_kernels.interpreter import interpret_kernels
from tests.aot import compile_for_h200
from tests.jfp8.reference import f64, normal, quantize, smallest_exponent, sqnr_db, top_exponent
from train import loss as loss_module
from train.fp8_head import fp8_cross_entropy

B, T, D, V = 2, 128, 128, 64
SMALL = 32 * B * V  # logits: four chunks
EXPONENTS = (-6, -9, -23)
DELAYED = jfp8.Recipe(calibration="explicit", quantize_implementation="xla")
CURRENT = jfp8.Recipe(name="current", quantize_implementation="xla")
MOSAIC = dataclasses.replace(DELAYED, quantize_implementation="mosaic")
HIDDEN = normal(0, B, T, D).astype(jnp.bfloat16)
HEAD = normal(1, D, V) / 8
_RNG = np.random.default_rng(2)
TARGETS = jnp.asarray(_RNG.integers(0, V, (B, T)))
WEIGHTS = jnp.asarray((_RNG.random((B, T)) > 0.2) / (B * T), jnp.float32)
NAMES = ("dhidden", "dhead")


def state(exponents=EXPONENTS):
    fresh = jfp8.init_state(DELAYED)
    return fresh._replace(scale=jnp.exp2(jnp.asarray(exponents, jnp.float32)))


@functools.cache
def results(recipe, max_chunk_logits=SMALL, z_loss=0.0, factor=1.0):
    """(loss, nll), then the gradients: of hidden, of the head, and the observation."""

    def run(hidden, head, state):
        total, nll = fp8_cross_entropy(
            hidden, head, TARGETS, WEIGHTS, state, recipe=recipe, z_loss=z_loss
        )
        return factor * total, nll

    with pytest.MonkeyPatch.context() as patch, interpret_kernels():
        patch.setattr(loss_module, "_MAX_CHUNK_LOGITS", max_chunk_logits)
        both = jax.jit(jax.value_and_grad(run, argnums=(0, 1, 2), has_aux=True))
        (total, nll), grads = both(HIDDEN, HEAD, state())
    return (total, nll), *grads


def reference(exponents=None, z_loss=0.0):
    """Loss, nll, dhidden, dhead and amax of dlogits in float64; with exponents, of 8-bit casts."""
    cast = lambda x, slot: (  # noqa: E731
        x if exponents is None else quantize(x, exponents[slot], ("e4m3", "e4m3", "e5m2")[slot])
    )
    hidden, head = cast(f64(HIDDEN).reshape(-1, D), 0), cast(f64(HEAD), 1)
    targets, weights = np.asarray(TARGETS).reshape(-1), f64(WEIGHTS).reshape(-1)
    logits = hidden @ head
    lse = np.log(np.exp(logits).sum(-1))
    nll = lse - logits[np.arange(B * T), targets]
    softmax = np.exp(logits - lse[:, None])
    dlogits = (1 + 2 * z_loss * lse)[:, None] * softmax - np.eye(V)[targets]
    dlogits *= weights[:, None]
    amax = np.abs(dlogits).max()
    total = (weights * (nll + z_loss * lse**2)).sum()
    if exponents is not None:
        dlogits = cast(dlogits, 2)
    dhidden = (dlogits @ head.T).reshape(B, T, D)
    return total, (weights * nll).sum(), dhidden, hidden.T @ dlogits, amax


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("max_chunk_logits", [SMALL, 1 << 27])
def test_gradients_are_those_of_the_8_bit_casts(max_chunk_logits, z_loss):
    (total, nll), *grads, _ = results(DELAYED, max_chunk_logits, z_loss)
    want_total, want_nll, *want, _ = reference(EXPONENTS, z_loss)
    np.testing.assert_allclose((total, nll), (want_total, want_nll), rtol=1e-5)
    # What is left: the rounding of dhidden to bfloat16, and dlogits that float32 takes to the other
    # of two 8-bit neighbours. The casts alone leave 30 dB.
    for name, expected, got in zip(NAMES, want, grads, strict=True):
        assert sqnr_db(expected, got) > 45, name


@pytest.mark.parametrize("recipe", [DELAYED, CURRENT, MOSAIC], ids=["delayed", "current", "mosaic"])
def test_error_at_most_twice_that_of_the_casts(recipe):
    (total, _), *grads, _ = results(recipe)
    exact_total, _, *exact, _ = reference()
    rounded_total, _, *rounded, _ = reference(EXPONENTS)
    assert abs(total - exact_total) <= 2 * abs(rounded_total - exact_total) + 1e-5
    for name, want, peer, got in zip(NAMES, exact, rounded, grads, strict=True):
        assert sqnr_db(want, got) >= sqnr_db(want, peer) - 6, name


def test_kernels_do_what_xla_does():
    mosaic, xla = results(MOSAIC), results(DELAYED)
    np.testing.assert_array_equal(mosaic[0], xla[0])
    for got, want in zip(mosaic[1:3], xla[1:3], strict=True):
        assert sqnr_db(f64(want), got) > 60  # the order of the sums


@pytest.mark.parametrize("recipe", [DELAYED, CURRENT, MOSAIC], ids=["delayed", "current", "mosaic"])
@pytest.mark.parametrize("max_chunk_logits", [SMALL, 1 << 27])
def test_observation_holds_the_exponents_of_the_whole_tensors(recipe, max_chunk_logits):
    observed = results(recipe, max_chunk_logits)[3]
    # The gradient is that of logits whose operands are in 8 bits.
    amaxes = (np.abs(f64(HIDDEN)).max(), np.abs(f64(HEAD)).max(), reference(EXPONENTS)[4])
    for slot, (amax, format) in enumerate(zip(amaxes, ("e4m3", "e4m3", "e5m2"), strict=True)):
        want = smallest_exponent(amax, format)
        assert top_exponent(observed.observation[slot]) == want
    health = jfp8.health(observed, recipe)
    assert (np.asarray(health.nonfinite) == 0).all()
    assert (np.asarray(health.saturated_fraction) == 0).all()


def test_split_over_eight_devices_it_sees_and_computes_the_same():
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    on = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))  # noqa: E731
    run = lambda h, w, t, k, s: fp8_cross_entropy(h, w, t, k, s, recipe=CURRENT)[0]  # noqa: E731
    hidden, targets, weights = (x.reshape(8, -1, *x.shape[2:]) for x in (HIDDEN, TARGETS, WEIGHTS))
    args = (hidden, HEAD, targets, weights, state())
    specs = [("data",), ("fsdp", "tensor"), ("data",), ("data",)]
    split = (*(on(x, *spec) for x, spec in zip(args, specs, strict=False)), on(args[-1]))
    grad = jax.jit(jax.grad(run, argnums=(0, 1, 4)))
    got, want = grad(*split), grad(*args)
    for name, a, b in zip(NAMES, got, want, strict=False):
        assert sqnr_db(f64(b), a) > 50, name
    exponents = [[top_exponent(x) for x in g[2].observation] for g in (got, want)]
    assert exponents[0] == exponents[1]


def test_a_factor_of_the_loss_reaches_the_gradients_but_not_the_observation():
    once, thrice = results(DELAYED), results(DELAYED, factor=3.0)
    np.testing.assert_allclose(f64(thrice[2]), 3 * f64(once[2]), rtol=1e-6)
    np.testing.assert_array_equal(thrice[3].observation, once[3].observation)


def test_without_a_gradient_the_loss_is_the_same():
    run = functools.partial(fp8_cross_entropy, recipe=DELAYED)
    total, nll = jax.jit(run)(HIDDEN, HEAD, TARGETS, WEIGHTS, state())
    np.testing.assert_allclose((total, nll), results(DELAYED)[0], rtol=1e-6)


def test_nonfinite_hidden_states_are_seen():
    grad = jax.grad(
        lambda s: fp8_cross_entropy(
            HIDDEN.at[1, 3, 2].set(jnp.nan), HEAD, TARGETS, WEIGHTS, s, recipe=DELAYED
        )[0]
    )
    nonfinite = jfp8.health(jax.jit(grad)(state()), DELAYED).nonfinite
    assert nonfinite[0] > 0 and nonfinite[1] == 0 and nonfinite[2] > 0


def test_rejects():
    with pytest.raises(ValueError, match="N=60 must be a positive multiple of 16"):
        fp8_cross_entropy(HIDDEN, HEAD[:, :60], TARGETS, WEIGHTS, state(), recipe=DELAYED)
    with pytest.raises(ValueError, match="must be a jfp8.ScalingState"):
        fp8_cross_entropy(HIDDEN, HEAD, TARGETS, WEIGHTS, None, recipe=DELAYED)


@pytest.mark.parametrize("recipe", [DELAYED, MOSAIC], ids=["xla", "mosaic"])
def test_h200_program_has_three_fp8_gemms_and_sums_no_head_gradient(recipe, monkeypatch):
    b, t, d, v = 2, 2048, 1024, 4096
    monkeypatch.setattr(loss_module, "_MAX_CHUNK_LOGITS", b * t * v // 4)
    recipe = dataclasses.replace(recipe, weight_grad_dtype="bfloat16")
    shape = jax.ShapeDtypeStruct
    args = (
        shape((b, t, d), jnp.bfloat16),
        shape((d, v), jnp.float32),
        shape((b, t), jnp.int32),
        shape((b, t), jnp.float32),
        jax.eval_shape(state),
    )
    run = lambda *args: fp8_cross_entropy(*args, recipe=recipe)[0]  # noqa: E731
    with hardware.assume_device_kind("NVIDIA H200"):
        compiled = compile_for_h200(jax.grad(run, argnums=(0, 1, 4)), *args)
    gemms = {
        g.op_name.split("head/fp8_dot/")[1].split("/")[0].strip(")"): g
        for g in fp8_dot_count(compiled).gemms
    }
    assert all(g.kind == "cublaslt_fp8" for g in gemms.values())
    executions = {name: g.executions for name, g in gemms.items()}
    assert executions == {"fwd": 4, "dgrad": 4, "wgrad": 1}
    assert sum(g.flops for g in gemms.values()) == 3 * 2 * b * t * d * v
    assert gemms["wgrad"].out_dtype == "bf16" and gemms["fwd"].out_dtype == "f32"

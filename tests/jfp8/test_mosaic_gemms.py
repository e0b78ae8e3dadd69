"""dot_general with its GEMMs by the Mosaic kernel, in the CPU interpreter and as compiled."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jfp8
from jfp8.diagnostics import fp8_dot_count, lowered_dot_count
from jfp8.swiglu_mlp import swiglu_mlp
from pallas_kernels import hardware
from pallas_kernels.interpreter import interpret_kernels
from tests.aot import compile_for_h200
from tests.jfp8 import reference

M, K, N = 256, 128, 256
DENSE = (((1,), (0,)), ((), ()))
BATCHED = (((2,), (1,)), ((0,), (0,)))
XLA = jfp8.Recipe(name="current", quantize_implementation="xla")
MOSAIC = dataclasses.replace(XLA, gemm_implementation="mosaic")
FORWARD = dataclasses.replace(XLA, gemm_implementation="mosaic_forward")


def run(recipe, numbers, x, w):
    """The result, its gradients and the observation."""

    def loss(x, w, state):
        out = jfp8.dot_general(x, w, numbers, state, recipe=recipe)
        return (out.astype(jnp.float32) ** 2).sum(), out

    with interpret_kernels():
        gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(
            x, w, jfp8.init_state(recipe)
        )
    return out, *gradients


def assert_close(got, want):
    """float32 sums of the same products, taken in another order."""
    got, want = (np.asarray(x, np.float64) for x in (got, want))
    assert np.abs(got - want).max() <= 2.0**-20 * np.abs(want).max()


@pytest.mark.parametrize(
    ("batch", "casts"), [((), "mosaic"), ((2,), "xla")], ids=["matrix", "stack"]
)
def test_same_result_gradients_and_observation_as_xla(batch, casts):
    size = int(np.prod(batch))
    x = reference.normal(0, size * M, K).reshape(*batch, M, K)
    w = reference.normal(1, size * K, N).reshape(*batch, K, N)
    numbers = BATCHED if batch else DENSE
    mosaic, xla = (dataclasses.replace(r, quantize_implementation=casts) for r in (MOSAIC, XLA))
    out, dx, dw, state = run(mosaic, numbers, x, w)
    want = run(xla, numbers, x, w)
    assert_close(out, want[0])
    # The gradient of the loss is the result itself, cast to two bits of mantissa: where a rounding
    # of it falls on the other side of a tie, it is off by a quarter.
    for got, expected in zip((dx, dw), want[1:3], strict=True):
        norm = np.linalg.norm(expected)
        assert np.linalg.norm(np.asarray(got) - np.asarray(expected)) <= 0.01 * norm
    np.testing.assert_array_equal(state.observation, want[3].observation)


def test_refuses_a_shape_and_a_device_with_the_reason():
    x, w = jnp.zeros((M, K)), jnp.zeros((K, 48))
    dot = functools.partial(jfp8.dot_general, dimension_numbers=DENSE, recipe=MOSAIC)
    with pytest.raises(NotImplementedError, match="kernel is for Hopper, but .* implementation='x"):
        dot(x, w, state=jfp8.init_state(MOSAIC))
    with (
        hardware.assume_device_kind("NVIDIA H200"),
        pytest.raises(NotImplementedError, match="48 rows of rhs_t must be a multiple of"),
    ):
        dot(x, w, state=jfp8.init_state(MOSAIC))


def test_recipe_rejects_another_name():
    with pytest.raises(ValueError, match="gemm_implementation='cuda' must be one of xla, mosaic"):
        jfp8.Recipe(gemm_implementation="cuda")


def struct(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def sizes_of(report):
    return sorted((g.kind, g.m, g.n, g.k, g.op_name.split("fp8_dot/")[1][:3]) for g in report.gemms)


@pytest.mark.parametrize("base", [FORWARD, MOSAIC], ids=["forward", "all"])
def test_reports_count_the_kernel_as_an_fp8_gemm(base):
    m, k, n = 1024, 512, 2048
    recipe = dataclasses.replace(
        base, name="delayed", calibration="explicit", quantize_implementation="mosaic"
    )

    def layer(x, w, state, grad):
        dot = functools.partial(jfp8.dot_general, dimension_numbers=DENSE, recipe=recipe)
        out, pullback = jax.vjp(lambda x, w, state: dot(x, w, state=state), x, w, state)
        return out, pullback(grad)

    state = jax.eval_shape(lambda: jfp8.init_state(recipe))
    arguments = struct(m, k), struct(k, n, dtype=jnp.float32), state, struct(m, n)
    with hardware.assume_device_kind("NVIDIA H200"):
        lowered = jax.jit(layer).trace(*arguments).lower(lowering_platforms=("cuda",))
        compiled = compile_for_h200(layer, *arguments)
    sizes = {"fwd": (m, n, k), "dgr": (m, k, n), "wgr": (k, n, m)}
    for report, exact in ((lowered_dot_count(lowered), "dot"), (fp8_dot_count(compiled), "cub")):
        found = {name: (kind, *rest) for kind, *rest, name in sizes_of(report)}
        assert found.keys() == sizes.keys() and report.other_count == 0
        assert found["fwd"] == ("mosaic_fp8", *sizes["fwd"])
        for name in ("dgr", "wgr"):
            kind, *size = found[name]
            assert kind.startswith(exact if base == FORWARD else "mosaic_fp8") and sorted(
                size
            ) == sorted(sizes[name])
        assert report.fp8_flops == 3 * 2 * m * n * k


def test_both_gemms_of_the_mlp_are_the_kernel():
    recipe = dataclasses.replace(MOSAIC, name="delayed", calibration="explicit")
    state = jax.eval_shape(lambda: jfp8.init_state(recipe))
    arguments = struct(1024, 512), struct(512, 2048), struct(1024, 512), state, state
    mlp = functools.partial(swiglu_mlp, recipe=recipe, group=128)
    with hardware.assume_device_kind("NVIDIA H200"):
        lowered = jax.jit(mlp).trace(*arguments).lower(lowering_platforms=("cuda",))
    assert [g.kind for g in lowered_dot_count(lowered).gemms] == ["mosaic_fp8"] * 2


def test_all_six_gemms_of_the_mlp_and_its_gradient_are_the_kernel():
    recipe = dataclasses.replace(MOSAIC, name="delayed", calibration="explicit")
    state = jax.eval_shape(lambda: jfp8.init_state(recipe))

    def loss(x, w1, w2, states):
        out = swiglu_mlp(x, w1, w2, *states, recipe=recipe, group=128)
        return out.sum(), out

    arguments = struct(1024, 512), struct(512, 2048), struct(1024, 512), (state, state)
    with hardware.assume_device_kind("NVIDIA H200"):
        gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True))
        lowered = gradient.trace(*arguments).lower(lowering_platforms=("cuda",))
    assert [g.kind for g in lowered_dot_count(lowered).gemms] == ["mosaic_fp8"] * 6

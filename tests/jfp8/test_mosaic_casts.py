"""dot_general with the Mosaic casts: the same numbers and the same state as with XLA's, under every
transformation. The kernels run in the CPU interpreter.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jfp8
from jfp8.diagnostics import fp8_dot_count
from jfp8.scaling import EXPONENTS
from pallas_kernels import hardware
from pallas_kernels.interpreter import interpret_kernels
from tests.aot import compile_for_h200
from tests.jfp8 import reference
from tests.jfp8.test_compiled import large_passes

M, K, N = 128, 128, 64
DENSE = (((1,), (0,)), ((), ()))
MOSAIC = jfp8.Recipe(quantize_implementation="mosaic")
XLA = dataclasses.replace(MOSAIC, quantize_implementation="xla")
X, W = reference.normal(0, M, K), reference.normal(1, K, N)


@pytest.fixture(autouse=True)
def interpreted():
    with interpret_kernels():
        yield


def dot(recipe, x, w, state):
    return jfp8.dot_general(x, w, DENSE, state, recipe=recipe)


def calibrated():
    """A state of which the operands saturate a little and underflow a little."""
    state = jfp8.init_state(XLA)
    scale = jnp.asarray([2.0**-8, 2.0**-8, 2.0**-10], jnp.float32)
    return state._replace(scale=scale)


def loss(recipe, x, w, state):
    return (dot(recipe, x, w, state) ** 2).sum()


def gradients(function, *args):
    return jax.jit(jax.value_and_grad(function, argnums=tuple(range(len(args)))))(*args)


def assert_same_state(mosaic, xla):
    """Exponents, counters, and what an update makes of them; one-hots may be added less often."""
    observed, expected = (np.asarray(s.observation) for s in (mosaic, xla))
    highest = [(x[..., EXPONENTS - 1 :: -1] > 0).argmax(-1) for x in (observed, expected)]
    np.testing.assert_array_equal(*highest)
    np.testing.assert_array_equal(observed[..., EXPONENTS + 1 :], expected[..., EXPONENTS + 1 :])
    assert (observed[..., :EXPONENTS].sum(-1) > 0).all()


def assert_same(run):
    """`run(recipe)` returns arrays and states; those of the two recipes must be equal."""
    mosaic, xla = run(MOSAIC), run(XLA)
    is_state = lambda x: isinstance(x, jfp8.ScalingState)  # noqa: E731
    for got, want in zip(
        jax.tree.leaves(mosaic, is_leaf=is_state),
        jax.tree.leaves(xla, is_leaf=is_state),
        strict=True,
    ):
        if is_state(got):
            assert_same_state(got, want)
        else:
            np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


@pytest.mark.parametrize("options", [{"name": "current"}, {"calibration": "explicit"}], ids=str)
def test_value_gradients_and_observation_are_xlas(options):
    state = calibrated() if options.get("calibration") else jfp8.init_state(XLA)

    def run(recipe):
        recipe = dataclasses.replace(recipe, **options)
        return gradients(functools.partial(loss, recipe), X, W, state)

    assert_same(run)


def test_value_without_gradient_is_xlas():
    assert_same(lambda recipe: jax.jit(functools.partial(dot, recipe))(X, W, calibrated()))


def test_batched_dot():
    x, w = reference.normal(2, 2, M, K), reference.normal(3, 2, K, N)
    dimensions = (((2,), (1,)), ((0,), (0,)))

    def total(recipe, x, w, s):
        return (jfp8.dot_general(x, w, dimensions, s, recipe=recipe) ** 2).sum()

    assert_same(lambda recipe: gradients(functools.partial(total, recipe), x, w, calibrated()))


def test_layer_used_twice_and_accumulation():
    def twice(recipe, x, w, s):
        return loss(recipe, x, w, s) + loss(recipe, 40 * x, w, s)

    assert_same(lambda recipe: gradients(functools.partial(twice, recipe), X, W, calibrated()))


def test_vmap_over_rows_with_one_state():
    def mapped(recipe, x, w, s):
        return jax.vmap(functools.partial(loss, recipe), in_axes=(0, None, None))(x, w, s).sum()

    x = jnp.stack([X, 9 * X])
    assert_same(lambda recipe: gradients(functools.partial(mapped, recipe), x, W, calibrated()))


def test_scanned_layers():
    square = reference.normal(4, 2, K, K) / 16
    states = jax.tree.map(lambda a: jnp.stack([a, a]), calibrated())

    def total(recipe, x, weights, states):
        layer = lambda x, ws: (jnp.tanh(dot(recipe, x, *ws)), None)  # noqa: E731
        return lax.scan(layer, x, (weights, states))[0].sum()

    assert_same(lambda recipe: gradients(functools.partial(total, recipe), X, square, states))


def test_shard_map_with_check_vma():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])

    def run(recipe):
        mapped = jax.shard_map(
            functools.partial(dot, recipe),
            mesh=mesh,
            in_specs=(P("data"), P(), P()),
            out_specs=P("data"),
        )
        return gradients(lambda x, w, s: (mapped(x, w, s) ** 2).sum(), X, W, calibrated())

    assert_same(run)


def test_special_values_are_seen_and_never_enter_the_history():
    special = X.at[7, 9].set(jnp.nan)
    _, (_, _, observed) = gradients(functools.partial(loss, MOSAIC), special, W, calibrated())
    nonfinite = jfp8.health(observed, MOSAIC).nonfinite
    assert nonfinite[0] > 0 and nonfinite[1] == 0 and nonfinite[2] > 0
    new = jfp8.update(calibrated(), observed, MOSAIC)
    assert jnp.isfinite(new.scale).all() and new.scale[0] == calibrated().scale[0]


@pytest.mark.parametrize(
    ("m", "k", "message"), [(100, 128, "multiple of 16"), (96, 128, "96 rows must be a multiple")]
)
def test_refuses_a_shape_with_the_reason(m, k, message):
    with pytest.raises((ValueError, NotImplementedError), match=message):
        jax.eval_shape(
            jax.grad(functools.partial(loss, MOSAIC), argnums=1),
            *(jnp.zeros((m, k)), jnp.zeros((k, N)), calibrated()),
        )


def test_recipe_rejects_another_name():
    with pytest.raises(
        ValueError, match="quantize_implementation='cuda' must be one of auto, xla, mosaic"
    ):
        jfp8.Recipe(quantize_implementation="cuda")


AUTO = jfp8.Recipe()


def kernels(function, *args):
    """How many casting kernels a function starts, by its jaxpr."""
    jaxpr = jax.make_jaxpr(lambda *args: function(*args))(*args)  # a new one is traced anew
    return len(re.findall(r"name=(?:swiglu_|swiglu_grad_)?quantize\b", str(jaxpr)))


@pytest.mark.parametrize(
    ("m", "k", "n", "expected"),
    [
        (M, K, N, 3),
        (64, K, N, 0),  # lhs and gradient have too few rows
        (M, 64, N, 0),  # rhs has
        (M, K, 80, 0),  # rhs and gradient are as wide as no tile
    ],
)
def test_auto_casts_all_operands_of_a_dot_by_the_kernel_or_none(m, k, n, expected):
    assert AUTO.quantize_implementation == "auto"
    x, w = jax.ShapeDtypeStruct((m, k), jnp.bfloat16), jax.ShapeDtypeStruct((k, n), jnp.float32)
    gradient = jax.grad(functools.partial(loss, AUTO), argnums=(0, 1))
    assert kernels(gradient, x, w, calibrated()) == expected
    with interpret_kernels(False):
        assert kernels(gradient, x, w, calibrated()) == 0  # a CPU


def test_auto_leaves_a_stack_of_matrices_to_xla():
    x, w = jnp.zeros((2, M, K), jnp.bfloat16), jnp.zeros((2, K, N))

    def run(x, w, recipe):
        numbers = (((2,), (1,)), ((0,), (0,)))
        return jfp8.dot_general(x, w, numbers, calibrated(), recipe=recipe)

    assert kernels(functools.partial(run, recipe=AUTO), x, w) == 0
    assert kernels(functools.partial(run, recipe=MOSAIC), x, w) == 2


def test_auto_computes_what_the_kernels_compute():
    results = [
        jax.value_and_grad(functools.partial(loss, recipe), argnums=(0, 1, 2))(X, W, calibrated())
        for recipe in (AUTO, MOSAIC)
    ]
    jax.tree.map(np.testing.assert_array_equal, *results)


def test_auto_casts_a_kernel_by_itself_and_swiglu_with_its_dots():
    w = jnp.zeros((K, 2 * 128))
    assert kernels(functools.partial(jfp8.cast_kernel, recipe=AUTO), w, calibrated()) == 1
    half = jnp.zeros((64, N))
    assert kernels(functools.partial(jfp8.cast_kernel, recipe=AUTO), half, calibrated()) == 0
    x, w2 = jnp.zeros((M, K), jnp.bfloat16), jnp.zeros((128, K))

    def mlp(x, w1, w2, group):
        return jfp8.swiglu_mlp(x, w1, w2, calibrated(), calibrated(), group=group, recipe=AUTO)

    assert kernels(functools.partial(mlp, group=128), x, w, w2) == 4
    assert kernels(functools.partial(mlp, group=64), x, w, w2) == 0


def test_h200_program_reads_each_tensor_once_and_transposes_nothing():
    jax.config.update("jax_disable_most_optimizations", False)
    m, k, n = 4096, 1024, 2048
    recipe = dataclasses.replace(MOSAIC, calibration="explicit")

    def layer(x, w, state, grad):
        out, vjp = jax.vjp(functools.partial(dot, recipe), x, w, state)
        return out, vjp(grad)

    shape = jax.ShapeDtypeStruct
    state = jax.eval_shape(lambda: jfp8.init_state(recipe))
    bf16 = [shape(s, jnp.bfloat16) for s in ((m, k), (m, n))]
    with interpret_kernels(False), hardware.assume_device_kind("NVIDIA H200"):
        compiled = compile_for_h200(layer, bf16[0], shape((k, n), jnp.float32), state, bf16[1])
    report = fp8_dot_count(compiled)
    assert report.fp8_flops == 3 * 2 * m * k * n and report.other_count == 0
    text = re.sub(r"\[(\d+),2,(\d+)\]", lambda s: f"[{2 * int(s[1])},{s[2]}]", compiled.as_text())
    assert large_passes(text, m * k // 2) == sorted(
        [
            f"f8e4m3fn[{k},{m}] f8e4m3fn[{m},{k}]",  # lhs, both layouts
            f"f8e4m3fn[{k},{n}] f8e4m3fn[{n},{k}]",  # rhs
            f"f8e5m2[{n},{m}] f8e5m2[{m},{n}]",  # the gradient
            f"bf16[{m},{n}]",  # the three GEMMs
            f"bf16[{m},{k}]",
            f"f32[{k},{n}]",
        ]
    )

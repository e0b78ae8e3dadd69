"""FP8 dots against NumPy float64: values, gradients, dtypes, dimension numbers, refusals."""

import functools
import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jfp8
from jfp8.validation import ALIGNMENT
from tests.jfp8 import reference
from tests.jfp8.reference import normal

DENSE = (((1,), (0,)), ((), ()))
RECIPES = {
    "delayed": jfp8.Recipe(),
    "current": jfp8.Recipe(name="current"),
    "calibrating": jfp8.Recipe(calibration="explicit").calibrating(),
    "e4m3_gradient": jfp8.Recipe(gradient_format="e4m3"),
}
by_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)


def value_and_gradients(recipe, lhs, rhs, grad, state=None, dimensions=DENSE):
    """out, dlhs, drhs, observed state."""
    state = jfp8.init_state(recipe) if state is None else state

    @jax.jit
    def run(lhs, rhs, state, grad):
        dot = functools.partial(jfp8.dot_general, dimension_numbers=dimensions, recipe=recipe)
        out, vjp = jax.vjp(lambda a, b, s: dot(a, b, state=s), lhs, rhs, state)
        return out, *vjp(grad)

    return run(lhs, rhs, state, grad)


@by_recipe
def test_values_and_gradients_are_those_of_the_quantised_operands(recipe):
    x, w = normal(0, 96, 64, dtype=jnp.bfloat16), 0.1 * normal(1, 64, 48)
    g = (1e-4 * normal(2, 96, 48)).astype(jnp.bfloat16)
    out, dx, dw, _ = value_and_gradients(recipe, x, w, g)
    grad_format = recipe.gradient_format
    qx, qw, qg = (
        reference.quantize(t, reference.amax_exponent(f, t), f)
        for t, f in ((x, "e4m3"), (w, "e4m3"), (g, grad_format))
    )
    for got, want, dtype in (
        (out, qx @ qw, jnp.bfloat16),
        (dx, qg @ qw.T, jnp.bfloat16),
        (dw, qx.T @ qg, jnp.float32),
    ):
        assert got.dtype == dtype
        # One rounding to bfloat16 costs 2**-9 of the value; XLA:CPU may sum in bfloat16 besides.
        assert reference.sqnr_db(want, got) > (50 if dtype == jnp.bfloat16 else 100)


@pytest.mark.parametrize("gradient_format, sqnr", [("e5m2", 24.6), ("e4m3", 28.4)])
def test_sqnr_of_gaussian_operands(gradient_format, sqnr):
    """The figures that per-tensor FP8 is known to reach; a tenth of a dB is the spread of seeds."""
    recipe = jfp8.Recipe(gradient_format=gradient_format)
    x, w, g = normal(3, 256, 256), normal(4, 256, 256), normal(5, 256, 256)
    out, dx, dw, _ = value_and_gradients(recipe, x, w, g)
    x, w, g = map(reference.f64, (x, w, g))
    assert reference.sqnr_db(x @ w, out) == pytest.approx(28.4, abs=0.5)
    assert reference.sqnr_db(g @ w.T, dx) == pytest.approx(sqnr, abs=0.5)
    assert reference.sqnr_db(x.T @ g, dw) == pytest.approx(sqnr, abs=0.5)


def test_delayed_uses_the_scales_of_the_state_and_nothing_of_this_step():
    recipe = jfp8.Recipe(calibration="explicit")
    exponents = np.asarray([-5, -9, -20])
    state = jfp8.init_state(recipe)._replace(scale=jnp.asarray(2.0**exponents, jnp.float32))
    x, w, g = normal(0, 32, 32), normal(1, 32, 32), normal(2, 32, 32)
    out, dx, dw, _ = value_and_gradients(recipe, 64 * x, w, 1e-4 * g, state)
    qx = reference.quantize(64 * x, -5, "e4m3")  # clips
    qw = reference.quantize(w, -9, "e4m3")
    qg = reference.quantize(1e-4 * g, -20, "e5m2")
    assert np.abs(reference.f64(64 * x)).max() > 448 * 2.0**-5
    assert reference.sqnr_db(qx @ qw, out) > 100
    assert reference.sqnr_db(qg @ qw.T, dx) > 100
    assert reference.sqnr_db(qx.T @ qg, dw) > 100


def test_an_uncalibrated_explicit_state_is_loud():
    recipe = jfp8.Recipe(calibration="explicit")
    x, w = normal(0, 32, 32), normal(1, 32, 32)
    with pytest.raises(ValueError, match=r"not calibrated.*recipe\.calibrating\(\)"):
        jfp8.dot_general(x, w, DENSE, jfp8.init_state(recipe), recipe=recipe)
    out, dx, dw, _ = value_and_gradients(recipe, x, w, jnp.ones((32, 32)))
    assert all(np.isnan(t).all() for t in (out, dx, dw))


def test_calibrating_step_gives_the_delayed_state():
    recipe = jfp8.Recipe(calibration="explicit")
    x, w, g = normal(0, 32, 32), normal(1, 32, 32), normal(2, 32, 32)
    state = jfp8.init_state(recipe)
    *_, observed = value_and_gradients(recipe.calibrating(), x, w, g, state)
    state = jfp8.update(state, observed, recipe)
    for slot, tensor, format in ((0, x, "e4m3"), (1, w, "e4m3"), (2, g, "e5m2")):
        assert state.scale[slot] == 2.0 ** reference.amax_exponent(format, tensor)
    now = value_and_gradients(recipe, x, w, g, state)[:3]
    fresh = value_and_gradients(recipe.calibrating(), x, w, g)[:3]
    for a, b in zip(now, fresh, strict=True):  # the same scales: the same bits
        assert np.array_equal(a, b)


def test_saturation_and_underflow_are_counted():
    recipe = jfp8.Recipe(calibration="explicit")
    state = jfp8.init_state(recipe)._replace(scale=jnp.ones(3))
    x = normal(0, 32, 32).at[0, :8].set(1e4).at[1, :4].set(1e-6)
    w = jnp.ones((32, 32))
    *_, observed = value_and_gradients(recipe, x, w, jnp.full((32, 32), 1e-7), state)
    health = jfp8.health(observed, recipe)
    assert health.saturated_fraction[0] == 8 / 1024
    tiny = np.abs(reference.f64(x)) <= 2.0**-10
    assert health.underflowed_fraction[0] == tiny.sum() / 1024 >= 4 / 1024
    assert health.underflowed_fraction[2] == 1  # loud: every gradient is lost
    assert health.saturated_fraction[1] == health.underflowed_fraction[1] == 0
    assert health.amax_edge[0] == 14336 >= 1e4  # 448 * 32


CASES = {
    "dense_3d": ("btd,df->btf", (2, 16, 32), (32, 48)),
    "two_free_rhs": ("btd,dnh->btnh", (2, 16, 32), (32, 4, 16)),
    "two_contracted": ("btnh,nhd->btd", (2, 16, 4, 8), (4, 8, 32)),
    "transposed_rhs": ("btd,fd->btf", (2, 16, 32), (48, 32)),
    "expert_batch": ("etd,edf->etf", (3, 16, 32), (3, 32, 48)),
    "two_batches": ("abtd,bafd->abtf", (2, 3, 16, 32), (3, 2, 16, 32)),
}


def dimension_numbers(equation: str) -> tuple:
    lhs, rhs, out = re.split(",|->", equation)
    contract = [c for c in lhs if c in rhs and c not in out]
    batch = [c for c in lhs if c in rhs and c in out]
    return tuple(
        tuple(tuple(term.index(c) for c in letters) for term in (lhs, rhs))
        for letters in (contract, batch)
    )


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_dimension_numbers(case):
    equation, lhs_shape, rhs_shape = case
    recipe = jfp8.Recipe()
    x, w = normal(0, *lhs_shape), normal(1, *rhs_shape)
    lhs, rhs, out = re.split(",|->", equation)
    qx = reference.quantize(x, reference.amax_exponent("e4m3", x), "e4m3")
    qw = reference.quantize(w, reference.amax_exponent("e4m3", w), "e4m3")
    want = np.einsum(equation, qx, qw)
    g = normal(2, *want.shape)
    qg = reference.quantize(g, reference.amax_exponent("e5m2", g), "e5m2")
    got, dx, dw, observed = value_and_gradients(
        recipe, x, w, g, dimensions=dimension_numbers(equation)
    )
    assert got.shape == want.shape
    assert reference.sqnr_db(want, got) > 100
    assert reference.sqnr_db(np.einsum(f"{out},{rhs}->{lhs}", qg, qw), dx) > 100
    assert reference.sqnr_db(np.einsum(f"{lhs},{out}->{rhs}", qx, qg), dw) > 100
    slots = ((x, "e4m3"), (w, "e4m3"), (g, "e5m2"))
    for seen, (tensor, format) in zip(observed.observation, slots, strict=True):
        assert reference.top_exponent(seen) == reference.amax_exponent(format, tensor)


def equations(jaxpr) -> Iterator:
    """Every equation of a jaxpr and of the jaxprs inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for parameter in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_gemm_is_a_direct_fp8_dot_of_matrices(case):
    equation, lhs_shape, rhs_shape = case
    recipe, dimensions = jfp8.Recipe(), dimension_numbers(equation)

    def loss(x, w, s):
        out = jfp8.dot_general(x, w, dimensions, s, recipe=recipe)
        return out.astype(jnp.float32).sum()

    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(
        jnp.ones(lhs_shape, jnp.bfloat16), jnp.ones(rhs_shape), jfp8.init_state(recipe)
    )
    dots = [e for e in equations(jaxpr.jaxpr) if e.primitive.name == "dot_general"]
    e4m3, e5m2 = jnp.float8_e4m3fn, jnp.float8_e5m2
    highest = (lax.Precision.HIGHEST,) * 2
    assert [
        (
            tuple(v.aval.dtype for v in e.invars),
            e.params["preferred_element_type"],
            e.params["precision"],
        )
        for e in dots
    ] == [
        ((e4m3, e4m3), jnp.bfloat16, (lax.Precision.DEFAULT,) * 2),
        ((e5m2, e4m3), jnp.bfloat16, highest),
        ((e4m3, e5m2), jnp.float32, highest),
    ]
    for dot in dots:  # one contracted and one free dimension each: what cuBLASLt takes
        (contract, _), (batch, _) = dot.params["dimension_numbers"]
        assert len(contract) == 1
        assert {v.aval.ndim - len(batch) for v in dot.invars} == {2} and len(batch) <= 1


def test_no_two_e5m2_operands_in_any_recipe():
    formats = [recipe.formats for recipe in RECIPES.values()]
    assert all(lhs is jfp8.E4M3 and rhs is jfp8.E4M3 for lhs, rhs, _ in formats)


def test_bf16_recipe_is_the_plain_dot_with_float32_weight_gradient():
    recipe = jfp8.Recipe(name="bf16")
    x, w = normal(0, 40, 24, dtype=jnp.bfloat16), normal(1, 24, 7)  # no alignment asked for
    g = normal(2, 40, 7, dtype=jnp.bfloat16)
    run = jax.jit(
        lambda x, w: jax.vjp(lambda x, w: jfp8.dot_general(x, w, DENSE, None, recipe=recipe), x, w)
    )
    out, vjp = run(x, w)
    dx, dw = vjp(g)
    w16 = w.astype(jnp.bfloat16)
    x64, w64, g64 = map(reference.f64, (x, w16, g))
    assert (out.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    assert reference.sqnr_db(x64 @ w64, out) > 50
    assert reference.sqnr_db(g64 @ w64.T, dx) > 50
    assert reference.sqnr_db(x64.T @ g64, dw) > 100  # never rounded to bfloat16


@pytest.mark.parametrize("name", ["bf16", "delayed", "current"])
def test_weight_gradient_in_bfloat16_is_one_rounding_of_the_float32_sum(name):
    x, w = normal(0, 4096, 32, dtype=jnp.bfloat16), normal(1, 32, 48)
    g = normal(2, 4096, 48, dtype=jnp.bfloat16)
    exact, narrow = (
        value_and_gradients(jfp8.Recipe(name=name, weight_grad_dtype=dtype), x, w, g)
        for dtype in ("float32", "bfloat16")
    )
    for a, b in ((exact[0], narrow[0]), (exact[1], narrow[1])):
        np.testing.assert_array_equal(a, b)
    assert narrow[2].dtype == jnp.float32  # what the optimizer gets
    # Half a unit in the last of 8 bits is at most 2**-8; a sum in bfloat16 would be far off.
    error = np.abs(np.asarray(narrow[2] - exact[2], np.float64))
    assert (error <= 1.001 * 2.0**-8 * np.abs(np.asarray(exact[2], np.float64))).all()
    if name != "bf16":  # there XLA:CPU drops the rounding, as it may unless told otherwise
        np.testing.assert_array_equal(narrow[2], narrow[2].astype(jnp.bfloat16))


def test_bf16_recipe_leaves_a_state_alone():
    recipe = jfp8.Recipe(name="bf16")
    state = jfp8.init_state(jfp8.Recipe())
    *_, observed = value_and_gradients(
        recipe, normal(0, 16, 16), normal(1, 16, 16), jnp.ones((16, 16)), state
    )
    assert not observed.observation.any()


def test_bitwise_deterministic():
    recipe = jfp8.Recipe()
    arguments = recipe, normal(0, 64, 64), normal(1, 64, 64), normal(2, 64, 64)
    first, second = value_and_gradients(*arguments), value_and_gradients(*arguments)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert np.array_equal(a, b)


OK = {"lhs": jnp.ones((32, 32), jnp.bfloat16), "rhs": jnp.ones((32, 32)), "state": None}
BAD = {
    "m": ({"lhs": jnp.ones((24, 32))}, r"M=24 must be a positive multiple of 16"),
    "k": (
        {"lhs": jnp.ones((32, 40)), "rhs": jnp.ones((40, 32))},
        r"K=40 .*lhs\.shape=\(32, 40\).*Recipe\.skip",
    ),
    "n": ({"rhs": jnp.ones((32, 8))}, r"N=8 must be a positive multiple of 16"),
    "empty": ({"lhs": jnp.ones((0, 32))}, r"M=0 must be a positive multiple"),
    "lhs_dtype": (
        {"lhs": jnp.ones((32, 32), jnp.float16)},
        r"lhs\.dtype=float16 must be bfloat16 or float32",
    ),
    "rhs_dtype": ({"rhs": jnp.ones((32, 32), jnp.int8)}, r"rhs\.dtype=int8"),
    "no_state": ({"state": None}, r"state=NoneType must be a jfp8\.ScalingState"),
    "not_a_state": ({"state": {"scale": 1}}, r"state=dict must be"),
    "stacked_state": (
        {"state": jax.tree.map(lambda a: jnp.stack([a, a]), jfp8.init_state(jfp8.Recipe()))},
        r"state\.scale\.shape=\(2, 3\) must be \(3,\).*stacked",
    ),
}


@pytest.mark.parametrize("change, message", BAD.values(), ids=BAD)
def test_rejects(change, message):
    recipe = jfp8.Recipe()
    arguments = {**OK, "state": jfp8.init_state(recipe), **change}
    with pytest.raises(ValueError, match=message):
        jfp8.dot_general(
            arguments["lhs"], arguments["rhs"], DENSE, arguments["state"], recipe=recipe
        )
    assert ALIGNMENT == 16

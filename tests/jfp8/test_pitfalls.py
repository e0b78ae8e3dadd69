"""Where FP8 scaling state goes wrong in JAX: one test per known pitfall (docs/fp8_state.md).

Each runs the case on this library, and on the design that other libraries use (`naive_dot`: the
cotangent of the state *is* the new amax), where it must come out wrong: so the test can fail.
Rows 7 to 10, on several devices, are in test_pitfalls_sharded.py.
"""

import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from jax import lax

import jfp8
import jfp8.linen
import jfp8.nnx
from jfp8.scaling import GRAD, LHS, NONFINITE, RHS
from tests.jfp8 import reference
from tests.jfp8.pitfall_cases import (
    DIMENSIONS,
    RECIPE,
    ZERO,
    K,
    M,
    N,
    W,
    X,
    assert_naive_amax_is_wrong,
    calibrated,
    dot,
    lhs_exponent,
    naive_dot,
    normal,
    observe,
)


@pytest.fixture(name="state")
def state_fixture() -> jfp8.ScalingState:
    return calibrated()


@pytest.mark.parametrize("recipe", [RECIPE, RECIPE.calibrating()], ids=["inline", "calibrating"])
def test_row_01_step_0_keeps_small_gradients(recipe):
    grad = normal(3, M, N, factor=1e-6)
    assert not jfp8.quantize(grad, jnp.float32(1), jfp8.E5M2).any()  # naive: scale 1 at step 0
    fresh = jfp8.init_state(recipe)

    def loss(w):
        return (jfp8.dot_general(X, w, DIMENSIONS, fresh, recipe=recipe) * grad).sum()

    dw = jax.jit(jax.grad(loss))(W)
    assert reference.sqnr_db(reference.f64(X).T @ reference.f64(grad), dw) > 22


def test_row_02_a_layer_used_twice_sees_the_larger_input(state):
    large = 37 * X
    observed = observe(lambda s: (dot(X, W, s) + dot(large, W, s)).sum(), state)
    assert lhs_exponent(observed) == reference.amax_exponent("e4m3", X, large)
    naive = observe(lambda a: (naive_dot(X, W, a) + naive_dot(large, W, a)).sum(), ZERO)
    assert_naive_amax_is_wrong(naive, X, large)


def test_row_03_scan_with_a_broadcast_state(state):
    factors = jnp.asarray([1.0, 100.0, 3.0])

    def loss(dot, s):
        return lax.map(lambda factor: dot(factor * X, W, s).sum(), factors).sum()

    observed = observe(functools.partial(loss, dot), state)
    assert lhs_exponent(observed) == reference.amax_exponent("e4m3", 100 * X)
    naive = observe(functools.partial(loss, naive_dot), ZERO)
    assert_naive_amax_is_wrong(naive, 100 * X)


class Scanned(linen.Module):
    """Three uses of one Dense in an `nn.scan`."""

    dot_general_cls: type
    collections: tuple[str, ...]

    @linen.compact
    def __call__(self, x):
        scan = linen.scan(
            lambda module, carry, _: (module(carry), None),
            variable_broadcast=("params", *self.collections),
            split_rngs={"params": False},
            length=3,
        )
        dense = linen.Dense(K, use_bias=False, dot_general_cls=self.dot_general_cls)
        return scan(dense, x, None)[0]


def test_row_04_state_needs_no_lifting_of_its_own():
    # Linen state must be named to every lifted transform; the one of Flax itself stops there.
    with pytest.raises(flax.errors.ScopeCollectionNotFound):
        Scanned(linen.fp8_ops.Fp8DotGeneral, ()).init(jax.random.key(0), X)
    # An NNX layer is plain data: any JAX transform takes it as it is.
    layer = jfp8.nnx.Linear(K, K, recipe=RECIPE, rngs=nnx.Rngs(0), dtype=jnp.float32)
    graph, scaling, params = nnx.split(layer, jfp8.nnx.Scaling, nnx.Param)

    def loss(scaling):
        layer = nnx.merge(graph, scaling, params)
        return lax.scan(lambda carry, _: (50 * layer(carry), None), X, length=2)[0].sum()

    observed = observe(loss, scaling)["scaling"].get_value()
    second = 50 * reference.f64(X) @ reference.f64(layer.kernel[...])
    assert lhs_exponent(observed) == reference.amax_exponent("e4m3", X, second)


@pytest.mark.parametrize("combine", ["sum", "mean", "scan"])
def test_row_05_gradient_accumulation(state, combine):
    microbatches = X * jnp.asarray([1.0, 24.0, 5.0])[:, None, None]

    def loss(dot, x, s):
        return dot(x, W, s).sum()

    gradient = {f: jax.grad(functools.partial(loss, f), argnums=1) for f in (dot, naive_dot)}
    initial = {dot: state, naive_dot: ZERO}

    @functools.partial(jax.jit, static_argnums=0)
    def accumulate(f):
        if combine == "scan":

            def step(total, x):
                return (jax.tree.map(jnp.add, total, gradient[f](x, initial[f])), None)

            return lax.scan(step, jax.tree.map(jnp.zeros_like, initial[f]), microbatches)[0]
        total = jax.tree.map(lambda *g: sum(g), *(gradient[f](x, initial[f]) for x in microbatches))
        return jax.tree.map(lambda g: g / 3, total) if combine == "mean" else total

    observed = accumulate(dot)
    assert lhs_exponent(observed) == reference.amax_exponent("e4m3", microbatches)
    once = jfp8.update(state, observed, RECIPE)  # once per optimizer step
    assert once.history[LHS, 0] == lhs_exponent(observed)
    assert np.array_equal(once.history[LHS, 1:], state.history[LHS, :-1])
    assert_naive_amax_is_wrong(accumulate(naive_dot), microbatches)


@pytest.mark.parametrize("recipe", [RECIPE, RECIPE.calibrating()], ids=lambda r: r.name)
def test_row_06_vmap(state, recipe):
    batch = X * jnp.asarray([1.0, 900.0, 2.0])[:, None, None]

    def mapped(f, s):
        return jax.vmap(lambda x: f(x, W, s).sum())(batch).sum()

    ours = functools.partial(
        mapped, lambda x, w, s: jfp8.dot_general(x, w, DIMENSIONS, s, recipe=recipe)
    )
    assert lhs_exponent(observe(ours, state)) == reference.amax_exponent("e4m3", batch)
    naive = observe(functools.partial(mapped, naive_dot), ZERO)
    assert_naive_amax_is_wrong(naive, batch)


def test_row_06_vmap_over_experts_with_states_of_their_own():
    factors = jnp.asarray([1.0, 900.0, 0.0])  # the last expert gets no tokens
    batch = X * factors[:, None, None]
    weights = W * jnp.asarray([1.0, 2.0, 4.0])[:, None, None]
    states = jax.tree.map(lambda a: jnp.stack([a] * 3), jfp8.init_state(RECIPE))
    observed = observe(lambda s: jax.vmap(dot)(batch, weights, s).sum(), states)
    new = jfp8.update(states, observed, RECIPE)
    for i in range(2):
        assert new.scale[i, LHS] == 2.0 ** reference.amax_exponent("e4m3", batch[i])
    assert np.isnan(new.scale[2, LHS])
    for i in range(3):
        assert new.scale[i, RHS] == 2.0 ** reference.amax_exponent("e4m3", weights[i])


@pytest.mark.parametrize("how", ["cond", "stop_gradient", "unused"])
def test_row_11_an_unused_layer_keeps_its_state(state, how):
    def loss(f, s):
        if how == "cond":
            return lax.cond(X.sum() > 1e9, lambda: f(X, W, s).sum(), lambda: X.sum())
        if how == "stop_gradient":
            return lax.stop_gradient(f(X, W, s)).sum()
        return X.sum()

    observed = observe(functools.partial(loss, dot), state)
    new = jfp8.update(state, observed, RECIPE)
    assert all(np.array_equal(a, b) for a, b in zip(new, state, strict=True))
    assert float(observe(functools.partial(loss, naive_dot), ZERO)) == 0  # overwrites with zero


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_row_12_a_nonfinite_value_never_enters_the_history(state, bad):
    poisoned = X.at[3, 3].set(bad)
    observed = observe(lambda s: dot(poisoned, W, s).sum(), state)
    assert float(jfp8.health(observed, RECIPE).nonfinite[LHS]) == 1
    assert observed.observation[LHS, NONFINITE] == 1
    new = jfp8.update(state, observed, RECIPE)
    usual = reference.amax_exponent("e4m3", X)
    assert new.history[LHS].tolist() == [usual, usual] + [-np.inf] * 14
    assert new.scale[LHS] == 2.0**usual
    nothing_else = observe(lambda s: dot(jnp.full_like(X, bad), W, s).sum(), state)
    kept = jfp8.update(state, nothing_else, RECIPE)
    assert np.array_equal(kept.history[LHS], state.history[LHS])
    assert kept.scale[LHS] == state.scale[LHS]
    # One bad microbatch does not hide what the good ones needed.
    large = observe(lambda s: (dot(poisoned, W, s) + dot(9 * X, W, s)).sum(), state)
    assert lhs_exponent(large) == reference.amax_exponent("e4m3", 9 * X)
    # The naive maximum of the history stays non-finite for as long as the entry does.
    naive_history = jnp.roll(jnp.ones(16), 1).at[0].set(jnp.abs(poisoned).max())
    assert not np.isfinite(jnp.roll(naive_history, 3).max())


def test_row_13_an_outlier_is_forgotten():
    assert jfp8.Recipe().amax_history_length <= 64  # 1024 elsewhere
    recipe = jfp8.Recipe(amax_history_length=3)
    state = jfp8.init_state(recipe)
    outlier = X.at[0, 0].set(1e4)

    def loss(x, s):
        return jfp8.dot_general(x, W, DIMENSIONS, s, recipe=recipe).sum()

    observe_x = jax.jit(jax.grad(loss, argnums=1))
    exponents = []
    for x in (X, outlier, X, X, X):
        state = jfp8.update(state, observe_x(x, state), recipe)
        exponents.append(int(np.log2(state.scale[LHS])))
    usual = reference.amax_exponent("e4m3", X)
    spike = reference.amax_exponent("e4m3", outlier)
    assert exponents == [usual, spike, spike, spike, usual]
    assert spike > usual


def model() -> jfp8.nnx.Linear:
    layer = jfp8.nnx.Linear(K, N, recipe=RECIPE, rngs=nnx.Rngs(0))
    fresh = jfp8.init_state(RECIPE)
    seen = observe(lambda s: dot(X, W, s).sum(), fresh)
    layer.scaling.set_value(jfp8.update(fresh, seen, RECIPE))
    return layer


def test_row_14_the_optimizer_does_not_see_the_state():
    layer = model()
    before = jax.tree.map(np.asarray, layer.scaling.get_value())
    optimizer = nnx.Optimizer(layer, optax.adamw(1e-3, weight_decay=0.1), wrt=nnx.Param)

    @nnx.jit
    def step(layer, optimizer):
        optimizer.update(layer, nnx.grad(lambda layer: layer(X).sum())(layer))

    step(layer, optimizer)
    after = layer.scaling.get_value()
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    # The naive tree holds the state beside the weights.
    tree = {"kernel": W, "scale": jnp.ones(())}
    adamw = optax.adamw(1e-3, weight_decay=0.1)
    updates, _ = adamw.update(jax.tree.map(jnp.ones_like, tree), adamw.init(tree), tree)
    assert float(optax.apply_updates(tree, updates)["scale"]) != 1


def test_row_15_the_gradient_norm_is_of_the_parameters():
    graph, params, scaling = nnx.split(model(), nnx.Param, jfp8.nnx.Scaling)

    def loss(p, s):
        return nnx.merge(graph, p, s)(X).astype(jnp.float32).mean()

    grads, observed = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, scaling)
    kernel_alone = np.linalg.norm(reference.f64(grads["kernel"].get_value()))
    assert np.isclose(float(optax.tree.norm(grads)), kernel_alone, rtol=1e-4)
    naive = optax.tree.norm((grads, observed))
    assert not np.isclose(float(naive), kernel_alone, rtol=1e-2)


def test_row_16_a_cast_of_the_gradients_keeps_the_maximum(state):
    amax = 449.0  # bfloat16 rounds it to 448: E4M3 with scale 1 would clip it
    x = (X / jnp.abs(X).max()).at[0, 0].set(1.0) * amax
    observed = observe(lambda s: dot(x, W, s).sum(), state)
    cast = jax.tree.map(lambda a: a.astype(jnp.bfloat16), observed)
    new = jfp8.update(state, cast, RECIPE)
    assert new.scale[LHS] == 2.0 == 2.0 ** reference.smallest_exponent(amax, "e4m3")
    assert [a.dtype for a in new] == [a.dtype for a in state]
    naive = float(jnp.abs(x).max().astype(jnp.bfloat16))
    assert reference.smallest_exponent(naive, "e4m3") == 0


def test_row_17_scales_cost_no_gain_error(state):
    """Over 32 amaxes the gain of the product is that of the casts, bit for bit."""
    x, w = X.astype(jnp.bfloat16), W.astype(jnp.bfloat16)
    forward = jax.jit(lambda x, w: dot(x, w, jfp8.init_state(RECIPE)))
    worst_naive = 0.0
    for factor in np.random.default_rng(0).uniform(0.01, 100, 32):
        x_scaled = (x * factor).astype(jnp.bfloat16)
        qx = reference.quantize(x_scaled, reference.amax_exponent("e4m3", x_scaled), "e4m3")
        qw = reference.quantize(w, reference.amax_exponent("e4m3", w), "e4m3")
        exact = (qx @ qw).astype(np.float32)
        # float32 sums in another order, then one rounding to bfloat16 (half an ulp is 2**-9).
        error = np.abs(reference.f64(forward(x_scaled, w)) - exact)
        assert (error <= np.abs(exact) * 2.0**-8 + np.abs(qx).max() * 1e-6).all()
        naive_scale = np.float32(np.abs(reference.f64(x_scaled)).max() / 448)
        worst_naive = max(worst_naive, abs(float(jnp.bfloat16(naive_scale)) / naive_scale - 1))
    assert worst_naive > 1e-3


def count_casts_to_fp8(text: str) -> int:
    return sum("stablehlo.convert" in line and "-> tensor" in line and "f8E" in line.split("->")[1]
               for line in text.splitlines())  # fmt: skip


def test_row_18_remat_keeps_state_and_can_keep_the_casts(state):
    def loss(policy, x, w, s):
        def block(x):
            return jnp.tanh(dot(jnp.tanh(x), w, s))

        return jax.checkpoint(block, policy=policy)(x).sum()

    policies = jax.checkpoint_policies
    named = policies.save_only_these_names(*jfp8.RESIDUAL_NAMES)
    grad = {
        name: jax.jit(jax.value_and_grad(functools.partial(loss, policy), argnums=(0, 1, 2)))
        for name, policy in (
            ("everything", policies.everything_saveable),
            ("nothing", policies.nothing_saveable),
            ("named", named),
        )
    }
    results = {name: f(X, W, state) for name, f in grad.items()}
    for result in results.values():
        for a, b in zip(
            jax.tree.leaves(result), jax.tree.leaves(results["everything"]), strict=True
        ):
            assert np.array_equal(a, b)
    casts = {name: count_casts_to_fp8(f.lower(X, W, state).as_text()) for name, f in grad.items()}
    assert casts["named"] == 3  # lhs, rhs, gradient, each once
    assert casts["nothing"] == 5  # the naive policy casts lhs and rhs again


def test_row_19_only_8_bit_tensors_are_kept_for_the_backward(state):
    x, w = X.astype(jnp.bfloat16), jnp.asarray(W)
    _, backward = jax.vjp(lambda x, w: dot(x, w, state), x, w)
    large = [a for a in jax.tree.leaves(backward) if a.size >= min(M * K, K * N)]
    assert sorted((a.dtype.itemsize, a.size) for a in large) == [(1, K * N), (1, M * K)]
    _, naive = jax.vjp(lambda x, w: x @ w.astype(x.dtype), x, w)
    assert any(a.dtype.itemsize > 1 for a in jax.tree.leaves(naive) if a.size >= K * N)


def test_row_20_evaluation_changes_nothing():
    layer = model()
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(layer)))
    first = nnx.jit(lambda layer: layer(X))(layer)
    assert np.array_equal(first, nnx.jit(lambda layer: layer(X))(layer))
    after = nnx.to_pure_dict(nnx.state(layer))
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert np.array_equal(a, b)
    dense = linen.Dense(
        N, dot_general_cls=functools.partial(jfp8.linen.Fp8DotGeneral, recipe=RECIPE)
    )
    variables = dense.init(jax.random.key(0), X)
    dense.apply(variables, X)  # would raise if it wrote to a collection
    assert set(variables) == {"params", "fp8"}


def test_slots_are_of_lhs_rhs_and_gradient(state):
    grad = normal(5, M, N, factor=1e-3)
    observed = observe(lambda s: (dot(X, W, s) * grad).sum(), state).observation
    assert reference.top_exponent(observed[LHS]) == reference.amax_exponent("e4m3", X)
    assert reference.top_exponent(observed[RHS]) == reference.amax_exponent("e4m3", W)
    assert reference.top_exponent(observed[GRAD]) == reference.amax_exponent("e5m2", grad)

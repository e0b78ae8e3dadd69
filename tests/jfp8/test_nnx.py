"""NNX layers: values, structure of their state, and the transforms of a training step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import jfp8
from jfp8.nnx import Einsum, Linear, Scaling
from tests.jfp8 import reference

EXPLICIT = jfp8.Recipe(calibration="explicit")
X = reference.normal(0, 4, 16, 32)


def test_linear_is_the_dot_plus_bias():
    layer = Linear(32, 48, recipe=jfp8.Recipe(), rngs=nnx.Rngs(0), use_bias=True)
    layer.bias.set_value(jnp.arange(48.0))
    y = layer(X)
    assert y.dtype == jnp.bfloat16 and y.shape == (4, 16, 48)
    assert layer.kernel.get_value().dtype == jnp.float32
    expected = reference.f64(X) @ reference.f64(layer.kernel[...]) + np.arange(48)
    assert reference.sqnr_db(expected, y) > 28


def test_state_structure_is_that_of_the_quantising_recipes():
    def structure(recipe):
        model = nnx.eval_shape(lambda: Linear(32, 48, recipe=recipe, rngs=nnx.Rngs(0)))
        return jax.tree.structure(nnx.state(model)), nnx.state(model, Scaling)

    delayed, scaling = structure(EXPLICIT)
    assert structure(EXPLICIT.calibrating())[0] == delayed
    assert jax.tree.map(jnp.shape, scaling["scaling"].get_value()).scale == (3,)
    assert structure(jfp8.Recipe(name="bf16"))[0] != delayed


def test_layers_of_one_recipe_have_one_graph():
    graph = [
        nnx.graphdef(
            nnx.eval_shape(
                lambda: Einsum("btd,dnh->btnh", (32, 4, 16), recipe=EXPLICIT, rngs=nnx.Rngs(0))
            )
        )
        for _ in range(2)
    ]
    assert graph[0] == graph[1] and hash(graph[0]) == hash(graph[1])  # or jit compiles again


def test_training_step_of_scanned_layers():
    """Calibrates with one graph, goes on with another, on the same stacked states."""

    @nnx.vmap(in_axes=0, out_axes=0)
    def stack(key):
        return Linear(32, 32, recipe=EXPLICIT, rngs=nnx.Rngs(key), dtype=jnp.float32)

    _, params, scaling = nnx.split(
        stack(jax.random.split(jax.random.key(1), 3)), nnx.Param, Scaling
    )
    assert scaling["scaling"].get_value().history.shape == (3, 3, 16)

    def step(recipe):
        graph = nnx.graphdef(
            nnx.eval_shape(
                lambda: Linear(32, 32, recipe=recipe, rngs=nnx.Rngs(0), dtype=jnp.float32)
            )
        )

        def loss(params, scaling):
            def layer(x, stacked):
                return nnx.merge(graph, *stacked)(x), None

            return jnp.square(lax.scan(layer, X, (params, scaling))[0]).mean()

        @jax.jit
        def run(params, scaling):
            value, (_, observed) = jax.value_and_grad(loss, argnums=(0, 1))(params, scaling)
            return value, jfp8.update(scaling, observed, recipe)

        return run

    calibrated, scaling = step(EXPLICIT.calibrating())(params, scaling)
    value, after = step(EXPLICIT)(params, scaling)
    assert np.isfinite(value) and value == calibrated  # the same scales: the same bits
    scales = scaling["scaling"].get_value().scale
    kernels = params["kernel"].get_value()
    assert np.log2(scales[:, 1]).tolist() == [reference.amax_exponent("e4m3", k) for k in kernels]
    assert jax.tree.structure(after) == jax.tree.structure(scaling)


@pytest.mark.parametrize(
    "equation, x_shape, kernel_shape",
    [
        ("btd,dnh->btnh", (2, 16, 32), (32, 4, 16)),
        ("btnh,nhd->btd", (2, 16, 4, 8), (4, 8, 32)),
        ("btd,dnh->bnth", (2, 16, 32), (32, 4, 16)),
        ("etd,efd->etf", (3, 16, 32), (3, 48, 32)),
    ],
)
def test_einsum(equation, x_shape, kernel_shape):
    layer = Einsum(
        equation, kernel_shape, recipe=jfp8.Recipe(), rngs=nnx.Rngs(0), dtype=jnp.float32
    )
    x = reference.normal(1, *x_shape)
    expected = np.einsum(equation, reference.f64(x), reference.f64(layer.kernel[...]))
    y = nnx.jit(lambda layer, x: layer(x))(layer, x)
    assert layer.kernel[...].shape == kernel_shape
    assert y.shape == expected.shape and reference.sqnr_db(expected, y) > 27


def test_einsum_initialises_with_the_true_fan_in():
    layer = Einsum("btnh,nhd->btd", (8, 32, 512), recipe=jfp8.Recipe(), rngs=nnx.Rngs(0))
    assert float(layer.kernel[...].std()) == pytest.approx((8 * 32) ** -0.5, rel=0.02)


@pytest.mark.parametrize(
    "equation", ["btd,df", "...d,df->...f", "btd,de->bte,", "btd,ef->btf", "bdd,df->bf"]
)
def test_einsum_rejects_equations(equation):
    with pytest.raises(ValueError, match="equation=.* must be two operands"):
        Einsum(equation, (16, 16), recipe=jfp8.Recipe(), rngs=nnx.Rngs(0))


def test_einsum_rejects_shapes():
    with pytest.raises(ValueError, match=r"kernel_shape=\(16,\) must have one size"):
        Einsum("btd,df->btf", (16,), recipe=jfp8.Recipe(), rngs=nnx.Rngs(0))
    layer = Einsum("btd,df->btf", (16, 16), recipe=jfp8.Recipe(), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"x\.shape=\(16, 16\) must have the 3 dimensions"):
        layer(jnp.ones((16, 16)))

"""Recipes: what is a valid one, and which layer gets which."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jfp8


def test_recipes_are_static_values():
    assert hash(jfp8.Recipe()) == hash(jfp8.Recipe()) and jfp8.Recipe() == jfp8.Recipe()
    traces = []

    def f(x, recipe):
        traces.append(recipe)
        return x

    jitted = jax.jit(f, static_argnames="recipe")
    for recipe in (jfp8.Recipe(), jfp8.Recipe(), jfp8.Recipe(name="current")):
        jitted(jnp.ones(1), recipe=recipe)
    assert traces == [jfp8.Recipe(), jfp8.Recipe(name="current")]


@pytest.mark.parametrize(
    "name, expected",
    [("blocks.ffn.down", "bf16"), ("blocks.ffn.up", "delayed"), ("head", "bf16"), ("", "delayed")],
)
def test_for_layer(name, expected):
    recipe = jfp8.Recipe(skip=("*.down", "head"))
    assert recipe.for_layer(name).name == expected


def test_calibrating_keeps_the_structure_of_the_state():
    recipe = jfp8.Recipe(amax_history_length=5, margin=1, calibration="explicit")
    twin = recipe.calibrating()
    assert twin.name == "current" and twin.formats == recipe.formats
    shapes = [jax.eval_shape(lambda r=r: jfp8.init_state(r)) for r in (recipe, twin)]
    assert shapes[0] == shapes[1]
    bf16 = jfp8.Recipe(name="bf16")
    assert bf16.calibrating() == bf16


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("name", "fp8", "Recipe.name='fp8' must be one of bf16, delayed, current"),
        ("gradient_format", "e3m4", "must be one of e5m2, e4m3"),
        ("calibration", "auto", "must be one of inline, explicit"),
        ("amax_history_length", 0, "amax_history_length=0 must be at least 1"),
        ("margin", 9, r"margin=9 must be in \[-8, 8\]"),
        ("skip", "*.down", "must be a tuple of glob patterns"),
    ],
)
def test_rejects(field, value, message):
    with pytest.raises(ValueError, match=message):
        jfp8.Recipe(**{field: value})


@pytest.mark.parametrize("format", [jfp8.E4M3, jfp8.E5M2], ids=lambda f: f.name)
def test_formats_agree_with_ml_dtypes(format):
    info = ml_dtypes.finfo(format.dtype)
    assert format.max_value == float(info.max) == 1.75 * 2.0**format.max_exponent
    assert format.min_subnormal == float(info.smallest_subnormal)
    assert np.dtype(format.dtype).itemsize == 1

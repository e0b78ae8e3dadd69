"""Bands by hand arithmetic, and the semantics of T != S against JAX's own attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import flash_attention
from pallas_kernels.flash_attention.masks import Band, dense_mask, make_band
from tests.pallas_kernels import oracle


@pytest.mark.parametrize(
    ("is_causal", "window", "t", "s", "band"),
    [
        (False, None, 8, 8, Band()),
        (True, None, 8, 8, Band(None, 0)),
        (False, 3, 8, 8, Band(3, 3)),
        (True, 3, 8, 8, Band(3, 0)),
        (False, (2, 5), 8, 8, Band(2, 5)),
        (False, (7, 7), 8, 8, Band()),  # the corner pairs are 7 apart
        (False, (6, 6), 8, 8, Band(6, 6)),
        (True, None, 8, 1, Band()),  # one key: every query comes at or after it
        (False, (3, 0), 4, 8, Band(None, 0)),
    ],
)
def test_make_band(is_causal, window, t, s, band):
    assert make_band(is_causal, window, t, s) == band


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("window", [None, (0, 0), (2, 3), (9, 1)])
@pytest.mark.parametrize(("t", "s"), [(6, 6), (3, 9), (9, 3)])
def test_dense_mask_is_the_pairwise_definition(is_causal, window, t, s):
    band = make_band(is_causal, window, t, s)
    mask = dense_mask(band, jnp.arange(t), jnp.arange(s), None, None)
    want = oracle.visible(t, s, is_causal, window, None, None)
    np.testing.assert_array_equal(np.ones((t, s), bool) if mask is None else mask[0], want)
    assert band.has_empty_row(t, s) == (not want.any(axis=1).all())
    assert band.is_full == want.all()


@pytest.mark.parametrize(("t", "s", "window"), [(5, 8, None), (8, 6, None), (7, 7, (3, 1))])
def test_mask_semantics_are_those_of_jax_nn(t, s, window):
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (1, t, 2, 8))
    k, v = (jax.random.normal(key, (1, s, 1, 8)) for key in keys[1:])
    options = dict(is_causal=True, local_window_size=window, implementation="xla")
    np.testing.assert_allclose(
        jax.jit(functools.partial(flash_attention, **options))(q, k, v),
        jax.jit(functools.partial(jax.nn.dot_product_attention, **options))(q, k, v),
        atol=1e-5,
    )


@pytest.mark.parametrize("window", [-1, (-1, 0), (1, 2, 3), 1.5, (None, 3)])
def test_make_band_rejects(window):
    with pytest.raises(ValueError, match="local_window_size=.* must be an int >= 0 or a pair"):
        make_band(False, window, 8, 8)

"""fp8_matmul: the XLA product against float64, the kernel by name, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import fp8_matmul, hardware
from pallas_kernels.interpreter import interpret_kernels
from tests.pallas_kernels.matmul.reference import E4M3, E5M2, integers, product, rounded

SCALE = jnp.float32(0.25)


@pytest.mark.parametrize("out", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(
    ("lhs", "rhs", "options"),
    [
        (E4M3, E4M3, {}),
        (E5M2, E4M3, dict(implementation="xla")),
        (E4M3, E5M2, dict(implementation="xla", accumulation="exact")),
        (E4M3, E4M3, dict(implementation="mosaic", accumulation="exact")),
    ],
)
def test_is_exact_for_whole_numbers(lhs, rhs, out, options):
    x, y = integers(0, 64, 256, lhs), integers(1, 192, 256, rhs)
    with interpret_kernels():
        got = fp8_matmul(x, y, SCALE, out_dtype=out, **options)
    assert got.dtype == out
    np.testing.assert_array_equal(
        np.asarray(got, np.float64), rounded(product(x, y, SCALE), out).astype(np.float64)
    )


def test_mapped_products_are_those_of_each_pair():
    x = jnp.stack([integers(i, 64, 128, E4M3) for i in (0, 1)])
    y = jnp.stack([integers(i, 64, 128, E4M3) for i in (2, 3)])
    with interpret_kernels():
        run = jax.vmap(lambda x, y: fp8_matmul(x, y, SCALE, implementation="mosaic"))
        got = run(x, y)
    for i in (0, 1):
        np.testing.assert_array_equal(
            np.asarray(got[i], np.float64),
            rounded(product(x[i], y[i], SCALE), jnp.bfloat16).astype(np.float64),
        )


def arguments(**changed):
    values = dict(lhs=jnp.zeros((64, 128), E4M3), rhs_t=jnp.zeros((64, 128), E4M3), scale=SCALE)
    return values | changed


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(lhs=jnp.zeros((64, 128))), "lhs.dtype=float32 must be one of"),
        (dict(lhs=jnp.zeros((2, 64, 128), E4M3)), r"lhs.shape=\(2, 64, 128\) must be"),
        (dict(rhs_t=jnp.zeros((128, 64), E4M3)), "must agree in their last dimension"),
        (
            dict(lhs=jnp.zeros((64, 128), E5M2), rhs_t=jnp.zeros((64, 128), E5M2)),
            "must not both be float8_e5m2",
        ),
        (dict(scale=jnp.ones((64,))), r"scale is float32\[64\], must be float32\[\]"),
        (dict(out_dtype=jnp.float16), "out_dtype=float16 must be one of"),
        (dict(accumulation="slow"), "accumulation='slow' must be one of"),
        (dict(implementation="cublas"), "implementation='cublas' must be one of"),
    ],
)
def test_rejects(changed, message):
    with pytest.raises(ValueError, match=message):
        fp8_matmul(**arguments(**changed))


def test_kernel_refuses_another_device_and_shape_with_the_reason():
    with pytest.raises(NotImplementedError, match="for Hopper, but the default device is 'cpu'"):
        fp8_matmul(**arguments(), implementation="mosaic")
    ragged = arguments(rhs_t=jnp.zeros((48, 128), E4M3))
    with (
        hardware.assume_device_kind("NVIDIA H200"),
        pytest.raises(NotImplementedError, match="48 rows of rhs_t must be a multiple of 64; pad"),
    ):
        fp8_matmul(**ragged, implementation="mosaic")

"""Rows and columns of FP8 operands: interpreted bit for bit, and compiled for the H200."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

from pallas_kernels import hardware
from pallas_kernels.flash_attention.sm90_columns_fp8 import columns_and_rows
from tests.pallas_kernels.compile_gate import ptxas_report

E4M3, E5M2, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.bfloat16
# Position p of 16 holds this element.
ORDERS = {
    16: [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15],
    28: [0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15],
}
CASES = [
    pytest.param(200, 64, 16, BF16, E4M3, True, id="dout"),
    pytest.param(300, 128, 28, E4M3, E4M3, False, id="k"),
    pytest.param(40, 256, 16, BF16, E5M2, True, id="dout_e5m2_d256"),
]
each_case = pytest.mark.parametrize(("length", "h", "order", "source", "dtype", "rows"), CASES)


def example(length, h, dtype):
    """Returns x, the factors of rows and columns."""
    rng = np.random.default_rng(0)
    x = (40 * rng.standard_normal((2, length, 2, h))).astype(dtype)
    factor = np.exp2(rng.integers(-4, 5, (2, 2, length))).astype(np.float32)
    return x, factor, np.exp2(rng.integers(-3, 3, (2, 2, length))).astype(np.float32)


def round8(x, dtype):
    """Saturating, by ml_dtypes' own conversion."""
    largest = float(ml_dtypes.finfo(dtype).max)
    return np.clip(x, -largest, largest).astype(dtype)


def expected(x, factor, scale, order, dtype):
    """Returns columns and rows, in NumPy."""
    wide = x.astype(np.float32)
    columns = round8(wide * factor.transpose(0, 2, 1)[..., None], dtype)
    columns = np.pad(columns, ((0, 0), (0, -x.shape[1] % 128), (0, 0), (0, 0)))
    columns = columns.transpose(0, 2, 3, 1)
    index = np.arange(columns.shape[3]).reshape(-1, 16)[:, ORDERS[order]].ravel()
    return columns[..., index], round8(wide * scale.transpose(0, 2, 1)[..., None], dtype)


def assert_bits_equal(got, want):
    np.testing.assert_array_equal(np.asarray(got).view(np.uint8), want.view(np.uint8))


def assert_every_bit(length, h, order, source, dtype, rows, *, interpret):
    x, factor, scale = example(length, h, source)
    columns, got_rows = columns_and_rows(
        jnp.asarray(x),
        jnp.asarray(factor),
        dtype=dtype,
        order=order,
        row_factor=jnp.asarray(scale) if rows else None,
        interpret=interpret,
    )
    want, want_rows = expected(x, factor, scale, order, dtype)
    assert_bits_equal(columns, want)
    if rows:
        assert_bits_equal(got_rows, want_rows)
    else:
        assert got_rows is None


@each_case
def test_interpreted_kernel_has_every_bit(length, h, order, source, dtype, rows):
    assert_every_bit(length, h, order, source, dtype, rows, interpret=True)
    assert not interpret_pallas_call.get_races().races_found


@pytest.mark.gpu
@each_case
def test_kernel_has_every_bit(length, h, order, source, dtype, rows):
    assert_every_bit(length, h, order, source, dtype, rows, interpret=False)


@each_case
def test_compiles_for_sm90a_without_spills(length, h, order, source, dtype, rows):
    shape = jax.ShapeDtypeStruct
    with hardware.assume_device_kind("NVIDIA H200"):
        report = ptxas_report(
            lambda x, factor, scale: columns_and_rows(
                x, factor, dtype=dtype, order=order, row_factor=scale if rows else None
            ),
            shape((2, 64 * length, 8, h), source),
            shape((2, 8, 64 * length), jnp.float32),
            shape((2, 8, 64 * length), jnp.float32),
        )
    assert report.spilled_bytes == 0, report.text

"""The start of the bf16 backward: interpreted, compiled for the H200, and on it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

from pallas_kernels import hardware
from pallas_kernels.flash_attention.sm90_bwd_rows import row_operands
from tests.pallas_kernels.compile_gate import ptxas_report

BAD_LSE = np.float32(-1e30)


def example(length, padded, h, dtype):
    """Two rows, two heads; as many zeros as the lengths need, and -inf beyond the end."""
    rng = np.random.default_rng(0)
    out, dout = rng.standard_normal((2, 2, length, 2, h))
    lse, dlse = rng.standard_normal((2, 2, 2, padded))
    lse[:, :, length:], dlse[:, :, length:] = -np.inf, 0
    return (
        *(jnp.asarray(x, dtype) for x in (out, dout)),
        *(jnp.asarray(x, jnp.float32) for x in (lse, dlse)),
    )


def check(got, out, dout, lse, dlse):
    length, padded = out.shape[1], lse.shape[2]
    out, dout, dlse = (np.asarray(x, np.float64) for x in (out, dout, dlse))
    want = np.zeros(dlse.shape)
    want[:, :, :length] = np.einsum("btnh,btnh->bnt", out, dout)
    bound = np.zeros(dlse.shape)
    bound[:, :, :length] = np.einsum("btnh,btnh->bnt", abs(out), abs(dout))
    # A sum of H float32 numbers in any order.
    assert (abs(np.asarray(got[1]) - (want - dlse)) <= 2**-23 * 16 * (bound + abs(dlse))).all()
    visible = np.asarray(lse, np.float64)[:, :, :length] / np.log(2)
    np.testing.assert_allclose(got[0][:, :, :length], visible, rtol=2**-22)
    assert (np.asarray(got[0])[:, :, length:] == np.inf).all()
    assert got[2].shape == (2, padded, 2, out.shape[3])
    assert not np.asarray(got[2]).any()


CASES = [(192, 192, 128, jnp.bfloat16), (104, 128, 64, jnp.float16)]


@pytest.mark.parametrize(("length", "padded", "h", "dtype"), CASES)
def test_interpreted_kernel_against_float64(length, padded, h, dtype):
    arrays = example(length, padded, h, dtype)
    got = row_operands(*arrays, padded_length=padded, sm_count=1, interpret=True)
    assert not interpret_pallas_call.get_races().races_found
    check(got, *arrays)


def test_queries_that_have_something_not_finite_are_marked():
    out, dout, lse, dlse = example(64, 64, 64, jnp.bfloat16)
    out = out.at[0, 1, 0, 5].set(jnp.nan)
    dout = dout.at[0, 2, 0, 63].set(-jnp.inf)
    lse = lse.at[0, 0, 3].set(jnp.nan).at[0, 0, 4].set(jnp.inf).at[0, 0, 5].set(-jnp.inf)
    dlse = dlse.at[0, 0, 6].set(jnp.nan)
    new_lse, delta, _ = row_operands(
        out, dout, lse, dlse, padded_length=64, sm_count=1, interpret=True
    )
    marked = np.zeros((2, 2, 64), bool)
    marked[0, 0, [1, 2, 3, 4, 6]] = True
    np.testing.assert_array_equal(np.asarray(new_lse) == BAD_LSE, marked)
    np.testing.assert_array_equal(np.asarray(delta)[marked], 0)
    assert np.asarray(new_lse)[0, 0, 5] == np.inf
    assert np.isfinite(delta).all()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("length", "padded", "h", "dtype"), [*CASES, (4096, 4096, 256, jnp.bfloat16)]
)
def test_kernel_against_float64(length, padded, h, dtype):
    arrays = example(length, padded, h, dtype)
    # One multiprocessor, so that each CTA walks through many blocks.
    check(row_operands(*arrays, padded_length=padded, sm_count=1), *arrays)


@pytest.mark.parametrize(
    ("h", "dtype"), [(128, jnp.bfloat16), (64, jnp.float16), (256, jnp.bfloat16)]
)
def test_compiles_for_sm90a_without_spills(h, dtype):
    rows = jax.ShapeDtypeStruct((2, 8192, 16, h), dtype)
    numbers = jax.ShapeDtypeStruct((2, 16, 8192), jnp.float32)
    with hardware.assume_device_kind("NVIDIA H200"):
        report = ptxas_report(
            lambda *arrays: row_operands(*arrays, padded_length=8192, sm_count=132),
            rows,
            rows,
            numbers,
            numbers,
        )
    assert report.spilled_bytes == 0, report.text

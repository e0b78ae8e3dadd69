"""The end of FP8 attention's dQ: interpreted, compiled for the H200, and on it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

from pallas_kernels import hardware
from pallas_kernels.flash_attention import fp8
from pallas_kernels.flash_attention.sm90_finish_fp8 import scale_and_rotate
from tests.pallas_kernels.compile_gate import ptxas_report


def example(length, h, dtype):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, length, 2, h)).astype(np.float32)
    factor = np.exp2(rng.integers(-6, 6, (2, 2, length))).astype(np.float32)
    return jnp.asarray(x), jnp.asarray(factor), jnp.asarray(fp8.rotation(h), dtype)


def check(got, x, factor, matrix, dtype):
    """Rounded to dtype before the product and after: 2^-9 each at most for bfloat16."""
    scaled = np.asarray(x, np.float64) * np.asarray(factor).transpose(0, 2, 1)[..., None]
    want = scaled @ np.asarray(matrix, np.float64)
    error = np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want)
    assert got.dtype == dtype
    assert error <= jnp.finfo(dtype).eps / 2


@pytest.mark.parametrize(("h", "dtype"), [(128, jnp.bfloat16), (64, jnp.float16)])
def test_interpreted_kernel_against_float64(h, dtype):
    arrays = example(192, h, dtype)
    got = scale_and_rotate(*arrays, dtype=dtype, sm_count=2, interpret=True)
    assert not interpret_pallas_call.get_races().races_found
    check(got, *arrays, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize(("h", "dtype"), [(128, jnp.bfloat16), (64, jnp.float16)])
def test_kernel_against_float64(h, dtype):
    arrays = example(1024, h, dtype)
    # Two CTAs for 64 blocks, so that each walks through many.
    check(scale_and_rotate(*arrays, dtype=dtype, sm_count=1), *arrays, dtype)


@pytest.mark.parametrize(("h", "dtype"), [(128, jnp.bfloat16), (64, jnp.float16)])
def test_compiles_for_sm90a_without_spills(h, dtype):
    shape = jax.ShapeDtypeStruct
    with hardware.assume_device_kind("NVIDIA H200"):
        report = ptxas_report(
            lambda *arrays: scale_and_rotate(*arrays, dtype=dtype, sm_count=132),
            shape((2, 8192, 16, h), jnp.float32),
            shape((2, 16, 8192), jnp.float32),
            shape((h, h), dtype),
        )
    assert report.spilled_bytes == 0, report.text
    assert not report.serialised_wgmmas, report.text
    registers = int(report.text.split("Used ")[1].split()[0])
    assert registers <= 65536 // 128 // 2, "two CTAs share an SM"

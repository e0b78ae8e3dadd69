"""Quantisation of q, k and v for FP8 attention: interpreted, and compiled for the H200."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

from pallas_kernels import hardware
from pallas_kernels.flash_attention import fp8
from pallas_kernels.flash_attention.sm90_quantize_fp8 import quantize
from tests.pallas_kernels.compile_gate import ptxas_report

E4M3 = ml_dtypes.float8_e4m3fn
# Position p of 16 columns holds this row.
ORDER = [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One tensor; the largest magnitudes of its blocks differ."""

    name: str
    length: int
    h: int
    dtype: str = "bfloat16"
    rotates: bool = False
    centers: bool = False
    writes_columns: bool = False
    multiplies: bool = False

    def __str__(self):
        return self.name

    def arguments(self):
        rng = np.random.default_rng(0)
        x = rng.standard_normal((2, self.length, 2, self.h))
        reach = 30 if self.dtype == "bfloat16" else 6
        exponents = rng.integers(-reach, reach, (2, -(-self.length // 128), 2))
        x *= np.exp2(exponents).repeat(128, axis=1)[:, : self.length, :, None]
        matrix = fp8.rotation(self.h) if self.rotates else None
        mean = rng.standard_normal((2, 2, self.h)) if self.centers else None
        return (
            jnp.asarray(x, self.dtype),
            None if matrix is None else jnp.asarray(matrix, self.dtype),
            None if mean is None else jnp.asarray(mean, jnp.float32),
            jnp.asarray(rng.standard_normal((2, 2, self.h)), jnp.float32)
            if self.multiplies
            else None,
        )

    def shapes(self):
        x, matrix, *vectors = self.arguments()
        big = jax.ShapeDtypeStruct((2, 8192, 16, self.h), x.dtype)
        vector = jax.ShapeDtypeStruct((2, 16, self.h), jnp.float32)
        return big, matrix, *(None if v is None else vector for v in vectors)


CASES = [
    Case(name="q", length=300, h=128, rotates=True, multiplies=True),
    Case(name="k", length=256, h=128, rotates=True, centers=True),
    Case(name="k_plain", length=130, h=64, centers=True, dtype="float16"),
    Case(name="v", length=200, h=64, writes_columns=True),
    Case(name="v_128", length=150, h=128, writes_columns=True),
]


def expected(case, x, matrix, mean, key):
    """Returns y, its scales and its products with the key, float64."""
    y = np.asarray(x, np.float64)
    if matrix is not None:
        y = y @ np.asarray(matrix, np.float64)
    padded = np.pad(y, ((0, 0), (0, -case.length % 128), (0, 0), (0, 0)))
    if mean is not None:
        y, padded = (a - np.asarray(mean, np.float64)[:, None] for a in (y, padded))
    amax = np.abs(padded.reshape(2, -1, 128, 2, case.h)).max(axis=(2, 4)).swapaxes(1, 2)
    scale = np.exp2(np.maximum(np.ceil(np.log2(amax / 448)), -40))
    if key is None:
        return y, scale, None
    return y, scale, np.einsum("blnh,bnh->bnl", y, np.asarray(key, np.float64))


def check(case, result, y, scale, products):
    """Holds a result against float64: every bit but where float32 sums fall on the other side."""
    np.testing.assert_array_equal(result.scale, scale)
    factor = scale.repeat(128, axis=2)[:, :, : case.length].transpose(0, 2, 1)[..., None]
    want = (y / factor).astype(E4M3)
    rows = np.asarray(result.rows)
    wrong = np.mean(rows.view(np.uint8) != want.view(np.uint8))
    assert wrong <= (1e-3 if case.rotates or case.centers else 0)
    got = rows.astype(np.float64)
    # Half a unit of 3 bits, or of the subnormal numbers.
    assert np.all(np.abs(got - y / factor) <= np.maximum(np.abs(y / factor) / 16, 2**-10) * 1.001)
    if case.multiplies:
        bound = 1e-5 * np.linalg.norm(y, axis=3).transpose(0, 2, 1) * case.h**0.5
        assert np.all(np.abs(np.asarray(result.products) - products) <= bound)
    if not case.writes_columns:
        assert result.columns is None and result.norm is None
        return
    columns = np.pad(rows, ((0, 0), (0, -case.length % 128), (0, 0), (0, 0))).transpose(0, 2, 3, 1)
    index = np.arange(columns.shape[3]).reshape(-1, 16)[:, ORDER].ravel()
    np.testing.assert_array_equal(
        np.asarray(result.columns).view(np.uint8), columns[..., index].view(np.uint8)
    )
    np.testing.assert_allclose(result.norm, np.linalg.norm(y, axis=3).max(axis=1), rtol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_interpreted_kernel_against_float64(case):
    arguments = case.arguments()
    options = dict(writes_columns=case.writes_columns, sm_count=2, interpret=True)
    result = quantize(*arguments, **options)
    assert not interpret_pallas_call.get_races().races_found
    check(case, result, *expected(case, *arguments))


def test_what_is_not_finite_stays_in_its_block():
    case = Case(name="v", length=300, h=64)
    x, *_ = case.arguments()
    x = x.at[0, 130, 0, 3].set(jnp.nan).at[1, 7, 1, 0].set(jnp.inf)
    result = quantize(x, None, None, writes_columns=False, sm_count=2, interpret=True)
    is_nan = np.zeros((2, 2, 3), bool)
    is_nan[0, 0, 1] = is_nan[1, 1, 0] = True
    np.testing.assert_array_equal(np.isnan(result.scale), is_nan)
    rows = np.asarray(result.rows).astype(np.float32)
    blocks = np.isnan(np.pad(rows, ((0, 0), (0, 84), (0, 0), (0, 0))).reshape(2, 3, 128, 2, 64))
    np.testing.assert_array_equal(blocks[:, :, :44].all(axis=(2, 4)).swapaxes(1, 2), is_nan)
    np.testing.assert_array_equal(blocks.any(axis=(2, 4)).swapaxes(1, 2), is_nan)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_against_float64(case):
    arguments = case.arguments()
    # Two CTAs for 8 or 12 blocks, so that each walks through several.
    result = quantize(*arguments, writes_columns=case.writes_columns, sm_count=1)
    check(case, result, *expected(case, *arguments))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiles_for_sm90a_without_spills(case):
    with hardware.assume_device_kind("NVIDIA H200"):
        report = ptxas_report(
            lambda *arguments: quantize(
                *arguments, writes_columns=case.writes_columns, sm_count=132
            ),
            *case.shapes(),
        )
    assert report.spilled_bytes == 0, report.text
    assert not report.serialised_wgmmas, report.text
    registers = int(report.text.split("Used ")[1].split()[0])
    assert registers <= 65536 // 128 // 2, "two CTAs share an SM"

"""Rotary positions and quantisation in one pass: interpreted, and compiled for the H200."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

from pallas_kernels import hardware
from pallas_kernels.flash_attention import fp8, sm90_quantize_fp8
from pallas_kernels.flash_attention.sm90_quantize_fp8 import Part
from pallas_kernels.flash_attention.sm90_rope_quantize_fp8 import (
    Plan,
    heads_per_cta,
    rope_quantize,
    smem_bytes,
)
from tests.pallas_kernels.compile_gate import ptxas_report


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """q (with products) or k (with a mean) of a projection of 2 x K groups of g query heads."""

    name: str
    length: int
    kv_heads: int
    group: int
    h: int
    is_key: bool = False
    rotates: bool = True
    dtype: str = "bfloat16"

    def __str__(self):
        return self.name

    @property
    def part(self):
        first, count = (self.group, 1) if self.is_key else (0, self.group)
        return Part(group=self.group + 2, first=first, count=count)

    @property
    def heads(self):
        return self.kv_heads * self.part.count

    def arguments(self):
        """x, cos, sin, M, mean, key; the largest magnitudes of the blocks differ."""
        rng = np.random.default_rng(1)
        x = rng.standard_normal((2, self.length, self.kv_heads * (self.group + 2), self.h))
        exponents = rng.integers(-6, 6, (2, -(-self.length // 128), x.shape[2]))
        x *= np.exp2(exponents).repeat(128, axis=1)[:, : self.length, :, None]
        angle = 50 * rng.standard_normal((2, self.length, self.h // 2))
        vector = jnp.asarray(rng.standard_normal((2, self.heads, self.h)), jnp.float32)
        return (
            jnp.asarray(x, self.dtype),
            *(jnp.asarray(f(angle), jnp.float32) for f in (np.cos, np.sin)),
            jnp.asarray(fp8.rotation(self.h), self.dtype) if self.rotates else None,
            vector if self.is_key else None,
            None if self.is_key else vector,
        )

    def shapes(self):
        """Of the same arguments at 2 x 8192 tokens."""
        struct = jax.ShapeDtypeStruct
        _, _, _, matrix, mean, _ = self.arguments()
        angles = [struct((2, 8192, self.h // 2), jnp.float32)] * 2
        vector = struct((2, self.heads, self.h), jnp.float32)
        x = struct((2, 8192, self.kv_heads * (self.group + 2), self.h), self.dtype)
        return x, *angles, matrix, *((None, vector) if mean is None else (vector, None))


CASES = [
    Case(name="q", length=208, kv_heads=2, group=2, h=128),
    Case(name="k", length=176, kv_heads=3, group=2, h=128, is_key=True),
    Case(name="q_64", length=128, kv_heads=1, group=1, h=64, dtype="float16"),
    Case(name="k_64", length=16, kv_heads=1, group=3, h=64, is_key=True, rotates=False),
]
BENCHMARKED = [
    Case(name="q_32_8", length=16, kv_heads=8, group=4, h=128),
    Case(name="k_32_8", length=16, kv_heads=8, group=4, h=128, is_key=True),
    Case(name="q_16_16", length=16, kv_heads=16, group=1, h=128),
    Case(name="q_64", length=16, kv_heads=16, group=1, h=64, dtype="float16"),
    Case(name="k_64", length=16, kv_heads=8, group=4, h=64, is_key=True),
    Case(name="q_plain", length=16, kv_heads=8, group=4, h=128, rotates=False),
]


def rotated(case, x, cos, sin):
    """The part of x that the kernel takes, rotated, in float64 and then rounded to x's dtype."""
    x = np.asarray(x, np.float64).reshape(2, case.length, case.kv_heads, case.part.group, -1)
    x = x[:, :, :, case.part.first :][:, :, :, : case.part.count]
    x = x.reshape(2, case.length, case.heads, 2, case.h // 2)
    turn = np.asarray(cos, np.float64) + 1j * np.asarray(sin, np.float64)
    z = (x[..., 0, :] + 1j * x[..., 1, :]) * turn[:, :, None]
    z = np.concatenate([z.real, z.imag], axis=-1)
    return z.astype(ml_dtypes.bfloat16 if case.dtype == "bfloat16" else np.float16)


def check(case, result, x, cos, sin, matrix, mean, key):
    """Holds a result against float64: every bit but where a float32 fell on the other side."""
    z = rotated(case, x, cos, sin).astype(np.float64)
    matrix = np.eye(case.h) if matrix is None else np.asarray(matrix, np.float64)
    y = z @ matrix
    padded = np.pad(y, ((0, 0), (0, -case.length % 128), (0, 0), (0, 0)))
    if mean is not None:
        y, padded = (a - np.asarray(mean, np.float64)[:, None] for a in (y, padded))
    amax = np.abs(padded.reshape(2, -1, 128, case.heads, case.h)).max(axis=(2, 4)).swapaxes(1, 2)
    scale = np.exp2(np.maximum(np.ceil(np.log2(amax / 448)), -40))
    np.testing.assert_array_equal(result.scale, scale)
    factor = scale.repeat(128, axis=2)[:, :, : case.length].transpose(0, 2, 1)[..., None]
    want = (y / factor).astype(ml_dtypes.float8_e4m3fn)
    rows = np.asarray(result.rows)
    assert np.mean(rows.view(np.uint8) != want.view(np.uint8)) <= 1e-3
    # Half a step of 3 bits, or of the subnormal numbers; and where one z of the row was rounded to
    # the other side, its last bit.
    bit = float(jnp.finfo(case.dtype).eps) * np.abs(z).max(axis=3, keepdims=True)
    apart = np.abs(rows.astype(np.float64) - y / factor)
    rounding = np.maximum(np.abs(y / factor) / 16, 2**-10)
    assert np.all(apart <= 1.001 * rounding + 17 / 16 * bit / factor)
    assert (result.products is None) == (key is None)
    if key is not None:
        products = np.einsum("blnh,bnh->bnl", y, np.asarray(key, np.float64))
        bound = 1e-5 * np.linalg.norm(y, axis=3) * case.h**0.5
        key_sums = np.abs(matrix @ np.asarray(key)[..., None]).max(axis=2)
        bound = (bound + bit[..., 0] * key_sums[..., 0][:, None]).transpose(0, 2, 1)
        assert np.all(np.abs(np.asarray(result.products) - products) <= bound)
    assert result.columns is None and result.norm is None


@pytest.mark.parametrize("case", CASES, ids=str)
def test_interpreted_kernel_against_float64(case):
    arguments = case.arguments()
    result = rope_quantize(*arguments, part=case.part, sm_count=2, interpret=True)
    assert not interpret_pallas_call.get_races().races_found
    check(case, result, *arguments)


def test_same_bits_as_the_kernel_that_reads_rotated_heads():
    case = Case(name="q", length=144, kv_heads=1, group=2, h=64)
    x, cos, sin, matrix, mean, key = case.arguments()
    # A quarter turn or none: no product is rounded, so neither can a sum of them be otherwise.
    cos = jnp.round(cos)
    sin = jnp.where(cos == 0, jnp.where(sin < 0, -1.0, 1.0), 0.0)
    got = rope_quantize(x, cos, sin, matrix, mean, key, part=case.part, sm_count=2, interpret=True)
    z = jnp.asarray(rotated(case, x, cos, sin))
    want = sm90_quantize_fp8.quantize(
        z, matrix, mean, key, writes_columns=False, sm_count=2, interpret=True
    )
    np.testing.assert_array_equal(got.scale, want.scale)
    np.testing.assert_array_equal(
        np.asarray(got.rows).view(np.uint8), np.asarray(want.rows).view(np.uint8)
    )
    np.testing.assert_allclose(got.products, want.products, rtol=1e-5, atol=1e-3)


def test_v_is_read_out_of_the_projection():
    """By `sm90_quantize_fp8`, which writes columns: the last head of each group."""
    x = CASES[0].arguments()[0][:, :48, :, :64]
    options = dict(writes_columns=True, sm_count=2, interpret=True)
    part = Part(group=4, first=3, count=1)
    got = sm90_quantize_fp8.quantize(x, None, None, part=part, **options)
    assert not interpret_pallas_call.get_races().races_found
    want = sm90_quantize_fp8.quantize(x[:, :, 3::4], None, None, **options)
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            np.testing.assert_array_equal(a.astype(jnp.float32), b.astype(jnp.float32))


def test_what_is_not_finite_stays_in_its_block():
    case = Case(name="q", length=256, kv_heads=1, group=2, h=64)
    x, *others = case.arguments()
    x = x.at[0, 130, 0, 3].set(jnp.nan).at[1, 70, 1, 40].set(jnp.nan)
    result = rope_quantize(x, *others, part=case.part, sm_count=2, interpret=True)
    is_nan = np.zeros((2, 2, 2), bool)
    is_nan[0, 0, 1] = is_nan[1, 1, 0] = True
    np.testing.assert_array_equal(np.isnan(result.scale), is_nan)
    rows = np.isnan(np.asarray(result.rows).astype(np.float32)).reshape(2, 2, 128, 2, 64)
    np.testing.assert_array_equal(rows.all(axis=(2, 4)).swapaxes(1, 2), is_nan)
    np.testing.assert_array_equal(rows.any(axis=(2, 4)).swapaxes(1, 2), is_nan)


@pytest.mark.parametrize("h", [64, 128])
def test_the_rotation_has_the_form_that_the_kernel_uses(h):
    left, right = np.hsplit(fp8.rotation(h), 2)
    np.testing.assert_array_equal(right[: h // 2], left[: h // 2])
    np.testing.assert_array_equal(right[h // 2 :], -left[h // 2 :])


@pytest.mark.parametrize(
    ("heads", "blocks", "expected"),
    # 132 at a time: one wave of all heads; two of halves are 2 x 5 steps, four of pairs 4 x 3.
    [(32, 128, 32), (8, 128, 8), (16, 64, 8), (8, 33, 2), (1, 500, 1)],
)
def test_heads_are_divided_so_that_ctas_are_done_soon(heads, blocks, expected):
    assert heads_per_cta(heads, blocks, 132) == expected


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("sm_count", [1, 132])
def test_kernel_against_float64(case, sm_count):
    arguments = case.arguments()
    # For one multiprocessor a CTA takes all heads of its rows.
    check(case, rope_quantize(*arguments, part=case.part, sm_count=sm_count), *arguments)


@pytest.mark.parametrize("case", BENCHMARKED, ids=str)
def test_compiles_for_sm90a_without_spills(case):
    with hardware.assume_device_kind("NVIDIA H200"):
        report = ptxas_report(
            lambda *arguments: rope_quantize(*arguments, part=case.part, sm_count=132),
            *case.shapes(),
        )
    assert report.spilled_bytes == 0, report.text
    assert not report.serialised_wgmmas, report.text
    plan = Plan(
        shape=(2, 8192, case.heads, case.h),
        part=case.part,
        dtype=case.dtype,
        rotates=case.rotates,
        centers=case.is_key,
        multiplies=not case.is_key,
        sm_count=132,
    )
    assert smem_bytes(plan) <= 227 * 1024

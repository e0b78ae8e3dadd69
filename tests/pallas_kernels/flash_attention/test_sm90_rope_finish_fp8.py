"""The end of FP8 attention's backward from a projection: interpreted, and compiled for the H200."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

from pallas_kernels import hardware
from pallas_kernels.flash_attention import fp8
from pallas_kernels.flash_attention.sm90_finish_fp8 import scale_and_rotate
from pallas_kernels.flash_attention.sm90_rope_finish_fp8 import Plan, rope_finish, smem_bytes
from pallas_kernels.mosaic import SMEM_OVERHEAD
from tests.pallas_kernels.compile_gate import ptxas_report


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Gradients of a projection of K groups of g query heads."""

    name: str
    length: int
    kv_heads: int
    group: int
    h: int
    dtype: str = "bfloat16"

    def __str__(self):
        return self.name

    def shapes(self):
        """Of sums, factor, dk, dv, cos, sin, M, for 2 sequences; padded to 64 and 128 rows."""
        queries, keys = (-(-self.length // rows) * rows for rows in (64, 128))
        struct, heads = jax.ShapeDtypeStruct, self.kv_heads * self.group
        return (
            struct((2, queries, heads, self.h), jnp.float32),
            struct((2, heads, queries), jnp.float32),
            *[struct((2, keys, self.kv_heads, self.h), self.dtype)] * 2,
            *[struct((2, self.length, self.h // 2), jnp.float32)] * 2,
            struct((self.h, self.h), self.dtype),
        )

    def arguments(self):
        rng = np.random.default_rng(2)
        sums, factor, dk, dv, cos, _, _ = self.shapes()
        angle = 50 * rng.standard_normal(cos.shape)
        normal = [jnp.asarray(rng.standard_normal(x.shape), x.dtype) for x in (sums, dk, dv)]
        return (
            normal[0],
            jnp.asarray(np.exp2(rng.integers(-3, 4, factor.shape)) / 1.7, jnp.float32),
            *normal[1:],
            *(jnp.asarray(f(angle), jnp.float32) for f in (np.cos, np.sin)),
            jnp.asarray(fp8.rotation(self.h).T / self.h, self.dtype),
        )


CASES = [
    Case(name="gqa", length=80, kv_heads=2, group=2, h=128),
    Case(name="mha_64", length=128, kv_heads=3, group=1, h=64, dtype="float16"),
]
BENCHMARKED = [
    Case(name="32_8", length=8192, kv_heads=8, group=4, h=128),
    Case(name="16_16", length=8192, kv_heads=16, group=1, h=128),
    Case(name="64", length=8192, kv_heads=8, group=4, h=64, dtype="float16"),
]


def check(case, got, sums, factor, dk, dv, cos, sin, matrix):
    """Holds a result against float64, rounded where the kernel rounds."""
    dtype = ml_dtypes.bfloat16 if case.dtype == "bfloat16" else np.float16
    f64 = lambda x: np.asarray(x, np.float64)  # noqa: E731
    n, h = case.length, case.h
    z = (f64(sums) * f64(factor).transpose(0, 2, 1)[..., None]).astype(dtype)
    z = (f64(z) @ f64(matrix)).astype(dtype)[:, :n]
    heads = f64(z).reshape(2, n, case.kv_heads, case.group, h)
    heads = np.concatenate([heads, f64(dk)[:, :n, :, None], f64(dv)[:, :n, :, None]], axis=3)
    plane = heads.reshape(*heads.shape[:-1], 2, h // 2)
    turn = (f64(cos) - 1j * f64(sin))[:, :, None, None]
    turned = (plane[..., 0, :] + 1j * plane[..., 1, :]) * turn
    want = np.concatenate([turned.real, turned.imag], axis=-1)
    want[:, :, :, -1] = heads[:, :, :, -1]
    assert got.dtype == case.dtype and got.shape == (2, n, case.kv_heads * (case.group + 2), h)
    # A last bit of the result; of what cancelled; and of z where a float32 sum fell on the other
    # side.
    epsilon = float(jnp.finfo(case.dtype).eps)
    got = np.asarray(got, np.float64).reshape(want.shape)
    bit = np.abs(plane).max(axis=(4, 5), keepdims=True)[..., 0]
    apart = np.abs(got - want)
    assert np.all(apart <= epsilon * (np.abs(want) + bit))
    assert np.mean(apart > epsilon / 2 * np.abs(want) + 2**-21) <= 0.01
    np.testing.assert_array_equal(got[:, :, :, -1], want[:, :, :, -1])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_interpreted_kernel_against_float64(case):
    arguments = case.arguments()
    got = rope_finish(*arguments, sm_count=1, interpret=True)
    assert not interpret_pallas_call.get_races().races_found
    check(case, got, *arguments)


def test_same_bits_as_the_kernel_that_writes_dq():
    case = Case(name="gqa", length=64, kv_heads=1, group=2, h=64)
    sums, factor, dk, dv, cos, sin, matrix = case.arguments()
    # No turn: a product with 1, or 0 added, is not rounded.
    cos, sin = jnp.ones_like(cos), jnp.zeros_like(sin)
    options = dict(sm_count=2, interpret=True)
    got = rope_finish(sums, factor, dk, dv, cos, sin, matrix, **options)
    dq = scale_and_rotate(sums, factor, matrix, dtype=dk.dtype, **options)
    want = jnp.concatenate([dq, dk[:, :64], dv[:, :64]], axis=2)
    np.testing.assert_array_equal(got.astype(jnp.float32), want.astype(jnp.float32))


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("sm_count", [1, 132])
def test_kernel_against_float64(case, sm_count):
    arguments = case.arguments()
    # For one multiprocessor a CTA takes several key/value heads of its rows.
    check(case, rope_finish(*arguments, sm_count=sm_count), *arguments)


@pytest.mark.parametrize("case", BENCHMARKED, ids=str)
def test_compiles_for_sm90a_without_spills(case):
    with hardware.assume_device_kind("NVIDIA H200"):
        report = ptxas_report(
            lambda *arguments: rope_finish(*arguments, sm_count=132), *case.shapes()
        )
    assert report.spilled_bytes == 0, report.text
    assert not report.serialised_wgmmas, report.text
    registers = int(report.text.split("Used ")[1].split()[0])
    assert registers <= 65536 // 128 // 2, "two CTAs share an SM"
    plan = Plan(
        shape=(2, 8192, case.kv_heads, case.h), group=case.group, dtype=case.dtype, sm_count=132
    )
    # It has no reductions, which most of the overhead is for; CUDA takes 1 KiB for itself.
    smem = smem_bytes(plan) - SMEM_OVERHEAD
    assert 2 * (smem + 1024) <= 228 * 1024, "two CTAs share an SM"

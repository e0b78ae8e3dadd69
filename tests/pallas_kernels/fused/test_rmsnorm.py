"""RMSNorm, quantised: against float64, by XLA and by the interpreted kernel."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

from pallas_kernels import hardware, rmsnorm, rmsnorm_quantize
from pallas_kernels.fused import sm90_rmsnorm, sm90_rmsnorm_grad
from pallas_kernels.fused.rmsnorm import make_plan, rmsnorm_and_cast
from pallas_kernels.fused.sm90_rmsnorm import RmsNormConfig
from pallas_kernels.interpreter import interpret_kernels
from tests.pallas_kernels.compile_gate import ptxas_report
from tests.pallas_kernels.quantize import reference

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2
SCALE, EPS = jnp.float32(2.0**-4), 1e-5


def inputs(rows, columns, dtype="bfloat16"):
    rng = np.random.default_rng(5)
    x = rng.standard_normal((rows, columns)) * np.exp2(rng.integers(-8, 8, (rows, 1)))
    x[7] = 0
    return jnp.asarray(x).astype(dtype), jnp.asarray(rng.standard_normal(columns), jnp.float32)


def assert_close(result, rstd, x, weight, dtype):
    x = np.asarray(x, np.float64)
    exact_rstd = 1 / np.sqrt((x * x).mean(axis=1) + EPS)
    exact = x * exact_rstd[:, None] * np.asarray(weight, np.float64)
    np.testing.assert_allclose(rstd, exact_rstd, rtol=2e-6)
    apart = np.abs(
        reference.order(result.q)
        - reference.order(reference.round8(exact, float(SCALE), np.dtype(dtype)))
    )
    assert apart.max() <= 1 and (apart > 0).mean() < 1e-3
    np.testing.assert_array_equal(reference.bits(result.q).T, reference.bits(result.q_t))
    amax = np.int32(result.amax_bits.max()).view(np.float32)
    np.testing.assert_allclose(amax, np.abs(exact).max(), rtol=2e-6)


def test_xla():
    x, weight = inputs(48, 80)
    result, rstd = rmsnorm_quantize(x, weight, SCALE, eps=EPS, implementation="xla")
    assert_close(result, rstd, x, weight, E4M3)


# Tiles that stay in their slots, that do not, and blocks of one CTA one after another.
INTERPRETED = [
    (128, 1024, "bfloat16", E4M3, RmsNormConfig(chunks=4, warpgroups=2, slots=1)),
    (384, 192, "float16", E5M2, RmsNormConfig(chunks=1, warpgroups=1, slots=2)),
    (256, 256, "bfloat16", E4M3, RmsNormConfig(chunks=2, warpgroups=2, slots=5)),
]


@pytest.mark.parametrize("case", INTERPRETED, ids=str)
def test_interpreted(case):
    rows, columns, input_dtype, dtype, config = case
    x, weight = inputs(rows, columns, input_dtype)
    with interpret_kernels():
        plan = make_plan(x, eps=EPS, dtype=dtype, config=config)
        assert sm90_rmsnorm.unsupported_reason(plan) is None
        q, q_t, rstd, amax = sm90_rmsnorm.launch(plan, x, weight, SCALE)
    bits = jnp.abs(amax).max().view(jnp.int32)[None]
    assert_close(reference.Result(q, q_t, bits), rstd, x, weight, dtype)
    assert not interpret_pallas_call.get_races().races_found


def test_infinities_show_as_nan_and_in_the_amax():
    x, weight = inputs(128, 64)
    with interpret_kernels():
        result, _ = rmsnorm_quantize(
            x.at[5, 2].set(jnp.inf), weight, SCALE, eps=EPS, implementation="mosaic"
        )
    # rstd is 0: the row is 0 but where it is 0 * inf.
    assert np.argwhere(np.isnan(np.asarray(result.q, np.float32))).tolist() == [[5, 2]]
    assert int(result.amax_bits.max()) >= 0x7F800000


@pytest.mark.parametrize("config", sm90_rmsnorm.candidates(), ids=str)
def test_compiles_for_sm90a_without_spills(config, columns=4096):
    arrays = [
        jax.ShapeDtypeStruct((16384, columns), jnp.bfloat16),
        jax.ShapeDtypeStruct((columns,), jnp.float32),
        jax.ShapeDtypeStruct((), jnp.float32),
    ]
    with hardware.assume_device_kind("NVIDIA H200"):
        plan = make_plan(arrays[0], eps=EPS, dtype=E4M3, config=config)
        assert sm90_rmsnorm.unsupported_reason(plan) is None
        report = ptxas_report(lambda *a: sm90_rmsnorm.launch(plan, *a), *arrays)
    assert report.spilled_bytes == 0, report.text


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((100, 128), jnp.bfloat16, "100 rows must be a multiple of 128"),
        ((128, 96), jnp.bfloat16, "96 columns must be a multiple of 64"),
        ((128, 128), jnp.float32, "x.dtype=float32 must have 16 bits"),
    ],
)
def test_kernel_refuses_with_the_reason(shape, dtype, message):
    with (
        hardware.assume_device_kind("NVIDIA H200"),
        pytest.raises(NotImplementedError, match=message),
    ):
        rmsnorm_quantize(
            jnp.zeros(shape, dtype), jnp.ones(shape[1]), SCALE, eps=EPS, implementation="mosaic"
        )


def test_rejects():
    with pytest.raises(ValueError, match=r"weight is float32\[64\], must be float32\[128\]"):
        rmsnorm_quantize(jnp.zeros((16, 128)), jnp.ones(64), SCALE, eps=EPS)
    with pytest.raises(ValueError, match="self.chunks=3 must be 1, 2 or 4"):
        RmsNormConfig(chunks=3)


@pytest.mark.gpu
@pytest.mark.parametrize("config", sm90_rmsnorm.candidates(), ids=str)
@pytest.mark.parametrize("shape", [(256, 1024), (4096, 4096)], ids=str)
def test_gpu_kernel(shape, config):
    x, weight = inputs(*shape)
    plan = make_plan(x, eps=EPS, dtype=E4M3, config=config)
    q, q_t, rstd, amax = sm90_rmsnorm.launch(plan, x, weight, SCALE)
    bits = jnp.abs(amax).max().view(jnp.int32)[None]
    assert_close(reference.Result(q, q_t, bits), rstd, x, weight, E4M3)


def gradient64(x, weight, dy, g):
    """y, dx and dw in float64."""
    x, weight, dy, g = (np.asarray(a, np.float64) for a in (x, weight, dy, g))
    rstd = 1 / np.sqrt((x * x).mean(axis=-1, keepdims=True) + EPS)
    normed = x * rstd
    c = (dy * weight * normed).mean(axis=-1, keepdims=True)
    dx = g + rstd * (dy * weight - normed * c)
    return normed * weight, dx, (dy * normed).reshape(-1, x.shape[-1]).sum(axis=0)


def grads_of(shape, dtype):
    rng = np.random.default_rng(6)
    return [jnp.asarray(rng.standard_normal(shape)).astype(dtype) for _ in range(2)]


def assert_gradient(got, x, weight, dy, g, *, adds_in_16_bits=False):
    """One rounding to 16 bits; in XLA's sum of two gradients a second one, of one of them. Where dx
    cancels, that of its float32 terms.
    """
    want = gradient64(x, weight, dy, g)
    half = float(jnp.finfo(x.dtype).eps) / 2
    for a, b, added in zip(got[:2], want[:2], (0, np.asarray(g, np.float64)), strict=True):
        roundings = np.abs(b) + (np.abs(b - added) if adds_in_16_bits else 0)
        scale = np.abs(b).max(axis=-1, keepdims=True)
        assert (np.abs(np.asarray(a, np.float64) - b) <= half * roundings + 1e-6 * scale).all()
    np.testing.assert_allclose(got[2], want[2], atol=2e-6 * np.abs(want[2]).max())


@pytest.mark.parametrize(
    ("implementation", "shape", "dtype"),
    [
        ("xla", (2, 6, 48), "bfloat16"),
        ("mosaic", (3, 7, 1024), "bfloat16"),  # several rows a CTA, one more for some
        ("mosaic", (2, 2048), "float16"),  # fewer rows than CTAs
    ],
)
def test_plain_value_and_gradient(implementation, shape, dtype):
    rows = int(np.prod(shape[:-1]))
    x, weight = inputs(max(rows, 8), shape[-1], dtype)
    x, (dy, g) = x[:rows].reshape(shape), grads_of(shape, dtype)
    run = functools.partial(rmsnorm, eps=EPS, implementation=implementation)
    with interpret_kernels():
        (y, same), pullback = jax.vjp(run, x, weight)
        dx, dweight = pullback((dy, g))
    np.testing.assert_array_equal(same, x)
    assert y.dtype == dx.dtype == x.dtype and dweight.dtype == jnp.float32
    is_xla = implementation == "xla"
    assert_gradient((y, dx, dweight), x, weight, dy, g, adds_in_16_bits=is_xla)
    if not is_xla:
        assert not interpret_pallas_call.get_races().races_found


@pytest.mark.parametrize("gradient_implementation", ["xla", "mosaic"])
def test_norm_and_cast_with_the_gradient_of_the_norm(gradient_implementation):
    x, weight = inputs(128, 1024)
    dy, g = grads_of(x.shape, "bfloat16")
    options = dict(eps=EPS, dtype=E4M3, implementation="mosaic")

    def run(x, weight):
        y, same, cast = rmsnorm_and_cast(
            x, weight, SCALE, gradient_implementation=gradient_implementation, **options
        )
        return (y, same), cast

    with interpret_kernels():
        (y, _), pullback, cast = jax.vjp(run, x, weight, has_aux=True)
        dx, dweight = pullback((dy, g))
        alone, rstd = rmsnorm_quantize(x, weight, SCALE, **options)
    assert_gradient((y, dx, dweight), x, weight, dy, g)
    rows = [q.view(E4M3) for q in (cast.q, cast.q_t)]
    assert_close(reference.Result(*rows, cast.amax_bits), rstd, x, weight, E4M3)
    np.testing.assert_array_equal(cast.q, reference.bits(alone.q))


def test_gradient_keeps_a_bad_row_to_itself():
    x, weight = inputs(8, 1024)
    dy, g = grads_of(x.shape, "bfloat16")
    with interpret_kernels():
        run = functools.partial(rmsnorm, eps=EPS, implementation="mosaic")
        _, pullback = jax.vjp(run, x, weight)
        dx, _ = pullback((dy.at[3, 5].set(jnp.nan), g))
    assert np.isnan(np.asarray(dx, np.float32)).any(axis=1).nonzero()[0].tolist() == [3]


@pytest.mark.parametrize("columns", [1024, 2048, 4096])
def test_gradient_compiles_for_sm90a_without_spills(columns):
    plan = sm90_rmsnorm_grad.RmsNormGradPlan(rows=16384, columns=columns, dtype="bfloat16")
    assert sm90_rmsnorm_grad.unsupported_reason(plan) is None
    assert 2 * sm90_rmsnorm_grad.smem_bytes(plan) <= 227 * 1024  # two CTAs to a multiprocessor
    matrix = jax.ShapeDtypeStruct((16384, columns), jnp.bfloat16)
    vectors = [jax.ShapeDtypeStruct((size,), jnp.float32) for size in (16384, columns)]
    run = functools.partial(sm90_rmsnorm_grad.launch, plan)
    report = ptxas_report(run, matrix, matrix, matrix, *vectors)
    assert report.spilled_bytes == 0, report.text


@pytest.mark.parametrize(
    ("columns", "dtype", "message"),
    [
        (1536, jnp.bfloat16, "1536 columns must be a multiple of 1024 up to 4096"),
        (8192, jnp.bfloat16, "8192 columns must be a multiple of 1024 up to 4096"),
        (1024, jnp.float32, "x.dtype=float32 must have 16 bits"),
    ],
)
def test_gradient_kernel_refuses_with_the_reason(columns, dtype, message):
    with (
        hardware.assume_device_kind("NVIDIA H200"),
        pytest.raises(NotImplementedError, match=message),
    ):
        rmsnorm(jnp.zeros((8, columns), dtype), jnp.ones(columns), eps=EPS, implementation="mosaic")


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 1000, 4096), (333, 2048)], ids=str)
def test_gpu_gradient_and_its_repeatability(shape):
    x, weight = inputs(int(np.prod(shape[:-1])), shape[-1])
    x, (dy, g) = x.reshape(shape), grads_of(shape, "bfloat16")
    _, pullback = jax.vjp(functools.partial(rmsnorm, eps=EPS, implementation="mosaic"), x, weight)
    (dx, dweight), again = pullback((dy, g)), pullback((dy, g))
    y = gradient64(x, weight, dy, g)[0].astype(np.float32)
    assert_gradient((jnp.asarray(y, x.dtype), dx, dweight), x, weight, dy, g)
    np.testing.assert_array_equal(dx, again[0])
    np.testing.assert_array_equal(dweight, again[1])

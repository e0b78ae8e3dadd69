"""quantize: bit for bit NumPy's, by XLA and by the interpreted kernel; rejections."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels import hardware, quantize
from pallas_kernels.interpreter import interpret_kernels
from pallas_kernels.quantize import sm90
from pallas_kernels.quantize.api import SUPPORTED_DTYPES
from pallas_kernels.quantize.sm90_plan import TileConfig
from tests.pallas_kernels.quantize import reference

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2
INFINITY_BITS = 0x7F800000
SCALE = jnp.float32(0.25)


def matrix(rows, columns, dtype, seed=0):
    """Normal values over many powers of two, saturating and underflowing ones among them."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, columns)) * np.exp2(rng.integers(-16, 10, (rows, columns)))
    x[0, :4] = [0.0, -0.0, 448 * 0.25, 2.0**-11]
    return jnp.asarray(x, jnp.float32).astype(dtype)


def special(rows, columns):
    """Infinities and NaN, each in rows and columns of its own."""
    x = np.ones((rows, columns), np.float32)
    x[1, 2], x[2, 70], x[5, 5] = np.inf, -np.inf, np.nan
    return jnp.asarray(x, jnp.bfloat16)


def assert_exact(result, x, scale, dtype, layouts="both"):
    expected = reference.bits(reference.round8(x, scale, np.dtype(dtype)))
    assert (result.q is None) == (layouts == "columns")
    assert (result.q_t is None) == (layouts == "rows")
    if result.q is not None:
        np.testing.assert_array_equal(reference.bits(result.q), expected)
    if result.q_t is not None:
        np.testing.assert_array_equal(reference.bits(result.q_t), expected.T)
    if np.isfinite(np.asarray(x, np.float32)).all():
        assert int(result.amax_bits.max()) == reference.amax_bits(x)
    else:
        assert int(result.amax_bits.max()) >= INFINITY_BITS
    assert result.amax_bits.shape == (128,) and result.amax_bits.dtype == jnp.int32


@pytest.mark.parametrize("layouts", ["both", "rows", "columns"])
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("input_dtype", SUPPORTED_DTYPES)
def test_xla_is_exact(input_dtype, dtype, layouts):
    x = matrix(48, 80, input_dtype)
    result = quantize(x, SCALE, dtype=dtype, layouts=layouts, implementation="xla")
    assert_exact(result, x, 0.25, dtype, layouts)


INTERPRETED = [
    (256, 128, "bfloat16", E4M3, "both", TileConfig(tile_columns=128)),
    (128, 192, "float32", E4M3, "both", TileConfig(tile_columns=64, stages=2, out_slots=2)),
    (384, 64, "float16", E5M2, "both", TileConfig(tile_columns=64, warpgroups=1)),
    (256, 128, "bfloat16", E5M2, "columns", TileConfig(tile_columns=64, warpgroups=3)),
    (144, 128, "float32", E5M2, "rows", TileConfig(tile_columns=128, warpgroups=1, stages=2)),
]


@pytest.mark.parametrize("case", INTERPRETED, ids=str)
def test_interpreted_kernel_is_exact_and_free_of_races(case):
    rows, columns, input_dtype, dtype, layouts, config = case
    x = matrix(rows, columns, input_dtype)
    with interpret_kernels():
        plan = sm90.make_plan(x, dtype=dtype, layouts=layouts, config=config)
        assert sm90.unsupported_reason(plan) is None
        result = sm90.quantize(x, SCALE, dtype=dtype, layouts=layouts, config=config)
    assert_exact(result, x, 0.25, dtype, layouts)
    assert not interpret_pallas_call.get_races().races_found


@pytest.mark.parametrize("implementation", ["xla", "mosaic"])
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_infinities_and_nan_become_nan_and_show_in_the_amax(dtype, implementation):
    x = special(128, 128)
    with interpret_kernels():
        result = quantize(x, SCALE, dtype=dtype, implementation=implementation)
    assert_exact(result, x, 0.25, dtype)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_one_special_value_is_never_lost(value):
    x = matrix(128, 64, jnp.float32).at[77, 13].set(value)
    with interpret_kernels():
        result = quantize(x, SCALE, implementation="mosaic")
    assert int(result.amax_bits.max()) >= INFINITY_BITS
    assert np.isnan(np.asarray(result.q_t, np.float32)).sum() == 1


def test_vmap_gives_each_matrix_its_own_scale():
    x = jnp.stack([matrix(128, 64, jnp.bfloat16, seed) for seed in (1, 2)])
    scales = jnp.asarray([0.25, 2.0], jnp.float32)
    with interpret_kernels():
        run = lambda x, s: quantize(x, s, implementation="mosaic")  # noqa: E731
        result = jax.vmap(run)(x, scales)
    for i in (0, 1):
        assert_exact(jax.tree.map(lambda a, i=i: a[i], result), x[i], scales[i], E4M3)


def kernels(function, *args):
    """How many kernels a function starts, by its jaxpr."""
    jaxpr = jax.make_jaxpr(lambda *args: function(*args))(*args)  # a new one is traced anew
    return str(jaxpr).count("name=quantize")


@pytest.mark.parametrize(
    ("shape", "implementation", "expected"),
    [
        ((128, 64), None, 1),
        ((128, 64), "mosaic", 1),
        ((128, 64), "xla", 0),
        ((128, 80), None, 0),  # the kernel takes multiples of 64
        ((64, 64), None, 0),  # and of 128 rows
    ],
)
def test_left_alone_it_takes_the_kernel_where_that_can_run(shape, implementation, expected):
    run = lambda x: quantize(x, SCALE, implementation=implementation)  # noqa: E731
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    with interpret_kernels():
        assert kernels(run, x) == expected
    if implementation is None:
        assert kernels(run, x) == 0  # a CPU


def test_left_alone_it_takes_the_kernel_where_a_device_part_is_seen():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    x = jax.ShapeDtypeStruct((1024, 64), jnp.bfloat16)
    run = lambda x: quantize(x, SCALE).q  # noqa: E731
    split = dict(mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False)
    with hardware.assume_device_kind("NVIDIA H200"):
        assert kernels(jax.shard_map(run, **split), x) == 1
        half = jax.ShapeDtypeStruct((512, 64), jnp.bfloat16)  # 64 rows a device
        assert kernels(jax.shard_map(run, **split), half) == 0
        assert kernels(run, x) == 0  # the partitioner is to split it


def test_nothing_but_what_is_asked_for_is_computed_by_default():
    assert quantize(matrix(16, 16, jnp.float32), SCALE).q.dtype == E4M3


# [tokens, width] of activations and gradients, and [in, out] of weights, of configs/*.toml.
TRAINER = [
    (16384, 2048), (16384, 6144), (16384, 5632), (16384, 11264), (16384, 4096), (16384, 14336),
    (16384, 28672), (2048, 6144), (2048, 11264), (5632, 2048), (4096, 6144), (14336, 4096),
]  # fmt: skip


@pytest.mark.parametrize("shape", TRAINER, ids=str)
def test_lowers_for_cuda_at_the_trainers_shapes(shape):
    def run(x, scale):
        return quantize(x, scale, implementation="mosaic")

    input_dtype = jnp.float32 if shape[0] < 16384 else jnp.bfloat16
    args = jax.ShapeDtypeStruct(shape, input_dtype), jax.ShapeDtypeStruct((), jnp.float32)
    with hardware.assume_device_kind("NVIDIA H200"):
        lowered = jax.jit(run).trace(*args).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (jnp.zeros((4, 4, 4)), {}, r"x.shape=\(4, 4, 4\) must be \[rows, columns\]"),
        (jnp.zeros((0, 4)), {}, r"x.shape=\(0, 4\) must be"),
        (jnp.zeros((16, 16), jnp.int32), {}, "x.dtype=int32 must be one of"),
        (jnp.zeros((16, 16)), {"dtype": jnp.int8}, "dtype=int8 must be one of"),
        (jnp.zeros((16, 16)), {"layouts": "all"}, "layouts='all' must be one of"),
        (jnp.zeros((16, 16)), {"implementation": "cuda"}, "implementation='cuda' must be one of"),
        (
            jnp.zeros((16, 16)),
            {"scale": jnp.ones(3)},
            r"scale is float32\[3\], must be float32\[\]",
        ),
    ],
)
def test_rejects(x, options, message):
    with pytest.raises(ValueError, match=message):
        quantize(x, options.pop("scale", SCALE), **options)


@pytest.mark.parametrize(
    ("shape", "layouts", "message"),
    [
        ((200, 128), "both", "200 rows must be a multiple of 128; pad them"),
        ((24, 128), "rows", "24 rows must be a multiple of 16; pad them"),
        ((128, 80), "both", "80 columns must be a multiple of 64; pad them"),
        ((2**20, 4096), "both", "do not fit int32"),
    ],
)
def test_kernel_refuses_with_the_reason(shape, layouts, message):
    def run(x):
        return quantize(x, SCALE, layouts=layouts, implementation="mosaic")

    with (
        hardware.assume_device_kind("NVIDIA H200"),
        pytest.raises(NotImplementedError, match=message),
    ):
        jax.eval_shape(run, jax.ShapeDtypeStruct(shape, jnp.bfloat16))


def test_kernel_refuses_the_cpu_with_the_reason():
    with pytest.raises(NotImplementedError, match="the kernel is for Hopper, but .* is 'cpu'"):
        quantize(jnp.zeros((128, 128)), SCALE, implementation="mosaic")


def test_config_rejects():
    with pytest.raises(ValueError, match="tile_columns=96 must be 64 or 128"):
        TileConfig(tile_columns=96)
    with pytest.raises(ValueError, match="TileConfig.stages=0 must be at least 1"):
        TileConfig(stages=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("input_dtype", SUPPORTED_DTYPES)
@pytest.mark.parametrize("shape", [(256, 384), (2048, 6144)], ids=str)
def test_gpu_kernel_is_exact(shape, input_dtype, dtype):
    x = matrix(*shape, input_dtype)
    result = quantize(x, SCALE, dtype=dtype, implementation="mosaic")
    assert_exact(result, x, 0.25, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("itemsize", [2, 4])
def test_gpu_every_candidate_is_exact(itemsize):
    x = matrix(1024, 1152, jnp.bfloat16 if itemsize == 2 else jnp.float32)
    for config in sm90.candidates(itemsize):
        plan = sm90.make_plan(x, dtype=E4M3, layouts="both", config=config)
        if sm90.unsupported_reason(plan) is None:
            result = sm90.quantize(x, SCALE, dtype=E4M3, layouts="both", config=config)
            assert_exact(result, x, 0.25, E4M3)


@pytest.mark.gpu
def test_gpu_special_values():
    x = special(256, 128)
    for dtype in (E4M3, E5M2):
        assert_exact(quantize(x, SCALE, dtype=dtype, implementation="mosaic"), x, 0.25, dtype)


assert np.dtype(ml_dtypes.float8_e4m3fn) == np.dtype(E4M3)

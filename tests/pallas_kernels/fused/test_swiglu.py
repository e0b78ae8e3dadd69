"""SwiGLU and its gradient, quantised: against float64, by XLA and by the interpreted kernels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

from pallas_kernels import hardware, swiglu, swiglu_grad_quantize, swiglu_quantize
from pallas_kernels.fused import sm90_swiglu
from pallas_kernels.interpreter import interpret_kernels
from pallas_kernels.quantize.sm90_plan import TileConfig
from tests.pallas_kernels.compile_gate import ptxas_report
from tests.pallas_kernels.quantize import reference

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2
SCALE = jnp.float32(2.0**-6)


def inputs(rows, hidden, dtype="bfloat16"):
    rng = np.random.default_rng(3)
    gate_up = 4 * rng.standard_normal((rows, 2 * hidden))
    gate_up[3, :8] = [-200, -88.5, -20, -1, 0, 1, 20, 200]  # exp(-gate) overflows, or is lost
    grad = rng.standard_normal((rows, hidden))
    return jnp.asarray(gate_up).astype(dtype), jnp.asarray(grad).astype(dtype)


def split64(gate_up, group):
    pairs = np.asarray(gate_up, np.float64).reshape(len(gate_up), -1, 2, group)
    return pairs[:, :, 0].reshape(len(gate_up), -1), pairs[:, :, 1].reshape(len(gate_up), -1)


def forward64(gate_up, group):
    gate, up = split64(gate_up, group)
    return gate * up / (1 + np.exp(-gate))


def backward64(gate_up, grad, group):
    gate, up = split64(gate_up, group)
    grad, sigmoid = np.asarray(grad, np.float64), 1 / (1 + np.exp(-gate))
    dgate = grad * up * sigmoid * (1 + gate * (1 - sigmoid))
    both = [x.reshape(len(gate), -1, group) for x in (dgate, grad * gate * sigmoid)]
    return np.stack(both, axis=2).reshape(gate_up.shape)


def assert_plain_close(values, exact, gate_up, grad):
    """Rounded to bfloat16 once; the sigmoid may be a float32 rounding off, however small it is."""
    largest = np.abs(np.asarray(grad, np.float64)).max() * np.abs(gate_up.astype(np.float32)).max()
    values = np.asarray(values, np.float64)
    np.testing.assert_allclose(values, exact, rtol=2**-8, atol=2**-23 * float(largest))


def assert_close(result, exact, dtype):
    """At most the float32 rounding away from the exact values before the cast, so mostly the same
    bytes, some neighbours; q_t is q.T exactly.
    """
    expected = reference.round8(exact, float(SCALE), np.dtype(dtype))
    rows = result.q if result.q is not None else result.q_t.T
    apart = np.abs(reference.order(rows) - reference.order(expected))
    assert apart.max() <= 1
    assert (apart > 0).mean() < 1e-3
    if result.q is not None and result.q_t is not None:
        np.testing.assert_array_equal(reference.bits(result.q).T, reference.bits(result.q_t))
    amax = np.int32(result.amax_bits.max()).view(np.float32)
    np.testing.assert_allclose(amax, np.abs(exact).max(), rtol=1e-6)


@pytest.mark.parametrize("group", [16, 128])
def test_xla_forward(group):
    gate_up, _ = inputs(32, 256)
    result = swiglu_quantize(gate_up, SCALE, group=group, implementation="xla")
    assert_close(result, forward64(gate_up, group), E4M3)


@pytest.mark.parametrize("group", [16, 128])
def test_xla_backward(group):
    gate_up, grad = inputs(32, 256)
    result, plain = swiglu_grad_quantize(
        gate_up, grad, SCALE, group=group, plain=True, implementation="xla"
    )
    exact = backward64(gate_up, grad, group)
    assert_close(result, exact, E5M2)
    assert_plain_close(plain, exact, gate_up, grad)


FORWARD = [
    ((128, 256), "bfloat16", E4M3, "both", sm90_swiglu.FORWARD),
    ((256, 128), "float16", E5M2, "columns", TileConfig(tile_columns=64, warpgroups=3)),
    ((48, 128), "bfloat16", E4M3, "rows", TileConfig(tile_columns=64, stages=2)),
]


@pytest.mark.parametrize("case", FORWARD, ids=str)
def test_interpreted_forward(case):
    shape, input_dtype, dtype, layouts, config = case
    gate_up, _ = inputs(*shape, input_dtype)
    with interpret_kernels():
        plan = sm90_swiglu.forward_plan(gate_up, dtype=dtype, layouts=layouts, config=config)
        assert sm90_swiglu.unsupported_reason(plan, gate_up, 128) is None
        options = dict(dtype=dtype, layouts=layouts, config=config)
        result = sm90_swiglu.forward(gate_up, SCALE, **options)
    assert_close(result, forward64(gate_up, 128), dtype)
    assert not interpret_pallas_call.get_races().races_found


BACKWARD = [
    ((128, 256), E5M2, "both", False, sm90_swiglu.BACKWARD),
    ((128, 128), E4M3, "columns", True, sm90_swiglu.BACKWARD_PLAIN),
    ((32, 128), E5M2, "rows", False, TileConfig(tile_columns=128, warpgroups=1)),
]


@pytest.mark.parametrize("case", BACKWARD, ids=str)
def test_interpreted_backward(case):
    shape, dtype, layouts, plain, config = case
    gate_up, grad = inputs(*shape)
    with interpret_kernels():
        options = dict(dtype=dtype, layouts=layouts, plain=plain, config=config)
        result, values = sm90_swiglu.backward(gate_up, grad, SCALE, **options)
    exact = backward64(gate_up, grad, 128)
    assert_close(result, exact, dtype)
    assert (values is None) != plain
    if plain:
        assert_plain_close(values, exact, gate_up, grad)
    assert not interpret_pallas_call.get_races().races_found


@pytest.mark.parametrize(
    ("implementation", "group", "shape", "dtype"),
    [
        ("xla", 16, (2, 16), "bfloat16"),
        ("xla", 128, (32,), "float32"),
        ("mosaic", 128, (2, 24), "bfloat16"),
        ("mosaic", 128, (128,), "float16"),
    ],
)
def test_plain_value_and_gradient(implementation, group, shape, dtype):
    gate_up, grad = inputs(int(np.prod(shape)), 256, dtype)
    run = functools.partial(swiglu, group=group, implementation=implementation)
    with interpret_kernels():
        out, pullback = jax.vjp(run, gate_up.reshape(*shape, 512))
        (dgate_up,) = pullback(grad.reshape(*shape, 256))
    assert (out.shape, out.dtype) == ((*shape, 256), gate_up.dtype) == (out.shape, dgate_up.dtype)
    kept = [(x.size, x.dtype) for x in jax.tree.leaves(pullback) if x.size > 1]
    assert kept == [(gate_up.size, gate_up.dtype)]  # only the input
    ones = np.ones(1)
    assert_plain_close(out.reshape(-1, 256), forward64(gate_up, group), gate_up, ones)
    exact = backward64(gate_up, grad, group)
    assert_plain_close(dgate_up.reshape(gate_up.shape), exact, gate_up, grad)
    if implementation == "mosaic":
        assert not interpret_pallas_call.get_races().races_found


@pytest.mark.parametrize("implementation", ["xla", "mosaic"])
def test_infinities_show_as_nan_and_in_the_amax(implementation):
    gate_up, grad = inputs(128, 128)
    gate_up = gate_up.at[5, 130].set(jnp.inf)  # up of hidden column 2
    with interpret_kernels():
        result = swiglu_quantize(gate_up, SCALE, implementation=implementation)
        dresult, _ = swiglu_grad_quantize(gate_up, grad, SCALE, implementation=implementation)
    assert np.argwhere(np.isnan(np.asarray(result.q, np.float32))).tolist() == [[5, 2]]
    assert np.argwhere(np.isnan(np.asarray(dresult.q_t, np.float32))).tolist() == [[2, 5]]
    assert min(int(r.amax_bits.max()) for r in (result, dresult)) >= 0x7F800000


def cases():
    struct = jax.ShapeDtypeStruct
    gate_up, grad = struct((16384, 28672), jnp.bfloat16), struct((16384, 14336), jnp.bfloat16)
    for config in sm90_swiglu.forward_candidates():
        yield "forward", config, (gate_up,)
    for config in sm90_swiglu.backward_candidates():
        yield "backward", config, (gate_up, grad)
    yield "backward_plain", sm90_swiglu.BACKWARD_PLAIN, (gate_up, grad)
    yield "plain", sm90_swiglu.FORWARD, (gate_up,)
    yield "plain_gradient", sm90_swiglu.BACKWARD, (gate_up, grad)


@pytest.mark.parametrize("case", list(cases()), ids=lambda case: f"{case[0]}-{case[1]}")
def test_compiles_for_sm90a_without_spills(case):
    kind, config, arrays = case
    options = dict(layouts="both", config=config)
    with hardware.assume_device_kind("NVIDIA H200"):
        if kind.startswith("plain"):
            run = dict(plain=sm90_swiglu.forward_plain, plain_gradient=sm90_swiglu.backward_plain)
            report = ptxas_report(functools.partial(run[kind], config=config), *arrays)
            assert report.spilled_bytes == 0, report.text
            return
        if kind == "forward":
            options |= dict(dtype=E4M3)
            plan = sm90_swiglu.forward_plan(arrays[0], **options)
            run = functools.partial(sm90_swiglu.forward, **options)
        else:
            options |= dict(dtype=E5M2, plain=kind == "backward_plain")
            plan = sm90_swiglu.backward_plan(arrays[0], **options)
            run = functools.partial(sm90_swiglu.backward, **options)
        assert sm90_swiglu.unsupported_reason(plan, arrays[0], 128) is None
        report = ptxas_report(run, *arrays, jax.ShapeDtypeStruct((), jnp.float32))
    assert report.spilled_bytes == 0, report.text


@pytest.mark.parametrize("hidden", [5632, 14336])
def test_lowers_for_cuda_at_the_trainers_shapes(hidden):
    def run(gate_up, grad, scale):
        forward = swiglu_quantize(gate_up, scale, implementation="mosaic")
        return forward, swiglu_grad_quantize(gate_up, grad, scale, implementation="mosaic")

    shapes = [(16384, 2 * hidden), (16384, hidden)]
    args = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    with hardware.assume_device_kind("NVIDIA H200"):
        traced = jax.jit(run).trace(*args, jax.ShapeDtypeStruct((), jnp.float32))
        assert traced.lower(lowering_platforms=("cuda",)).as_text().count("mosaic_gpu") >= 2


@pytest.mark.parametrize(
    ("gate_up", "grad", "options", "message"),
    [
        ((16, 100), (16, 50), {}, r"gate_up.shape\[1\]=100 must be a multiple of 2 . group=256"),
        ((16, 256), (16, 64), {}, r"grad.shape=\(16, 64\) must be the rows of"),
        ((16, 256), (16, 128), {"layouts": "none"}, "layouts='none' must be one of"),
    ],
)
def test_rejects(gate_up, grad, options, message):
    with pytest.raises(ValueError, match=message):
        swiglu_grad_quantize(jnp.zeros(gate_up), jnp.zeros(grad), SCALE, **options)


@pytest.mark.parametrize(
    ("shape", "dtype", "group", "message"),
    [
        ((128, 256), jnp.bfloat16, 64, "group=64 must be 128"),
        ((128, 256), jnp.float32, 128, "gate_up.dtype=float32 must have 16 bits"),
        ((100, 256), jnp.bfloat16, 128, "100 rows must be a multiple of 128"),
    ],
)
def test_kernel_refuses_with_the_reason(shape, dtype, group, message):
    with (
        hardware.assume_device_kind("NVIDIA H200"),
        pytest.raises(NotImplementedError, match=message),
    ):
        swiglu_quantize(jnp.zeros(shape, dtype), SCALE, group=group, implementation="mosaic")


@pytest.mark.gpu
def test_gpu_plain():
    gate_up, grad = inputs(2064, 5632)
    out, pullback = jax.vjp(functools.partial(swiglu, implementation="mosaic"), gate_up)
    assert_plain_close(out, forward64(gate_up, 128), gate_up, np.ones(1))
    assert_plain_close(pullback(grad)[0], backward64(gate_up, grad, 128), gate_up, grad)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(256, 384), (2048, 5632)], ids=str)
def test_gpu_kernels(shape):
    gate_up, grad = inputs(*shape)
    result = swiglu_quantize(gate_up, SCALE, implementation="mosaic")
    assert_close(result, forward64(gate_up, 128), E4M3)
    result, _ = swiglu_grad_quantize(gate_up, grad, SCALE, implementation="mosaic")
    assert_close(result, backward64(gate_up, grad, 128), E5M2)


@pytest.mark.gpu
def test_gpu_every_candidate_agrees():
    gate_up, grad = inputs(1024, 1152)
    for config in sm90_swiglu.forward_candidates():
        result = sm90_swiglu.forward(gate_up, SCALE, dtype=E4M3, layouts="both", config=config)
        assert_close(result, forward64(gate_up, 128), E4M3)
    for config in sm90_swiglu.backward_candidates():
        options = dict(dtype=E5M2, layouts="both", plain=False, config=config)
        result, _ = sm90_swiglu.backward(gate_up, grad, SCALE, **options)
        assert_close(result, backward64(gate_up, grad, 128), E5M2)

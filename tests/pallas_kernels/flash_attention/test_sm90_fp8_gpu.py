"""FP8 attention on the GPU: against float32, and no worse than the twin in XLA.

Both references are computed on the CPU: they compile there in seconds, and for a GPU in half a
minute, because XLA tries out algorithms for each of their products.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Fp8Options, flash_attention
from pallas_kernels.flash_attention import fp8_quantize, sm90_fp8, tuning
from pallas_kernels.flash_attention.config import Fp8BackwardConfig
from tests.pallas_kernels.cases import Case
from tests.pallas_kernels.flash_attention.test_sm90_fp8_forward import spec_of

pytestmark = pytest.mark.gpu

CASES = [
    Case(name="causal_gqa_ragged", b=2, t=777, s=777, n=4, k=2, h=128, is_causal=True),
    Case(name="full", b=1, t=1024, s=1024, n=2, k=2, h=128),
    Case(name="cross_d64", b=1, t=300, s=1000, n=4, k=1, h=64),
    Case(name="window", b=1, t=1024, s=1024, n=2, k=1, h=128, window=(100, 30)),
    Case(name="packed", b=2, t=512, s=512, n=2, k=1, h=128, is_causal=True, segments="padded"),
]
D256 = Case(name="causal_d256", b=1, t=512, s=512, n=2, k=1, h=256, is_causal=True)
OPTIONS = {
    "mosaic": Fp8Options(quantize_implementation="mosaic"),
    "xla": Fp8Options(),
    "e5m2": Fp8Options(gradient_format="e5m2"),
}


def relative(got, want):
    got, want = (np.asarray(x, np.float64) for x in (got, want))
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def attend(case, implementation, options):
    """Attention of q, k, v; in FP8 if there are options."""
    return functools.partial(
        flash_attention,
        precision="bf16" if options is None else "fp8",
        fp8_options=options,
        implementation=implementation,
        return_lse=True,
        **case.options(),
    )


def gradients(case, implementation, options, q, k, v, dout, dlse):
    call = attend(case, implementation, options)

    @jax.jit
    def run(q, k, v, dout, dlse):
        return jax.vjp(call, q, k, v)[1]((dout.astype(q.dtype), dlse))

    return run(q, k, v, dout, dlse)


def on_cpu(run, case, options, arrays, dtype):
    """Runs the XLA implementation on the CPU with q, k, v (and dout) in dtype."""
    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu):
        arrays = [x.astype(dtype) if x.dtype == jnp.bfloat16 else x for x in arrays]
        return run(case, "xla", options, *jax.device_put(arrays, cpu))


def forward(case, implementation, options, q, k, v):
    return jax.jit(attend(case, implementation, options))(q, k, v)


@pytest.mark.parametrize(
    ("case", "options"),
    [*((case, "mosaic") for case in CASES), (CASES[0], "xla"), (D256, "xla")],
    ids=str,
)
def test_forward_is_as_good_as_its_twin_and_repeats(case, options):
    qkv, options = case.arrays(jnp.bfloat16)[:3], OPTIONS[options]
    out, lse = forward(case, "mosaic", options, *qkv)
    twin, twin_lse = on_cpu(forward, case, options, qkv, jnp.bfloat16)
    oracle, _ = on_cpu(forward, case, None, qkv, jnp.float32)
    assert relative(out, oracle) <= 1.05 * relative(twin, oracle)
    np.testing.assert_allclose(lse, twin_lse, atol=0.02)
    again, _ = forward(case, "mosaic", options, *qkv)
    np.testing.assert_array_equal(*(np.asarray(x, np.float32) for x in (out, again)))


@pytest.mark.parametrize(
    ("case", "options"),
    [*((case, "mosaic") for case in CASES), (CASES[0], "xla"), (CASES[0], "e5m2")],
    ids=str,
)
def test_backward_is_as_good_as_its_twin(case, options):
    arrays, options = case.arrays(jnp.bfloat16), OPTIONS[options]
    got = gradients(case, "mosaic", options, *arrays)
    twin = on_cpu(gradients, case, options, arrays, jnp.bfloat16)
    oracle = on_cpu(gradients, case, None, arrays, jnp.float32)
    for name, x, y, z in zip(("dq", "dk", "dv"), got, twin, oracle, strict=True):
        assert relative(x, z) <= 1.05 * relative(y, z), name


def test_deterministic_gradients_repeat_bit_for_bit():
    case = Case(name="x", b=2, t=4096, s=4096, n=8, k=4, h=128, is_causal=True)
    arrays = case.arrays(jnp.bfloat16)
    q, k, v, dout, dlse = arrays
    call = functools.partial(attend(case, "mosaic", OPTIONS["mosaic"]), deterministic=True)
    run = jax.jit(lambda *qkv: jax.vjp(call, *qkv)[1]((dout, dlse)))
    first, *others = (run(q, k, v) for _ in range(4))
    reference = gradients(case, "mosaic", OPTIONS["mosaic"], *arrays)
    np.testing.assert_allclose(relative(first[0], reference[0]), 0.0, atol=0.004)
    for other in others:
        for x, y in zip(first, other, strict=True):
            np.testing.assert_array_equal(*(np.asarray(a, np.float32) for a in (x, y)))


def test_bf16_backward_of_an_fp8_forward():
    case = Case(name="x", b=1, t=1024, s=1024, n=2, k=1, h=128, is_causal=True)
    arrays = case.arrays(jnp.bfloat16)
    got = gradients(case, "mosaic", Fp8Options(backward="bf16"), *arrays)
    want = on_cpu(gradients, case, None, arrays, jnp.float32)
    for name, x, y in zip(("dq", "dk", "dv"), got, want, strict=True):
        # The probabilities are those of bf16 logits over an FP8 log-sum-exp.
        assert relative(x, y) <= 0.06, name


TIMED = Case(name="x", b=2, t=1100, s=1100, n=4, k=2, h=128, is_causal=True)


def test_turns_change_no_bit_of_the_forward():
    spec = spec_of(TIMED)
    inputs = jax.jit(lambda *qkv: fp8_quantize.quantize_inputs(*qkv, spec))(
        *TIMED.arrays(jnp.bfloat16)[:3]
    )
    free = tuning.forward_config(spec)
    assert free.compute_warpgroups == 3 and not free.ping_pong
    results = []
    for config in (free, dataclasses.replace(free, ping_pong=True)):
        out, statistics = sm90_fp8.fp8_forward(inputs, None, None, spec, config=config)
        results.append((np.asarray(out, np.float32), *statistics))
    for x, y in zip(*results, strict=True):
        np.testing.assert_array_equal(x, y)


def test_how_the_backward_is_cut_changes_no_bit_in_a_fixed_order():
    spec = spec_of(TIMED, deterministic=True)

    @jax.jit
    def operands(q, k, v, dout, dlse):
        inputs = fp8_quantize.quantize_inputs(q, k, v, spec)
        out, statistics = sm90_fp8.fp8_forward(inputs, None, None, spec)
        return inputs, fp8_quantize.quantize_gradients(inputs, statistics, out, dout, dlse, spec)

    inputs, gradients = operands(*TIMED.arrays(jnp.bfloat16))
    results = [
        sm90_fp8.fp8_backward(inputs, gradients, None, None, spec, config=config)
        for config in (
            Fp8BackwardConfig(),
            Fp8BackwardConfig(early_dv=True),
            Fp8BackwardConfig(separate_dq=True),
            Fp8BackwardConfig(separate_dq=True, early_dv=True),
        )
    ]
    for other in results[1:]:
        for name, x, y in zip(("dq", "dk", "dv"), results[0], other, strict=True):
            np.testing.assert_array_equal(*(np.asarray(a, np.float32) for a in (x, y)), name)

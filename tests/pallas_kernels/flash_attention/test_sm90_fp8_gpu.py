"""FP8 attention on the GPU: against the float32 oracle and the twin in XLA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Fp8Options, flash_attention
from tests.pallas_kernels.cases import Case

pytestmark = pytest.mark.gpu

CASES = [
    Case(name="causal_gqa_ragged", b=2, t=777, s=777, n=8, k=2, h=128, is_causal=True),
    Case(name="full", b=1, t=1024, s=1024, n=4, k=4, h=128),
    Case(name="cross_d64", b=1, t=300, s=1000, n=4, k=1, h=64),
    Case(name="window", b=1, t=1024, s=1024, n=4, k=2, h=128, window=(100, 30)),
    Case(name="packed", b=2, t=1024, s=1024, n=4, k=2, h=128, is_causal=True, segments="padded"),
    Case(name="causal_d256", b=1, t=1024, s=1024, n=4, k=2, h=256, is_causal=True),
]


def relative(got, want):
    got, want = (np.asarray(x, np.float64) for x in (got, want))
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def attend(case, implementation, precision="fp8", **options):
    fp8_options = Fp8Options(**options) if precision == "fp8" else None
    return functools.partial(
        flash_attention,
        precision=precision,
        fp8_options=fp8_options,
        implementation=implementation,
        return_lse=True,
        **case.options(),
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_is_as_good_as_its_twin_and_repeats(case):
    q, k, v, *_ = case.arrays(jnp.bfloat16)
    run = jax.jit(attend(case, "mosaic"))
    out, lse = run(q, k, v)
    twin, twin_lse = jax.jit(attend(case, "xla"))(q, k, v)
    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    oracle, _ = jax.jit(attend(case, "xla", "bf16"))(*wide)
    assert relative(out, oracle) <= 1.05 * relative(twin, oracle)
    np.testing.assert_allclose(lse, twin_lse, atol=1e-3)
    np.testing.assert_array_equal(*(np.asarray(x, np.float32) for x in (out, run(q, k, v)[0])))


@pytest.mark.parametrize("quantize_implementation", ["xla", "mosaic"])
@pytest.mark.parametrize("gradient_format", ["e4m3", "e5m2"])
@pytest.mark.parametrize("case", [c for c in CASES if c.h <= 128], ids=str)
def test_backward_is_as_good_as_its_twin(case, gradient_format, quantize_implementation):
    *qkv, dout, dlse = case.arrays(jnp.bfloat16)
    options = dict(gradient_format=gradient_format, quantize_implementation=quantize_implementation)

    def gradients(call, arrays, dout):
        return jax.jit(lambda *qkv: jax.vjp(call, *qkv)[1]((dout, dlse)))(*arrays)

    got = gradients(attend(case, "mosaic", **options), qkv, dout)
    twin = gradients(attend(case, "xla", **options), qkv, dout)
    wide = [x.astype(jnp.float32) for x in qkv]
    oracle = gradients(attend(case, "xla", "bf16"), wide, dout.astype(jnp.float32))
    for name, x, y, z in zip(("dq", "dk", "dv"), got, twin, oracle, strict=True):
        assert relative(x, z) <= 1.05 * relative(y, z), name


def test_bf16_backward_of_an_fp8_forward():
    case = Case(name="x", b=1, t=1024, s=1024, n=4, k=2, h=128, is_causal=True)
    *qkv, dout, _ = case.arrays(jnp.bfloat16)

    def gradients(precision, implementation, arrays, dout, **options):
        call = functools.partial(
            attend(case, implementation, precision, **options), return_lse=False
        )
        return jax.jit(lambda *qkv: jax.vjp(call, *qkv)[1](dout))(*arrays)

    got = gradients("fp8", "mosaic", qkv, dout, backward="bf16")
    wide = [x.astype(jnp.float32) for x in qkv]
    want = gradients("bf16", "xla", wide, dout.astype(jnp.float32))
    for name, x, y in zip(("dq", "dk", "dv"), got, want, strict=True):
        # The probabilities are those of bf16 logits over an FP8 log-sum-exp.
        assert relative(x, y) <= 0.06, name

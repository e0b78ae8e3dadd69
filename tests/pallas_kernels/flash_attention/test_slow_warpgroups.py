"""The kernels stay right when one warpgroup is late at every barrier.

A GPU runs the warpgroups of a CTA in any order. If one can come so late that a barrier completes
twice before it has waited once, it waits for ever; the interpreter counts phases and says so. (With
two turn barriers instead of NUM_TURN_BARRIERS, a late compute warpgroup makes the backward fail
here, as it made it hang on a GPU.)
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import shared_memory

from pallas_kernels.flash_attention import fp8_quantize, fp8_xla, sm90, sm90_fp8
from pallas_kernels.flash_attention.config import BackwardConfig, ForwardConfig, Fp8BackwardConfig
from pallas_kernels.flash_attention.sm90_rope_quantize_fp8 import rope_quantize
from tests.pallas_kernels.cases import Case
from tests.pallas_kernels.flash_attention import test_sm90_fp8_forward, test_sm90_rope_quantize_fp8
from tests.pallas_kernels.flash_attention.test_sm90_backward import interpreted
from tests.pallas_kernels.flash_attention.test_sm90_forward import spec_of

LATE_S = 0.01
# More steps than any kernel has buffers, and two tiles for one CTA.
CASE = Case(name="five_steps", b=1, t=320, s=256, n=1, k=1, h=64)


@pytest.fixture(params=[0, 1, 2], ids=["compute_0", "compute_1", "producer"])
def late_warpgroup(request, monkeypatch):
    """Makes one warpgroup come late to each wait; runs all tiles on one CTA."""
    wait = shared_memory.Barrier.wait

    def late_wait(barrier, thread, *args, **kwargs):
        if thread.warpgroup_id == request.param:
            time.sleep(LATE_S)
        return wait(barrier, thread, *args, **kwargs)

    monkeypatch.setattr(shared_memory.Barrier, "wait", late_wait)
    monkeypatch.setattr(sm90, "sm_count", lambda: 1)


def test_forward(late_warpgroup):
    q, k, v, *_ = CASE.arrays(jnp.bfloat16)
    config = ForwardConfig(block_kv=64)
    out, _ = sm90.forward(q, k, v, None, None, spec_of(CASE), config=config, interpret=True)
    want = CASE.expected(q, k, v).out
    assert np.abs(np.asarray(out, np.float64) - want).max() <= 2.0**-7 * np.abs(want).max()


@pytest.mark.parametrize("late_dq", [False, True], ids=["in_order", "late_dq"])
def test_backward(late_warpgroup, late_dq):
    arrays = CASE.arrays(jnp.bfloat16)
    expected = CASE.expected(*arrays)
    config = BackwardConfig(block_q=64, overlap=not late_dq, late_dq=late_dq)
    got = interpreted(CASE, config, arrays, expected, deterministic=not late_dq)
    for name, x in zip(("dq", "dk", "dv"), got, strict=True):
        want = getattr(expected, name)
        assert np.abs(np.asarray(x, np.float64) - want).max() <= 2.0**-6 * np.abs(want).max(), name


def test_fp8_forward(late_warpgroup):
    q, k, v, *_ = CASE.arrays(jnp.bfloat16)
    spec = test_sm90_fp8_forward.spec_of(CASE)
    config = ForwardConfig(block_kv=64, compute_warpgroups=2, overlap=False)
    inputs = jax.jit(lambda *qkv: fp8_quantize.quantize_inputs(*qkv, spec))(q, k, v)
    out, _ = sm90_fp8.fp8_forward(inputs, None, None, spec, config=config, interpret=True)
    want = CASE.expected(q, k, v).out
    # Two of 8 bits, and the probabilities.
    assert np.linalg.norm(np.asarray(out, np.float64) - want) <= 0.06 * np.linalg.norm(want)


@pytest.mark.parametrize("separate_dq", [False, True])
def test_fp8_backward(late_warpgroup, separate_dq):
    q, k, v, dout, dlse = CASE.arrays(jnp.bfloat16)
    spec = test_sm90_fp8_forward.spec_of(CASE, deterministic=True)
    config = Fp8BackwardConfig(separate_dq=separate_dq)

    @jax.jit
    def operands(q, k, v, dout, dlse):
        inputs = fp8_quantize.quantize_inputs(q, k, v, spec)
        out, statistics = fp8_xla.fp8_forward(inputs, None, None, spec)
        gradients = fp8_quantize.quantize_gradients(inputs, statistics, out, dout, dlse, spec)
        return inputs, gradients, fp8_xla.fp8_backward(inputs, gradients, None, None, spec)

    inputs, gradients, twin = operands(q, k, v, dout, dlse)
    got = sm90_fp8.fp8_backward(inputs, gradients, None, None, spec, config=config, interpret=True)
    for x, y in zip(got, twin, strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert np.linalg.norm(x - y) <= 0.01 * np.linalg.norm(y)


def test_rope_quantize(late_warpgroup):
    case = test_sm90_rope_quantize_fp8.Case(
        name="five_heads", length=128, kv_heads=5, group=1, h=64, rotates=False
    )
    arguments = case.arguments()
    got = rope_quantize(*arguments, part=case.part, sm_count=1, interpret=True)
    test_sm90_rope_quantize_fp8.check(case, got, *arguments)

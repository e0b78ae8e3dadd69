"""The FP8 part of the attention benchmark: what it runs, and that all of it lowers for the H200."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import attention, attention_fp8_worker, attention_worker
from benchmarks.attention import SHAPES
from pallas_kernels import hardware
from pallas_kernels.flash_attention import fp8_quantize, sm90_bwd_fp8, sm90_bwd_fp8_plan, sm90_fp8


def test_every_shape_is_timed_with_its_shipped_config():
    listed = list(attention.fp8_tasks(["forward", "backward"], max_configs=2, fast=False))
    for direction in ("forward", "backward"):
        shipped = [
            t
            for t in listed
            if t["kind"] == "fp8 time" and t["candidate"] is None and t["direction"] == direction
        ]
        names = {s["name"] for t in shipped for s in t["shapes"]}
        assert names == {s.name for s in SHAPES if direction == "forward" or s.h <= 128}
    assert listed[0]["kind"] == "fp8 check"


def test_fp8_tasks_go_to_the_fp8_worker(monkeypatch):
    commands = []

    class Popen:
        pid = 0

        def __init__(self, command, **_):
            commands.append(command)

        def wait(self, _):
            return 0

    monkeypatch.setattr(attention.subprocess, "Popen", Popen)
    for kind in ("fp8 check", "check"):
        attention.run_worker({"kind": kind, "timeout_s": 1})
    modules = [command[2] for command in commands]
    assert modules == ["benchmarks.attention_fp8_worker", "benchmarks.attention_worker"]


def test_report_shows_the_error_table():
    rows = [
        {"kind": "accuracy", "case": "N(0,1)", "contender": "ours"}
        | dict(out=0.0512, dq=0.0671, dk=0.0662, dv=0.0533)
    ]
    parts = [{"task": {"kind": "fp8 accuracy"}, "ended": "ok", "rows": rows}]
    assert "| N(0,1) | ours      | 0.0512 | 0.0671 | 0.0662 | 0.0533 |" in attention.report(parts)


def test_the_distributions_are_what_they_are_called():
    inputs = attention_fp8_worker.distributions(512)
    q, _, _, dout = inputs["N(0,1)"]
    assert q.shape == dout.shape == (1, 512, 2, 128) and abs(float(q.std()) - 1) < 0.02
    spiky = np.abs(np.asarray(inputs["outliers .1% x10"][1])) > 5
    assert 1e-4 < spiky.mean() < 2e-3
    q, k, *_ = inputs["sink +8"]
    logits = jnp.einsum("h,sh->s", q[0, 7, 0], k[0, :, 0]) / 128**0.5
    np.testing.assert_allclose(logits[0], 8.0, rtol=1e-5)


def test_kernels_of_the_largest_shapes_lower_with_what_the_benchmark_gives_them():
    shape = next(s for s in SHAPES if s.name == "causal 2x8192 32/8")
    spec = attention_worker.spec_of(shape, precision="fp8")
    q = jax.ShapeDtypeStruct((shape.b, shape.t, shape.n, shape.h), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((shape.b, shape.t, shape.k, shape.h), jnp.bfloat16)
    with hardware.assume_device_kind("NVIDIA H200"):
        backward_plan = sm90_bwd_fp8_plan.Plan(spec=spec)

        def both(q, k, v, dout):
            inputs = fp8_quantize.quantize_inputs(q, k, v, spec)
            out, statistics = sm90_fp8.fp8_forward(inputs, None, None, spec)
            dlse = jnp.zeros(out.shape[:3], jnp.float32)
            gradients = fp8_quantize.quantize_gradients(inputs, statistics, out, dout, dlse, spec)
            operands = sm90_fp8.backward_operands(inputs, gradients, None, None, backward_plan)
            return sm90_bwd_fp8.launch(operands, plan=backward_plan)

        text = jax.jit(both).trace(q, k, k, q).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu") >= 2

"""One FP8 part of `benchmarks.attention`, in a process of its own: prints JSON objects, one a row.

python -m benchmarks.attention_fp8_worker '{"kind": "fp8 check", "direction": "forward"}'

Times are of the kernel alone on quantised operands ("fp8 kernel"), and of the whole call from
bfloat16 to bfloat16 ("fp8 with quantising"), beside cuDNN in bf16 and cuDNN in FP8 (its kernel
alone: one scale for a whole tensor, head dim 128, no windows).
"""

import dataclasses
import functools
import json
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as cudnn_binding

from benchmarks.attention import Shape
from benchmarks.attention_worker import (
    emit,
    emit_failure,
    emit_times,
    inputs,
    options_of,
    shipped_or_candidate,
    spec_of,
    time_interleaved,
)
from pallas_kernels import Fp8Options, flash_attention
from pallas_kernels.flash_attention import (
    fp8_quantize,
    sm90_bwd_fp8,
    sm90_bwd_fp8_plan,
    sm90_fp8,
    sm90_fwd_fp8,
    tuning,
)
from pallas_kernels.flash_attention.config import AttentionSpec

Call = Callable[..., Any]
_CHECKS = {
    "causal": {},
    "full": dict(is_causal=False),
    "gqa many tiles": dict(b=3, t=2048, n=16, k=4),
    "mqa d64": dict(k=1, h=64),
    "d256": dict(h=256),
    "odd length": dict(t=777),
    "window": dict(left=100),
    "documents": dict(documents=True),
    "documents d64": dict(documents=True, h=64),
    "short": dict(t=40),
}


def relative(got: Any, want: Any) -> float:
    """Euclidean norm of the difference over that of `want`."""
    got, want = (jnp.asarray(x, jnp.float32) for x in (got, want))
    return float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))


def cosine(got: Any, want: Any) -> float:
    """Cosine of the angle between two arrays."""
    got, want = (jnp.asarray(x, jnp.float32) for x in (got, want))
    return float((got * want).sum() / jnp.linalg.norm(got) / jnp.linalg.norm(want))


def gradient_of(call: Call) -> Call:
    """Maps (q, k, v, dout) to (dq, dk, dv)."""
    return jax.jit(lambda q, k, v, dout: jax.vjp(call, q, k, v)[1](dout.astype(q.dtype)))


def run_checks(task: dict[str, Any]) -> None:
    """Compares the kernels with the float32 oracle and their twin in XLA, feature by feature."""
    for name, fields in _CHECKS.items():
        try:
            _check(name, task["direction"], **fields)
        except Exception as error:  # reported as a failed check; the next one still runs
            _emit_check(task["direction"], name, "run", float("nan"), 0.0, str(error)[:300])


def _check(
    name: str, direction: str, *, documents: bool = False, t: int = 1024, **fields: Any
) -> None:
    """Checks one feature: no worse than the twin by more than 5 %, and near to it."""
    shape = Shape(**(dict(name=name, b=1, n=4, k=2) | fields), t=t)
    if direction == "backward" and shape.h not in sm90_fp8.BACKWARD_HEAD_DIMS:
        return
    q, k, v, dout = inputs(shape)
    ids: dict[str, Any] = {}
    if documents:
        numbers = jnp.tile(jnp.arange(t, dtype=jnp.int32) // 150, (shape.b, 1))
        ids = dict(q_segment_ids=numbers.at[:, -50:].set(999), kv_segment_ids=numbers)
    call = functools.partial(flash_attention, **options_of(shape), **ids)
    ours, twin = (
        functools.partial(call, precision="fp8", implementation=i) for i in ("mosaic", "xla")
    )
    oracle = functools.partial(call, implementation="xla")
    wide = [x.astype(jnp.float32) for x in (q, k, v, dout)]
    if direction == "forward":
        results = [(jax.jit(f)(q, k, v),) for f in (ours, ours, twin)]
        want, names = (jax.jit(oracle)(*wide[:3]),), ("out",)
    else:
        results = [gradient_of(f)(q, k, v, dout) for f in (ours, ours, twin)]
        want, names = gradient_of(oracle)(*wide), ("dq", "dk", "dv")
    for i, what in enumerate(names):
        got, again, same = (result[i] for result in results)
        error = relative(got, want[i])
        _emit_check(direction, name, what, error, 1.05 * relative(same, want[i]) + 1e-3)
        _emit_check(direction, name, f"{what} off twin", relative(got, same), 0.01)
        if what != "dq":  # added in the order in which tiles finish
            _emit_check(direction, name, f"{what} repeat", relative(again, got), 0.0)


def _emit_check(
    direction: str, case: str, what: str, error: float, bound: float, message: str = ""
) -> None:
    """Prints the row of one comparison."""
    verdict = f"FAILED {message}".strip() if message or not error <= bound else "ok"
    emit(
        kind="check",
        direction=direction,
        case=case,
        what=what,
        error=error,
        bound=bound,
        verdict=verdict,
    )


def distributions(length: int = 4096) -> dict[str, list[Any]]:
    """q, k, v, dout `[1, length, 2, 128]` of the error table, float32."""
    keys = jax.random.split(jax.random.key(3), 8)
    shape = (1, length, 2, 128)
    normal = [jax.random.normal(key, shape) for key in keys[:4]]
    q, k, v, dout = normal
    spikes = [
        10 * x * jax.random.bernoulli(key, 0.001, shape)
        for key, x in zip(keys[4:7], (jnp.roll(x, 1, 1) for x in (q, k, v)), strict=True)
    ]
    bias = 8 * jax.random.normal(keys[7], (1, 1, 2, 128)) * (jnp.arange(128) % 16 == 0)
    sink_k = k.at[..., 0].set(0.0).at[:, 0].set(0.0).at[:, 0, :, 0].set(8 * 128**0.5)
    return {
        "N(0,1)": normal,
        "U(-.5,.5)": [*(jax.random.uniform(key, shape) - 0.5 for key in keys[:3]), dout],
        "U(0,1)": [*(jax.random.uniform(key, shape) for key in keys[:3]), dout],
        "outliers .1% x10": [q + spikes[0], k + spikes[1], v + spikes[2], dout],
        "K channel bias": [q, k + bias, v, dout],
        "sink +8": [q.at[..., 0].set(1.0), sink_k, v.at[:, 0].multiply(0.05), dout],
    }


def run_accuracy(task: dict[str, Any]) -> None:
    """Prints the relative errors of FP8 attention, ours and cuDNN's, over input distributions."""
    shape = Shape(name="accuracy", b=1, t=4096, n=2, k=2, is_causal=False)
    contenders = {
        "ours": functools.partial(flash_attention, precision="fp8", implementation="mosaic"),
        "ours, no rotation": functools.partial(
            flash_attention,
            precision="fp8",
            implementation="mosaic",
            fp8_options=Fp8Options(rotate=False),
        ),
    }
    oracle = functools.partial(flash_attention, implementation="xla")
    for name, wide in distributions().items():
        want = [oracle(*wide[:3]), *gradient_of(oracle)(*wide)]
        narrow = [x.astype(jnp.bfloat16) for x in wide]
        results: dict[str, Call] = {
            contender: functools.partial(_out_and_gradients, f, narrow)
            for contender, f in contenders.items()
        }
        results["cuDNN fp8"] = functools.partial(_cudnn_results, shape, narrow)
        for contender, run in results.items():
            try:
                errors = [relative(x, y) for x, y in zip(run(), want, strict=True)]
            except Exception as error:  # reported; the next one still runs
                emit(kind="fail", shape=name, contender=contender, error=str(error)[:300])
                continue
            emit(
                kind="accuracy",
                case=name,
                contender=contender,
                **dict(zip(("out", "dq", "dk", "dv"), errors, strict=True)),
            )


def _out_and_gradients(call: Call, arrays: list[Any]) -> list[Any]:
    """out, dq, dk, dv of an implementation."""
    return [jax.jit(call)(*arrays[:3]), *gradient_of(call)(*arrays)]


def _cudnn_results(shape: Shape, arrays: list[Any]) -> list[Any]:
    """The same of cuDNN in FP8."""
    return CudnnFp8(shape, arrays).results()


class CudnnFp8:
    """cuDNN's FP8 attention with the best scales it could have: those of these very tensors."""

    def __init__(self, shape: Shape, arrays: list[Any]):
        if shape.h != 128 or shape.t % 128 or shape.left is not None:
            raise NotImplementedError("cuDNN FP8 takes head dim 128, T % 128 == 0, no window")
        self.options = (
            shape.h**-0.5,
            shape.is_causal,
            cudnn_binding.AttentionLayout.BTNH.value,
            cudnn_binding.check_cudnn_version(),
        )
        one = jnp.ones((1, 1, 1, 1), jnp.float32)
        self.params = dict.fromkeys(cudnn_binding.fp8_params_keys, one)
        self.arrays = []
        for name, x in zip(("q", "k", "v", "dO"), arrays, strict=True):
            scale = jnp.abs(x).max().astype(jnp.float32) / 448
            self.params[f"descale_{name}"] = scale.reshape(1, 1, 1, 1)
            self.arrays.append((x.astype(jnp.float32) / scale).astype(jnp.float8_e4m3fn))
        self.params |= dict(scale_s=256 * one, descale_s=one / 256)
        _, _, amax_out = self.forward(*self.arrays[:3])[0]
        self.params |= dict(scale_o=448 / amax_out, descale_o=amax_out / 448)
        self.residuals = self.forward(*self.arrays[:3])[1]
        amaxes = self.backward(self.arrays[3])[3]
        for name in ("dQ", "dK", "dV", "dP"):
            self.params[f"scale_{name}"] = 448 / amaxes[f"amax_{name}"]
        self.params["descale_dP"] = 1 / self.params["scale_dP"]
        self.residuals = self.forward(*self.arrays[:3])[1]

    def forward(self, q: Any, k: Any, v: Any) -> Any:
        """Outputs and residuals."""
        rule = cudnn_binding._dot_product_attention_fp8_fwd_rule
        return jax.jit(lambda q, k, v: rule(q, k, v, self.params, *self.options))(q, k, v)

    def backward(self, dout: Any) -> Any:
        """dq, dk, dv in FP8, and amaxes."""
        rule = cudnn_binding._dot_product_attention_fp8_bwd_rule
        run = jax.jit(lambda residuals, dout: rule(*self.options, residuals, (dout,)))
        return run(self.residuals, dout)

    def results(self) -> list[Any]:
        """out, dq, dk, dv, dequantised."""
        out = self.forward(*self.arrays[:3])[0][0].astype(jnp.float32) / self.params["scale_o"]
        grads = self.backward(self.arrays[3])[:3]
        scales = [self.params[f"scale_{name}"] for name in ("dQ", "dK", "dV")]
        return [out, *(x.astype(jnp.float32) / s for x, s in zip(grads, scales, strict=True))]

    def timed(self, direction: str) -> Call:
        """The kernel alone."""
        if direction == "forward":
            rule = cudnn_binding._dot_product_attention_fp8_fwd
            names = cudnn_binding.fp8_params_keys_fwd
            values = [self.params[name] for name in names]
            run = jax.jit(lambda q, k, v: rule(q, k, v, values, *self.options))
            return functools.partial(run, *self.arrays[:3])
        rule = cudnn_binding._dot_product_attention_fp8_bwd_rule
        run = jax.jit(lambda residuals, dout: rule(*self.options, residuals, (dout,))[:3])
        return functools.partial(run, self.residuals, self.arrays[3])


def run_timing(task: dict[str, Any]) -> None:
    """Times one config at several shapes beside cuDNN."""
    for fields in task["shapes"]:
        shape = Shape(**fields)
        try:
            calls = _contenders(shape, task)
            if not calls:
                continue
            medians = time_interleaved(calls, jax.block_until_ready)
        except Exception as error:  # reported as the row of this shape; the next one still runs
            emit_failure(task, shape, "fp8 kernel", error)
            continue
        emit_times(task, shape, medians, "cudnn bf16", {})


def _contenders(shape: Shape, task: dict[str, Any]) -> dict[str, Call]:
    """Calls to be timed: the kernel, the whole, cuDNN in bf16 and FP8."""
    q, k, v, dout = arrays = inputs(shape)
    spec = spec_of(shape, precision="fp8")
    whole = functools.partial(
        flash_attention, precision="fp8", implementation="mosaic", **options_of(shape)
    )
    bf16 = functools.partial(flash_attention, implementation="cudnn", **options_of(shape))
    if task["direction"] == "forward":
        config = _forward_config(spec, task["candidate"])
        if config is None:
            return {}
        name = " ".join(f"{key}={value}" for key, value in dataclasses.asdict(config).items())
        calls = {f"fp8 kernel {name}": _forward_kernel(spec, config, q, k, v)}
        calls["cudnn bf16"] = functools.partial(jax.jit(bf16), q, k, v)
        if task["candidate"] is not None:
            return calls
        calls["fp8 with quantising"] = functools.partial(jax.jit(whole), q, k, v)
        own = jax.jit(_own_quantising(whole))
        calls["fp8 with quantising, own kernels"] = functools.partial(own, q, k, v)
    else:
        calls = {"fp8 kernel": _backward_kernel(spec, *arrays)}
        for contender, call in (
            ("cudnn bf16", bf16),
            ("fp8 with quantising", whole),
            ("fp8 with quantising, own kernels", _own_quantising(whole)),
        ):
            _, vjp = jax.vjp(call, q, k, v)
            calls[contender] = functools.partial(jax.jit(lambda f, x: f(x)), vjp, dout)
    try:
        calls["cudnn fp8 kernel"] = CudnnFp8(shape, arrays).timed(task["direction"])
    except Exception as error:  # the peer's limits are no failure of this part
        emit_failure(task, shape, "cudnn fp8", error)
    return calls


def _own_quantising(call: Call) -> Call:
    """The same call, quantised by the project's own kernels instead of XLA."""
    return functools.partial(call, fp8_options=Fp8Options(quantize_implementation="mosaic"))


def _forward_config(spec: AttentionSpec, candidate: int | None) -> Any:
    """The shipped config, or another accepted one, or None if there are not so many."""
    shipped = tuning.forward_config(spec)
    return shipped_or_candidate(shipped, tuning.forward_candidates(spec), candidate)


def _forward_kernel(spec: AttentionSpec, config: Any, q: Any, k: Any, v: Any) -> Call:
    """The forward kernel on operands that are ready."""
    plan = sm90_fp8.forward_plan(spec, config=config)

    @jax.jit
    def prepare(q: Any, k: Any, v: Any) -> Any:
        return sm90_fp8.forward_operands(
            fp8_quantize.quantize_inputs(q, k, v, spec), None, None, plan
        )

    run = jax.jit(lambda operands: sm90_fwd_fp8.launch(*operands, plan=plan))
    return functools.partial(run, jax.block_until_ready(prepare(q, k, v)))


def _backward_kernel(spec: AttentionSpec, q: Any, k: Any, v: Any, dout: Any) -> Call:
    """The backward kernel on operands that are ready; clearing dQ is part of it."""
    plan = sm90_bwd_fp8_plan.Plan(spec=spec)

    @jax.jit
    def prepare(q: Any, k: Any, v: Any, dout: Any) -> Any:
        quantised = fp8_quantize.quantize_inputs(q, k, v, spec)
        out, statistics = sm90_fp8.fp8_forward(quantised, None, None, spec)
        dlse = jnp.zeros(out.shape[:3], jnp.float32)
        gradients = fp8_quantize.quantize_gradients(quantised, statistics, out, dout, dlse, spec)
        return sm90_fp8.backward_operands(quantised, gradients, None, None, plan)

    run = jax.jit(lambda operands: sm90_bwd_fp8.launch(operands, plan=plan))
    return functools.partial(run, jax.block_until_ready(prepare(q, k, v, dout)))


def main(text: str) -> None:
    """Runs the task described by a JSON object."""
    task = json.loads(text)
    kinds = {"fp8 check": run_checks, "fp8 time": run_timing, "fp8 accuracy": run_accuracy}
    kinds[task["kind"]](task)


if __name__ == "__main__":
    main(sys.argv[1])

"""One part of `benchmarks.attention`, in a process of its own: prints a JSON object for each row.

python -m benchmarks.attention_worker '{"kind": "check", "direction": "forward"}'
"""

import dataclasses
import functools
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.attention import Shape

_ROUNDS = 5
_CALLS = 10  # queued before the host waits, so that launch overhead overlaps


def emit(**row: Any) -> None:
    """Prints one row."""
    print(json.dumps(row), flush=True)


def emit_times(
    task: dict[str, Any],
    shape: Shape,
    medians: dict[str, float],
    reference: str,
    notes: dict[str, str],
) -> None:
    """Prints a row for each contender, given its median time in ms; `reference` is a contender.

    Args:
      task: says in which direction.
      shape: what was timed.
      medians: by contender.
      reference: the contender that speedups are against.
      notes: on some contenders.
    """
    import jax

    for contender, median_ms in medians.items():
        emit(
            kind="time",
            direction=task["direction"],
            shape=shape.name,
            contender=contender,
            median_ms=median_ms,
            tflops=shape.flops(task["direction"]) / median_ms / 1e9,
            speedup=medians[reference] / median_ms,
            note=notes.get(contender, ""),
            device=jax.devices()[0].device_kind,
        )


def emit_failure(task: dict[str, Any], shape: Shape, contender: str, error: Exception) -> None:
    """Prints that a contender could not be timed; the next one still is."""
    emit(
        kind="fail",
        direction=task["direction"],
        shape=shape.name,
        contender=contender,
        error=f"{type(error).__name__}: {str(error)[:500]}",
    )


def shipped_or_candidate(shipped: Any, candidates: Any, index: int | None) -> Any:
    """Returns the shipped config, or another accepted one by index, or None if there are fewer."""
    if index is None:
        return shipped
    others = [c for c, reason in candidates if reason is None and c != shipped]
    return others[index] if index < len(others) else None


def time_interleaved(contenders: dict[str, Any], wait: Callable[[Any], Any]) -> dict[str, float]:
    """Returns the median time of one call of each contender in ms, taken in turns."""
    for call in contenders.values():
        wait(call())
        wait(call())
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(_ROUNDS):
        for name, call in contenders.items():
            started = time.perf_counter()
            wait([call() for _ in range(_CALLS)][-1])
            times[name].append(1e3 * (time.perf_counter() - started) / _CALLS)
    return {name: statistics.median(values) for name, values in times.items()}


def inputs(shape: Shape, dtype: str = "bfloat16", seed: int = 0) -> list[Any]:
    """Returns q, k, v and the output's gradient, standard normal, on the default device."""
    import jax

    keys = jax.random.split(jax.random.key(seed), 4)
    heads = (shape.n, shape.k, shape.k, shape.n)
    return [
        jax.random.normal(key, (shape.b, shape.t, n, shape.h), dtype)
        for key, n in zip(keys, heads, strict=True)
    ]


def options_of(shape: Shape) -> dict[str, Any]:
    """Returns the arguments of flash_attention."""
    window = None if shape.left is None else (shape.left, 0)
    return dict(is_causal=shape.is_causal, local_window_size=window)


def run_timing(task: dict[str, Any]) -> None:
    """Times one config at several shapes beside cuDNN and tokamax."""
    for fields in task["shapes"]:
        shape = Shape(**fields)
        spec, config, name = _config(shape, task)
        if config is None:
            continue
        try:
            _time_shape(shape, spec, config, name, task)
        except Exception as error:  # reported as the row of this shape; the next one still runs
            emit_failure(task, shape, name, error)


def spec_of(shape: Shape, **fields: Any) -> Any:
    """Returns the AttentionSpec of a shape: bf16 without segment ids unless `fields` say else."""
    from pallas_kernels.flash_attention.config import AttentionSpec
    from pallas_kernels.flash_attention.masks import make_band

    options = options_of(shape)
    spec = AttentionSpec(
        batch_size=shape.b,
        query_length=shape.t,
        key_length=shape.t,
        num_heads=shape.n,
        num_kv_heads=shape.k,
        head_dim=shape.h,
        dtype="bfloat16",
        band=make_band(options["is_causal"], options["local_window_size"], shape.t, shape.t),
        has_segments=False,
        softmax_scale=shape.h**-0.5,
        return_lse=False,
        precision="bf16",
    )
    return dataclasses.replace(spec, **fields)


def _config(shape: Shape, task: dict[str, Any]) -> tuple[Any, Any, str]:
    """Returns the spec of a shape, and the config of this task with its name, or None."""
    from pallas_kernels.flash_attention import tuning

    spec = spec_of(shape)
    is_forward = task["direction"] == "forward"
    shipped = tuning.forward_config(spec) if is_forward else tuning.backward_config(spec)
    candidates = tuning.forward_candidates if is_forward else tuning.backward_candidates
    config = shipped_or_candidate(shipped, candidates(spec), task["candidate"])
    if config is None:
        return spec, None, ""
    values = dataclasses.asdict(config)
    name = "mosaic " + " ".join(f"{key}={value}" for key, value in values.items())
    return spec, config, name


def _time_shape(shape: Shape, spec: Any, config: Any, name: str, task: dict[str, Any]) -> None:
    """Times one shape; checks the output of the first head against cuDNN."""
    import jax

    from pallas_kernels import flash_attention
    from pallas_kernels.flash_attention import sm90

    q, k, v, dout = inputs(shape)
    backward = task["direction"] == "backward"
    cudnn = jax.jit(functools.partial(flash_attention, implementation="cudnn", **options_of(shape)))
    peers = {"cudnn": cudnn}
    if task["candidate"] is None and shape.left is None:
        peers |= _tokamax(shape)
    if backward:
        calls = _our_backwards(q, k, v, dout, spec, config, name)
        for key, f in peers.items():
            # The residuals travel in the pullback, so that its call runs the backward alone.
            calls[key] = functools.partial(
                jax.jit(lambda pullback, dout: pullback(dout)), jax.vjp(f, q, k, v)[1], dout
            )
    else:
        ours = jax.jit(lambda q, k, v: sm90.forward(q, k, v, None, None, spec, config=config)[0])
        calls = {key: functools.partial(f, q, k, v) for key, f in {name: ours, **peers}.items()}
    results = zip(*(jax.tree.leaves(calls[key]()) for key in (name, "cudnn")), strict=True)
    difference = max(float(abs(x.astype("float32") - y).max()) for x, y in results)
    medians = time_interleaved(calls, jax.block_until_ready)
    emit_times(task, shape, medians, "cudnn", {name: f"off cuDNN by {difference:.1e}"})


def _our_backwards(
    q: Any, k: Any, v: Any, dout: Any, spec: Any, config: Any, name: str
) -> dict[str, Callable[..., Any]]:
    """Returns the backward kernel in both orders of addition, each as a call without arguments."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.flash_attention import sm90

    out, lse = jax.jit(lambda q, k, v: sm90.attention(q, k, v, None, None, spec))(q, k, v)
    dlse = jnp.zeros_like(lse)
    calls = {}
    for label, deterministic in ((name, True), (f"{name} any order", False)):
        ordered = dataclasses.replace(spec, deterministic=deterministic)
        run = functools.partial(sm90.backward, spec=ordered, config=config)
        call = jax.jit(lambda *arrays, run=run: run(*arrays[:3], None, None, *arrays[3:]))
        calls[label] = functools.partial(call, q, k, v, out, lse, dout, dlse)
    return calls


def _tokamax(shape: Shape) -> dict[str, Callable[..., Any]]:
    """Returns tokamax's Mosaic kernel as a contender, if the package is installed."""
    if importlib.util.find_spec("tokamax") is None:
        return {}
    import jax
    import tokamax  # pyrefly: ignore[missing-import]

    call = functools.partial(
        tokamax.dot_product_attention, is_causal=shape.is_causal, implementation="mosaic"
    )
    return {"tokamax mosaic": jax.jit(call)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Check:
    """One feature to be checked; lengths and documents chosen so that every path is taken."""

    name: str
    b: int = 1
    t: int = 1024
    s: int = 1024
    n: int = 4
    k: int = 2
    h: int = 128
    is_causal: bool = True
    window: tuple[int, int] | None = None
    documents: bool = False
    dtype: str = "bfloat16"
    spoil: str = ""


_CHECKS = (
    _Check(name="causal"),
    _Check(name="full", is_causal=False),
    _Check(name="many tiles", b=3, n=16, k=4, t=2048, s=2048),
    _Check(name="mqa d64", k=1, h=64),
    _Check(name="full d64", h=64, is_causal=False),
    _Check(name="causal d256", h=256),
    _Check(name="full d256", h=256, is_causal=False),
    _Check(name="odd lengths", t=777, s=1001),
    _Check(name="more queries", t=1000, s=300),
    _Check(name="cross", t=300, s=1000, is_causal=False),
    _Check(name="window", window=(100, 0)),
    _Check(name="window both sides", window=(130, 70), is_causal=False),
    _Check(name="window past the keys", t=1000, s=300, window=(64, 0)),
    _Check(name="documents", documents=True),
    _Check(name="documents full d64", documents=True, is_causal=False, h=64),
    _Check(name="f16", dtype="float16"),
    _Check(name="short", t=40, s=40),
    _Check(name="one huge logit", spoil="huge"),
    _Check(name="zeros", spoil="zeros"),
    _Check(name="1e4", spoil="large"),
)


def run_checks(task: dict[str, Any]) -> None:
    """Compares the Mosaic kernel with the float32 oracle, feature by feature."""
    for check in _CHECKS:
        try:
            (_check_forward if task["direction"] == "forward" else _check_backward)(check)
        except Exception as error:  # reported as a failed check; the next one still runs
            emit(
                kind="check",
                direction=task["direction"],
                case=check.name,
                what="run",
                error=float("nan"),
                bound=0.0,
                verdict=f"FAILED {type(error).__name__}: {str(error)[:300]}",
            )


def _check_forward(check: _Check) -> None:
    """Checks out and lse; the bound is twice the error of the same-precision reference."""
    import jax
    import jax.numpy as jnp

    q, k, v = _check_inputs(check)
    call = _check_call(check)
    ours = jax.jit(functools.partial(call, implementation="mosaic"))
    reference = jax.jit(functools.partial(call, implementation="xla"))
    out, lse = (np.asarray(x, np.float32) for x in ours(q, k, v))
    again, _ = ours(q, k, v)
    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    oracle_out, oracle_lse = (np.asarray(x) for x in reference(*wide))
    twin_out, _ = (np.asarray(x, np.float32) for x in reference(q, k, v))
    rounding = 2.0**-9 * np.abs(oracle_out).max()
    _verdict(
        check,
        "out",
        np.abs(out - oracle_out).max(),
        2 * np.abs(twin_out - oracle_out).max() + rounding,
    )
    with np.errstate(invalid="ignore"):
        off = np.where(lse == oracle_lse, 0.0, np.abs(lse - oracle_lse))
    _verdict(check, "lse", off.max(), 1e-4 * max(1.0, np.abs(oracle_lse[oracle_lse > -1e9]).max()))
    _verdict(check, "repeat", np.abs(out - np.asarray(again, np.float32)).max(), 0.0)


def _check_call(check: _Check) -> Callable[..., Any]:
    """Returns flash_attention with the options of a check."""
    import jax.numpy as jnp

    from pallas_kernels import flash_attention

    ids = {}
    if check.documents:
        numbers = np.arange(max(check.t, check.s)) // 150
        q_ids = np.where(np.arange(check.t) > check.t - 50, 999, numbers[: check.t])
        ids = dict(
            q_segment_ids=jnp.asarray(np.tile(q_ids, (check.b, 1)), jnp.int32),
            kv_segment_ids=jnp.asarray(np.tile(numbers[: check.s], (check.b, 1)), jnp.int32),
        )
    return functools.partial(
        flash_attention,
        is_causal=check.is_causal,
        local_window_size=check.window,
        return_lse=True,
        **ids,
    )


def _check_backward(check: _Check) -> None:
    """Checks dq, dk and dv, for gradients of both results; the bounds are those of the forward."""
    import jax
    import jax.numpy as jnp

    q, k, v = _check_inputs(check)
    keys = jax.random.split(jax.random.key(2), 2)
    dout = jax.random.normal(keys[0], q.shape, q.dtype)
    dlse = jax.random.normal(keys[1], q.shape[:3], jnp.float32)

    def gradients(
        implementation: str, *arrays: Any, deterministic: bool | None = None
    ) -> list[Any]:
        call = functools.partial(
            _check_call(check), implementation=implementation, deterministic=deterministic
        )

        @jax.jit
        def run(q: Any, k: Any, v: Any) -> Any:
            return jax.vjp(call, q, k, v)[1]((dout.astype(q.dtype), dlse))

        return [np.asarray(x, np.float32) for x in run(*arrays)]

    ours, again = (gradients("mosaic", q, k, v, deterministic=True) for _ in range(2))
    free = gradients("mosaic", q, k, v)
    twin = gradients("xla", q, k, v)
    oracle = gradients("xla", *(x.astype(jnp.float32) for x in (q, k, v)))
    names = ("dq", "dk", "dv")
    for what, x, y, f, z, w in zip(names, ours, again, free, twin, oracle, strict=True):
        bound = 2 * np.abs(z - w).max() + 2.0**-9 * np.abs(w).max()
        _verdict(check, what, np.abs(x - w).max(), bound, "backward")
        _verdict(check, f"any order {what}", np.abs(f - w).max(), bound, "backward")
        _verdict(check, f"repeat {what}", np.abs(x - y).max(), 0.0, "backward")


def _check_inputs(check: _Check) -> list[Any]:
    """Returns q, k, v of a check."""
    import jax

    keys = jax.random.split(jax.random.key(1), 3)
    shapes = [(check.t, check.n), (check.s, check.k), (check.s, check.k)]
    q, k, v = (
        jax.random.normal(key, (check.b, length, heads, check.h), check.dtype)
        for key, (length, heads) in zip(keys, shapes, strict=True)
    )
    if check.spoil == "huge":
        k = k.at[:, 77].multiply(100)
    elif check.spoil == "zeros":
        q, k, v = 0 * q, 0 * k, 0 * v
    elif check.spoil == "large":
        k = k.at[:, ::3].set(1e4)
        v = v.at[:, ::5].set(-1e4)
    return [q, k, v]


def _verdict(
    check: _Check, what: str, error: float, bound: float, direction: str = "forward"
) -> None:
    """Prints the row of one comparison."""
    emit(
        kind="check",
        direction=direction,
        case=check.name,
        what=what,
        error=float(error),
        bound=float(bound),
        verdict="ok" if error <= bound else "FAILED",
    )


def run_torch(task: dict[str, Any]) -> None:
    """Times PyTorch's attention through cuDNN and through FlashAttention 2."""
    if importlib.util.find_spec("torch") is None:
        return
    from torch.nn.attention import SDPBackend  # pyrefly: ignore[missing-import]

    backends = {
        "torch cudnn": SDPBackend.CUDNN_ATTENTION,
        "torch flash": SDPBackend.FLASH_ATTENTION,
    }
    shapes = [Shape(**fields) for fields in task["shapes"]]
    for shape in [shape for shape in shapes if shape.left is None]:
        for contender, backend in backends.items():
            for direction in task["directions"]:
                row = dict(direction=direction, shape=shape.name, contender=contender)
                try:
                    median_ms = _time_torch(shape, backend, direction)
                except RuntimeError as error:
                    emit(kind="fail", **row, error=str(error)[:300])
                    continue
                tflops = shape.flops(direction) / median_ms / 1e9
                emit(kind="time", **row, median_ms=median_ms, tflops=tflops)


def _time_torch(shape: Shape, backend: Any, direction: str) -> float:
    """Returns the time of PyTorch's forward, or of its backward alone, in ms."""
    import torch  # pyrefly: ignore[missing-import]
    from torch.nn.attention import sdpa_kernel  # pyrefly: ignore[missing-import]

    is_backward = direction == "backward"
    q, k, v, dout = (  # [B, N, T, H]
        torch.randn(shape.b, heads, shape.t, shape.h, dtype=torch.bfloat16, device="cuda")
        for heads in (shape.n, shape.k, shape.k, shape.n)
    )

    def forward() -> Any:
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=shape.is_causal, enable_gqa=shape.n != shape.k
            )

    call: Callable[[], Any] = forward
    if is_backward:
        inputs = [x.requires_grad_() for x in (q, k, v)]
        out = forward()
        call = functools.partial(torch.autograd.grad, out, inputs, dout, retain_graph=True)
    return time_interleaved({"torch": call}, lambda _: torch.cuda.synchronize())["torch"]


def main(text: str) -> None:
    """Runs the task described by a JSON object."""
    task = json.loads(text)
    {"check": run_checks, "time": run_timing, "torch": run_torch}[task["kind"]](task)


if __name__ == "__main__":
    main(sys.argv[1])

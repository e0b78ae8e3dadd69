"""Times one optimizer step of our trainer beside its peers: same shapes, same machine, one run.

    python -m benchmarks.train_step --model 8b-slice \\
        --contenders ours-bf16,ours-delayed,torch-bf16,flax-fp8 --output results/step.json

Each contender runs alone, in a process of its own under its own time limit; one that is missing,
runs out of memory, hangs or fails costs only its own row, which then says so. At the end the first
of ours runs again, to show how far the machine drifted meanwhile. The file is rewritten after each
contender.

Steps are timed as a training loop runs them (`common.time_steps`). Model FLOPs are
`train.metrics.model_flops_per_token`; MFU is against the dense bf16 peak of the data sheet, for FP8
too.
"""

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import markdown_table, summarise, write_json
from benchmarks.contenders import split_name
from benchmarks.contenders.__main__ import MISSING_EXIT_CODE
from pallas_kernels.hardware import peak_tflops
from train.config import TrainConfig, parse
from train.metrics import model_flops_per_token

_TINY = (
    *("--model.num-layers", "2", "--model.attention-implementation", "xla"),
    *("--data.sequence-length", "64", "--data.batch-size", "2", "--data.document-mask", "False"),
)
_MODELS = {
    "8b-slice": ("configs/llama_8b_slice_{precision}.toml", ()),
    "1b": ("configs/llama_1b_{precision}.toml", ()),
    "350m": ("configs/llama_350m_{precision}.toml", ()),
    "125m": ("configs/llama_125m_{precision}.toml", ()),
    "tiny": ("configs/tiny_cpu.toml", _TINY),
}
_OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "out of memory", "OutOfMemoryError")
_LOG_TAIL_CHARACTERS = 3000
_REFERENCES = ("torch-bf16", "flax-fp8")
# Of the device's memory, for every JAX contender: 0.75, the default, is too little for Flax.
_JAX_MEMORY_FRACTION = "0.92"


def config_arguments(model: str, contender: str) -> list[str]:
    """What `train.config.parse` gets for a contender; peers take only the shapes from it."""
    family, variant, options = split_name(contender)
    recipe = variant if family == "ours" else "bf16"
    path, extra = _MODELS[model]
    path = path.format(precision="bf16" if recipe == "bf16" else "fp8")
    return ["--config", path, *extra, "--fp8.recipe", recipe, *options]


def run_contender(name: str, arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Runs one contender in its own process.

    Returns: a row with "name", "status" (ok, missing, out_of_memory, timeout, failed) and what it
      measured, or the "reason" why it did not.
    """
    config = parse(config_arguments(arguments.model, name))
    task = {
        "name": name,
        "config_arguments": config_arguments(arguments.model, name),
        "model": dataclasses.asdict(config.model) | {"head_dim": config.model.resolved_head_dim},
        "batch_size": config.data.batch_size,
        "sequence_length": config.data.sequence_length,
        "warmup": arguments.warmup,
        "steps": arguments.steps,
        "compile": arguments.torch_compile,
    }
    task_path, result_path, log_path = (work / x for x in ("task.json", "result.json", "log"))
    result_path.unlink(missing_ok=True)
    write_json(task_path, task)
    python = arguments.torch_python if name.startswith("torch") else sys.executable
    command = [python, "-m", "benchmarks.contenders", str(task_path), str(result_path)]
    started = time.perf_counter()
    code = _run_process(command, _environment(name, work), log_path, arguments.timeout)
    row: dict[str, Any] = {"name": name, "wall_time_s": time.perf_counter() - started}
    if code == 0:
        return row | {"status": "ok"} | _measured(json.loads(result_path.read_text()), config)
    if code == MISSING_EXIT_CODE and result_path.exists():
        reason = json.loads(result_path.read_text())["missing"]
        return row | {"status": "missing", "reason": reason}
    log = log_path.read_text(errors="replace")
    status, reason = _explain(code, log, arguments.timeout)
    return row | {"status": status, "reason": reason, "log_tail": log[-_LOG_TAIL_CHARACTERS:]}


def _environment(name: str, work: Path) -> dict[str, str]:
    environment = dict(os.environ)
    if not name.startswith("torch"):
        environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", _JAX_MEMORY_FRACTION)
        # The repetition at the end need not compile again; nobody else shares it, so that the first
        # run's compile time is its own.
        environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(work / "compiled" / name))
        if not shutil.which("nvidia-smi"):
            environment.setdefault("JAX_PLATFORMS", "cpu")
    return environment


def _run_process(command: list[str], environment: dict[str, str], log: Path, timeout: float) -> int:
    """Exit code, -SIGKILL at the time limit. Ends whatever the process started, too."""
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=output, start_new_session=True
        )
        try:
            return process.wait(timeout)
        except subprocess.TimeoutExpired:
            return -signal.SIGKILL
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _explain(code: int, log: str, timeout: float) -> tuple[str, str]:
    """Status and reason of a process that ended with `code`."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    for line in lines:
        if any(word in line for word in _OUT_OF_MEMORY):
            return "out_of_memory", line[:300]
    if code == -signal.SIGKILL:
        return "timeout", f"killed: not done after {timeout:.0f} s, or out of host memory"
    return "failed", f"exit code {code}: {lines[-1][:300] if lines else 'no output'}"


def _measured(result: dict[str, Any], config: TrainConfig) -> dict[str, Any]:
    """Adds what follows from the step times and the shape."""
    times = summarise(result["step_times_s"])
    tokens = config.data.batch_size * config.data.sequence_length
    tokens_per_s = tokens / (times["median_ms"] / 1e3)
    flops = model_flops_per_token(config.model, config.data.sequence_length)
    tflops = tokens_per_s * flops / 1e12
    peak = peak_tflops(result["device"], "bfloat16")
    launch = summarise(result["launch_times_s"])["median_ms"]
    return result | {
        "step_time": times,
        "host_fraction": launch / times["median_ms"],
        "tokens_per_s": tokens_per_s,
        "model_tflops": tflops,
        "mfu": tflops / peak if peak else None,
        "peak_tflops": peak,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a markdown table, with how many times faster each is than the references."""
    medians = {r["name"]: r["step_time"]["median_ms"] for r in rows if r["status"] == "ok"}
    header = ["contender", "ms", "p10-p90", "tokens/s", "model TFLOP/s", "MFU", "GiB", "compile s"]
    header += ["loss", "FP8 GEMMs", "FP8 FLOPs", *(f"x {name}" for name in _REFERENCES)]
    lines = []
    for row in rows:
        if row["status"] != "ok":
            lines.append([f"{row['name']}: {row['status']}", *[""] * (len(header) - 1)])
            continue
        times, gemms = row["step_time"], row.get("gemms")
        ratios = [
            f"{medians[name] / times['median_ms']:.2f}" if name in medians else "-"
            for name in _REFERENCES
        ]
        count = f"{gemms['fp8_gemms']}/{gemms['fp8_gemms'] + gemms['other_gemms']}" if gemms else ""
        lines.append(
            [
                row["name"] + (" (again)" if row.get("is_repeat") else ""),
                f"{times['median_ms']:.1f}",
                f"{times['p10_ms']:.1f}-{times['p90_ms']:.1f}",
                f"{row['tokens_per_s']:,.0f}",
                f"{row['model_tflops']:.3g}",
                f"{row['mfu']:.1%}" if row["mfu"] else "-",
                f"{row['peak_memory_gib']:.1f}" if row["peak_memory_gib"] else "-",
                f"{row['compile_time_s']:.0f}",
                f"{row['loss_nats']:.3f}",
                count,
                f"{gemms['fp8_flop_fraction']:.1%}" if gemms else "",
                *ratios,
            ]
        )
    failed = [f"- {r['name']}: {r['status']}: {r['reason']}" for r in rows if r["status"] != "ok"]
    return "\n".join([markdown_table(header, lines), *failed])


def _machine() -> dict[str, Any]:
    machine: dict[str, Any] = {"host": platform.platform(), "python": platform.python_version()}
    if shutil.which("nvidia-smi"):
        query = [
            "nvidia-smi",
            "--query-gpu=name,driver_version,memory.total",
            "--format=csv,noheader",
        ]
        machine["nvidia_smi"] = subprocess.run(
            query, capture_output=True, text=True, check=False
        ).stdout.strip()
    return machine


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Reads the command line; exits with a message for an unknown model or contender."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_step")
    parser.add_argument("--model", choices=_MODELS, default="8b-slice")
    parser.add_argument(
        "--tiny", action="store_const", const="tiny", dest="model", help="a model for a CPU"
    )
    parser.add_argument(
        "--contenders",
        type=lambda text: text.split(","),
        default="ours-bf16,ours-delayed,ours-current,torch-bf16,torchao-tensorwise,flax-bf16,flax-fp8",
        help="names, ours perhaps with options: ours-delayed+model.remat=dots",
    )
    parser.add_argument("--output", type=Path, required=True, help="the JSON file")
    parser.add_argument("--steps", type=int, default=20, help="timed steps")
    parser.add_argument("--warmup", type=int, default=4, help="steps before them")
    parser.add_argument("--timeout", type=float, default=240, help="seconds for one contender")
    parser.add_argument("--repeat", default="", help="contender to run again; 'none' for none")
    parser.add_argument("--torch-python", default=sys.executable, help="a Python that has PyTorch")
    parser.add_argument("--no-torch-compile", action="store_false", dest="torch_compile")
    parsed = parser.parse_args(arguments)
    for name in [*parsed.contenders, *([] if parsed.repeat in ("", "none") else [parsed.repeat])]:
        try:
            split_name(name)
        except ValueError as error:
            parser.error(str(error))
    if not parsed.repeat:
        ours = [name for name in parsed.contenders if name.startswith("ours")]
        parsed.repeat = ours[0] if ours and len(parsed.contenders) > 1 else "none"
    return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; 0 unless a contender that is installed failed."""
    parsed = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    # So that the time limit of whoever called us ends the contender, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    names = [*parsed.contenders, *([] if parsed.repeat == "none" else [parsed.repeat])]
    rows: list[dict[str, Any]] = []
    config = parse(config_arguments(parsed.model, parsed.contenders[0]))
    record = {
        "benchmark": "train_step",
        "model": parsed.model,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": _machine(),
        "batch_size": config.data.batch_size,
        "sequence_length": config.data.sequence_length,
        "model_flops_per_token": model_flops_per_token(config.model, config.data.sequence_length),
        "rows": rows,
    }
    with tempfile.TemporaryDirectory() as work:
        for i, name in enumerate(names):
            row = run_contender(name, parsed, Path(work))
            row["is_repeat"] = i == len(parsed.contenders)
            rows.append(row)
            write_json(parsed.output, record)
            said = row.get("reason") or f"{row['step_time']['median_ms']:.1f} ms"
            print(f"{name}: {row['status']}: {said} ({row['wall_time_s']:.0f} s)", flush=True)
    print(
        f"\n{parsed.model}, {record['machine'].get('nvidia_smi', 'cpu')}\n{table(rows)}", flush=True
    )
    return int(any(row["status"] not in ("ok", "missing") for row in rows))


if __name__ == "__main__":
    sys.exit(main())

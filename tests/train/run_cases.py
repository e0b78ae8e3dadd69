"""Small runs of the trainer to test with, in a process of their own, and what they leave."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

WORDS = "the cat sat on a mat and then it ran over hills to find some fish while rain fell".split()
STEPS = 60
VALIDATE_EVERY = 20
OPTIONS = {
    "model.hidden-size": 32,
    "model.num-layers": 1,
    "model.ffn-size": 64,
    "model.num-heads": 2,
    "model.num-kv-heads": 1,
    "model.vocab-size": 320,
    "data.sequence-length": 32,
    "data.batch-size": 8,
    "data.validation-fraction": 0.25,
    "run.steps": STEPS,
    "optimizer.warmup-steps": 2,
    "checkpoint.every": 25,
    "log.validate-every": VALIDATE_EVERY,
    "log.validation-batches": 2,
    "log.sample-tokens": 4,
}
# What tells one start from another, or one machine's load from another's.
CLOCKS = ("time", "step_time_s", "tokens_per_s", "memory_gib")

# Sends signals to itself when a function is called for the n-th time; else `python -m train.main`.
SIGNALLING_MAIN = """
import importlib, os, sys, time
from train.environment import prepare_environment
prepare_environment()
where, count, number, *arguments = sys.argv[1:]
module, _, path = where.partition(":")
*owners, name = path.split(".")
owner = importlib.import_module(module)
for part in owners:
    owner = getattr(owner, part)
original, calls = getattr(owner, name), 0
def signalling(*args, **kwargs):
    global calls
    calls += 1
    if calls == int(count):
        os.kill(os.getpid(), int(number))
        time.sleep(0.3)  # for the thread that answers
    return original(*args, **kwargs)
setattr(owner, name, signalling)
from train.main import main
sys.exit(main(arguments))
"""


def write_text(folder: Path, *, files: int = 40, words: int = 2000) -> Path:
    """Writes files of random words, the same ones every time."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for i in range(files):
        (folder / f"{i}.txt").write_text(" ".join(random.choice(WORDS, words)))
    return folder


def make_arguments(directory: Path, text: Path, **options: object) -> list[str]:
    """The command line of a small run; `**{"run.steps": 3}` stands for --run.steps 3."""
    folders = {
        "run.directory": directory,
        "data.path": text,
        "data.cache-directory": text.parent / "tokens",
    }
    table = {**OPTIONS, **folders, **options}
    return [word for name, value in table.items() for word in (f"--{name}", str(value))]


def environment(xla_cache: Path | None) -> dict[str, str]:
    """One CPU device, quick compilation; compiled programs are shared through `xla_cache`."""
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(xla_cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        **(cache if xla_cache else {}),
    }


def start(arguments: list[str], xla_cache: Path | None) -> subprocess.Popen:
    """Starts `python -m train.main`."""
    return _start(["-m", "train.main", *arguments], xla_cache)


def start_signalling(
    where: str, count: int, number: int, arguments: list[str], xla_cache: Path | None
) -> subprocess.Popen:
    """Starts a run that gets signal `number` at the `count`-th call of `where`, module:name."""
    return _start(["-c", SIGNALLING_MAIN, where, str(count), str(number), *arguments], xla_cache)


def run_python(code: str, *arguments: str, xla_cache: Path | None = None) -> subprocess.Popen:
    """Starts a script."""
    return _start(["-c", code, *arguments], xla_cache)


def _start(arguments: list[str], xla_cache: Path | None) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(xla_cache),
    )


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    """Waits; returns the exit code, stdout and stderr."""
    try:
        out, err = process.communicate(timeout=180)
    finally:
        process.kill()
    return process.returncode, out, err


def wait_for(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    """Returns when the condition holds; fails if the process ends first."""
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


def records(directory: Path, kind: str) -> list[dict]:
    """The lines of a kind in metrics.jsonl, without the clocks."""
    with contextlib.suppress(FileNotFoundError):
        lines = (directory / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines if line.endswith("}")]
        return [
            {name: value for name, value in row.items() if name not in CLOCKS}
            for row in rows
            if row["kind"] == kind
        ]
    return []


def checkpoints(directory: Path) -> list[int]:
    """Steps of the whole checkpoints."""
    folder = directory / "checkpoints"
    return sorted(int(p.name) for p in folder.glob("*") if p.name.isdigit())

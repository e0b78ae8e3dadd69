"""The folder of one run: its lock, what was run in it, and whether a new start may go on there.

    config.toml     the resolved config of the latest start
    versions.json   what that start ran on: Python, libraries, git commit, device
    run.lock        held (flock) by the process that trains here
    metrics.jsonl   train.metrics          loss.png       train.plots
    checkpoints/    train.checkpoint

Nothing here touches a device, so `python -m train.main` calls it first and a mistake costs no
start-up time.
"""

import contextlib
import dataclasses
import datetime
import fcntl
import importlib.metadata
import io
import json
import os
import platform
import socket
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, Self

from train.config import ConfigError, TrainConfig
from train.toml_text import to_toml

CONFIG_FILE = "config.toml"
VERSIONS_FILE = "versions.json"
LOCK_FILE = "run.lock"
METRICS_FILE = "metrics.jsonl"
PLOT_FILE = "loss.png"
CHECKPOINT_FOLDER = "checkpoints"

_LIBRARIES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "grain",
    "tokenizers",
)

# What a resumed run may change, and why. A field that is not here decides what the weights, the
# optimizer state or the order of the data mean; changing it would make one curve out of two
# experiments. A whole section is `name.*`. "free": every later number stays the same. "note":
# allowed, but later numbers change as the reason says.
RESUME_RULES: dict[str, tuple[Literal["free", "note"], str]] = {
    "run.name": ("free", "a label"),
    "run.directory": ("free", "the same folder may be reached by another path"),
    "run.resume": ("free", "says how to start, not what to run"),
    "run.steps": ("note", "the learning-rate schedule from here on is the one of the new length"),
    "checkpoint.*": ("free", "when the state is saved, not what it is"),
    "log.*": ("free", "what is shown and measured"),
    "mesh.*": ("note", "sums over devices are taken in another order; losses differ by rounding"),
    "data.path": ("note", "moved data is accepted if its documents are the same"),
    "data.cache_directory": ("free", "a cache, keyed by its contents"),
    "model.attention_implementation": ("note", "another kernel rounds differently"),
    "model.attention_deterministic": ("note", "attention adds to dq in another order"),
    "model.norm_implementation": ("note", "another kernel rounds differently"),
    "model.rope_implementation": ("note", "another kernel rounds differently"),
    "model.swiglu_implementation": ("note", "another kernel rounds differently"),
    "model.remat": ("note", "the compiler fuses differently; losses may differ by rounding"),
    "fp8.quantize_implementation": ("note", "another kernel rounds SwiGLU differently"),
    "fp8.gemm_implementation": ("note", "another kernel adds in another order"),
    "fp8.minimum_fraction": ("free", "a check before the first step"),
    "fp8.inspect_every": ("free", "measured by a program of its own"),
    "optimizer.max_consecutive_skips": ("free", "when to give up"),
}  # fmt: skip


class RunDirectory:
    """One run's folder, locked against a second process; a context manager, made by `open`."""

    def __init__(self, path: Path, *, is_resumed: bool, lock: io.TextIOWrapper | None):
        self.path = path
        self.is_resumed = is_resumed
        """Whether an earlier start has trained here."""
        self._lock = lock

    @classmethod
    def open(
        cls,
        config: TrainConfig,
        *,
        process_index: int = 0,
        report: Callable[[str], None] = print,
    ) -> Self:
        """Makes or takes over the folder `config.run.directory`.

        Takes the lock, compares `config` with the one of an earlier start by `RESUME_RULES`, then
        writes `config.toml` and `versions.json`. Nothing is written when anything is refused, save
        for the lock file.

        Args:
          config: the resolved config.
          process_index: which of the processes of a distributed run this is; only process 0 locks
            and writes.
          report: gets one line for each allowed change that alters later numbers.

        Returns: the open directory; `close` it, or use it in a `with` statement, to let go of the
          lock.

        Raises:
          ConfigError: the folder cannot be made or written, another process trains in it,
            `run.resume` forbids what is there, or the config differs from the earlier start's in a
            field that may not change.
        """
        path = Path(config.run.directory)
        if process_index != 0:
            return cls(path, is_resumed=_check_resume(path, config), lock=None)
        with _explain_os_errors(path):
            path.mkdir(parents=True, exist_ok=True)
            directory = cls(path, is_resumed=False, lock=_take_lock(path / LOCK_FILE))
            try:
                directory._start(config, report)
            except BaseException:
                directory.close()
                raise
        return directory

    def _start(self, config: TrainConfig, report: Callable[[str], None]) -> None:
        assert self._lock is not None
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on host {socket.gethostname()}\n")
        self._lock.flush()
        self.is_resumed = _check_resume(self.path, config)
        if self.is_resumed:
            for line in compare_config(self.path / CONFIG_FILE, config):
                report(line)
        self._write_versions(_versions(), report)
        atomic_write(self.path / CONFIG_FILE, to_toml(config))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints; made by `train.checkpoint`."""
        return self.path / CHECKPOINT_FOLDER

    @property
    def metrics(self) -> Path:
        """File of the metrics; written by `train.metrics`."""
        return self.path / METRICS_FILE

    @property
    def plot(self) -> Path:
        """File of the loss curve; written by `train.plots`."""
        return self.path / PLOT_FILE

    def set_device(self, kind: str, count: int) -> None:
        """Adds the device to `versions.json`; JAX starts it only after `open`."""
        if self._lock is not None:
            versions = json.loads((self.path / VERSIONS_FILE).read_text())
            self._write_versions(versions | {"device": kind, "device_count": count})

    def close(self) -> None:
        """Lets go of the lock."""
        # The file stays: removing it would race with a process that has just opened it.
        if self._lock is not None:
            self._lock.truncate(0)
            self._lock.close()
            self._lock = None

    def _write_versions(self, versions: dict, report: Callable[[str], None] | None = None) -> None:
        path = self.path / VERSIONS_FILE
        if report is not None and path.exists():
            for line in _version_changes(path, versions):
                report(line)
        atomic_write(path, json.dumps(versions, indent=2) + "\n")


def atomic_write(path: Path, text: str | bytes) -> None:
    """Replaces `path` in one step: after a kill or power cut it is the old file or the new, whole.

    Raises:
      OSError: the file cannot be written; the old one is untouched.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(text.encode() if isinstance(text, str) else text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Waits until the names in folder `path` are on disk, so that a rename survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _explain_os_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        kind = "is not a folder" if path.exists() and not path.is_dir() else "cannot be written"
        where = f": {error.filename}" if error.filename else ""
        raise ConfigError(
            f"--run.directory={path} {kind} ({error.strerror}{where}); choose another one"
        ) from error


def _take_lock(path: Path) -> io.TextIOWrapper:
    """Locks `path`. The kernel lets go of an flock when its process dies, however it dies."""
    lock = path.open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read().strip() or "an unknown process"
        lock.close()
        raise ConfigError(
            f"--run.directory={path.parent} is in use by {holder}; wait for it, stop it, or choose"
            " another --run.directory"
        ) from None
    # A forked data worker would inherit the lock and keep it after this process was killed.
    os.register_at_fork(after_in_child=lock.close)
    return lock


def _check_resume(path: Path, config: TrainConfig) -> bool:
    """Returns whether training was done here, which `run.resume` must allow to go on from."""
    folder = path / CHECKPOINT_FOLDER
    has_checkpoint = folder.is_dir() and any(p.name.isdecimal() for p in folder.iterdir())
    # A start that failed before its first step leaves a config and no more: the next one, with the
    # mistake put right, is not bound by it.
    metrics = path / METRICS_FILE
    is_used = has_checkpoint or (metrics.exists() and b'"kind": "train"' in metrics.read_bytes())
    if config.run.resume == "never" and is_used:
        raise ConfigError(
            f"--run.resume=never needs a fresh folder, and --run.directory={path} holds an earlier"
            " run; choose another --run.directory, delete that one, or use --run.resume=auto"
        )
    if config.run.resume == "must" and not has_checkpoint:
        raise ConfigError(
            f"--run.resume=must needs a checkpoint, and --run.directory={path} holds none; check"
            " the path, or use --run.resume=auto"
        )
    if is_used and not (path / CONFIG_FILE).exists():
        raise ConfigError(
            f"--run.directory={path} holds a run but no {CONFIG_FILE} to tell what it is; put that"
            " file back, or choose another --run.directory"
        )
    return is_used


def compare_config(path: Path, config: TrainConfig) -> list[str]:
    """Returns notes on allowed changes since the config in file `path`.

    Raises:
      ConfigError: listing the changes that `RESUME_RULES` does not allow.
    """
    try:
        earlier = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}, the config of the earlier start, cannot be read ({error}); put it right, or"
            " choose another --run.directory"
        ) from error
    refused, notes = [], []
    for name, old, new in _differences(earlier, config):
        rule, reason = _rule(name, config)
        option = f"--{name.replace('_', '-')}"
        if rule == "refused":
            refused.append(f"  {option}: was {old!r}, now {new!r}")
        elif rule == "note":
            notes.append(f"note: {option} was {old!r} and is now {new!r}: {reason}")
    if refused:
        raise ConfigError(
            f"--run.directory={path.parent} was started with another config:\n"
            + "\n".join(refused)
            + "\nResuming would mix two experiments in one run:"
            " choose another --run.directory, or give the old value"
        )
    return notes


def _differences(earlier: dict, config: TrainConfig) -> Iterator[tuple[str, object, object]]:
    """Yields (section.field, old, new); a field that the earlier version lacked has its default."""
    defaults = TrainConfig()
    for section in dataclasses.fields(config):
        values, table = getattr(config, section.name), earlier.get(section.name, {})
        for field in dataclasses.fields(values):
            new = getattr(values, field.name)
            old = table.get(field.name, getattr(getattr(defaults, section.name), field.name))
            old = tuple(old) if isinstance(old, list) else old
            if old != new:
                yield f"{section.name}.{field.name}", old, new


def _rule(name: str, config: TrainConfig) -> tuple[Literal["free", "note", "refused"], str]:
    if name == "run.steps" and config.optimizer.schedule == "constant":
        return "free", "a constant schedule does not know its length"
    section = name.partition(".")[0]
    return RESUME_RULES.get(name) or RESUME_RULES.get(f"{section}.*") or ("refused", "")


def _versions() -> dict:
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: importlib.metadata.version(name) for name in _LIBRARIES},
        "git_commit": _git_commit(),
    }


def _git_commit() -> str | None:
    """Commit of the checkout that holds this file ("+changes" if edited); None if there is none."""
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        # An installed package may lie inside somebody else's checkout, whose commit says nothing
        # about it.
        if Path(git("rev-parse", "--show-toplevel")) != root:
            return None
        is_edited = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+changes" if is_edited else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _version_changes(path: Path, versions: dict) -> list[str]:
    try:
        earlier = json.loads(path.read_text())
    except ValueError:
        return [f"note: {path} could not be read and is written anew"]
    return [
        f"note: {name} was {earlier[name]} and is now {versions[name]}: later losses may differ"
        f" by rounding"
        for name in ("python", *_LIBRARIES, "git_commit")
        if name in earlier and earlier[name] != versions[name]
    ]

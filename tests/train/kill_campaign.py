"""Kills runs at random moments until the wanted number is reached; what each run ends with.

A run is started, killed in a random phase, and started again, until it is done; then the next run
begins. The phases: `data` (imports, tokenising), `compile`, `step`, `save`.
"""

import dataclasses
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from run_cases import checkpoints, environment, make_arguments, records
from saved_runs import saved_arrays

PHASES = ("data", "compile", "step", "save")
# How long after the beginning of its phase a kill may come [s].
_WINDOW_S = {"data": 5.0, "compile": 2.5, "step": 0.4, "save": 0.03}
_POLL_S = 0.001
_EVERY = 5  # steps between checkpoints


@dataclasses.dataclass(frozen=True)
class Kill:
    """One start of a run that was not left alone."""

    run: int
    phase: str
    delay_s: float
    exit_code: int
    newest_checkpoint: int
    """Step of the newest whole checkpoint that it left; 0 for none."""
    last_line: str
    """Of its output."""


@dataclasses.dataclass
class Campaign:
    """Kills with one signal."""

    folder: Path
    text: Path
    xla_cache: Path
    number: signal.Signals
    seed: int

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)
        self.kills: list[Kill] = []
        self.starts = 0
        self.finished: list[Path] = []

    def directory(self, run: int) -> Path:
        return self.folder / f"run{run}"

    def arguments(self, run: int) -> list[str]:
        own = {"data.cache-directory": self.folder / "tokens", "checkpoint.every": _EVERY}
        return make_arguments(self.directory(run), self.text, **own)

    def execute(self, count: int) -> None:
        """Kills `count` times, then lets the last run end."""
        while len(self.kills) < count:
            run = len(self.finished)
            while not self._start(run, is_last=len(self.kills) >= count):
                pass
            self.finished.append(self.directory(run))

    def _start(self, run: int, *, is_last: bool) -> bool:
        """Starts the run once; returns whether it came to its end."""
        self.starts += 1
        phase = PHASES[len(self.kills) % len(PHASES)]
        if phase == "data":
            shutil.rmtree(self.folder / "tokens", ignore_errors=True)  # tokenised anew
        log = self.folder / "log.txt"
        with log.open("w") as stream:
            process = subprocess.Popen(
                [sys.executable, "-m", "train.main", *self.arguments(run)],
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=environment(None if phase == "compile" else self.xla_cache),
            )
        delay = self.random.uniform(0, _WINDOW_S[phase])
        try:
            if not is_last and self._wait(self._phase_begun(run, phase, log), process):
                time.sleep(delay)
                process.send_signal(self.number)
            code = process.wait(timeout=600)
        finally:
            process.kill()
        if code == 0:
            return True
        out = log.read_text()
        # A Python that is still starting has no handler yet.
        expected = {-self.number, 128 + self.number}
        assert code in expected and not is_last, (code, out)
        assert "Traceback" not in out, out
        newest = max(checkpoints(self.directory(run)), default=0)
        line = (out.split("\n") or [""])[-2:][0]
        self.kills.append(Kill(run, phase, round(delay, 4), code, newest, line[:100]))
        return False

    def _phase_begun(self, run: int, phase: str, log: Path) -> Callable[[], bool]:
        directory = self.directory(run)
        newest = max(checkpoints(directory), default=0)
        if phase == "data":
            return lambda: True
        if phase == "compile":
            return lambda: "compiling the step" in log.read_text()
        if phase == "step":
            # A few steps or a few checkpoints on, so that runs get ahead between the kills.
            wanted = newest + self.random.integers(1, 3 * _EVERY)
            return lambda: (
                "start at step" in log.read_text()
                and max((r["step"] for r in records(directory, "train")), default=0) >= wanted
            )
        wanted = newest + _EVERY * self.random.integers(1, 4)
        return lambda: any(
            int(path.stem) >= wanted for path in (directory / "checkpoints").glob("*.incomplete")
        )

    @staticmethod
    def _wait(condition: Callable[[], bool], process: subprocess.Popen) -> bool:
        """Returns whether the condition held before the process ended."""
        while process.poll() is None:
            if condition():
                return True
            time.sleep(_POLL_S)
        return False


def differences(directory: Path, arguments: list[str], reference: Path) -> list[str]:
    """What of a finished run is not bit for bit that of the reference; empty if all is."""
    found = [
        kind
        for kind in ("train", "validation")
        if records(directory, kind) != records(reference, kind)
    ]
    ours = saved_arrays([*arguments, "--run.directory", str(directory)])
    theirs = saved_arrays([*arguments, "--run.directory", str(reference)])
    return found + [name for name in theirs if ours.get(name) != theirs[name]]

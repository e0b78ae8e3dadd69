"""Faults of the surroundings: jumping clocks, a read-only file system, a second start."""

import errno
import itertools
import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
from run_cases import checkpoints, make_arguments, records
from saved_runs import quick_compilation, saved_arrays

from train import loop
from train.checkpoint import Checkpointer
from train.config import parse
from train.main import main
from train.run_directory import RunDirectory

READ_ONLY = OSError(errno.EROFS, os.strerror(errno.EROFS))


@pytest.fixture(scope="module")
def undisturbed(text, tmp_path_factory):
    """Calls `main` for a run of 6 steps; and such a run that nothing happened to."""

    def call(directory):
        options = {
            "mesh.data": 8,
            "run.steps": 6,
            "checkpoint.every": 2,
            "log.validate-every": 3,
            "log.sample-tokens": 0,
        }
        arguments = make_arguments(directory, text, **options)
        return main(arguments), arguments

    with quick_compilation(tmp_path_factory.mktemp("xla_faults")):
        directory = tmp_path_factory.mktemp("undisturbed") / "run"
        code, arguments = call(directory)
        assert code == 0
        yield call, directory, arguments


def test_clocks_that_jump(undisturbed, tmp_path, monkeypatch, capsys):
    call, directory, arguments = undisturbed
    # The wall clock alone: what the kernel calls monotonic is so. A week on, then two back.
    now, steps, week = time.time, itertools.count(1), 7 * 86400.0
    offset = 0.0
    to_devices = loop._Run._to_devices

    def jump(self, batch):
        nonlocal offset
        offset = {2: week, 5: -week}.get(next(steps), offset)
        return to_devices(self, batch)

    monkeypatch.setattr(loop._Run, "_to_devices", jump)
    monkeypatch.setattr(time, "time", lambda: now() + offset)
    code, jumped = call(tmp_path / "run")
    monkeypatch.undo()
    assert code == 0
    assert records(tmp_path / "run", "train") == records(directory, "train")
    assert saved_arrays(jumped) == saved_arrays(arguments)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    times = [json.loads(line)["time"] for line in lines]
    assert min(np.diff(times)) < -week and max(np.diff(times)) > week - 60


def test_file_system_turns_read_only(undisturbed, tmp_path, monkeypatch, capsys):
    """From the second checkpoint on nothing in the run directory can be written."""
    call, directory, _ = undisturbed
    run = tmp_path / "run"
    save, write, mkdir, opened = Checkpointer.save, os.write, Path.mkdir, Path.open
    is_read_only = False

    def then_read_only(self, step, *args, **options):
        nonlocal is_read_only
        if step > 2:
            self.wait()
            is_read_only = True
        return save(self, step, *args, **options)

    def refuse(original, is_ours):
        def call(target, *args, **options):
            if is_read_only and is_ours(target, *args):
                raise READ_ONLY
            return original(target, *args, **options)

        return call

    inside = lambda path, *_: run in Path(path).parents  # noqa: E731
    writes = lambda path, mode="r", *_: run in path.parents and "r" not in mode  # noqa: E731
    metrics = lambda descriptor, *_: (  # noqa: E731
        os.readlink(f"/proc/self/fd/{descriptor}").endswith("metrics.jsonl")
    )
    monkeypatch.setattr(Checkpointer, "save", then_read_only)
    monkeypatch.setattr(os, "write", refuse(write, metrics))
    monkeypatch.setattr(Path, "mkdir", refuse(mkdir, inside))
    monkeypatch.setattr(Path, "open", refuse(opened, writes))
    code, _ = call(run)
    monkeypatch.undo()
    out = capsys.readouterr().out
    assert code == 0
    assert "metrics.jsonl cannot be written (Read-only file system); training goes on" in out
    assert "checkpoint 4 was not saved (read-only file system); earlier ones are whole" in out
    assert "warning: plot, sample or summary is missing: [Errno 30] Read-only file system" in out
    assert out.endswith(
        "step 6 is done; its state is NOT saved; the same command goes on from step 2\n"
    )
    assert checkpoints(run) == [2]
    # Writable again, the same command does the rest once more.
    assert call(run)[0] == 0
    assert records(run, "train") == records(directory, "train")


def test_second_process_in_the_same_directory(undisturbed, capsys):
    call, directory, arguments = undisturbed
    before = {p: p.read_bytes() for p in directory.rglob("*") if p.is_file()}
    with RunDirectory.open(parse(arguments), report=lambda line: None):
        held = {p: p.read_bytes() for p in directory.rglob("*") if p.is_file()}
        assert call(directory)[0] == 2
        assert {p: p.read_bytes() for p in directory.rglob("*") if p.is_file()} == held
    assert f"in use by process {os.getpid()} on host" in capsys.readouterr().err
    assert before.keys() == held.keys()

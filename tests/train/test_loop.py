"""Whole runs: whatever interrupts them, the same command goes on and every number is the same."""

import errno
import json
import os
import shutil
import signal
import socket
import time

import jax
import numpy as np
import pytest
from run_cases import (
    STEPS,
    VALIDATE_EVERY,
    checkpoints,
    finish,
    make_arguments,
    records,
    run_python,
    start,
    start_signalling,
    wait_for,
)
from saved_runs import quick_compilation, restore, saved_arrays

from train import checkpoint, loop
from train.config import parse
from train.data import TrainIterator
from train.main import main
from train.manifest import Manifest

RUN_FILES = {
    "metrics.jsonl",
    "config.toml",
    "versions.json",
    "loss.png",
    "sample.txt",
    "summary.json",
    "tokenizer.json",
    "checkpoints",
}


def assert_same_run(directory, run):
    """Every metric and validation of `directory`, and its last state, are those of `run`."""
    assert records(directory, "train") == records(run.directory, "train")
    assert records(directory, "validation") == records(run.directory, "validation")
    ours, theirs = (saved_arrays(run.arguments(d)) for d in (directory, run.directory))
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []


# An undisturbed run.


def test_run_directory_holds_everything(finished_run):
    assert finished_run.exit_code == 0, finished_run.stderr
    assert finished_run.stderr == ""
    files = {path.name for path in finished_run.directory.iterdir()}
    assert files == RUN_FILES | {"run.lock"}
    assert (finished_run.directory / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert (finished_run.directory / "sample.txt").read_text().startswith("def ")
    assert parse(["--config", str(finished_run.directory / "config.toml")]) == parse(
        finished_run.arguments()
    )


def test_every_step_is_measured_once_and_the_loss_falls(finished_run):
    rows = records(finished_run.directory, "train")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["tokens"] for row in rows] == [256 * step for step in range(1, STEPS + 1)]
    assert rows[-1]["loss_nats"] < rows[0]["loss_nats"] - 1
    assert {row["skipped_steps"] for row in rows} == {0}
    validated = [row["step"] for row in records(finished_run.directory, "validation")]
    assert validated == list(range(VALIDATE_EVERY, STEPS + 1, VALIDATE_EVERY))
    assert checkpoints(finished_run.directory) == [50, 60]


def test_summary_says_what_ran_in_fp8(finished_run):
    line = (
        "recipe delayed: 12 of 12 block GEMMs in FP8, 100.0% of their FLOPs; emulated: this device"
        " has no FP8 GEMM"
    )
    assert finished_run.stdout.splitlines()[-1] == line
    summary = json.loads((finished_run.directory / "summary.json").read_text())
    rows = records(finished_run.directory, "train")
    validations = records(finished_run.directory, "validation")
    assert summary == {
        "first_loss_nats": rows[0]["loss_nats"],
        "validation_loss_nats": validations[-1]["validation_loss_nats"],
        "fp8": line,
    }


def test_checkpoints_know_the_validation_loss_of_their_own_step_only(finished_run):
    folder = finished_run.directory / "checkpoints"
    losses = {step: Manifest.read(folder / str(step)).validation_loss for step in (50, 60)}
    last = records(finished_run.directory, "validation")[-1]
    assert losses == {50: None, 60: last["validation_loss_nats"]}


def test_finished_run_started_again_changes_nothing(finished_run):
    def contents():
        return {
            path.relative_to(finished_run.directory): path.read_bytes()
            for path in finished_run.directory.rglob("*")
            if path.is_file() and path.name not in ("versions.json", "loss.png")
        }

    before = contents()
    (finished_run.directory / "loss.png").unlink()
    (finished_run.directory / "sample.txt").unlink()
    code, out, err = finish(start(finished_run.arguments(), finished_run.xla_cache))
    assert (code, err) == (0, "")
    assert f"already trained: {STEPS} of {STEPS} steps\n" in out
    assert (finished_run.directory / "loss.png").stat().st_size > 1000
    assert contents() == before


# Interrupted runs.


def test_killed_at_any_moment(finished_run, tmp_path):
    """SIGKILL while tokenising, compiling, stepping, saving, deleting and drawing the plot."""
    directory = tmp_path / "run"
    own = {"data.cache-directory": tmp_path / "tokens"}
    for where, count, every, newest in (
        ("train.data.cache:_publish", 1, 25, {0}),
        ("train.loop:compile_steps", 1, 25, {0}),
        ("train.manifest:Manifest.write", 2, 1, {1}),  # resumes right after the calibration
        ("train.checkpoint:Checkpointer._delete_old", 2, 3, {6}),
        ("train.loop:_Run._to_devices", 30, 10, {20, 30}),  # saving goes on behind the steps
        ("train.loop:plot_loss", 1, 25, {60}),
    ):
        arguments = finished_run.arguments(directory, **own, **{"checkpoint.every": every})
        code, out, err = finish(
            start_signalling(where, count, signal.SIGKILL, arguments, finished_run.xla_cache)
        )
        assert code == -signal.SIGKILL, (where, out, err)
        assert max(checkpoints(directory), default=0) in newest, where
    command = finished_run.arguments(directory, **own)
    code, out, err = finish(start(command, finished_run.xla_cache))
    assert (code, err) == (0, "")
    assert "already trained" in out
    assert_same_run(directory, finished_run)
    for name in ("summary.json", "sample.txt", "tokenizer.json"):
        ours, theirs = (d / name for d in (directory, finished_run.directory))
        assert ours.read_bytes() == theirs.read_bytes(), name
    folders = {path.name for path in (directory / "checkpoints").iterdir()}
    assert folders == {"50", "60"}


def test_signals_from_outside(finished_run, tmp_path):
    """SIGTERM, SIGINT, and SIGINT twice, sent to `python -m train.main` between steps."""
    directory = tmp_path / "run"
    # Validating at length after each step keeps the run where it is until the signal comes.
    options = {"log.validate-every": 1, "log.validation-batches": 100}
    slow = finished_run.arguments(directory, **options)

    def start_until(step):
        process = start(slow, finished_run.xla_cache)
        wait_for(lambda: any(r["step"] >= step for r in records(directory, "train")), process)
        return process

    stopped_after = 0
    for number in (signal.SIGTERM, signal.SIGINT):
        process = start_until(stopped_after + 2)
        process.send_signal(number)
        code, out, err = finish(process)
        assert (code, err) == (128 + number, "")
        stopped_after = records(directory, "train")[-1]["step"]
        assert stopped_after < VALIDATE_EVERY
        line = f"\n{number.name}: finishing this step and saving; once more to stop at once\n"
        assert line in out
        assert out.endswith(
            f"\nstopped after step {stopped_after}; its state is saved; run the same command to go"
            " on\n"
        )
        assert checkpoints(directory)[-1] == stopped_after
    process = start_until(stopped_after + 1)
    process.send_signal(signal.SIGINT)
    while "once more to stop at once" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    code, out, err = finish(process)
    assert (code, err) == (130, "")
    assert out.endswith("SIGINT: stopped; run the same command to go on\n")
    assert checkpoints(directory)[-1] == stopped_after
    # The last start compiles anew; the others take the programs from a cache.
    code, out, err = finish(start(finished_run.arguments(directory), None))
    assert (code, err) == (0, "")
    assert f"resumed from the checkpoint of step {stopped_after}\n" in out
    extra = [r for r in records(directory, "validation") if r["step"] <= stopped_after]
    assert len(extra) == stopped_after
    keep = [
        line
        for line in (directory / "metrics.jsonl").read_text().splitlines()
        if json.loads(line)["step"] > stopped_after or json.loads(line)["kind"] != "validation"
    ]
    (directory / "metrics.jsonl").write_text("\n".join(keep) + "\n")
    assert_same_run(directory, finished_run)


def test_damaged_newest_checkpoint(finished_run, tmp_path):
    directory = shutil.copytree(finished_run.directory, tmp_path / "run")
    meta = directory / "checkpoints" / str(STEPS) / "meta.json"
    os.truncate(meta, meta.stat().st_size // 2)
    code, out, err = finish(start(finished_run.arguments(directory), finished_run.xla_cache))
    assert (code, err) == (0, "")
    assert f"checkpoint {STEPS} is damaged and not used: " in out
    assert "resumed from the checkpoint of step 50\n" in out
    assert_same_run(directory, finished_run)


# In this process, on eight devices.


@pytest.fixture(scope="module")
def here(text, tmp_path_factory):
    """Calls `main` for a run of 8 steps, in this process."""

    def call(directory, **options):
        table = {
            "mesh.data": 4,
            "mesh.fsdp": 2,
            "fp8.recipe": "current",
            "run.steps": 8,
            "checkpoint.every": 3,
            "log.validate-every": 4,
            "log.sample-tokens": 0,
        }
        arguments = make_arguments(directory, text, **(table | options))
        return main(arguments), arguments

    with quick_compilation(tmp_path_factory.mktemp("xla_here")):
        yield call


def signal_at(monkeypatch, owner, name, count):
    """Sends SIGTERM to this process at the `count`-th call of a method."""
    original, calls = getattr(owner, name), []

    def signalling(*args, **kwargs):
        calls.append(name)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.3)  # for the thread that answers
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, signalling)


def poison_batches(monkeypatch, is_bad):
    """Puts a NaN into the loss weights of the batches whose number, from 1, `is_bad`."""
    original = TrainIterator.__next__

    def poisoned(self):
        batch = original(self)
        if is_bad(self.get_state()["next_batch"]):
            weights = batch["loss_weights"].copy()
            weights[0, 0] = np.nan
            batch = {**batch, "loss_weights": weights}
        return batch

    monkeypatch.setattr(TrainIterator, "__next__", poisoned)


@pytest.mark.parametrize("recipe", ["current", "bf16"])
def test_stopped_and_resumed_on_eight_devices(recipe, here, tmp_path, monkeypatch, capsys):
    options = {"fp8.recipe": recipe}
    code, whole = here(tmp_path / "whole", **options)
    assert code == 0
    assert f"recipe {recipe}: {12 if recipe == 'current' else 0} of 12 " in capsys.readouterr().out
    with monkeypatch.context() as patch:
        signal_at(patch, loop._Run, "_to_devices", 5)
        assert here(tmp_path / "parts", **options)[0] == 128 + signal.SIGTERM
    stopped_after = records(tmp_path / "parts", "train")[-1]["step"]
    assert f"stopped after step {stopped_after}; its state is saved" in capsys.readouterr().out
    code, parts = here(tmp_path / "parts", **options)
    assert code == 0
    for kind in ("train", "validation"):
        assert records(tmp_path / "parts", kind) == records(tmp_path / "whole", kind)
    assert saved_arrays(parts) == saved_arrays(whole)


def test_one_bad_step_is_skipped_and_counted(here, tmp_path, monkeypatch, capsys):
    poison_batches(monkeypatch, lambda number: number == 3)
    code, arguments = here(tmp_path)
    assert code == 0
    rows = records(tmp_path, "train")
    assert [row["skipped_steps"] for row in rows] == [0, 0, 1, 1, 1, 1, 1, 1]
    assert [row["loss_nats"] is None for row in rows] == [i == 2 for i in range(8)]
    assert rows[2]["non_finite"]["loss_nats"] == "nan"
    messages = [event["message"] for event in records(tmp_path, "event")]
    assert "step 3 skipped: loss nan, grad norm nan" in messages
    state = restore(parse(arguments)).state
    assert (int(state.step), int(state.applied_steps), int(state.consecutive_skips)) == (8, 7, 0)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


def test_bad_steps_in_a_row_end_the_run(here, tmp_path, monkeypatch, capsys):
    options = {"optimizer.max-consecutive-skips": 3, "checkpoint.every": 1, "checkpoint.keep": 9}
    with monkeypatch.context() as patch:
        poison_batches(patch, lambda number: number > 2)
        code, arguments = here(tmp_path, **options)
    assert code == 3
    err = capsys.readouterr().err
    assert err.startswith(
        "error: 3 steps in a row had a non-finite loss or gradient (the last: step 5, loss nan,"
        " grad norm nan; the first tensor to go bad: the loss weights of the batch); "
    )
    assert err.count("\n") == 1
    assert checkpoints(tmp_path) == [1, 2, 3, 4]
    # The two saved in between hold the good parameters, and how often a step was skipped.
    state = restore(parse(arguments)).state
    assert (int(state.applied_steps), int(state.consecutive_skips)) == (2, 2)
    skipped = saved_arrays(arguments)
    shutil.rmtree(tmp_path / "checkpoints" / "4")
    shutil.rmtree(tmp_path / "checkpoints" / "3")
    good = saved_arrays(arguments)
    counters = {".step", ".consecutive_skips"}
    assert {name for name in good if good[name] != skipped[name]} == counters
    # Without the fault the same command ends well.
    assert here(tmp_path, **options)[0] == 0
    assert {row["skipped_steps"] for row in records(tmp_path, "train")} == {0}


def test_poisoned_parameters_are_not_saved(here, tmp_path, monkeypatch, capsys):
    original = loop._Run._save

    def save_poisoned(self, state):
        if int(state.step) == 6:
            state = state._replace(params=jax.tree.map(lambda x: x * np.inf, state.params))
        original(self, state)

    monkeypatch.setattr(loop._Run, "_save", save_poisoned)
    assert here(tmp_path)[0] == 3
    assert "after step 6 the parameters or moments hold infinities" in capsys.readouterr().err
    assert checkpoints(tmp_path) == [3]


def test_full_disk_while_saving(here, tmp_path, monkeypatch, capsys):
    """The save of step 6 fails before it begins, that of step 8 in the background."""
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    write, require_space = Manifest.write, checkpoint._require_space

    def fail_to_write(self, folder):
        if self.step == 8:
            raise full
        write(self, folder)

    def fail_to_start(folder, needed):
        if checkpoints(tmp_path / "full") == [3] and not fail_to_start.done:
            fail_to_start.done = True
            raise full
        require_space(folder, needed)

    fail_to_start.done = False
    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "write", fail_to_write)
        patch.setattr(checkpoint, "_require_space", fail_to_start)
        assert here(tmp_path / "full")[0] == 0
    assert fail_to_start.done
    messages = [(e["step"], e["message"]) for e in records(tmp_path / "full", "event")]
    assert [message for message in messages if "not saved" in message[1]] == [
        (
            step,
            f"checkpoint {step} was not saved (no space left on device); earlier ones are whole,"
            " and training can go on",
        )
        for step in (6, 8)
    ]
    assert checkpoints(tmp_path / "full") == [3]
    assert capsys.readouterr().out.endswith(
        "step 8 is done; its state is NOT saved; the same command goes on from step 3\n"
    )
    # With room again the same command does the rest once more.
    before = records(tmp_path / "full", "train")
    code, arguments = here(tmp_path / "full")
    assert code == 0
    assert records(tmp_path / "full", "train") == before
    assert checkpoints(tmp_path / "full") == [6, 8]


def test_signal_during_the_last_save_and_no_room_for_the_plot(here, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        signal_at(patch, checkpoint.Checkpointer, "wait", 1)
        assert here(tmp_path)[0] == 128 + signal.SIGTERM
    assert "stopped after step 8; its state is saved" in capsys.readouterr().out
    assert checkpoints(tmp_path) == [6, 8]
    before = (tmp_path / "metrics.jsonl").read_bytes()
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fail(*_):
        raise full

    with monkeypatch.context() as patch:
        patch.setattr(loop, "plot_loss", fail)
        assert here(tmp_path)[0] == 0
    out = capsys.readouterr().out
    assert "already trained: 8 of 8 steps\n" in out
    assert "warning: plot, sample or summary is missing: [Errno 28] No space left on device" in out
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


# Several processes.

ONE_OF_TWO_PROCESSES = """
import sys
import jax
from train import loop
from train.config import TrainConfig
from train.interrupt import Interrupt
from train.mesh import make_mesh

port, index = sys.argv[1], int(sys.argv[2])
jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=index)

class NoData:
    def train_iterator(self):
        return iter(())

config = TrainConfig()
run = loop._Run(config, [], None, NoData(), None, make_mesh(config.mesh), print)
interrupt = Interrupt()
for step in range(10):
    if (index, step) == (1, 4):
        interrupt.number = 15
    if run._must_stop(interrupt):
        print("stops at", step, "for", run.stop_number)
        break
"""


def test_two_processes_stop_after_the_same_step_for_a_signal_to_one():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    processes = [run_python(ONE_OF_TWO_PROCESSES, port, str(index)) for index in (0, 1)]
    for code, out, err in [finish(process) for process in processes]:
        assert code == 0, err
        assert out.endswith("stops at 5 for 15\n")

"""The run directory: its lock, what it records, and what a resumed run may change."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from train.config import ConfigError, TrainConfig
from train.run_directory import RESUME_RULES, RunDirectory, atomic_write
from train.toml_text import to_toml


def config(directory: Path, **changes: object) -> TrainConfig:
    """The default config in `directory`, with changes such as {"run.steps": 7}."""
    result = TrainConfig()
    for name, value in {"run.directory": str(directory), **changes}.items():
        section, field = name.split(".")
        part = dataclasses.replace(getattr(result, section), **{field: value})
        result = dataclasses.replace(result, **{section: part})
    return result


def start(cfg: TrainConfig) -> list[str]:
    """Opens and closes the run directory, as a start that trains does; returns its reports."""
    lines: list[str] = []
    with RunDirectory.open(cfg, report=lines.append) as run, run.metrics.open("a") as metrics:
        metrics.write(json.dumps({"kind": "train", "step": 1}) + "\n")
    return lines


def add_checkpoint(directory: Path) -> None:
    (directory / "checkpoints" / "10").mkdir(parents=True)


def test_first_start_records_config_and_versions(tmp_path):
    cfg = config(tmp_path / "a" / "run", **{"optimizer.learning_rate": 0.25})
    with RunDirectory.open(cfg) as run:
        assert not run.is_resumed
        run.set_device("NVIDIA H200", 8)
    assert (tmp_path / "a" / "run" / "config.toml").read_text() == to_toml(cfg)
    versions = json.loads((run.path / "versions.json").read_text())
    assert versions["python"] == "{}.{}.{}".format(*sys.version_info[:3])
    assert {"jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tokenizers"} <= set(
        versions
    )
    assert (versions["device"], versions["device_count"]) == ("NVIDIA H200", 8)
    assert run.checkpoints == run.path / "checkpoints"
    assert [p.name for p in run.path.iterdir() if p.suffix == ".tmp"] == []


def test_second_start_resumes(tmp_path):
    assert start(config(tmp_path)) == []
    with RunDirectory.open(config(tmp_path)) as run:
        assert run.is_resumed


def test_second_process_is_refused_and_told_who_holds_the_lock(tmp_path):
    with RunDirectory.open(config(tmp_path)):
        with pytest.raises(ConfigError, match=rf"in use by process {os.getpid()} on host \S+;"):
            RunDirectory.open(config(tmp_path))
    start(config(tmp_path))


HOLDER = """
import dataclasses, os, sys, time
from train.config import RunConfig, TrainConfig
from train.run_directory import RunDirectory
RunDirectory.open(TrainConfig(run=RunConfig(directory=sys.argv[1])))
if os.fork() == 0:  # A data worker that outlives its parent.
    print(os.getpid(), flush=True)
    time.sleep(30)
    os._exit(0)
time.sleep(30)
"""


def test_lock_vanishes_with_sigkill_even_when_a_forked_child_lives_on(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        child = int(holder.stdout.readline())
        try:
            with pytest.raises(ConfigError, match=f"in use by process {holder.pid} on host"):
                RunDirectory.open(config(tmp_path))
            holder.send_signal(signal.SIGKILL)
            holder.wait()
            start(config(tmp_path))
        finally:
            os.kill(child, signal.SIGKILL)


def test_other_processes_of_the_same_run_neither_lock_nor_write(tmp_path):
    start(config(tmp_path))
    with RunDirectory.open(config(tmp_path)) as first:
        before = (first.path / "versions.json").read_bytes()
        with RunDirectory.open(config(tmp_path, **{"run.steps": 9}), process_index=1) as second:
            assert second.is_resumed
            second.set_device("cpu", 1)
    assert (first.path / "versions.json").read_bytes() == before
    assert tomllib.loads((first.path / "config.toml").read_text())["run"]["steps"] == 300


def test_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--run.directory=\S+file is not a folder"):
        RunDirectory.open(config(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"file/run cannot be written \(Not a directory"):
        RunDirectory.open(config(tmp_path / "file" / "run"))


def test_unwritable_folder():
    # /proc refuses new folders to root too, which a test may well run as.
    with pytest.raises(ConfigError, match=r"--run.directory=/proc/self/run cannot be written \("):
        RunDirectory.open(config(Path("/proc/self/run")))


def test_no_space_for_the_config_names_the_folder_and_frees_the_lock(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ConfigError, match=r"cannot be written \(No space left on device\)"):
            RunDirectory.open(config(tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.lock"]
    start(config(tmp_path))


def test_failed_start_does_not_bind_the_next(tmp_path):
    RunDirectory.open(config(tmp_path, **{"data.path": ("mistyped",)})).close()
    (tmp_path / "metrics.jsonl").write_text('{"kind": "event", "step": 0, "message": "start"}\n')
    with RunDirectory.open(config(tmp_path, **{"run.resume": "never"})) as run:
        assert not run.is_resumed
    assert (tmp_path / "config.toml").read_text() == to_toml(
        config(tmp_path, **{"run.resume": "never"})
    )


def test_resume_never_refuses_a_used_folder(tmp_path):
    start(config(tmp_path, **{"run.resume": "never"}))
    with pytest.raises(ConfigError, match="--run.resume=never needs a fresh folder"):
        RunDirectory.open(config(tmp_path, **{"run.resume": "never"}))


def test_resume_must_refuses_a_folder_without_a_checkpoint(tmp_path):
    start(config(tmp_path))
    (tmp_path / "checkpoints" / "10.incomplete").mkdir(parents=True)
    with pytest.raises(ConfigError, match="--run.resume=must needs a checkpoint"):
        RunDirectory.open(config(tmp_path, **{"run.resume": "must"}))
    add_checkpoint(tmp_path)
    start(config(tmp_path, **{"run.resume": "must"}))


def test_checkpoints_without_a_config_are_refused(tmp_path):
    add_checkpoint(tmp_path)
    with pytest.raises(ConfigError, match="holds a run but no config.toml"):
        RunDirectory.open(config(tmp_path))


CHANGES_REFUSED = {
    "model.hidden_size": 256,
    "model.layer_loop": "unroll",
    "fp8.recipe": "current",
    "fp8.skip_layers": ("*.down",),
    "data.glob": "*.txt",
    "data.batch_size": 32,
    "optimizer.learning_rate": 0.5,
    "optimizer.accumulation_steps": 2,
    "run.seed": 1,
}


@pytest.mark.parametrize("name", CHANGES_REFUSED)
def test_change_that_alters_the_result_is_refused(tmp_path, name):
    start(config(tmp_path))
    recorded = (tmp_path / "config.toml").read_bytes()
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')}: was .*, now "):
        RunDirectory.open(config(tmp_path, **{name: CHANGES_REFUSED[name]}))
    assert (tmp_path / "config.toml").read_bytes() == recorded
    start(config(tmp_path))


def test_every_refused_field_is_listed_with_both_values_and_the_way_out(tmp_path):
    start(config(tmp_path))
    with pytest.raises(ConfigError) as error:
        RunDirectory.open(config(tmp_path, **CHANGES_REFUSED))
    message = str(error.value)
    assert "--model.hidden-size: was 128, now 256" in message
    assert "--fp8.recipe: was 'delayed', now 'current'" in message
    assert "--data.glob: was '**/*', now '*.txt'" in message
    assert message.count(": was ") == len(CHANGES_REFUSED)
    assert message.endswith("choose another --run.directory, or give the old value")


CHANGES_FREE = {
    "run.name": "other",
    "run.resume": "auto",
    "checkpoint.every": 7,
    "checkpoint.keep": 5,
    "log.every": 1,
    "data.cache_directory": "/elsewhere",
    "fp8.minimum_fraction": 0.5,
}
CHANGES_NOTED = {
    "run.steps": 900,
    "mesh.fsdp": 2,
    "model.remat": "block",
    "data.path": ("elsewhere",),
}


def test_free_changes_are_silent_and_recorded(tmp_path):
    start(config(tmp_path))
    changed = config(tmp_path, **CHANGES_FREE)
    assert start(changed) == []
    assert (tmp_path / "config.toml").read_text() == to_toml(changed)


@pytest.mark.parametrize("name", CHANGES_NOTED)
def test_changes_that_alter_later_numbers_are_noted(tmp_path, name):
    start(config(tmp_path))
    (line,) = start(config(tmp_path, **{name: CHANGES_NOTED[name]}))
    assert line.startswith(f"note: --{name.replace('_', '-')} was ")


def test_more_steps_need_no_note_under_a_constant_schedule(tmp_path):
    start(config(tmp_path, **{"optimizer.schedule": "constant"}))
    assert start(config(tmp_path, **{"optimizer.schedule": "constant", "run.steps": 900})) == []


def test_rules_name_fields_that_exist():
    for name in RESUME_RULES:
        section, field = name.split(".")
        fields = {f.name for f in dataclasses.fields(getattr(TrainConfig(), section))}
        assert field == "*" or field in fields, name


def test_field_that_the_earlier_version_lacked_counts_as_its_default(tmp_path):
    start(config(tmp_path))
    path = tmp_path / "config.toml"
    path.write_text(path.read_text().replace("qk_norm = false\n", ""))
    assert start(config(tmp_path)) == []
    path.write_text(path.read_text().replace("qk_norm = false\n", ""))
    with pytest.raises(ConfigError, match="--model.qk-norm: was False, now True"):
        RunDirectory.open(config(tmp_path, **{"model.qk_norm": True}))


def test_unreadable_earlier_config(tmp_path):
    start(config(tmp_path))
    (tmp_path / "config.toml").write_text("[run\nsteps = ")
    with pytest.raises(ConfigError, match="config of the earlier start, cannot be read"):
        RunDirectory.open(config(tmp_path))


def test_changed_library_version_is_noted(tmp_path):
    start(config(tmp_path))
    path = tmp_path / "versions.json"
    versions = json.loads(path.read_text())
    path.write_text(json.dumps(versions | {"jaxlib": "0.1.0"}))
    (line,) = start(config(tmp_path))
    assert line.startswith(f"note: jaxlib was 0.1.0 and is now {versions['jaxlib']}:")


def test_atomic_write_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "file"
    atomic_write(path, "old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        atomic_write(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]

"""Damage, kills and full disks: each leaves a good checkpoint or a clear error."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_cases import (
    DATA,
    abstract,
    assert_bitwise_equal,
    files,
    make_state,
    names,
    restore,
    save,
)

from train import checkpoint as checkpoint_module
from train.checkpoint import Checkpointer, CheckpointError, CheckpointSaveError
from train.config import CheckpointConfig

# Damage. Checkpoints 1 and 2 exist, 2 is damaged: 1 must come back, and nothing else.


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("pristine")
    save(directory, [1, 2])
    return directory


@pytest.fixture
def pair(pristine, tmp_path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "checkpoints"))


def assert_falls_back(directory: Path, reason: str) -> None:
    reports: list[str] = []
    restored = restore(directory, reports=reports)
    assert restored is not None and restored.step == 1
    assert restored.data_state == {**DATA, "step": 1}
    assert_bitwise_equal(restored.state, make_state(1))
    assert len(reports) == 1
    assert reports[0].startswith("checkpoint 2 is damaged and not used: ")
    assert reason in reports[0]


def test_flipped_bit_in_each_file(pair):
    for index, path in enumerate(files(pair / "2")):
        content = bytearray(path.read_bytes())
        # Another place and another bit in each file; commit_success.txt and the like included.
        place, bit = (index * 7919) % len(content), index % 8
        content[place] ^= 1 << bit
        path.write_bytes(content)
        assert_falls_back(pair, path.name)
        content[place] ^= 1 << bit
        path.write_bytes(content)
    assert restore(pair).step == 2


def test_flipped_bit_at_each_place_of_the_manifest(pair):
    path = pair / "2" / "manifest.json"
    whole = path.read_bytes()
    for place in range(0, len(whole), 101):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(checkpoint_module.DamageError, match="manifest.json"):
            checkpoint_module.Manifest.read(pair / "2")


def largest_array_file(checkpoint: Path) -> Path:
    # The manifest can be larger than any of them, but its damage reads differently.
    return max(files(checkpoint / "state"), key=lambda path: path.stat().st_size)


def test_truncated_file(pair):
    largest = largest_array_file(pair / "2")
    size = largest.stat().st_size
    os.truncate(largest, size // 2)
    assert_falls_back(pair, f"{largest.name} has {size // 2} bytes instead of {size}")


def test_missing_file(pair):
    (pair / "2" / "state" / "manifest.ocdbt").unlink()
    assert_falls_back(pair, "state/manifest.ocdbt is missing")


def test_missing_manifest(pair):
    (pair / "2" / "manifest.json").unlink()
    assert_falls_back(pair, "it has no manifest.json")


def test_garbage_file(pair):
    (pair / "2" / "state" / "d" / "garbage").write_text("?")
    assert_falls_back(pair, "state/d/garbage does not belong there (delete it to use the")


def test_renamed_checkpoint(pair):
    (pair / "2").rename(pair / "3")
    reports: list[str] = []
    assert restore(pair, reports=reports).step == 1
    assert reports == ["checkpoint 3 is damaged and not used: its manifest is of checkpoint 2"]


def test_unreadable_block_of_the_disk(pair, monkeypatch):
    def broken(file, digest):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("hashlib.file_digest", broken)
    with pytest.raises(CheckpointError, match=r"2/\S+ cannot be read \(Input/output error\)"):
        restore(pair)


def test_sizes_are_checked_even_without_checksums(pair):
    largest = largest_array_file(pair / "2")
    os.truncate(largest, largest.stat().st_size - 1)
    config = CheckpointConfig(verify=False)
    with Checkpointer(pair, config, report=[].append) as checkpointer:
        assert checkpointer.restore_newest(abstract(make_state())).step == 1


def test_all_damaged_names_each(pair):
    (pair / "1" / "meta.json").write_text("{}")
    (pair / "2" / "data_state.json").unlink()
    with pytest.raises(CheckpointError) as error:
        restore(pair)
    assert "holds 2 checkpoints, and none is good" in str(error.value)
    assert "\n  1: meta.json has 2 bytes instead of " in str(error.value)
    assert "\n  2: data_state.json is missing" in str(error.value)
    assert "start anew with another --run.directory" in str(error.value)


def test_leftovers_of_a_kill_are_never_read_and_go_at_the_next_save(pair):
    (pair / "2").rename(pair / "2.incomplete")
    (pair / "9.incomplete" / "state.orbax-checkpoint-tmp").mkdir(parents=True)
    (pair / "0.deleted").mkdir()
    (pair / "notes.txt").write_text("mine")
    assert restore(pair).step == 1
    save(pair, [3])
    assert names(pair) == ["1", "3", "notes.txt"]


def test_saving_goes_on_after_a_fallback(pair):
    (pair / "2" / "meta.json").write_text("{}")
    with Checkpointer(pair, CheckpointConfig(keep=1), report=[].append) as checkpointer:
        assert checkpointer.restore_newest(abstract(make_state())).step == 1
        checkpointer.save(2, make_state(22), data_state=DATA)
        checkpointer.wait()
    assert names(pair) == ["2"]
    assert_bitwise_equal(restore(pair).state, make_state(22))


def test_damaged_newer_checkpoint_goes_once_a_good_one_is_saved(pair):
    (pair / "2").rename(pair / "200")
    with Checkpointer(pair, CheckpointConfig(keep=2), report=[].append) as checkpointer:
        assert checkpointer.restore_newest(abstract(make_state())).step == 1
        assert names(pair) == ["1", "200"]
        checkpointer.save(3, make_state(3), data_state=DATA)
        checkpointer.wait()
    assert names(pair) == ["1", "3"]


KILLED = """
    import sys
    from pathlib import Path
    import jax.numpy as jnp
    from train.checkpoint import Checkpointer
    from train.config import CheckpointConfig

    checkpointer = Checkpointer(Path(sys.argv[1]), CheckpointConfig(keep=2))
    for step in range(1, 10_000):
        checkpointer.save(step, {"x": jnp.full((1 << 16,), step)}, data_state={"step": step})
        if step == 3:
            print("go", flush=True)
"""


def test_sigkill_at_any_moment_leaves_a_good_checkpoint(tmp_path):
    reports: list[str] = []
    for delay_s in (0, 0.017, 0.05, 0.11):
        shutil.rmtree(tmp_path)
        with subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path)],
            stdout=subprocess.PIPE,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(timeout=delay_s)
            process.send_signal(signal.SIGKILL)
        restored = restore(tmp_path, {"x": jnp.zeros((1 << 16,), jnp.int32)}, reports)
        assert restored is not None and restored.step >= 2
        assert restored.data_state == {"step": restored.step}
        assert np.all(np.asarray(restored.state["x"]) == restored.step)
    assert reports == []


# No space left.


def test_full_disk_under_orbax(tmp_path):
    """The file size limit stops tensorstore's own writes, as a full disk would."""
    big = {"x": jnp.asarray(np.random.default_rng(0).standard_normal(1 << 18), jnp.float32)}
    with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
        checkpointer.save(1, big, data_state=DATA)
        checkpointer.wait()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 17, limits[1]))
        try:
            checkpointer.save(2, big, data_state=DATA)
            with pytest.raises(CheckpointSaveError) as error:
                checkpointer.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert str(error.value) == (
            "checkpoint 2 was not saved (file too large);"
            " earlier ones are whole, and training can go on"
        )
        assert list(error.value.failures) == [2]
        checkpointer.wait()  # Each failure is raised once.
        assert names(tmp_path) == ["1"]
        checkpointer.save(3, big, data_state=DATA)
        checkpointer.wait()
    assert names(tmp_path) == ["1", "3"]
    assert restore(tmp_path, big).step == 3


@pytest.mark.parametrize("place", ["Manifest.write", "Manifest.of_folder", "sync_folder"])
def test_full_disk_after_orbax(tmp_path, monkeypatch, place):
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device", "manifest.json")

    with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
        checkpointer.save(1, make_state(1), data_state=DATA)
        checkpointer.wait()
        with monkeypatch.context() as patch:
            patch.setattr(f"train.checkpoint.{place}", full)
            checkpointer.save(2, make_state(2), data_state=DATA)
            with pytest.raises(CheckpointSaveError, match="2 was not saved .no space left on dev"):
                checkpointer.wait()
        assert [name for name in names(tmp_path) if name.endswith(".incomplete")] == []
    assert_bitwise_equal(restore(tmp_path).state, make_state(restore(tmp_path).step))


def test_full_disk_before_orbax(tmp_path, monkeypatch):
    with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
        with monkeypatch.context() as patch:
            patch.setattr(Path, "mkdir", lambda *_, **__: os.open("/dev/full/x", os.O_RDONLY))
            with pytest.raises(CheckpointSaveError) as error:
                checkpointer.save(1, make_state(), data_state=DATA)
            assert list(error.value.failures) == [1]
        checkpointer.save(2, make_state(2), data_state=DATA)
    assert names(tmp_path) == ["2"]


def test_too_little_space_is_found_before_anything_is_written(tmp_path, monkeypatch):
    state = {"x": jnp.zeros((1 << 18,))}  # 1 MiB
    usage = shutil.disk_usage(tmp_path)._replace(free=(1 << 20) - 1)
    with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
        checkpointer.save(1, {"x": jnp.zeros((1,))}, data_state=DATA)
        checkpointer.wait()
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
        with pytest.raises(CheckpointSaveError, match=r"it takes 0.000977 GiB, and 0.000977 GiB"):
            checkpointer.save(2, state, data_state=DATA)
        assert names(tmp_path) == ["1"]
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1 << 20))
        checkpointer.save(3, state, data_state=DATA)
    assert names(tmp_path) == ["1", "3"]


def test_save_reports_the_failure_before_it_and_still_saves(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
        with monkeypatch.context() as patch:
            patch.setattr("train.checkpoint.Manifest.write", full)
            checkpointer.save(1, make_state(1), data_state=DATA)
            checkpointer._join()
        with pytest.raises(CheckpointSaveError) as error:
            checkpointer.save(2, make_state(2), data_state=DATA)
        assert list(error.value.failures) == [1]
    assert names(tmp_path) == ["2"]


def test_failure_that_nobody_asked_for_is_reported_at_close(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("train.checkpoint.Manifest.write", full)
    reports: list[str] = []
    checkpointer = Checkpointer(tmp_path, CheckpointConfig(), report=reports.append)
    checkpointer.save(1, make_state(1), data_state=DATA)
    checkpointer.close()
    assert len(reports) == 1 and "1 was not saved (no space left on device)" in reports[0]

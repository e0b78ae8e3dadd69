"""Checkpoints: exact, atomic, verified; every fault leaves a good one or a clear error."""

import concurrent.futures
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from train import checkpoint as checkpoint_module
from train.checkpoint import Checkpointer, CheckpointError, CheckpointSaveError
from train.config import CheckpointConfig

DATA = {"epoch": 1, "position": 640}


def bits(array: jax.Array) -> tuple:
    """Everything that must come back: dtype, shape and the raw bytes."""
    host = np.asarray(array)
    return host.dtype, host.shape, host.tobytes()


def make_state(seed: int = 0) -> dict:
    """A state with each dtype that training uses, in the containers of optax."""
    random = np.random.default_rng(seed)
    words = random.integers(0, 2**16, (6, 8), dtype=np.uint16)  # All bfloat16 patterns, NaN too.
    kernel = jnp.asarray(random.standard_normal((8, 16)), jnp.float32)
    return {
        "params": {"kernel": kernel, "bias": jnp.zeros((3,), jnp.bfloat16)},
        "opt_state": optax.adamw(1e-3).init({"kernel": kernel}),
        "moment": jax.lax.bitcast_convert_type(jnp.asarray(words), jnp.bfloat16),
        "scaling": jnp.asarray([np.inf, -0.0, np.nan, 1e-45], jnp.float32),
        "fp8": jnp.arange(-3, 5, dtype=jnp.float32).astype(jnp.float8_e4m3fn),
        "key": jax.random.key_data(jax.random.key(seed)),
        "step": jnp.int32(seed),
        "empty": jnp.zeros((0, 4), jnp.float32),
        "is_calibrated": jnp.asarray(True),
    }


def abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def assert_bitwise_equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for path, (a, b) in zip(
        jax.tree_util.tree_leaves_with_path(expected),
        zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True),
        strict=True,
    ):
        assert bits(a) == bits(b), path[0]


def save(directory: Path, steps, *, keep: int = 9, **options) -> None:
    with Checkpointer(directory, CheckpointConfig(keep=keep)) as checkpointer:
        for step in steps:
            checkpointer.save(step, make_state(step), data_state={**DATA, "step": step}, **options)
        checkpointer.wait()


def restore(directory: Path, state=None, reports: list | None = None, **options):
    report = [].append if reports is None else reports.append
    with Checkpointer(directory, CheckpointConfig(), report=report) as checkpointer:
        return checkpointer.restore_newest(abstract(state or make_state()), **options)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


# What comes back.


def test_round_trip_is_bitwise_exact(tmp_path):
    state = make_state(3)
    with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
        checkpointer.save(3, state, data_state=DATA, meta={"first_loss_nats": 8.25, "note": None})
    restored = restore(tmp_path)
    assert restored is not None
    assert restored.step == 3
    assert restored.data_state == DATA
    assert restored.meta == {"first_loss_nats": 8.25, "note": None}
    assert_bitwise_equal(restored.state, state)


def test_data_state_may_be_bytes(tmp_path):
    with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
        checkpointer.save(1, make_state(), data_state=bytes(range(256)))
    assert restore(tmp_path).data_state == bytes(range(256))


def test_nothing_to_restore(tmp_path):
    assert restore(tmp_path) is None
    assert restore(tmp_path / "missing") is None
    assert names(tmp_path) == []


def test_arrays_may_be_donated_as_soon_as_save_returns(tmp_path):
    advance = jax.jit(lambda x: jax.tree.map(lambda y: y + 1, x), donate_argnums=0)
    random = np.random.default_rng(0)
    host = {name: random.standard_normal((1 << 18,)).astype(np.float32) for name in "abcd"}
    state = jax.tree.map(jnp.array, host)
    with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
        checkpointer.save(1, state, data_state=DATA)
        for _ in range(5):
            state = advance(state)
        jax.block_until_ready(state)
    assert_bitwise_equal(restore(tmp_path, state).state, jax.tree.map(jnp.array, host))


def test_part_of_the_state(tmp_path):
    save(tmp_path, [5])
    part = {"params": make_state(5)["params"]}
    assert_bitwise_equal(restore(tmp_path, part, is_partial=True).state, part)


ON_EIGHT_DEVICES = """
    import sys
    from pathlib import Path
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import NamedSharding, PartitionSpec as P
    from train.checkpoint import Checkpointer
    from train.config import CheckpointConfig

    values = np.random.default_rng(0).standard_normal((16, 24)).astype(np.float32)
    def place(shape, spec):
        mesh = jax.make_mesh(shape, ("fsdp", "tensor"), devices=jax.devices()[:shape[0] * shape[1]])
        state = {"w": values, "b": values[0].astype(jnp.bfloat16), "n": np.int32(7)}
        specs = {"w": spec, "b": P("tensor"), "n": P()}
        return {k: jax.device_put(v, NamedSharding(mesh, specs[k])) for k, v in state.items()}

    with Checkpointer(Path(sys.argv[1]), CheckpointConfig()) as checkpointer:
        saved = place((4, 2), P("fsdp", "tensor"))
        checkpointer.save(1, saved, data_state={})
        checkpointer.wait()
        for shape, spec in (((4, 2), P("fsdp", "tensor")), ((2, 4), P("tensor", "fsdp")),
                            ((8, 1), P("fsdp", None)), ((1, 1), P()), ((2, 1), P(None, "fsdp"))):
            wanted = place(shape, spec)
            restored = checkpointer.restore_newest(wanted).state
            for name in saved:
                assert restored[name].sharding == wanted[name].sharding, (shape, name)
                assert restored[name].dtype == saved[name].dtype
                assert np.asarray(restored[name]).tobytes() == np.asarray(saved[name]).tobytes()
    print("equal on", jax.device_count())
"""


def run_python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
    )


def test_sharded_state_restores_to_any_mesh(tmp_path):
    done = run_python(
        ON_EIGHT_DEVICES, str(tmp_path), XLA_FLAGS="--xla_force_host_platform_device_count=8"
    )
    assert done.stdout.strip() == "equal on 8", done.stderr


ONE_OF_TWO_PROCESSES = """
    import os, sys
    from pathlib import Path
    import jax
    port, index, directory = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=index)
    import numpy as np
    from jax.experimental.multihost_utils import sync_global_devices
    from jax.sharding import NamedSharding, PartitionSpec as P
    from train.checkpoint import Checkpointer, CheckpointError
    from train.config import CheckpointConfig

    mesh = jax.make_mesh((2,), ("fsdp",))
    values = {"w": np.arange(32, dtype=np.float32).reshape(8, 4), "n": np.full(3, 7, np.int32)}
    specs = {"w": P("fsdp"), "n": P()}

    def state(step):
        return {
            name: jax.make_array_from_callback(
                value.shape, NamedSharding(mesh, specs[name]), lambda i, v=value: v[i] * step
            )
            for name, value in values.items()
        }

    def check(step):
        restored = checkpointer.restore_newest(state(0))
        assert (restored.step, restored.data_state) == (step, {"process": index})
        for name, array in restored.state.items():
            for shard in array.addressable_shards:
                assert np.array_equal(shard.data, values[name][shard.index] * step), name

    checkpointer = Checkpointer(directory, CheckpointConfig(keep=2), report=lambda line: None)
    for step in (1, 2, 3):
        checkpointer.save(step, state(step), data_state={"process": index})
    checkpointer.wait()
    check(3)
    for damaged in (3, 2):
        sync_global_devices(f"before {damaged}")
        if index == 0:
            assert checkpointer.steps() == [2, 3]
            os.truncate(directory / str(damaged) / "meta.json", 1)
        sync_global_devices(f"after {damaged}")
        if damaged == 3:
            check(2)
    try:
        checkpointer.restore_newest(state(0))
    except CheckpointError as error:
        assert "holds 2 checkpoints, and none is good" in str(error)
        print("done", index)
    checkpointer.save(4, state(4), data_state={"process": index})
    checkpointer.close()
"""


def test_two_processes(tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        both = pool.map(
            lambda index: run_python(
                ONE_OF_TWO_PROCESSES, port, index, str(tmp_path), XLA_FLAGS=""
            ),
            "01",
        )
    for index, done in enumerate(both):
        assert f"done {index}" in done.stdout, done.stderr
    # The damaged ones went when a good one was there.
    assert names(tmp_path) == ["4"]
    wanted = {"w": jnp.zeros((8, 4)), "n": jnp.zeros(3, jnp.int32)}
    with pytest.raises(CheckpointError, match="data positions of 2 processes, and this run has 1;"):
        restore(tmp_path, wanted)


# What is kept.


def test_newest_are_kept_and_the_best(tmp_path):
    losses = {10: 4.0, 20: 3.0, 30: 3.5, 40: 3.75, 50: None, 60: float("nan")}
    with Checkpointer(tmp_path, CheckpointConfig(keep=2)) as checkpointer:
        for step, loss in losses.items():
            checkpointer.save(step, make_state(), data_state=DATA, validation_loss=loss)
            checkpointer.wait()
            assert checkpointer.steps()[-1] == step
        assert checkpointer.steps() == [20, 50, 60]
    assert names(tmp_path) == ["20", "50", "60"]


def test_nothing_is_deleted_before_the_newer_one_has_its_manifest(tmp_path, monkeypatch):
    save(tmp_path, [1])
    seen = []
    write = checkpoint_module.Manifest.write

    def spy(self, folder):
        seen.append(names(tmp_path))
        write(self, folder)

    monkeypatch.setattr(checkpoint_module.Manifest, "write", spy)
    with Checkpointer(tmp_path, CheckpointConfig(keep=1)) as checkpointer:
        checkpointer.save(2, make_state(), data_state=DATA)
    assert seen == [["1", "2.incomplete"]]
    assert names(tmp_path) == ["2"]


def test_step_that_was_saved_is_not_saved_again(tmp_path):
    with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
        checkpointer.save(1, make_state(1), data_state=DATA)
        checkpointer.save(1, make_state(2), data_state=DATA)
    assert_bitwise_equal(restore(tmp_path).state, make_state(1))


def test_manifest_lists_every_file_with_size_and_sha256(tmp_path):
    save(tmp_path, [1], validation_loss=2.5)
    manifest = json.loads((tmp_path / "1" / "manifest.json").read_text())
    assert (manifest["step"], manifest["validation_loss"]) == (1, 2.5)
    expected = subprocess.run(
        ["sha256sum", *manifest["files"]], cwd=tmp_path / "1", capture_output=True, check=True
    ).stdout.decode()
    assert expected.splitlines() == [
        f"{sha}  {name}" for name, (_, sha) in manifest["files"].items()
    ]
    for name, (size, _) in manifest["files"].items():
        assert (tmp_path / "1" / name).stat().st_size == size
    listed = {tmp_path / "1" / name for name in manifest["files"]}
    assert listed | {tmp_path / "1" / "manifest.json"} == set(files(tmp_path / "1"))


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


def test_truncated_file(pair):
    largest = max(files(pair / "2"), key=lambda path: path.stat().st_size)
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
    largest = max(files(pair / "2"), key=lambda path: path.stat().st_size)
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


# Another architecture, another tokenizer.


def test_another_architecture_lists_the_leaves(pair):
    state = make_state()
    state["params"]["kernel"] = jnp.zeros((8, 32), jnp.float32)
    state["moment"] = state["moment"].astype(jnp.float32)
    state["extra"] = state.pop("is_calibrated")
    with pytest.raises(CheckpointError) as error:
        restore(pair, state)
    message = str(error.value)
    assert "checkpoint 2 is of another architecture; 4 of 13 arrays differ" in message
    assert "params.kernel: checkpoint float32[8, 16], this run float32[8, 32]" in message
    assert "moment: checkpoint bfloat16[6, 8], this run float32[6, 8]" in message
    assert "extra: checkpoint none, this run bool[]" in message
    assert "is_calibrated: checkpoint bool[], this run none" in message


def test_at_most_ten_differing_leaves_are_listed(pair):
    with pytest.raises(CheckpointError) as error:
        restore(pair, {f"x{i}": jnp.zeros(3) for i in range(5)})
    assert str(error.value).count("checkpoint none") + str(error.value).count("run none") == 10
    assert "and 7 more" in str(error.value)


def test_a_missing_part_is_an_error(pair):
    with pytest.raises(CheckpointError, match=r"absent: checkpoint none, this run float32\[2\]"):
        restore(pair, {"absent": jnp.zeros(2)}, is_partial=True)


def test_another_tokenizer_or_vocabulary(tmp_path):
    save(tmp_path, [1], meta={"tokenizer": "abc", "vocab_size": 512, "first_loss_nats": 6.0})
    same = {"tokenizer": "abc", "vocab_size": 512, "first_loss_nats": None}
    assert restore(tmp_path, must_match=same).step == 1
    with pytest.raises(CheckpointError) as error:
        restore(tmp_path, must_match={"tokenizer": "xyz", "vocab_size": 1024})
    assert "tokenizer: checkpoint 'abc', this run 'xyz'" in str(error.value)
    assert "vocab_size: checkpoint 512, this run 1024" in str(error.value)


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


# Bad input.


@pytest.mark.parametrize(
    ("make_leaf", "message"),
    [
        (lambda: 1.5, "'x' is a float, not a jax.Array"),
        (lambda: np.zeros(3), "'x' is a ndarray, not a jax.Array"),
        (lambda: jax.random.key(0), "'x' is a typed PRNG key; save jax.random.key_data of it"),
    ],
)
def test_leaf_that_is_no_array(tmp_path, make_leaf, message):
    with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
        with pytest.raises(TypeError, match=message):
            checkpointer.save(1, {"x": make_leaf()}, data_state=DATA)
    assert names(tmp_path) == []


def test_two_leaves_of_one_name(tmp_path):
    with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
        with pytest.raises(TypeError, match=r"two leaves of the state are both called 'a.b'"):
            checkpointer.save(1, {"a.b": jnp.ones(1), "a": {"b": jnp.ones(1)}}, data_state=DATA)

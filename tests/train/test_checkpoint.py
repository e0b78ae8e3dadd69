"""Checkpoints come back exactly, on any mesh and from any number of processes, or not at all."""

import concurrent.futures
import json
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_cases import (
    DATA,
    assert_bitwise_equal,
    files,
    make_state,
    names,
    restore,
    save,
)

from train import checkpoint as checkpoint_module
from train.checkpoint import Checkpointer, CheckpointError
from train.config import CheckpointConfig

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


# Another architecture, another tokenizer.


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    """Checkpoints 1 and 2, only to be read."""
    directory = tmp_path_factory.mktemp("pair")
    save(directory, [1, 2])
    return directory


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

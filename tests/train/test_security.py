"""Files from strangers: nothing in them is executed, no path in them leads out of their folder."""

import ast
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorstore
from checkpoint_cases import files, restore, save
from run_cases import environment

from train.checkpoint import CheckpointError
from train.config import DataConfig
from train.data import DataError
from train.data.sources import find_files, read_documents
from train.data.tokenizer import load_tokenizer
from train.manifest import DamageError, Manifest
from train.metrics import MetricsError, read_metrics

ROOT = Path(__file__).parents[2]
SOURCES = [
    path
    for package in ("jfp8", "pallas_kernels", "train")
    for path in sorted((ROOT / package).rglob("*.py"))
]
# Modules that make objects, or code, out of bytes.
UNSAFE_MODULES = {
    *("pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"),
    *("code", "codeop", "runpy", "imp", "xmlrpc", "yaml", "torch"),
}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__", "system", "popen", "execv", "allow_pickle"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_can_turn_bytes_into_code(path):
    assert unsafe_uses(path.read_text()) == set()


def test_unsafe_uses_are_found():
    source = "import pickle as p\nfrom os import system\nnp.load(x, allow_pickle=True)\neval(y)\n"
    source += "import importlib\nimportlib.import_module(name)\nimport subprocess\n"
    source += "subprocess.run(c, shell=True)\ncompiled = lowered.compile()\n"
    found = {"pickle", "system", "allow_pickle", "eval", "shell"}
    assert unsafe_uses(source) == found


def unsafe_uses(source: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names} & UNSAFE_MODULES
        elif isinstance(node, ast.ImportFrom):
            found |= {(node.module or "").split(".")[0]} & UNSAFE_MODULES
            found |= {name.name for name in node.names} & UNSAFE_CALLS
        elif isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name):
                found |= {node.func.id} & UNSAFE_CALLS
            # `lowered.compile()` is XLA's; of the others the module does not matter.
            elif isinstance(node.func, ast.Attribute) and node.func.attr != "compile":
                found |= {node.func.attr} & UNSAFE_CALLS
            found |= {word.arg for word in node.keywords} & {"allow_pickle", "shell"}
    return found


# Malicious files.


class Payload:
    """Makes `marker` when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


@pytest.fixture
def payload(tmp_path):
    """Bytes that betray whoever unpickles them."""
    marker = tmp_path / "executed"
    data = pickle.dumps(Payload(marker))
    pickle.loads(data)
    assert marker.exists()  # It would work.
    marker.unlink()
    yield data
    assert not marker.exists()


def read_all(folder: Path, **options) -> list:
    config = DataConfig(path=(str(folder),), **options)
    return [d for file in find_files(config) for d in read_documents(file, config.text_column)]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet", "a.bin"])
def test_pickle_as_data(name, payload, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / name).write_bytes(payload + b" " * (len(payload) % 2))
    meta = {"dtype": "uint16", "end_of_text_id": 0, "vocab_size": 300}
    if name == "a.bin":
        (folder / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(DataError):
        read_all(folder)
    (folder / "a.bin").write_bytes(b"\0\0")
    (folder / "meta.json").write_bytes(payload)
    with pytest.raises(DataError):
        read_all(folder)


def test_parquet_with_a_pickled_type(payload, tmp_path):
    """The extension type that old releases of pyarrow unpickled (CVE-2023-47248)."""
    metadata = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": payload,
    }
    schema = pa.schema([pa.field("text", pa.string(), metadata=metadata)])
    folder = tmp_path / "data"
    folder.mkdir()
    pq.write_table(pa.table({"text": ["a", "b"]}, schema=schema), folder / "a.parquet")
    assert (
        payload in (folder / "a.parquet").read_bytes()
        or pq.read_schema(folder / "a.parquet").field("text").metadata
    )
    try:
        assert [document.content for document in read_all(folder)] == ["a", "b"]
    except DataError:
        pass  # A refusal is as good.


def test_pickle_as_tokenizer_and_metrics(payload, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(payload)
    with pytest.raises(DataError):
        load_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "metrics.jsonl").write_bytes(payload)
    with pytest.raises(MetricsError):
        read_metrics(tmp_path)


def rewrite_manifest(folder: Path, step: int) -> None:
    """Vouches for whatever is in the folder: its checksums guard against damage, not malice."""
    manifest = Manifest.of_folder(folder, step=step, validation_loss=None, with_checksums=True)
    manifest.write(folder)


# In a process of its own: orbax leaves unfinished reads behind when one of them fails.
RESTORE_EACH = """
import sys
from pathlib import Path
from checkpoint_cases import assert_bitwise_equal, make_state, restore
from train.checkpoint import CheckpointError
for directory in sys.argv[1:]:
    try:
        # A file that is not read at all, such as orbax's marks, may hold anything.
        assert_bitwise_equal(restore(Path(directory), reports=[]).state, make_state(1))
        print("restored", flush=True)
    except (CheckpointError, ValueError) as error:
        print("refused", flush=True)
"""


def test_pickle_in_place_of_each_file_of_a_checkpoint(payload, tmp_path):
    save(tmp_path / "pristine", [1])
    directories = []
    for path in files(tmp_path / "pristine"):
        name = path.relative_to(tmp_path / "pristine")
        target = tmp_path / f"case{len(directories)}"
        directories.append(Path(shutil.copytree(tmp_path / "pristine", target)))
        (target / name).write_bytes(payload)
        if name.name != "manifest.json":
            rewrite_manifest(target / "1", 1)
    result = subprocess.run(
        [sys.executable, "-c", RESTORE_EACH, *map(str, directories)],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment(None)
        | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)])},
    )
    outcomes = result.stdout.split()
    assert len(outcomes) == len(directories), result.stderr
    assert set(outcomes) <= {"restored", "refused"} and outcomes.count("refused") >= 4


# Paths.


def test_manifest_with_paths_that_lead_outside(tmp_path):
    save(tmp_path / "checkpoints", [1])
    folder, secret = tmp_path / "checkpoints" / "1", tmp_path / "secret"
    secret.write_text("secret")
    whole = Manifest.read(folder)
    for name in ("../../secret", str(secret), "state/../../../secret"):
        entry = Manifest.of_folder(folder, step=1, validation_loss=None, with_checksums=True)
        entry.files[name] = (6, None)
        entry.write(folder)
        with pytest.raises(DamageError, match="secret is missing"):
            Manifest.read(folder).verify(folder, with_checksums=True)
    whole.write(folder)
    assert restore(tmp_path / "checkpoints").step == 1


@pytest.mark.parametrize("what", ["file", "folder"])
def test_links_in_a_checkpoint_are_refused(what, tmp_path):
    save(tmp_path / "checkpoints", [1])
    folder = tmp_path / "checkpoints" / "1"
    linked = folder / ("state" if what == "folder" else "meta.json")
    linked.rename(tmp_path / "elsewhere")
    linked.symlink_to(tmp_path / "elsewhere")
    for is_rewritten in (False, True):
        if is_rewritten:
            rewrite_manifest(folder, 1)
        with pytest.raises(CheckpointError, match=f"1: {linked.name} is a link"):
            restore(tmp_path / "checkpoints", reports=[])


def test_array_store_refuses_paths_that_lead_outside(tmp_path):
    (tmp_path / "inside").mkdir()
    (tmp_path / "secret").write_text("secret")
    store = tensorstore.KvStore.open(f"file://{tmp_path}/inside/").result()
    with pytest.raises(ValueError, match="Invalid key"):
        store.read("../secret").result()


def test_leftover_that_is_a_link_does_not_delete_its_target(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("mine")
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    (checkpoints / "7.deleted").symlink_to(outside)
    (checkpoints / "8.incomplete").symlink_to(outside)
    save(checkpoints, [1])
    assert (outside / "kept").read_text() == "mine"
    assert restore(checkpoints).step == 1


@pytest.mark.parametrize("name", ["²", "1²", "-1", "1.5", "١٢"])
def test_odd_names_among_the_checkpoints(name, tmp_path):
    save(tmp_path, [1])
    (tmp_path / name).mkdir()
    assert restore(tmp_path, reports=[]).step == 1


@pytest.mark.parametrize("pattern", ["../*", "a/../../*", "/etc/*"])
def test_glob_that_leads_outside(pattern, tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(DataError, match="must be a pattern inside the folder"):
        find_files(DataConfig(path=(str(tmp_path),), glob=pattern))


# A whole run, watched by the interpreter's own audit events.

WATCHED = """
import sys
SUSPICIOUS = ("pickle.", "os.system", "os.exec", "os.spawn", "os.posix_spawn", "marshal.load")
seen = []
def hook(event, arguments):
    if event.startswith(SUSPICIOUS):
        # Importing a module unmarshals its compiled code; that is Python's own business.
        frame = sys._getframe(1)
        while frame and "importlib" in frame.f_code.co_filename:
            frame = None
        if frame:
            seen.append((event, frame.f_code.co_filename))
sys.addaudithook(hook)
from train.main import main
from train import sample
code = main(sys.argv[2:]) or sample.main([sys.argv[1], "--tokens", "2"])
print("audit:", code, sorted(set(seen)))
"""


def test_resuming_and_sampling_unpickle_nothing(finished_run, tmp_path):
    directory = shutil.copytree(finished_run.directory, tmp_path / "run")
    shutil.rmtree(directory / "checkpoints" / "60")  # ten steps are left to do
    result = subprocess.run(
        [sys.executable, "-c", WATCHED, str(directory), *finished_run.arguments(directory)],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment(finished_run.xla_cache),
    )
    assert result.stdout.splitlines()[-1] == "audit: 0 []", result.stdout + result.stderr
    assert "resumed from the checkpoint of step 50" in result.stdout

"""What `python -m train.main` answers: exit codes, one clear message, nothing started in vain."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from run_cases import environment, finish, make_arguments, run_python, start_signalling
from tokenizers import Tokenizer, models

from train.config import parse
from train.run_directory import RunDirectory


class BadInput(NamedTuple):
    """A mistake, and the words that its message must hold."""

    options: Callable[[Path], dict[str, object]]  # given an empty folder
    words: list[str]
    needs_device: bool = False


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def empty_folder(folder: Path) -> dict[str, object]:
    (folder / "texts").mkdir()
    return {"data.path": folder / "texts"}


def config_file(folder: Path) -> dict[str, object]:
    return {"config": write(folder / "own.toml", "[model]\nhiden_size = 64\n")}


def broken_jsonl(folder: Path) -> dict[str, object]:
    return {"data.path": write(folder / "a.jsonl", '{"text": "one"}\n{"text": "tw\n')}


def parquet_without_text(folder: Path) -> dict[str, object]:
    table = pyarrow.table({"body": ["one", "two"]})
    pyarrow.parquet.write_table(table, folder / "a.parquet")
    return {"data.path": folder / "a.parquet"}


def tokenizer(size: int) -> Tokenizer:
    vocabulary = {"<|endoftext|>": 0} | {f"t{i}": i for i in range(1, size)}
    return Tokenizer(models.WordLevel(vocabulary, unk_token="t1"))


def token_shards(folder: Path) -> dict[str, object]:
    """The 8th token is 999, which `meta.json` says cannot be."""
    shards = folder / "shards"
    shards.mkdir()
    np.array([*range(1, 8), 999, 0] * 40, "<u2").tofile(shards / "000.bin")
    meta = {"dtype": "uint16", "end_of_text_id": 0, "vocab_size": 320}
    write(shards / "meta.json", json.dumps(meta))
    tokenizer(320).save(str(shards / "tokenizer.json"))
    return {"data.path": shards}


def large_tokenizer(folder: Path) -> dict[str, object]:
    tokenizer(400).save(str(folder / "tokenizer.json"))
    return {"data.tokenizer": folder / "tokenizer.json"}


BAD_INPUTS = {
    "unknown key": BadInput(lambda _: {"fp8.recipi": "bf16"}, ["--fp8.recipi", "--fp8.recipe"]),
    "unknown key in the file": BadInput(config_file, ["hiden-size", "--model.hidden-size"]),
    "no config file": BadInput(lambda _: {"config": "no.toml"}, ["--config", "no.toml"]),
    "wrong type": BadInput(lambda _: {"run.steps": "many"}, ["--run.steps", "many"]),
    "heads": BadInput(
        lambda _: {"model.num-heads": 4, "model.num-kv-heads": 3},
        ["--model.num-heads=4 must be a multiple of --model.num-kv-heads=3"],
    ),
    "unaligned GEMM": BadInput(
        lambda _: {"model.ffn-size": 72},
        ["--model.ffn-size=72 must be a multiple of 16", "--fp8.recipe bf16"],
    ),
    "warm-up longer than the run": BadInput(
        lambda _: {"optimizer.warmup-steps": 60},
        ["--optimizer.warmup-steps=60 must be less than --run.steps=60"],
    ),
    "no such data": BadInput(lambda f: {"data.path": f / "none"}, ["--data.path", "none"]),
    "empty data": BadInput(empty_folder, ["texts"]),
    "sequence longer than the data": BadInput(
        lambda _: {"data.sequence-length": 2**20, "data.batch-size": 1},
        ["--data.sequence-length=1048576 is longer than the training data"],
    ),
    "token id": BadInput(token_shards, ["000.bin", "999"]),
    "broken JSONL": BadInput(broken_jsonl, ["a.jsonl:2: not a line of JSON"]),
    "no text column": BadInput(parquet_without_text, ["a.parquet", "text", "body"]),
    "tokenizer larger than the vocabulary": BadInput(
        large_tokenizer, ["ids up to 399", "--model.vocab-size=320", "--model.vocab-size 448"]
    ),
    "no other processes": BadInput(
        lambda _: {"mesh.distributed": True}, ["--mesh.distributed=True", "SLURM"]
    ),
    "directory is a file": BadInput(
        lambda f: {"run.directory": write(f / "file", "")}, ["--run.directory", "is not a folder"]
    ),
    "mesh": BadInput(
        lambda _: {"mesh.data": 3}, ["--mesh.data=3", "does not make 1 devices"], True
    ),
    "cuDNN on a CPU": BadInput(
        lambda _: {"model.attention-implementation": "cudnn"},
        ["--model.attention-implementation=cudnn", "Hopper"],
        True,
    ),
    "attention precision": BadInput(
        lambda _: {"model.attention-precision": "fp8", "model.attention-implementation": "cudnn"},
        ["--model.attention-precision=fp8", "Hopper"],
        True,
    ),
}

# Calls main for one command line after the other: {"case": [words]} comes on stdin.
ANSWERS = """
import contextlib, io, json, sys
from train.main import main
answers = {}
for case, arguments in json.load(sys.stdin).items():
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(arguments)
        except SystemExit as error:
            code = error.code
    bridge = sys.modules.get("jax._src.xla_bridge")
    answers[case] = {
        "code": code,
        "out": out.getvalue(),
        "err": err.getvalue(),
        "device": bridge is not None and bridge.backends_are_initialized(),
    }
print(json.dumps(answers))
"""


def answers(commands: dict[str, list[str]]) -> dict[str, dict]:
    done = subprocess.run(
        [sys.executable, "-c", ANSWERS],
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        timeout=180,
        env=environment(None),
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def bad_answers(text, tmp_path_factory) -> dict[str, dict]:
    commands = {}
    for case, bad in BAD_INPUTS.items():
        folder = tmp_path_factory.mktemp("bad")
        commands[case] = make_arguments(folder / "run", text, **bad.options(folder))
    return answers(commands)


def assert_one_message(answer: dict, words: list[str]) -> None:
    assert answer["code"] == 2
    message = " ".join(answer["err"].replace("│", " ").split())
    for word in words:
        assert word in message
    assert "Traceback" not in answer["err"]
    assert answer["err"].count("error: ") <= 1


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input(case, bad_answers):
    assert_one_message(bad_answers[case], BAD_INPUTS[case].words)
    assert bad_answers[case]["device"] is BAD_INPUTS[case].needs_device


@pytest.fixture(scope="module")
def resumed(finished_run, tmp_path_factory) -> dict[str, tuple[Path, dict]]:
    """Copies of the finished run that were started again with something amiss."""
    folder = tmp_path_factory.mktemp("resumed")
    cases = ("config", "in use", "model", "tokenizer")
    directory = {case: shutil.copytree(finished_run.directory, folder / case) for case in cases}
    other = {"run.seed": 1, "optimizer.learning-rate": 0.5, "log.every": 7}
    text = shutil.copytree(finished_run.text, folder / "other" / "text")
    write(text / "more.txt", "quite different words: zebra, quartz, fjord " * 100)
    commands = {
        "config": finished_run.arguments(directory["config"], **other),
        "in use": finished_run.arguments(directory["in use"]),
        "model": finished_run.arguments(directory["model"], **{"model.ffn-size": 96}),
        "tokenizer": make_arguments(directory["tokenizer"], text),
    }
    # The recorded configs agree, as if someone had put them in by hand.
    replace_in(directory["model"] / "config.toml", "ffn_size = 64", "ffn_size = 96")
    replace_in(directory["tokenizer"] / "config.toml", str(finished_run.text), str(text))
    with RunDirectory.open(parse(commands["in use"]), report=lambda _: None):
        given = answers(commands)
    return {case: (directory[case], given[case]) for case in cases}


def replace_in(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_resuming_with_another_config_lists_the_fields(resumed, finished_run):
    directory, answer = resumed["config"]
    words = ["--run.seed: was 0, now 1", "--optimizer.learning-rate: was 0.002, now 0.5"]
    assert_one_message(answer, words)
    assert "--log" not in answer["err"]
    assert not answer["device"]
    config = (finished_run.directory / "config.toml").read_bytes()
    assert (directory / "config.toml").read_bytes() == config


def test_directory_in_use(resumed):
    directory, answer = resumed["in use"]
    assert_one_message(answer, [f"--run.directory={directory} is in use by process "])
    assert not answer["device"]


def test_checkpoint_of_another_model(resumed):
    words = [
        "checkpoint 60 is of another architecture",
        "params.blocks.ffn.down.kernel: checkpoint float32[1, 64, 32], this run float32[1, 96, 32]",
    ]
    assert_one_message(resumed["model"][1], words)


def test_checkpoint_of_another_tokenizer_keeps_its_own(resumed, finished_run):
    directory, answer = resumed["tokenizer"]
    assert_one_message(answer, ["checkpoint 60 was trained with", "tokenizer_hash"])
    tokenizer = (finished_run.directory / "tokenizer.json").read_bytes()
    assert (directory / "tokenizer.json").read_bytes() == tokenizer


@pytest.mark.parametrize("where", ["train.data.cache:_publish", "train.loop:compile_steps"])
def test_interrupted_outside_the_loop(where, text, tmp_path, xla_cache):
    own = {"data.cache-directory": tmp_path / "tokens"}
    arguments = make_arguments(tmp_path / "run", text, **own)
    process = start_signalling(where, 1, signal.SIGINT, arguments, xla_cache)
    code, out, err = finish(process)
    assert (code, err) == (130, "")
    assert out.endswith("\nSIGINT: stopped; run the same command to go on\n")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


ONE_PROCESS_OF_TWO = """
import sys
from train import loop
loop._join_processes = lambda config: (1, 2)
loop.make_mesh = lambda config: sys.exit(0)
from train.main import main
main(sys.argv[1:])
"""


def test_other_processes_are_silent(text, tmp_path):
    own = {"data.cache-directory": tmp_path / "tokens"}
    arguments = make_arguments(tmp_path / "run", text, **own)
    code, out, err = finish(run_python(ONE_PROCESS_OF_TWO, *arguments))
    assert (code, out, err) == (0, "", "")
    assert list((tmp_path / "tokens").iterdir())

"""`python -m train.sample` and `python -m train.report` on a run that was trained."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from saved_runs import quick_compilation, restore
from tokenizers import Tokenizer

from train import report, sample
from train.checkpoint import Checkpointer
from train.config import parse
from train.restore import load_model


@pytest.fixture(scope="module")
def call(tmp_path_factory):
    """Calls the command in this process."""
    with quick_compilation(tmp_path_factory.mktemp("xla_sample")):
        yield lambda *words: sample.main([str(word) for word in words])


@pytest.fixture
def run_copy(finished_run, tmp_path) -> Path:
    return shutil.copytree(finished_run.directory, tmp_path / "run")


def test_greedy_is_deterministic_and_seeds_differ(call, finished_run, capsys):
    def text(*words):
        assert call(finished_run.directory, "--prompt", "the cat", "--tokens", 12, *words) == 0
        out, err = capsys.readouterr()
        assert err == ""
        return out

    greedy = text("--temperature", 0)
    assert greedy == text("--temperature", 0, "--seed", 1)
    sampled = [text("--temperature", 5, "--seed", seed) for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    for continued in (greedy, *sampled):
        assert continued.startswith("the cat")
        assert len(continued) > len("the cat\n")


def test_likeliest_tokens_are_words_of_the_training_text(call, finished_run, capsys):
    text = (finished_run.text / "0.txt").read_text()
    prompt = text[:2000].rpartition(" ")[0]  # far beyond the sequence length
    assert call(finished_run.directory, "--prompt", prompt, "--tokens", 8, "--temperature", 0) == 0
    out = capsys.readouterr().out
    assert out.startswith(prompt)
    added = out.removeprefix(prompt).split()
    assert len(added) >= 4
    assert set(added[:-1]) <= set(text.split())


def test_only_the_weights_are_read(finished_run, monkeypatch):
    read, original = [], Checkpointer._restore_arrays

    def remember(self, folder, leaves):
        read.extend(leaves)
        return original(self, folder, leaves)

    monkeypatch.setattr(Checkpointer, "_restore_arrays", remember)
    model = load_model(finished_run.directory)
    counters = {"step", "applied_steps", "consecutive_skips"}
    assert {name.split(".")[0] for name in read} == {"params", "scaling"} | counters
    state = restore(parse(finished_run.arguments())).state
    for ours, theirs in ((model.params, state.params), (model.scaling, state.scaling)):
        assert_equal(ours, theirs)
    path = finished_run.directory / "tokenizer.json"
    assert model.tokenizer.get_vocab() == Tokenizer.from_file(str(path)).get_vocab()


def assert_equal(ours, theirs):
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert_equal(ours[name], theirs[name])
    elif isinstance(ours, tuple):
        for a, b in zip(ours, theirs, strict=True):
            assert_equal(a, b)
    else:
        np.testing.assert_array_equal(ours, theirs)


def test_damaged_newest_checkpoint_is_passed_over(call, run_copy, capsys):
    os.truncate(run_copy / "checkpoints" / "60" / "meta.json", 5)
    assert call(run_copy, "--tokens", 1) == 0
    out, err = capsys.readouterr()
    assert err.startswith("checkpoint 60 is damaged and not used: ")
    assert out.startswith("def ")


def test_machine_need_not_have_the_kernels_it_was_trained_with(call, run_copy, capsys):
    path = run_copy / "config.toml"
    config, changes = path.read_text(), 0
    for name in ("attention", "norm", "rope", "quantize"):
        before = f'{name}_implementation = "auto"'
        changes += config.count(before)
        config = config.replace(before, f'{name}_implementation = "mosaic"')
    assert changes == 4
    path.write_text(config)
    assert call(run_copy, "--tokens", 1) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", ""], "the prompt '' has no tokens; give at least one character"),
        (["--tokens", "0"], "--tokens=0 must be at least 1"),
        (["--temperature", "-1"], "--temperature=-1.0 must be >= 0 and finite"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_bad_options(words, message, call, finished_run, capsys):
    try:
        code = call(finished_run.directory, *words)
    except SystemExit as error:
        code = error.code
    assert code == 2
    out, err = capsys.readouterr()
    assert message in " ".join(err.replace("│", " ").split())
    assert out == ""


def test_no_such_run(call, tmp_path, capsys):
    assert call(tmp_path / "none") == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'none'}: no such run directory\n"
    assert call(tmp_path) == 2
    message = f"error: {tmp_path} is no run directory: it has no config.toml\n"
    assert capsys.readouterr().err == message


def test_run_without_checkpoint(call, run_copy, capsys):
    shutil.rmtree(run_copy / "checkpoints")
    assert call(run_copy) == 2
    assert capsys.readouterr().err == f"error: {run_copy} has no checkpoint yet; train it first\n"


def test_run_without_tokenizer(call, run_copy, capsys):
    (run_copy / "tokenizer.json").unlink()
    assert call(run_copy) == 2
    assert "tokenizer.json" in capsys.readouterr().err


def test_report(finished_run, tmp_path, capsys):
    picture = tmp_path / "loss.png"
    assert report.main([str(finished_run.directory), "--output", str(picture)]) == 0
    assert picture.read_bytes()[:4] == b"\x89PNG"
    out = capsys.readouterr().out
    assert finished_run.directory.name in out
    assert f"loss curves: {picture}" in out

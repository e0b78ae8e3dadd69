"""Comparisons of tiny runs: what is trained, the verdict, deadlines, and going on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from run_cases import OPTIONS, environment, records, wait_for

from train.config import ConfigError
from train.parity import ParityConfig, differences, main, make_arms

STEPS = 12
CONFIGS = Path(__file__).parent.parent.parent / "configs"


@pytest.fixture
def configs(tmp_path) -> list[str]:
    """A bf16 and a delayed config; as arguments."""
    words = []
    for recipe in ("bf16", "delayed"):
        path = tmp_path / f"{recipe}.toml"
        path.write_text(f'[fp8]\nrecipe = "{recipe}"\n')
        words += ["--config", str(path)]
    return words


def command(configs, output, text, *options: str) -> list[str]:
    table = {
        **OPTIONS,
        "run.steps": STEPS,
        "checkpoint.every": 4,
        "log.validate-every": 6,
        "log.sample-tokens": 0,
        "data.path": text,
        "data.cache-directory": text.parent / "tokens",
    }
    shared = [word for name, value in table.items() for word in (f"--{name}", str(value))]
    return [*configs, "--output", str(output), *options, *shared]


def start(arguments, xla_cache) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "train.parity", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(xla_cache),
    )


def finish(process) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=600)
    finally:
        process.kill()
    return process.returncode, out, err


def test_comparison_interrupted_and_finished(configs, tmp_path, text, xla_cache):
    """SIGTERM in the second arm, then the same command; then with nothing left to do."""
    output = tmp_path / "parity"
    arguments = command(configs, output, text)
    process = start(arguments, xla_cache)
    wait_for(lambda: any(r["step"] >= 2 for r in records(output / "delayed", "train")), process)
    process.send_signal(signal.SIGTERM)
    code, out, err = finish(process)
    assert (code, err) == (128 + signal.SIGTERM, "")
    assert "delayed: asked to save and stop\n" in out
    assert "arm 3 of 3, bf16_seed1: not started; run the same command to go on\n" in out
    assert out.endswith("\nverdict: incomplete\n")
    partial = json.loads((output / "parity.json").read_text())
    assert [arm["is_complete"] for arm in partial["arms"]] == [True, False, False]
    assert [arm.get("verdict") for arm in partial["arms"]] == [None, "incomplete", "incomplete"]
    assert (output / "parity.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"

    code, out, err = finish(start(arguments, xla_cache))
    assert (code, err) == (0, "")
    assert "arm 1 of 3, bf16: already trained\n" in out
    assert "resumed from the checkpoint of step " in out
    result = json.loads((output / "parity.json").read_text())
    assert result["verdict"] == "pass"
    _, delayed, seed1 = result["arms"]
    assert delayed["differs_in"] == {"fp8.recipe": ["bf16", "delayed"]}
    assert seed1["differs_in"] == {"run.seed": [0, 1]}
    assert all(arm["steps"] == STEPS and len(arm["curve"]["tokens"]) for arm in result["arms"])
    # Hand arithmetic: of 12 steps the tokens after the first 10.8 are those of the last two.
    losses = {
        arm: sum(r["loss_nats"] for r in records(output / arm, "train")[-2:]) / 2
        for arm in ("bf16", "delayed")
    }
    gap = delayed["train_gap"]
    assert gap["loss_nats"] == pytest.approx(losses["delayed"], rel=1e-12)
    assert gap["relative"] == pytest.approx(losses["delayed"] / losses["bf16"] - 1)
    # The arms saw the same batches with the same initial weights, the band other weights.
    first = {arm: records(output / arm, "train")[0] for arm in ("bf16", "delayed", "bf16_seed1")}
    assert first["delayed"]["loss_nats"] == pytest.approx(first["bf16"]["loss_nats"], rel=2e-3)
    assert first["bf16_seed1"]["loss_nats"] != first["bf16"]["loss_nats"]

    before = (output / "parity.json").read_bytes()
    code, out, _ = finish(start(arguments, xla_cache))
    assert (code, out.count("already trained")) == (0, 3)
    assert (output / "parity.json").read_bytes() == before
    # A finished run of another experiment does not pass for this one.
    code, _, err = finish(start([*arguments, "--optimizer.learning-rate", "0.1"], xla_cache))
    assert code == 2
    assert "--optimizer.learning-rate: was 0.002, now 0.1" in err


def test_deadline_stops_in_time(configs, tmp_path, text, xla_cache):
    output = tmp_path / "parity"
    slow = ("--run.steps", "100000", "--deadline-s", "8", "--save-s", "4")
    arguments = [*command(configs, output, text), *slow]
    begin = time.monotonic()
    code, out, err = finish(start(arguments, xla_cache))
    assert (code, err) == (3, "")
    # Twice as long, for a loaded machine that takes its time to import.
    assert time.monotonic() - begin < 60
    assert "bf16: asked to save and stop\n" in out
    assert "run the same command to go on\n" in out
    assert "arm 2 of 3, delayed: not started; run the same command to go on\n" in out
    assert json.loads((output / "parity.json").read_text())["verdict"] == "incomplete"


def test_arms_differ_in_the_recipe_and_band_in_the_initial_weights_alone():
    paths = tuple(CONFIGS / f"llama_350m_{recipe}.toml" for recipe in ("bf16", "fp8"))
    arms = make_arms(ParityConfig(config=paths, seeds=3, seed=7), ["--run.steps", "500"])
    names = ["llama_350m_bf16", "llama_350m_fp8", "llama_350m_bf16_seed8", "llama_350m_bf16_seed9"]
    assert [arm.name for arm in arms] == names
    assert {(arm.config.order_seed, arm.config.run.steps) for arm in arms} == {(7, 500)}
    differing = [[n for n, _, _ in differences(arms[0].config, arm.config)] for arm in arms]
    assert differing == [[], ["fp8.recipe"], ["run.seed"], ["run.seed"]]
    assert str(arms[1].directory) == "runs/parity/llama_350m_fp8"


@pytest.mark.parametrize(
    ("changes", "overrides", "message"),
    [
        ({}, ["--run.seed", "3"], "--run.seed is set by train.parity"),
        ({}, ["--run.directory=x"], "--run.directory is set by train.parity"),
        ({"names": ("a", "a")}, [], "must differ"),
        ({"second": "[data]\nbatch_size = 32\n"}, [], "--data.batch-size: 16 and 32"),
        ({"second": "[run]\nsteps = 400\n"}, [], "--run.steps: 300 and 400"),
    ],
)
def test_refuses_what_cannot_be_compared(changes, overrides, message, tmp_path):
    paths = []
    for folder, name in zip(("x", "y"), changes.get("names", ("a", "b")), strict=True):
        (tmp_path / folder).mkdir()
        paths.append(tmp_path / folder / f"{name}.toml")
        paths[-1].write_text(changes.get("second", "") if folder == "y" else "")
    with pytest.raises(ConfigError, match=message):
        make_arms(ParityConfig(config=tuple(paths)), overrides)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--config", "a.toml"], "--config was given 1 times"),
        (["--config", "a.toml", "--config", "b.toml", "--seeds", "0"], "--seeds=0"),
        (
            ["--config", "a.toml", "--config", "b.toml", "--deadline-s", "5"],
            "--save-s=60 must be positive and below --deadline-s=5",
        ),
    ],
)
def test_bad_options(options, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(options) == 2
    assert message in capsys.readouterr().err
    assert os.listdir(tmp_path) == []

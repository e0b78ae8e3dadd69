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
from test_report import write_run

from train.config import ConfigError
from train.parity import ParityConfig, differences, main, make_arms
from train.toml_text import to_toml

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
    arguments = command(configs, output, text, "--seeds", "2", "--arm-seeds", "1")
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
    assert [row["verdict"] for row in partial["comparisons"]] == ["incomplete"]
    assert (output / "parity.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"

    code, out, err = finish(start(arguments, xla_cache))
    assert err == ""
    assert "arm 1 of 3, bf16: already trained\n" in out
    assert "resumed from the checkpoint of step " in out
    result = json.loads((output / "parity.json").read_text())
    _, delayed, seed1 = result["arms"]
    (comparison,) = result["comparisons"]
    assert (comparison["name"], comparison["seeds"]) == ("delayed", [0])
    assert delayed["differs_in"] == {"fp8.recipe": ["bf16", "delayed"]}
    assert seed1["differs_in"] == {"run.seed": [0, 1]}
    assert all(arm["steps"] == STEPS and len(arm["curve"]["tokens"]) for arm in result["arms"])
    # Hand arithmetic: of 12 steps the tokens after the first 10.8 are those of the last two.
    losses = {
        arm: sum(r["loss_nats"] for r in records(output / arm, "train")[-2:]) / 2
        for arm in ("bf16", "delayed", "bf16_seed1")
    }
    gap = comparison["train_gap"]
    assert gap["noise_nats"] == pytest.approx(6.314 * abs(losses["bf16"] - losses["bf16_seed1"]))
    assert delayed["train_gap"]["nats"] == gap["nats"] == gap["per_seed_nats"][0]
    verdict = result["verdict"]
    assert code == {"pass": 0, "inconclusive": 4}[verdict]
    assert verdict == comparison["verdict"]
    assert gap["loss_nats"] == pytest.approx(losses["delayed"], rel=1e-12)
    assert gap["relative"] == pytest.approx(losses["delayed"] / losses["bf16"] - 1)
    # The arms saw the same batches with the same initial weights, the band other weights.
    first = {arm: records(output / arm, "train")[0] for arm in ("bf16", "delayed", "bf16_seed1")}
    assert first["delayed"]["loss_nats"] == pytest.approx(first["bf16"]["loss_nats"], rel=2e-3)
    assert first["bf16_seed1"]["loss_nats"] != first["bf16"]["loss_nats"]

    before = (output / "parity.json").read_bytes()
    code, out, _ = finish(start(arguments, xla_cache))
    assert out.count("already trained") == 3
    assert code == {"pass": 0, "inconclusive": 4}[verdict]
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
    assert "arm 2 of 6, delayed: not started; run the same command to go on\n" in out
    assert json.loads((output / "parity.json").read_text())["verdict"] == "incomplete"


def finished_arms(options, losses) -> list[str]:
    """Writes the run directories of a comparison of 20 steps; its arguments."""
    overrides = ["--run.steps", "20", "--optimizer.warmup-steps", "2"]
    for arm in make_arms(options, overrides):
        loss = losses[arm.name]
        arm.directory.parent.mkdir(exist_ok=True)
        write_run(
            arm.directory, [8.0] + [loss] * 19, validation={20: loss}, grad_norm=[1.5] + [1.0] * 19
        )
        (arm.directory / "config.toml").write_text(to_toml(arm.config))
        (arm.directory / "tokenizer.json").write_text("{}")
    words = [word for path in options.config for word in ("--config", str(path))]
    for name in ("output", "seeds", "arm_seeds", "repeats"):
        words += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    return [*words, *overrides]


LOSSES = {
    "bf16": 4.0, "bf16_seed1": 4.3, "bf16_seed2": 4.1,
    "delayed": 4.001, "delayed_seed1": 4.303, "delayed_seed2": 4.102,
}  # fmt: skip


def test_finished_arms_of_three_seeds(configs, tmp_path, capsys):
    """The seeds are 0.3 nats apart, but each pair agrees to 0.002: a pass, by hand arithmetic."""
    paths = tuple(map(Path, configs[1::2]))
    options = ParityConfig(config=paths, output=tmp_path / "parity")
    arguments = finished_arms(options, LOSSES)
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3].startswith(
        "  delayed (seeds 0, 1, 2): train 4.1353 (+0.048% +- 0.041%, +0.0020 nats); validation"
    )
    assert lines[-2] == (
        "    pass: train: gap 0.0020 nats, noise 0.0017 <= tolerance 0.0103;"
        " validation: gap 0.0020 nats, noise 0.0017 <= tolerance 0.0103"
    )
    assert lines[-1] == "verdict: pass"
    result = json.loads((tmp_path / "parity" / "parity.json").read_text())
    (comparison,) = result["comparisons"]
    assert comparison["seeds"] == [0, 1, 2]
    assert comparison["validation_gap"]["noise_nats"] == pytest.approx(2.920 * 0.001 / 3**0.5)
    pairs = {arm["name"]: arm.get("compared_with") for arm in result["arms"]}
    assert pairs["delayed_seed2"] == "bf16_seed2"
    assert pairs["bf16_seed2"] == "bf16"
    assert (tmp_path / "parity" / "parity.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize(
    ("changes", "options", "code", "reason"),
    [
        # Differences .001, .003 and .032: mean .012, variance 3.01e-4, noise .0292.
        ({"delayed_seed2": 4.132}, {}, 4, "noise 0.0292 nats > tolerance 0.0103"),
        # All .1 above: no noise, and a gap ten times the tolerance.
        ({"delayed": 4.1, "delayed_seed1": 4.4, "delayed_seed2": 4.2}, {}, 1, "gap 0.1000 nats >"),
        # One seed: twice the variance of the reference's, 2.3333e-2, is the noise.
        ({}, {"arm_seeds": 1}, 4, "noise 0.6308 nats > tolerance 0.0100"),
        ({}, {"seeds": 1}, 4, "the noise is not known from one seed"),
        # Differences' variance 1e-6, and twice 5e-5 from the repeat: (2e-6 + 1e-4) / 3.
        ({"bf16_repeat1": 4.01}, {"repeats": 1}, 0, "noise 0.0079 <= tolerance 0.0103"),
    ],
)
def test_verdicts_of_finished_arms(changes, options, code, reason, configs, tmp_path, capsys):
    paths = tuple(map(Path, configs[1::2]))
    chosen = ParityConfig(config=paths, output=tmp_path / "parity", **options)
    assert main(finished_arms(chosen, LOSSES | changes)) == code
    assert reason in capsys.readouterr().out.splitlines()[-2]


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("metrics.jsonl", '"grad_norm": 1.5', '"grad_norm": 14.0', "grad_norm at step 1: 1.5000"),
        ("metrics.jsonl", '"loss_nats": 8.0', '"loss_nats": 8.2', "loss_nats at step 1: 8.0000"),
        ("tokenizer.json", "{}", '{"a": 1}', "tokenizer.json is another one"),
    ],
)
def test_refuses_a_finished_arm_that_began_otherwise(
    name, old, new, message, configs, tmp_path, capsys
):
    options = ParityConfig(config=tuple(map(Path, configs[1::2])), output=tmp_path / "parity")
    arguments = finished_arms(options, LOSSES)
    file = tmp_path / "parity" / "delayed_seed1" / name
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert f"delayed_seed1 did not begin like {tmp_path / 'parity' / 'bf16'}:" in error
    assert message in error


def test_arms_in_order_and_what_they_differ_in():
    paths = tuple(CONFIGS / f"llama_350m_{recipe}.toml" for recipe in ("bf16", "fp8"))
    options = ParityConfig(config=paths, seeds=3, arm_seeds=2, repeats=1, seed=7)
    arms = make_arms(options, ["--run.steps", "500"])
    assert [arm.name for arm in arms] == [
        "llama_350m_bf16",
        "llama_350m_fp8",
        "llama_350m_bf16_seed8",
        "llama_350m_fp8_seed8",
        "llama_350m_bf16_seed9",
        "llama_350m_bf16_repeat1",
    ]
    assert {(arm.config.order_seed, arm.config.run.steps) for arm in arms} == {(7, 500)}
    differing = [[n for n, _, _ in differences(arms[0].config, arm.config)] for arm in arms]
    seed, recipe = "run.seed", "fp8.recipe"
    assert differing == [[], [recipe], [seed], [seed, recipe], [seed], []]
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
            ["--config", "a.toml", "--config", "b.toml", "--seeds", "2", "--arm-seeds", "3"],
            "--arm-seeds=3 must be in [0, 2]",
        ),
        (["--config", "a.toml", "--config", "b.toml", "--repeats", "-1"], "--repeats=-1"),
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

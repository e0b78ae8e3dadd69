"""The trainer's options: parsing, defaults, and an error for every bad value."""

import dataclasses
import tomllib
from pathlib import Path

import pytest

from train.config import TrainConfig, parse
from train.toml_text import flatten, to_toml

CONFIGS = Path(__file__).parent.parent.parent / "configs"

# Scripts rely on these names.
STABLE_OPTIONS = (
    ("--run.directory", "somewhere"),
    ("--run.steps", "7"),
    ("--run.seed", "3"),
    ("--checkpoint.every", "5"),
    ("--fp8.recipe", "current"),
    ("--model.attention-precision", "fp8"),
    ("--data.path", "a.txt"),
)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda p: p.stem)
def test_every_shipped_config_parses(path):
    config = parse(["--config", str(path)])
    assert config.run.name == path.stem
    assert config.run.directory == f"runs/{path.stem}"


@pytest.mark.parametrize("stem", ["llama_125m", "llama_350m", "llama_1b", "llama_8b_slice"])
def test_bf16_and_fp8_config_differ_in_the_fp8_table_alone(stem):
    recipes = {"bf16": "bf16", "fp8": "delayed", "current": "current"}
    paths = {recipe: CONFIGS / f"{stem}_{name}.toml" for name, recipe in recipes.items()}
    tables = {r: tomllib.loads(p.read_text()) for r, p in paths.items() if p.exists()}
    assert {"bf16", "delayed"} <= tables.keys()
    for recipe, table in tables.items():
        assert table.pop("fp8")["recipe"] == recipe
        assert table == {k: v for k, v in tables["bf16"].items() if k != "fp8"}


def test_no_arguments_is_the_tiny_config():
    assert parse([]) == parse(["--config", str(CONFIGS / "tiny_cpu.toml")])


@pytest.mark.parametrize(("option", "value"), STABLE_OPTIONS)
def test_stable_option_names(option, value):
    config = parse([option, value])
    section, name = option.removeprefix("--").split(".")
    got = getattr(getattr(config, section), name.replace("-", "_"))
    assert got == ((value,) if name == "path" else type(got)(value))


def test_later_value_wins_over_the_file(tmp_path):
    file = tmp_path / "x.toml"
    file.write_text("[run]\nsteps = 5\nseed = 4\n")
    config = parse(["--config", str(file), "--run.steps", "9"])
    assert (config.run.steps, config.run.seed, config.run.name) == (9, 4, "x")


def test_flatten_nested_tables_and_lists():
    table = {"fp8": {"margin": -1}, "data": {"path": ["a", "b"], "document_mask": False}}
    assert list(flatten(table)) == [
        *("--fp8.margin", "-1", "--data.path", "a", "b", "--data.document-mask", "False"),
    ]


@pytest.mark.parametrize("value", ["false", "False"])
@pytest.mark.parametrize("form", ["{} {}", "{}={}"])
def test_booleans_in_both_spellings(form, value):
    config = parse(form.format("--data.document-mask", value).split())
    assert config.data.document_mask is False
    # A text of that spelling stays as it is.
    assert parse(["--run.name", "true"]).run.name == "true"


def test_text_in_a_file_cannot_become_an_option(tmp_path, capsys):
    file = tmp_path / "x.toml"
    file.write_text('[data]\npath = ["a", "--run.steps", "7"]\n')
    with pytest.raises(SystemExit):
        parse(["--config", str(file)])
    assert "data.path = '--run.steps' must not begin with --" in capsys.readouterr().err


@pytest.mark.parametrize("argument", [b"a\xffb".decode("utf-8", "surrogateescape"), "a\0b"])
def test_argument_that_is_no_text(argument, capsys):
    with pytest.raises(SystemExit):
        parse(["--data.path", argument])
    assert "is not text in UTF-8" in capsys.readouterr().err


def test_resolved_config_survives_the_round_trip(tmp_path):
    text = 'a "b"\\c\n\t\b\x1f\x7f\u2028é😀'
    config = parse(["--fp8.margin", "-2", "--data.path", text, "d", "--fp8.skip-layers", "*.down"])
    assert config.data.path == (text, "d")
    file = tmp_path / "config.toml"
    file.write_text(to_toml(config))
    assert parse(["--config", str(file)]) == config


BAD = [
    (["--fp8.recip", "delayed"], "--fp8.recipe"),
    (["--run.stepz", "3"], "--run.steps"),
    (["--run.steps", "many"], "run.steps"),
    (["--run.steps", "0"], "at least 1"),
    (["--fp8.recipe", "fp4"], "delayed"),
    (["--model.num-heads", "6", "--model.num-kv-heads", "4"], "multiple of"),
    (["--model.hidden-size", "130"], "--model.hidden-size=130"),
    (["--model.embedding-multiplier", "-1"], "--model.embedding-multiplier=-1.0 must be positive"),
    (["--model.embedding-multiplier", "nan"], "--model.embedding-multiplier=nan must be positive"),
    (["--model.head-dim", "33"], "even"),
    (["--model.ffn-size", "200"], "--fp8.recipe bf16"),
    (["--model.head-dim", "6", "--model.num-kv-heads", "1"], "multiple of 16"),
    (["--data.sequence-length", "7", "--data.batch-size", "3"], "multiple of 16"),
    (["--optimizer.accumulation-steps", "3"], "--optimizer.accumulation-steps=3"),
    (["--optimizer.learning-rate", "nan"], "positive and finite"),
    (["--optimizer.beta2", "1"], "[0, 1)"),
    (["--data.validation-fraction", "1.5"], "validation-fraction"),
    (["--mesh.data", "-1", "--mesh.fsdp", "-1"], "only one"),
    (["--checkpoint.keep", "0"], "checkpoint.keep"),
    (["--log.every", "0"], "log.every"),
    (["--config", "no/such/file.toml"], "no/such/file.toml"),
    (["--config"], "path of a TOML file"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=lambda x: " ".join(x)[:50])
def test_bad_value_is_a_clear_error(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        parse(arguments)
    assert error.value.code == 2
    captured = capsys.readouterr()
    printed = " ".join((captured.err + captured.out).replace("│", " ").split())
    assert message in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[fp8]\nrecip = 'delayed'\n", "--fp8.recipe"),
        ("[run]\nsteps = 'x'\n", "run.steps"),
        ("[run\n", "--config"),
        ("[optimiser]\nbeta1 = 0.5\n", "--optimizer.beta1"),
    ],
)
def test_bad_file_is_a_clear_error(text, message, tmp_path, capsys):
    file = tmp_path / "bad.toml"
    file.write_text(text)
    with pytest.raises(SystemExit):
        parse(["--config", str(file)])
    captured = capsys.readouterr()
    assert message in captured.err + captured.out


def test_alignment_is_not_asked_of_bf16():
    config = parse(["--fp8.recipe", "bf16", "--model.ffn-size", "200"])
    assert config.model.ffn_size == 200


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().run.steps = 3  # pyrefly: ignore

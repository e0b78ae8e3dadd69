"""Whatever a config or a data file holds, the answer is a result or one of our own errors.

`python -m pytest -m campaign tests/train/test_fuzz.py` tries more than 10,000 cases and writes
their number to `benchmarks/results/`; here is a slice of it.
"""

import contextlib
import dataclasses
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_origin

import hypothesis
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.config import ConfigError, DataConfig, TrainConfig, parse
from train.data import DataError
from train.data.cache import open_cache
from train.data.sources import find_files, read_documents
from train.data.tokenizer import load_tokenizer
from train.manifest import DamageError, Manifest
from train.metrics import MetricsError, read_metrics
from train.optimizer import make_optimizer
from train.toml_text import to_toml

OUR_ERRORS = (ConfigError, DataError, DamageError, MetricsError)
RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "fuzz_cpu.json"
SECTIONS = {field.name: field.type for field in dataclasses.fields(TrainConfig)}

INTEGERS = st.one_of(st.integers(-5, 200), st.sampled_from([2**31 - 1, 2**31, 2**63, -(2**40)]))
FLOATS = st.one_of(st.floats(), st.floats(0, 2), st.sampled_from([0.0, 1e-300, 1e300]))
TEXT = st.text(max_size=12)


def value_of(kind: Any) -> st.SearchStrategy:
    """Values of a field: mostly of its type, often not sensible."""
    if kind is bool:
        return st.booleans()
    if kind is int:
        return INTEGERS
    if kind is float:
        return st.one_of(FLOATS, INTEGERS)
    if kind is str:
        return TEXT
    if get_origin(kind) is tuple:
        return st.lists(TEXT, max_size=3).map(tuple)
    choices = st.sampled_from(get_args(getattr(kind, "__value__", kind)))
    return st.one_of(choices, choices, TEXT)


OPTIONS = {
    (section, field.name): value_of(field.type)
    for section, kind in SECTIONS.items()
    for field in dataclasses.fields(kind)
}
OPTION = st.sampled_from(sorted(OPTIONS)).flatmap(
    lambda name: st.tuples(st.just(name), st.one_of(OPTIONS[name], OPTIONS[name], TEXT))
)


def check_config(config: TrainConfig) -> None:
    """What every start does with a config before it touches data or a device."""
    with contextlib.suppress(ConfigError):
        make_optimizer(config.optimizer, config.run.steps)
    # What was run can be run again.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.toml"
        path.write_text(to_toml(config))
        again = parse(["--config", str(path)])
        for section in SECTIONS:
            ours, theirs = (getattr(c, section) for c in (config, again))
            for field in dataclasses.fields(ours):
                a, b = getattr(ours, field.name), getattr(theirs, field.name)
                both_nan = a != a and b != b
                assert a == b or both_nan, (section, field.name, a, b)


def sections_case() -> st.SearchStrategy:
    def fields(kind):
        table = {f.name: value_of(f.type) for f in dataclasses.fields(kind)}
        return st.fixed_dictionaries({}, optional=table)

    return st.sampled_from(sorted(SECTIONS)).flatmap(
        lambda name: st.tuples(st.just(name), fields(SECTIONS[name]))
    )


def try_section(case) -> None:
    name, values = case
    with contextlib.suppress(ConfigError):
        TrainConfig(**{name: SECTIONS[name](**values)})


def try_command_line(words) -> None:
    arguments = []
    for (section, field), value in words:
        values = value if isinstance(value, tuple) else (value,)
        arguments += [f"--{section}.{field}".replace("_", "-"), *map(str, values)]
    config = quietly_parse(arguments)
    if config:
        check_config(config)


def try_file(content: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.toml"
        path.write_bytes(content.encode("utf-8", "surrogatepass"))
        config = quietly_parse(["--config", str(path)])
    if config:
        check_config(config)


def quietly_parse(arguments: list[str]) -> TrainConfig | None:
    err, out = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(out):
        try:
            return parse(arguments)
        except SystemExit as error:
            # 0 is --help; a refusal says why.
            assert error.code == 0 or err.getvalue() or out.getvalue()
            return None


def toml_text() -> st.SearchStrategy:
    def line(item):
        (section, field), value = item
        shown = list(value) if isinstance(value, tuple) else value
        text = json.dumps(shown).replace("NaN", "nan").replace("Infinity", "inf")
        return f"[{section}]\n{field} = {text}\n"

    return st.one_of(
        st.lists(OPTION.map(line), max_size=4).map("".join),
        st.text(max_size=60),
        st.lists(OPTION.map(line), min_size=1, max_size=2)
        .map("".join)
        .flatmap(lambda text: st.integers(0, len(text)).map(lambda n: text[:n] + "]" + text[n:])),
    )


# Files of data.

JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)
BYTES = st.binary(max_size=200)


def lines_of_json() -> st.SearchStrategy:
    record = st.one_of(JSON, st.fixed_dictionaries({"text": st.one_of(st.text(), JSON)}))
    lines = st.lists(record.map(json.dumps), max_size=5).map("\n".join).map(str.encode)
    return st.one_of(lines, BYTES, st.tuples(lines, BYTES).map(b"".join))


def parquet_bytes() -> st.SearchStrategy:
    def write(table: dict) -> bytes:
        buffer = io.BytesIO()
        pq.write_table(pa.table(table), buffer)
        return buffer.getvalue()

    column = st.one_of(
        st.lists(st.one_of(st.none(), st.text(max_size=5)), min_size=2, max_size=2),
        st.lists(st.integers(-9, 9), min_size=2, max_size=2),
    )
    names = st.sampled_from(["text", "other"])
    whole = st.dictionaries(names, column, min_size=1).map(write)
    return st.one_of(whole, damaged(whole), BYTES)


def damaged(content: st.SearchStrategy) -> st.SearchStrategy:
    def damage(case):
        data, place, what = case
        place = place % len(data)
        return data[:place] + what + data[place + len(what) :]

    return st.tuples(content, st.integers(0, 2**16), st.binary(max_size=3)).map(damage)


META = {"dtype": "uint16", "end_of_text_id": 0, "vocab_size": 300}
FILE = st.one_of(
    st.tuples(st.just("a.txt"), st.one_of(BYTES, st.text().map(str.encode))),
    st.tuples(st.just("a.jsonl"), lines_of_json()),
    st.tuples(st.just("a.parquet"), parquet_bytes()),
    st.tuples(st.just("a.bin"), BYTES),
    st.tuples(st.text(max_size=5).map(lambda s: s.replace("/", "_").replace("\0", "")), BYTES),
)
SHARD_META = st.one_of(
    st.just(json.dumps(META).encode()),
    st.fixed_dictionaries({name: JSON for name in META}).map(lambda x: json.dumps(x).encode()),
    JSON.map(lambda x: json.dumps(x).encode()),
    BYTES,
)


def try_data_file(case) -> None:
    (name, content), meta, column, kind = case
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "meta.json").write_bytes(meta)
        with contextlib.suppress(OSError, ValueError):  # not a name for a file
            (Path(folder) / name).write_bytes(content)
        config = DataConfig(path=(folder,), text_column=column, format=kind)
        with contextlib.suppress(*OUR_ERRORS):
            for file in find_files(config):
                for document in read_documents(file, column):
                    assert document is None or document.where


def try_cache(case) -> None:
    files, fraction, limit = case
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text"
        text.mkdir()
        for index, (name, content) in enumerate(files):
            (text / f"{index}{Path(name).suffix or '.txt'}").write_bytes(content)
        config = DataConfig(
            path=(str(text),),
            validation_fraction=fraction,
            max_bytes=limit,
            cache_directory=str(Path(folder) / "cache"),
        )
        with contextlib.suppress(*OUR_ERRORS):
            cache = open_cache(config, 300, lambda line: None)
            assert len(cache.train.tokens) + len(cache.validation.tokens) > 0


def try_json_files(case) -> None:
    """The small files that are read back: tokenizer, manifest, metrics."""
    content, which = case
    with tempfile.TemporaryDirectory() as folder:
        name = {"tokenizer": "tokenizer.json", "manifest": "manifest.json"}.get(which)
        path = Path(folder) / (name or "metrics.jsonl")
        path.write_bytes(content)
        with contextlib.suppress(*OUR_ERRORS):
            if which == "tokenizer":
                load_tokenizer(path)
            elif which == "manifest":
                Manifest.read(Path(folder)).verify(Path(folder), with_checksums=True)
            else:
                read_metrics(Path(folder))


def json_files() -> st.SearchStrategy:
    parts = st.fixed_dictionaries(
        {"model": JSON, "version": JSON}, optional={"added_tokens": JSON, "decoder": JSON}
    )
    manifest = st.fixed_dictionaries(
        {"format": JSON, "step": JSON, "validation_loss": JSON, "files": JSON, "sha256": JSON}
    )
    metrics = st.lists(
        st.fixed_dictionaries(
            {"kind": st.sampled_from(["train", "event"]), "step": st.one_of(INTEGERS, JSON)}
        ),
        max_size=3,
    )
    text = st.one_of(
        JSON.map(json.dumps),
        parts.map(json.dumps),
        manifest.map(json.dumps),
        metrics.map(lambda rows: "\n".join(map(json.dumps, rows))),
    ).map(str.encode)
    kinds = st.sampled_from(["tokenizer", "manifest", "metrics"])
    return st.tuples(st.one_of(text, BYTES), kinds)


# What is tried, and how often: here, and in the campaign.
TARGETS: dict[str, tuple[Callable, st.SearchStrategy, int, int]] = {
    "sections of a config": (try_section, sections_case(), 300, 4000),
    "command lines": (try_command_line, st.lists(OPTION, max_size=4), 40, 1500),
    "config files": (try_file, toml_text(), 40, 1500),
    "data files": (
        try_data_file,
        st.tuples(
            FILE,
            SHARD_META,
            st.sampled_from(["text", "", "other"]),
            st.sampled_from(get_args(DataConfig.__dataclass_fields__["format"].type)),
        ),
        200,
        3000,
    ),
    "token caches": (
        try_cache,
        st.tuples(
            st.lists(FILE, min_size=1, max_size=3),
            st.floats(0, 0.89),
            st.sampled_from([0, 1, 50]),
        ),
        15,
        400,
    ),
    "small files of a run": (try_json_files, json_files(), 200, 3000),
}


def fuzz(target: str, count: int) -> int:
    """Tries `count` cases; returns how many were."""
    check, cases, *_ = TARGETS[target]
    tried = 0

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @given(cases)
    def one(case):
        nonlocal tried
        tried += 1
        check(case)

    one()
    return tried


@pytest.mark.parametrize("target", TARGETS)
def test_a_slice_of_the_cases(target):
    assert fuzz(target, TARGETS[target][2]) > 0


@pytest.mark.campaign
def test_ten_thousand_cases():
    counts = {target: fuzz(target, TARGETS[target][3]) for target in TARGETS}
    assert sum(counts.values()) >= 10_000
    result = {
        "hypothesis": hypothesis.__version__,
        "cases": counts,
        "total": sum(counts.values()),
        "errors_that_are_not_ours": 0,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")

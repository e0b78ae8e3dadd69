"""Batches end to end: by hand, their order, resuming, processes, validation and what is refused."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from train.data import DataError, build_dataset
from train.data.tokenizer import load_tokenizer, tokenizer_hash

DOCS = Path(__file__).parents[3] / "docs" / "data.md"

LEAVE_WITHOUT_CLOSING = """
import os, pickle, sys, warnings
from train.config import DataConfig, Fp8Config, LogConfig, ModelConfig, TrainConfig
from train.data import build_dataset

warnings.simplefilter("ignore", DeprecationWarning)  # fork with threads is what is tried here
dataset = build_dataset(
    TrainConfig(
        model=ModelConfig(vocab_size=300),
        fp8=Fp8Config(recipe="bf16"),
        data=DataConfig(
            path=(sys.argv[1],), sequence_length=4, batch_size=2, validation_fraction=0.0,
            cache_directory=sys.argv[2],
        ),
        log=LogConfig(validate_every=0),
    )
)
batches = dataset.train_iterator()
next(batches)
reading, writing = os.pipe()
child = os.fork()
# More batches than are prepared ahead: the child cannot live on what it inherited.
batch = b"".join(next(batches)["tokens"].tobytes() for _ in range(20))
if child == 0:
    os.write(writing, batch)
    os._exit(0)
assert os.read(reading, len(batch)) == batch
assert os.waitpid(child, 0)[1] == 0
print("done", flush=True)
"""


@pytest.fixture
def numbered(write_shard):
    """81 tokens: 1, 2, ... 79 with documents that end after 20 and after the last one."""
    return write_shard([*range(1, 21), 0, *range(21, 80), 0])


@pytest.fixture
def build(make_config):
    def make(path, *, process_index=0, process_count=1, **options):
        config = make_config(path=(str(path),), **options)
        return build_dataset(
            config, process_index=process_index, process_count=process_count, log=lambda line: None
        )

    return make


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def first_tokens(batches):
    """The first token of each row tells which sequence it is."""
    return [batch["tokens"][:, 0].tolist() for batch in batches]


def assert_same(batches, expected):
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        assert batch.keys() == other.keys()
        for name in batch:
            assert batch[name].dtype == other[name].dtype
            np.testing.assert_array_equal(batch[name], other[name])


def test_one_batch_by_hand(build, write_shard):
    dataset = build(write_shard([1, 2, 3, 0, 4, 5, 0, 6, 7, 8, 9, 0]), shuffle=False)
    batch = next(dataset.train_iterator())
    expected = {
        "tokens": [[1, 2, 3, 0], [4, 5, 0, 6]],
        "targets": [[2, 3, 0, 4], [5, 0, 6, 7]],
        "segment_ids": [[1, 1, 1, 1], [1, 1, 1, 2]],
        "positions": [[0, 1, 2, 3], [0, 1, 2, 0]],
        "loss_weights": [[1, 1, 1, 0], [1, 1, 0, 1]],
    }
    assert {name: values.tolist() for name, values in batch.items()} == expected
    assert [batch[name].dtype.name for name in expected] == ["int32"] * 4 + ["float32"]


def test_document_mask_off_reaches_the_batch(build, numbered):
    batch = next(build(numbered, document_mask=False).train_iterator())
    np.testing.assert_array_equal(batch["positions"], [[0, 1, 2, 3]] * 2)
    np.testing.assert_array_equal(batch["loss_weights"], np.ones((2, 4)))


def test_without_shuffle_the_order_is_that_of_the_stream_and_epochs_follow_on(build, write_shard):
    # 13 tokens are three sequences of four, which begin with 1, 5 and 9; two rows a batch.
    dataset = build(write_shard([*range(1, 13), 0]), shuffle=False)
    assert dataset.summary["sequences_per_epoch"] == 3
    batches = take(dataset.train_iterator(), 3)
    assert first_tokens(batches) == [[1, 5], [9, 1], [5, 9]]


def test_every_epoch_has_every_sequence_once_in_another_order(build, numbered):
    dataset = build(numbered)  # 81 tokens are 20 sequences: 10 batches an epoch
    assert dataset.summary["sequences_per_epoch"] == 20
    rows = [row for pair in first_tokens(take(dataset.train_iterator(), 30)) for row in pair]
    epochs = [rows[:20], rows[20:40], rows[40:]]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    stream = [*range(1, 21), 0, *range(21, 80), 0]
    for epoch in epochs:
        assert sorted(epoch) == sorted(stream[0:80:4])


def test_order_depends_on_the_seed_alone(build, numbered):
    orders = [first_tokens(take(build(numbered, seed=s).train_iterator(), 20)) for s in (0, 0, 1)]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    # grain adds the epoch to the seed: the second epoch of seed 0 must not be the first of seed 1.
    assert orders[0][10:] != orders[2][:10]


@pytest.mark.parametrize("process_count", [2, 4])
def test_processes_share_the_rows_of_each_batch(build, numbered, process_count):
    whole = take(build(numbered, batch_size=8).train_iterator(), 7)
    parts = [
        take(
            build(
                numbered, batch_size=8, process_index=i, process_count=process_count
            ).train_iterator(),
            7,
        )
        for i in range(process_count)
    ]
    joined = [
        {name: np.concatenate([part[name] for part in rank]) for name in rank[0]}
        for rank in zip(*parts, strict=True)
    ]
    assert_same(joined, whole)


@pytest.mark.parametrize("stop", [0, 1, 9, 10, 11, 25])
def test_resume_is_exact_at_any_batch_and_across_epochs(build, numbered, stop):
    iterator = build(numbered).train_iterator()
    take(iterator, stop)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = take(iterator, 13)
    resumed = build(numbered).train_iterator()
    take(resumed, 3)
    resumed.set_state(state)
    assert resumed.get_state() == state
    assert_same(take(resumed, 13), expected)


def test_iterator_goes_back_to_an_earlier_state(build, numbered):
    iterator = build(numbered).train_iterator()
    state = iterator.get_state()
    first = take(iterator, 12)
    iterator.set_state(state)
    assert_same(take(iterator, 12), first)


def test_resume_with_another_number_of_processes(build, numbered):
    iterator = build(numbered, batch_size=4).train_iterator()
    take(iterator, 3)
    state = iterator.get_state()
    (expected,) = take(iterator, 1)
    other = build(numbered, batch_size=4, process_index=1, process_count=2).train_iterator()
    other.set_state(state)
    assert_same([next(other)], [{name: values[2:] for name, values in expected.items()}])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, r"data\.order_seed was 0, is 1"),
        ({"batch_size": 4}, r"data\.batch_size was 2, is 4"),
        ({"sequence_length": 5}, r"data\.sequence_length was 4, is 5"),
        ({"shuffle": False}, r"data\.shuffle was True, is False"),
        ({"max_bytes": 100}, r"documents was '\w+', is '\w+'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_rejects_the_state_of_another_order(build, numbered, change, message):
    state = build(numbered).train_iterator().get_state()
    with pytest.raises(DataError, match=message):
        build(numbered, **change).train_iterator().set_state(state)


def test_accepts_the_state_of_the_same_data_in_another_folder(build, numbered, tmp_path):
    iterator = build(numbered).train_iterator()
    next(iterator)
    moved = build(shutil.copytree(numbered, tmp_path / "moved")).train_iterator()
    moved.set_state(iterator.get_state())
    np.testing.assert_array_equal(next(moved)["tokens"], next(iterator)["tokens"])


def test_order_seed_is_the_run_seed_unless_given(build, numbered):
    own, run = (build(numbered, **c).train_iterator() for c in ({"order_seed": 3}, {"seed": 3}))
    other = build(numbered).train_iterator()
    first = [next(iterator)["tokens"] for iterator in (own, run, other)]
    np.testing.assert_array_equal(first[0], first[1])
    assert (first[0] != first[2]).any()


@pytest.mark.parametrize(
    "state", [None, {}, {"version": 2}, {"version": 1, "next_batch": -1, "order": {}}]
)
def test_rejects_what_is_not_a_state(build, numbered, state):
    with pytest.raises(DataError, match="not a position in the training data"):
        build(numbered).train_iterator().set_state(state)


@pytest.fixture
def with_validation(tmp_path, write_tokenizer):
    """60 documents of 8 words; about half of them are held out."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(60):
        (folder / f"{i:02}.txt").write_text(" ".join(f"t{(7 * i + j) % 290 + 1}" for j in range(8)))
    tokenizer = write_tokenizer(tmp_path / "tokenizer.json", 300)
    return folder, {"tokenizer": str(tokenizer), "validation_fraction": 0.5}


def test_validation_batches_are_the_same_every_time_and_evenly_spread(build, with_validation):
    folder, options = with_validation
    dataset = build(folder, **options)
    available = dataset.summary["validation_sequences"]
    batches = list(dataset.validation_batches(3))
    assert_same(list(dataset.validation_batches(3)), batches)
    assert_same(list(build(folder, **options, seed=5).validation_batches(3)), batches)
    every = [row for pair in first_tokens(dataset.validation_batches(10**6)) for row in pair]
    assert available > 30
    rows = [row for pair in first_tokens(batches) for row in pair]
    assert rows == [every[k * available // 6] for k in range(6)]


def test_all_of_the_validation_split_with_padding_at_the_end(build, with_validation):
    folder, options = with_validation
    dataset = build(folder, **options, batch_size=8)
    available = dataset.summary["validation_sequences"]
    assert available % 8
    batches = list(dataset.validation_batches(1000))
    assert len(batches) == -(-available // 8)
    is_real = np.concatenate([batch["segment_ids"][:, 0] > 0 for batch in batches])
    assert is_real.tolist() == [True] * available + [False] * (-available % 8)
    padding = {name: values[available % 8 :] for name, values in batches[-1].items()}
    assert all(not values.any() for values in padding.values())


def test_processes_share_validation_batches(build, with_validation):
    folder, options = with_validation
    whole = list(build(folder, **options, batch_size=8).validation_batches(4))
    parts = [
        build(folder, **options, batch_size=8, process_index=i, process_count=2) for i in range(2)
    ]
    for batch, *halves in zip(whole, *(part.validation_batches(4) for part in parts), strict=True):
        joined = {name: np.concatenate([half[name] for half in halves]) for name in batch}
        assert_same([joined], [batch])


def test_no_document_is_in_both_splits(build, with_validation):
    folder, options = with_validation
    dataset = build(folder, **options, sequence_length=9, shuffle=False, batch_size=1)
    # 8 words and the end of text: every sequence of nine is one document.
    held_out = {tuple(batch["tokens"][0]) for batch in dataset.validation_batches(100)}
    count = dataset.summary["sequences_per_epoch"]
    trained = {tuple(batch["tokens"][0]) for batch in take(dataset.train_iterator(), count)}
    assert len(held_out) + len(trained) == 58  # the last document of each split has no next token
    assert not held_out & trained


def test_summary_is_json_and_counts(build, numbered):
    summary = build(numbered).summary
    assert json.loads(json.dumps(summary)) == summary
    assert summary["train_documents"] == 2
    assert summary["train_tokens"] == 81
    assert summary["vocab_size"] == 100
    assert re.fullmatch(r"[0-9a-f]{64}", summary["tokenizer_hash"])
    assert re.fullmatch(r"[0-9a-f]{32}", summary["sources_fingerprint"])


def test_saved_tokenizer_is_the_one_that_was_used(build, numbered, tmp_path):
    dataset = build(numbered)
    dataset.save_tokenizer(tmp_path / "saved.json")
    assert (
        tokenizer_hash(load_tokenizer(tmp_path / "saved.json")) == dataset.summary["tokenizer_hash"]
    )
    assert dataset.end_of_text_id == 0


def test_trained_tokenizer_end_to_end_on_text(build, tmp_path):
    text = "def f(x):\n    return x + 1\n\n" * 30
    (tmp_path / "a.py").write_text(text)
    dataset = build(tmp_path / "a.py", shuffle=False, batch_size=1, sequence_length=8)
    count = dataset.summary["sequences_per_epoch"]
    ids = [batch["tokens"][0] for batch in take(dataset.train_iterator(), count)]
    assert dataset.summary["vocab_size"] <= 300
    assert text.startswith(dataset.tokenizer.decode(np.concatenate(ids).tolist()))


def test_process_ends_and_forks_with_live_iterators(numbered, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", LEAVE_WITHOUT_CLOSING, str(numbered), str(tmp_path / "cache")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_rejects_a_sequence_longer_than_the_training_data(build, numbered):
    message = (
        r"length=81 is longer than the training data: it needs 82 tokens, but there are 81 in 2"
    )
    with pytest.raises(DataError, match=message):
        build(numbered, sequence_length=81)
    assert build(numbered, sequence_length=80).summary["sequences_per_epoch"] == 1


def test_rejects_a_sequence_longer_than_the_validation_data(build, with_validation):
    folder, options = with_validation
    with pytest.raises(
        DataError, match=r"longer than the validation data: it needs 101 tokens.*raise"
    ):
        build(folder, **options | {"validation_fraction": 0.1, "sequence_length": 100})


def test_rejects_validation_without_a_split(build, numbered, make_config):
    config = make_config(path=(str(numbered),))
    config = type(config)(fp8=config.fp8, data=config.data, model=config.model)
    with pytest.raises(DataError, match=r"--data\.validation-fraction=0 leaves nothing"):
        build_dataset(config)
    with pytest.raises(DataError, match="longer than the validation data"):
        next(build(numbered).validation_batches(1))


@pytest.mark.parametrize(
    ("index", "count", "message"),
    [(2, 2, "process_index=2 must be in"), (0, 3, "batch-size=2 must be a multiple of .* 3")],
)
def test_rejects_processes(build, numbered, index, count, message):
    with pytest.raises(DataError, match=message):
        build(numbered, process_index=index, process_count=count)


def test_the_page_shows_how_to_write_shards_that_train(
    build, tmp_path, monkeypatch, write_tokenizer
):
    (code,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    write_tokenizer(tmp_path / "my_tokenizer.json", 300)
    exec(code, {"my_texts": ["t5 t6 t7", "t8 t9"]})
    dataset = build(tmp_path / "shards", shuffle=False, sequence_length=3, batch_size=2)
    assert next(dataset.train_iterator())["tokens"].tolist() == [[5, 6, 7], [0, 8, 9]]

"""What is written, when it is written again, and what happens when it is damaged or contended."""

import json
import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

from train.data import cache as cache_module
from train.data.cache import open_cache
from train.data.errors import DataError

KILLED_WHILE_PUBLISHING = """
import sys, time
from train.config import DataConfig
from train.data import cache

def wait_forever(temporary, directory):
    print(temporary, flush=True)
    time.sleep(600)

cache._publish = wait_forever
cache.open_cache(DataConfig(path=(sys.argv[1],), cache_directory=sys.argv[2]), 300, print)
"""


def open_(config, log=None):
    log = [] if log is None else log
    return open_cache(config.data, config.model.vocab_size, log.append)


def entries(config):
    root = os.listdir(config.data.cache_directory)
    return sorted(name for name in root if not name.endswith(".lock"))


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(20):
        (folder / f"{i:02}.txt").write_text(f"text number {i}\n" * (i + 1))
    return folder


def test_streams_by_hand(write_shard, make_config):
    config = make_config(path=(str(write_shard([1, 2, 3, 0, 4, 5, 0, 1, 2, 3, 0, 6])),))
    cached = open_(config)
    # The third document repeats the first; the last has no end-of-text of its own.
    assert cached.train.tokens.tolist() == [1, 2, 3, 0, 4, 5, 0, 6, 0]
    assert cached.train.offsets.tolist() == [0, 4, 7, 9]
    assert cached.validation.tokens.tolist() == []
    assert cached.validation.offsets.tolist() == [0]
    assert cached.counts == {
        "bytes": 4 * (3 + 2 + 1),
        "train_documents": 3,
        "train_tokens": 9,
        "validation_documents": 0,
        "validation_tokens": 0,
        "duplicates_left_out": 1,
        "empty_left_out": 0,
        "undecodable_left_out": 0,
    }


def test_text_becomes_the_ids_of_its_words(tmp_path, make_config, write_tokenizer):
    (tmp_path / "a.txt").write_text("t5 t6 t7")
    (tmp_path / "b.txt").write_text("t9")
    tokenizer = write_tokenizer(tmp_path / "tokenizer.json", 50, end_id=3)
    paths = (str(tmp_path / "a.txt"), str(tmp_path / "b.txt"))
    cached = open_(make_config(path=paths, tokenizer=str(tokenizer)))
    assert cached.train.tokens.tolist() == [5, 6, 7, 3, 9, 3]
    assert cached.train.offsets.tolist() == [0, 4, 6]


def test_order_survives_batches_and_formats(tmp_path, make_config, write_shard, monkeypatch):
    monkeypatch.setattr(cache_module, "_ENCODED_BYTES", 5)  # a batch every two texts
    monkeypatch.setattr(cache_module, "_COPIED_TOKENS", 2)
    lines = [{"text": f"t{i}"} for i in range(10, 20)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shards = write_shard([1, 2, 3, 4, 5, 0])
    (tmp_path / "z.txt").write_text("t30 t31")
    paths = (str(tmp_path / "a.jsonl"), str(shards), str(tmp_path / "z.txt"))
    cached = open_(make_config(path=paths))
    expected = [token for i in range(10, 20) for token in (i, 0)] + [1, 2, 3, 4, 5, 0, 30, 31, 0]
    assert cached.train.tokens.tolist() == expected


def test_both_splits_hold_every_document_once(texts, make_config):
    config = make_config(path=(str(texts),), validation_fraction=0.4)
    cached = open_(config)
    found = []
    for stream in (cached.train, cached.validation):
        assert len(stream.offsets) > 3
        for begin, end in zip(stream.offsets[:-1], stream.offsets[1:], strict=True):
            assert stream.tokens[end - 1] == 0
            found.append(cached.tokenizer.decode(stream.tokens[begin : end - 1].tolist()))
    assert sorted(found) == sorted(path.read_text() for path in texts.iterdir())


@pytest.mark.parametrize(("vocab_size", "dtype"), [(1 << 16, "<u2"), ((1 << 16) + 1, "<u4")])
def test_ids_are_stored_in_16_bits_if_they_fit(write_shard, make_config, vocab_size, dtype):
    folder = write_shard([1, 2, vocab_size - 1, 0], dtype="uint32", vocab_size=vocab_size)
    cached = open_(make_config(path=(str(folder),), vocab_size=vocab_size))
    assert cached.train.tokens.dtype == np.dtype(dtype)
    assert cached.train.tokens.tolist() == [1, 2, vocab_size - 1, 0]


def test_second_opening_reads_nothing_but_the_cache(texts, make_config):
    config, log = make_config(path=(str(texts),)), []
    first = open_(config, log)
    assert [line.split(":")[0] for line in log] == ["data", "data"]
    second = open_(config, log)
    assert len(log) == 2
    np.testing.assert_array_equal(first.train.tokens, second.train.tokens)
    assert first.counts == second.counts
    assert first.tokenizer.to_str() == second.tokenizer.to_str()


@pytest.mark.parametrize(
    "change",
    [
        {"validation_fraction": 0.5},
        {"max_bytes": 1000},
        {"glob": "**/0*.txt"},
        {"vocab_size": 310},
        {"tokenizer_training_bytes": 900},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_option_has_its_own_entry(texts, make_config, change):
    open_(make_config(path=(str(texts),)))
    changed = make_config(path=(str(texts),), **change)
    open_(changed)
    assert len(entries(changed)) == 2


def test_changed_file_has_its_own_entry(texts, make_config):
    config = make_config(path=(str(texts),))
    before = open_(config)
    os.utime(texts / "03.txt", ns=(1, 1))
    touched = open_(config)
    (texts / "03.txt").write_text("another text")
    after = open_(config)
    assert len(entries(config)) == 3
    # The fingerprint goes by content, not by time.
    assert touched.sources_fingerprint == before.sources_fingerprint
    assert after.sources_fingerprint != before.sources_fingerprint


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def zero_the_start(path):
    path.write_bytes(bytes(8) + path.read_bytes()[8:])


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        ("train.tokens", truncate, "train.tokens has"),
        ("train.tokens", zero_the_start, "the checksum of train.tokens differs"),
        ("validation.offsets", truncate, "validation.offsets has"),
        ("train.offsets", lambda path: path.write_bytes(path.read_bytes()[::-1]), "the checksum"),
        ("tokenizer.json", zero_the_start, "the checksum of tokenizer.json differs"),
        ("meta.json", truncate, "Expecting"),
        ("meta.json", lambda path: path.write_text("{}"), "'checksum'"),
        ("meta.json", lambda path: path.write_text("5"), "meta.json is not what was written"),
        (
            "meta.json",
            lambda path: path.write_text(path.read_text().replace('"<u2"', '"<u4"')),
            "meta.json is not what was written",
        ),
        ("train.tokens", lambda path: path.unlink(), "No such file"),
    ],
)
def test_damage_is_noticed_and_mended(texts, make_config, name, damage, reason):
    config, log = make_config(path=(str(texts),), validation_fraction=0.4), []
    good = open_(config)
    tokens, text = good.train.tokens.tolist(), good.tokenizer.to_str()
    (entry,) = entries(config)
    directory = os.path.join(config.data.cache_directory, entry)
    damage((texts.parent / "cache" / entry) / name)
    mended = open_(config, log)
    assert f"token cache {directory} is damaged" in log[0]
    assert reason in log[0]
    assert sum("is damaged" in line for line in log) == 1
    assert mended.train.tokens.tolist() == tokens
    assert mended.tokenizer.to_str() == text
    assert entries(config) == [entry]


def test_two_builders_at_once_build_once(texts, make_config, monkeypatch):
    config, log, builds = make_config(path=(str(texts),)), [], []
    building, go_on = threading.Event(), threading.Event()
    write_tokens = cache_module._write_tokens

    def slow_write_tokens(*arguments):
        builds.append(1)
        building.set()
        assert go_on.wait(30)
        return write_tokens(*arguments)

    monkeypatch.setattr(cache_module, "_write_tokens", slow_write_tokens)
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(open_(config, log))) for _ in range(2)
    ]
    threads[0].start()
    assert building.wait(30)
    threads[1].start()
    while not any("waiting for another process" in line for line in log):
        threads[1].join(0.01)
        assert threads[1].is_alive()
    go_on.set()
    for thread in threads:
        thread.join(30)
    assert len(builds) == 1
    assert results[0].train.tokens.tolist() == results[1].train.tokens.tolist()
    assert len(entries(config)) == 1


def test_killed_builder_leaves_neither_a_lock_nor_rubbish(texts, make_config):
    config = make_config(path=(str(texts),))
    command = [sys.executable, "-c", KILLED_WHILE_PUBLISHING]
    arguments = [str(texts), config.data.cache_directory]
    with subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        temporary = next(line.strip() for line in process.stdout if line.startswith("/"))
        process.send_signal(signal.SIGKILL)
    assert os.path.isdir(temporary)
    # The same options as the killed process: the same entry, the same lock.
    config = make_config(path=(str(texts),), validation_fraction=0.05)
    cached = open_(config)
    assert cached.counts["train_documents"] + cached.counts["validation_documents"] == 20
    assert not os.path.exists(temporary)
    assert len(entries(config)) == 1


def test_failed_build_leaves_nothing(tmp_path, make_config):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": 1}\n')
    config = make_config(path=(str(tmp_path / "a.jsonl"),))
    with pytest.raises(DataError, match=r"a\.jsonl:2"):
        open_(config)
    assert entries(config) == []


def test_another_machine_may_publish_first(tmp_path, monkeypatch):
    temporary, directory = tmp_path / "key.1.tmp", tmp_path / "key"
    for folder, content in ((temporary, "mine"), (directory, "theirs")):
        folder.mkdir()
        (folder / "meta.json").write_text(content)
    answers = iter([False, True])  # not there yet when looked for, there after the rename failed
    monkeypatch.setattr(cache_module.Path, "exists", lambda path: next(answers))
    cache_module._publish(temporary, directory)
    assert (directory / "meta.json").read_text() == "theirs"


def test_rejects_a_cache_folder_that_cannot_be_written(texts, tmp_path, make_config):
    (tmp_path / "file").touch()
    config = make_config(path=(str(texts),), cache_directory=str(tmp_path / "file" / "cache"))
    with pytest.raises(DataError, match=r"--data\.cache-directory=.*cannot be written"):
        open_(config)


def test_no_space_left_is_said_and_leaves_nothing(texts, make_config, monkeypatch):
    def no_space(stream):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_module, "_sync", no_space)
    config = make_config(path=(str(texts),))
    with pytest.raises(DataError, match="No space left on device; free space there or choose"):
        open_(config)
    assert entries(config) == []


@pytest.mark.parametrize(
    "text", ["", '{"text": ""}\n{"text": ""}\n'], ids=["no_line", "empty_texts"]
)
def test_rejects_sources_without_any_text(tmp_path, make_config, write_tokenizer, text):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.jsonl").write_text(text)
    tokenizer = write_tokenizer(tmp_path / "tokenizer.json", 50)
    config = make_config(path=(str(tmp_path / "texts"),), tokenizer=str(tokenizer))
    with pytest.raises(DataError, match=r"no text in 1 files \(\d empty documents"):
        open_(config)


def test_rejects_a_tokenizer_larger_than_the_vocabulary(
    texts, tmp_path, make_config, write_tokenizer
):
    path = write_tokenizer(tmp_path / "tokenizer.json", 301)
    config = make_config(path=(str(texts),), tokenizer=str(path), vocab_size=300)
    with pytest.raises(DataError, match=r"ids up to 300, but --model\.vocab-size=300; set .* 320"):
        open_(config)


def test_rejects_shards_larger_than_the_vocabulary(write_shard, write_tokenizer, make_config):
    folder = write_shard([1, 0], vocab_size=500)
    write_tokenizer(folder / "tokenizer.json", 100)
    with pytest.raises(
        DataError, match=r"meta\.json has ids up to 499, but --model\.vocab-size=300"
    ):
        open_(make_config(path=(str(folder),)))


def test_rejects_shards_of_another_tokenizer(write_shard, write_tokenizer, make_config):
    folder = write_shard([1, 0])
    write_tokenizer(folder / "tokenizer.json", 100, end_id=7)
    with pytest.raises(DataError, match=r"end_of_text_id=0, but it is 7 in the tokenizer"):
        open_(make_config(path=(str(folder),)))


def test_rejects_shards_without_a_tokenizer(write_shard, make_config):
    folder = write_shard([1, 0])
    (folder / "tokenizer.json").unlink()
    with pytest.raises(
        DataError, match=r"need their tokenizer\.json beside them or --data\.tokenizer"
    ):
        open_(make_config(path=(str(folder),)))


def test_rejects_shards_of_different_tokenizers(write_shard, write_tokenizer, make_config):
    first = write_shard([1, 0])
    second = first.rename(first.with_name("second"))
    first = write_shard([1, 0])
    write_tokenizer(first / "tokenizer.json", 99)
    with pytest.raises(DataError, match="made with different tokenizers"):
        open_(make_config(path=(str(first), str(second))))

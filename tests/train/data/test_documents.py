"""Duplicates, empty documents, limits and the validation split."""

import hashlib

import numpy as np

from train.config import DataConfig
from train.data.documents import Tally, split_documents, tokenizer_sample
from train.data.sources import find_files


def write_texts(folder, texts):
    folder.mkdir(exist_ok=True)
    for i, text in enumerate(texts):
        (folder / f"{i:03}.txt").write_bytes(text.encode())
    return folder


def split(folder, **options):
    config = DataConfig(path=(str(folder),), **options)
    tally = Tally()
    return list(split_documents(find_files(config), config, tally)), tally


def texts_of(items):
    return [item.document.content for item in items]


def test_exact_duplicates_and_empty_documents_are_dropped_and_counted(tmp_path):
    folder = write_texts(tmp_path / "d", ["one", "two", "", "one", "one ", "two"])
    items, tally = split(folder)
    assert texts_of(items) == ["one", "two", "one "]
    assert (tally.duplicates, tally.empty, tally.bytes) == (2, 1, 3 + 3 + 4)


def test_max_bytes_counts_utf8_and_takes_whole_documents(tmp_path):
    folder = write_texts(tmp_path / "d", ["äöü", "abcd", "x"])  # 6, 4 and 1 bytes
    assert texts_of(split(folder, max_bytes=11)[0]) == ["äöü", "abcd", "x"]
    assert texts_of(split(folder, max_bytes=10)[0]) == ["äöü", "abcd"]
    assert texts_of(split(folder, max_bytes=9)[0]) == ["äöü"]
    assert texts_of(split(folder, max_bytes=5)[0]) == []


def test_side_of_the_split_is_the_content_hash_against_the_fraction(tmp_path):
    texts = [f"document {i}" for i in range(200)]
    items, _ = split(write_texts(tmp_path / "d", texts), validation_fraction=0.25)
    for item in items:
        digest = hashlib.blake2b(item.document.content.encode(), digest_size=16).digest()
        assert item.is_validation == (int.from_bytes(digest[:8], "little") / 2**64 < 0.25)
    held_out = sum(item.is_validation for item in items)
    assert 30 <= held_out <= 70  # 50 +- 3.3 standard deviations of a fair hash


def test_whole_entries_of_the_folder_are_held_out(tmp_path):
    names = [f"package{i}" for i in range(40)]
    (tmp_path / "d").mkdir()
    for name in names:
        write_texts(tmp_path / "d" / name, [f"{name} {i}" for i in range(3)])
        write_texts(tmp_path / "d" / name / "inner", [f"{name} inner", "licence of all"])
    (tmp_path / "d" / "single.txt").write_text("single")
    options = {"validation_fraction": 0.3, "validation_unit": "folder"}
    items, tally = split(tmp_path / "d", **options)
    side: dict[str, set[bool]] = {}
    for item in items:
        if item.document.content != "licence of all":
            side.setdefault(item.document.content.split()[0], set()).add(item.is_validation)
    assert side.keys() == {*names, "single"}
    for name, sides in side.items():
        entry = name if name in names else "single.txt"
        digest = hashlib.blake2b(entry.encode(), digest_size=16).digest()
        assert sides == {int.from_bytes(digest[:8], "little") / 2**64 < 0.3}
    assert {True} in side.values() and {False} in side.values()
    assert tally.duplicates == 39  # of the licence: it is on one side only


def test_split_does_not_move_when_files_are_added(tmp_path):
    texts = [f"document {i}" for i in range(60)]
    before, _ = split(write_texts(tmp_path / "d", texts[30:]), validation_fraction=0.3)
    after, _ = split(write_texts(tmp_path / "e", texts), validation_fraction=0.3)
    side = {item.document.content: item.is_validation for item in after}
    assert all(side[item.document.content] == item.is_validation for item in before)
    assert 0 < sum(item.is_validation for item in before) < 30


def test_tokenizer_sample_is_training_text_alone(tmp_path):
    folder = write_texts(tmp_path / "d", [f"document {i}" for i in range(100)])
    config = DataConfig(path=(str(folder),), validation_fraction=0.4)
    files = find_files(config)
    items = list(split_documents(files, config, Tally()))
    expected = [item.document.content for item in items if not item.is_validation]
    assert list(tokenizer_sample(files, config)) == expected
    assert len(expected) < 100


def test_tokenizer_sample_is_spread_over_the_sources_and_bounded(tmp_path):
    folder = write_texts(tmp_path / "d", [f"{i:04}" + "x" * 6 for i in range(100)])  # 1000 bytes
    config = DataConfig(path=(str(folder),), validation_fraction=0.0, tokenizer_training_bytes=100)
    sample = list(tokenizer_sample(find_files(config), config))
    # Ten of a hundred documents, one whenever another tenth of the bytes has gone by.
    assert [int(text[:4]) for text in sample] == [9, 19, 29, 39, 49, 59, 69, 79, 89, 99]


def test_ids_are_hashed_alike_in_16_and_32_bits(write_shard):
    digests = []
    for dtype in ("uint16", "uint32"):
        items, _ = split(write_shard([5, 6, 0, 7, 0], dtype=dtype))
        digests.append([item.digest for item in items])
        assert [item.size for item in items] == [8, 4]
    assert digests[0] == digests[1]
    assert all(isinstance(item.document.content, np.ndarray) for item in items)

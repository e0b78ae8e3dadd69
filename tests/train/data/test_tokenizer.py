"""Training, loading and refusing tokenizers."""

import subprocess
import sys

import pytest
from tokenizers import Tokenizer, models

from train.data.errors import DataError
from train.data.tokenizer import (
    end_of_text_id,
    load_tokenizer,
    require_vocabulary,
    tokenizer_hash,
    train_tokenizer,
    vocabulary_size,
)

TEXTS = ["the cat sat on the mat, the end\n", "ünïcode ← 猫 \t tabs\r\n"] * 3

TRAIN_AND_PRINT_HASH = """
import pathlib, sysconfig
from train.data.tokenizer import tokenizer_hash, train_tokenizer

folder = pathlib.Path(sysconfig.get_path("stdlib"), "json")
texts = [path.read_text("utf-8") for path in sorted(folder.glob("*.py"))]
fingerprint = tokenizer_hash(train_tokenizer(iter(texts), 600))
print(fingerprint)
"""


def test_every_text_comes_back_as_it_was():
    tokenizer = train_tokenizer(iter(TEXTS), 300)
    for text in (*TEXTS, "unseen: \x00\x7f 🙂 <|endoftext|>"):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_ids_fill_the_vocabulary_and_the_first_is_end_of_text():
    tokenizer = train_tokenizer(iter(TEXTS), 270)
    assert vocabulary_size(tokenizer) == 270
    assert end_of_text_id(tokenizer) == 0


def test_text_of_a_special_token_does_not_become_one():
    tokenizer = train_tokenizer(iter(TEXTS), 300)
    assert 0 not in tokenizer.encode("a<|endoftext|>b").ids
    batch = tokenizer.encode_batch_fast(["a<|endoftext|>b"], add_special_tokens=False)
    assert 0 not in batch[0].ids


def test_training_is_bitwise_repeatable_across_processes():
    elsewhere = subprocess.run(
        [sys.executable, "-c", TRAIN_AND_PRINT_HASH], capture_output=True, text=True, check=True
    ).stdout.strip()
    here: dict[str, str] = {}
    exec(TRAIN_AND_PRINT_HASH, here)
    assert len(elsewhere) == 64
    assert here["fingerprint"] == elsewhere


def test_saved_and_loaded_tokenizer_is_the_same(tmp_path):
    tokenizer = train_tokenizer(iter(TEXTS), 300)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert tokenizer_hash(load_tokenizer(tmp_path / "tokenizer.json")) == tokenizer_hash(tokenizer)


def test_truncation_and_padding_of_a_loaded_tokenizer_are_off(tmp_path):
    tokenizer = train_tokenizer(iter(TEXTS), 300)
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = "0123456789"  # no two of these bytes were ever seen together
    assert len(load_tokenizer(tmp_path / "tokenizer.json").encode(text).ids) == 10


@pytest.mark.parametrize("name", ["<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>"])
def test_known_names_of_end_of_text(tmp_path, write_tokenizer, name):
    path = write_tokenizer(tmp_path / "tokenizer.json", 10, end_of_text=name, end_id=7)
    assert end_of_text_id(load_tokenizer(path)) == 7


def test_gaps_in_the_ids_count():
    assert vocabulary_size(Tokenizer(models.WordLevel({"a": 0, "b": 99}, unk_token="a"))) == 100


def test_rejects_a_vocabulary_too_small_for_bytes():
    with pytest.raises(DataError, match=r"vocab-size=256 must be at least 257"):
        train_tokenizer(iter(TEXTS), 256)


def test_rejects_no_training_text():
    with pytest.raises(DataError, match="no training text for the tokenizer"):
        train_tokenizer(iter([]), 300)


def test_rejects_a_vocabulary_that_does_not_fit_and_names_one_that_does():
    with pytest.raises(DataError, match=r"ids up to 100, .*vocab-size=100.*vocab-size 128"):
        require_vocabulary(101, 100, "tokenizer 'x'")
    require_vocabulary(100, 100, "tokenizer 'x'")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"{}", "is not a tokenizer.json"),
        (b'{"version": "1.0"', "is not a tokenizer.json"),
    ],
    ids=["missing", "not_utf8", "empty_object", "truncated"],
)
def test_rejects_what_is_not_a_tokenizer(tmp_path, content, message):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_tokenizer(path)


def test_rejects_a_tokenizer_without_end_of_text(tmp_path):
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="no end-of-text token; it needs one of"):
        load_tokenizer(tmp_path / "tokenizer.json")

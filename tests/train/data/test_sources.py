"""Which files are found, which documents they hold, and every input that is refused."""

import json
import sysconfig
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from train.config import DataConfig
from train.data import sources
from train.data.errors import DataError
from train.data.sources import find_files, read_documents


def read(*paths, **options):
    config = DataConfig(path=tuple(map(str, paths)), **options)
    return [
        document
        for file in find_files(config)
        for document in read_documents(file, config.text_column)
    ]


def contents(*paths, **options):
    return [document.content for document in read(*paths, **options)]


def test_files_of_a_folder_come_sorted_and_hidden_ones_are_left_out(tmp_path):
    for name in ("b.txt", "a/z.md", "a/b.py", "A.txt", ".hidden.txt", ".git/config.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert contents(tmp_path) == ["A.txt", "a/b.py", "a/z.md", "b.txt"]
    assert contents(tmp_path, glob="**/*.py") == ["a/b.py"]
    assert contents(tmp_path, glob="*.txt") == ["A.txt", "b.txt"]


def test_paths_come_in_the_given_order(tmp_path):
    for name in ("1.txt", "2.txt"):
        (tmp_path / name).write_text(name)
    assert contents(tmp_path / "2.txt", tmp_path / "1.txt") == ["2.txt", "1.txt"]


def test_text_keeps_its_line_ends(tmp_path):
    (tmp_path / "a.txt").write_bytes("ä\r\nb\rc\n".encode())
    assert contents(tmp_path) == ["ä\r\nb\rc\n"]


def test_explicit_format_overrides_the_ending(tmp_path):
    (tmp_path / "a.xyz").write_text('{"text": "x"}\n')
    assert contents(tmp_path, format="text") == ['{"text": "x"}\n']
    assert contents(tmp_path, format="jsonl") == ["x"]


def test_long_text_is_cut_at_empty_lines_then_line_ends_then_characters(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "WHOLE_FILE_BYTES", 16)
    monkeypatch.setattr(sources, "PIECE_BYTES", 8)
    text = "abcde\n\nfghij\nkl\u00e4\u00e4\u00e4\u00e4x\n"
    (tmp_path / "a.txt").write_bytes(text.encode())
    documents = read(tmp_path / "a.txt")
    # 8 bytes at most: to the empty line; to the line end; whole characters; the rest.
    assert [document.content for document in documents] == [
        "abcde\n\n",
        "fghij\n",
        "kl\u00e4\u00e4",
        "\u00e4\u00e4x\n",
    ]
    assert documents[1].where.endswith("a.txt, byte 7")


def test_cut_never_splits_a_character(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "WHOLE_FILE_BYTES", 16)
    monkeypatch.setattr(sources, "PIECE_BYTES", 9)
    text = "\U0001f642" * 11 + "\u732b" * 10
    (tmp_path / "a.txt").write_bytes(text.encode())
    pieces = contents(tmp_path / "a.txt")
    assert "".join(pieces) == text
    assert max(len(piece.encode()) for piece in pieces) <= 9


def test_jsonl(tmp_path):
    (tmp_path / "a.jsonl").write_bytes('{"text": "ä\\n"}\n\n  \n{"text": "b", "x": 1}'.encode())
    documents = read(tmp_path)
    assert [document.content for document in documents] == ["ä\n", "b"]
    assert [document.where[-2:] for document in documents] == [":1", ":4"]


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())]
)
def test_parquet(tmp_path, kind):
    texts = [f"row {i}" for i in range(5)]
    table = pa.table({"id": range(5), "body": pa.array(texts).cast(kind)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    assert contents(tmp_path, text_column="body") == texts


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_shard_documents_end_at_end_of_text(write_shard, dtype):
    folder = write_shard([1, 2, 0, 0, 3, 0, 4, 5], dtype=dtype)
    documents = read(folder)
    assert [document.content.tolist() for document in documents] == [[1, 2], [], [3], [4, 5]]
    assert documents[2].where.endswith("shard.bin, token 4")


def test_shards_of_a_folder_are_read_without_their_companions(write_shard):
    write_shard([1, 0], name="b.bin")
    folder = write_shard([2, 0], name="a.bin")
    assert [ids.tolist() for ids in contents(folder)] == [[2], [1]]
    assert [ids.tolist() for ids in contents(folder, format="tokens")] == [[2], [1]]


def test_a_shard_is_scanned_in_parts(write_shard, monkeypatch):
    monkeypatch.setattr(sources, "_SCAN_TOKENS", 3)
    folder = write_shard([1, 2, 3, 4, 0, 5, 0])
    assert [ids.tolist() for ids in contents(folder)] == [[1, 2, 3, 4], [5]]


def test_stdlib_is_sorted_and_has_no_site_packages():
    files = find_files(DataConfig())
    root = Path(sysconfig.get_path("stdlib"))
    names = [file.path.relative_to(root).as_posix() for file in files]
    assert names == sorted(names)
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    assert not any("site-packages" in name for name in names)


def test_stdlib_file_in_another_encoding_is_skipped(tmp_path, monkeypatch):
    (tmp_path / "a.py").write_bytes(b"# -*- coding: latin-1 -*-\n# \xe4\n")
    (tmp_path / "b.py").write_text("x = 1\n")
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "c.py").write_text("y = 1\n")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    documents = read("python-stdlib")
    assert documents[0] is None
    assert [document.content for document in documents[1:]] == ["x = 1\n"]


def test_packages_are_those_on_the_path_and_each_is_a_unit(tmp_path, monkeypatch):
    packages = tmp_path / "lib" / "site-packages"
    (packages / "one" / "sub").mkdir(parents=True)
    (packages / "one" / "sub" / "a.py").write_text("x = 1\n")
    (packages / "two.py").write_text("y = 1\n")
    (packages / "latin.py").write_bytes(b"# \xe4\n")
    (packages / "notes.txt").write_text("no source\n")
    monkeypatch.setattr("sys.path", [str(tmp_path), str(packages), str(packages)])
    files = find_files(DataConfig(path=("python-packages",), validation_unit="folder"))
    assert [(file.path.name, file.unit) for file in files] == [
        ("latin.py", "latin.py"),
        ("a.py", "one"),
        ("two.py", "two.py"),
    ]
    texts = [document.content for document in read("python-packages") if document]
    assert texts == ["x = 1\n", "y = 1\n"]


def test_packages_without_any_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    with pytest.raises(DataError, match=r"'python-packages': no \*\.py files in sys\.path"):
        find_files(DataConfig(path=("python-packages",)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"abc\xff", r"a\.txt is not UTF-8 text \(byte 3"),
        ("a.txt", b"abc\0d", r"a\.txt is a binary file \(byte 3 is zero\)"),
        (
            "a.xyz",
            b"abc",
            r"a\.xyz: cannot tell its format from the ending '\.xyz'.*--data\.format",
        ),
        ("LICENSE", b"abc", r"LICENSE: cannot tell its format from the ending ''"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl:2: not a line of JSON"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"a\.jsonl:1: not a line of JSON in UTF-8"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1: not a line of JSON"),
        (
            "a.jsonl",
            b'{"text": "x"}\n\n{"body": 1}\n',
            r"a\.jsonl:3: no field 'text' \(found: \['body'\]",
        ),
        ("a.jsonl", b'["text"]\n', r"a\.jsonl:1: no field 'text' \(found: list\)"),
        ("a.jsonl", b'{"text": 5}\n', r"a\.jsonl:1: 'text' holds int, not text"),
        ("a.jsonl", b'{"text": null}\n', r"a\.jsonl:1: 'text' holds null, not text"),
        ("a.parquet", b"PAR1 no", r"a\.parquet: not a readable Parquet file"),
    ],
)
def test_rejects_content(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"id": [1], "body": ["x"]}, r"no column 'text' \(columns: id, body\)"),
        ({"text": [1, 2]}, r"column 'text' holds int64, not text"),
        ({"text": ["x", None]}, r"row 1: 'text' holds null, not text"),
    ],
    ids=["no_column", "numbers", "null"],
)
def test_rejects_parquet(tmp_path, columns, message):
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=message):
        read(tmp_path)


def test_rejects_a_truncated_parquet_file(tmp_path):
    pq.write_table(pa.table({"text": ["x" * 1000]}), tmp_path / "a.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"a\.parquet"):
        read(tmp_path)


def test_rejects_a_missing_path(tmp_path):
    with pytest.raises(DataError, match=r"--data\.path '.*nowhere' does not exist"):
        read(tmp_path / "nowhere")


def test_rejects_an_empty_file(tmp_path):
    (tmp_path / "a.txt").touch()
    with pytest.raises(DataError, match=r"a\.txt' is empty"):
        read(tmp_path / "a.txt")


def test_rejects_a_folder_without_a_match(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match=r"no file that matches --data\.glob '\*\.rs'"):
        read(tmp_path, glob="*.rs")


@pytest.mark.parametrize("pattern", ["../*.txt", "a/../../*.txt", "/etc/*", ""])
def test_rejects_a_pattern_that_leaves_the_folder(tmp_path, pattern):
    with pytest.raises(DataError, match=r"must be a pattern inside the folder"):
        read(tmp_path, glob=pattern)


def test_rejects_a_token_id_outside_the_vocabulary(write_shard, monkeypatch):
    monkeypatch.setattr(sources, "_SCAN_TOKENS", 2)
    folder = write_shard([1, 2, 3, 100, 0], vocab_size=100)
    with pytest.raises(DataError, match=r"shard\.bin: token 3 is 100, .*vocab_size=100"):
        read(folder)


def test_rejects_a_shard_of_broken_tokens(write_shard):
    folder = write_shard([1, 2, 0], dtype="uint32")
    (folder / "shard.bin").write_bytes((folder / "shard.bin").read_bytes()[:-1])
    with pytest.raises(DataError, match=r"11 bytes are not whole uint32 tokens"):
        read(folder)


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        (None, r"needs meta\.json beside it"),
        ("{", r"meta\.json: JSONDecodeError"),
        ("[]", r"meta\.json: TypeError"),
        ({"dtype": "uint16"}, r"meta\.json: KeyError\('end_of_text_id'\)"),
        ({"dtype": "float32", "end_of_text_id": 0, "vocab_size": 9}, r"must be \{\"dtype\""),
        ({"dtype": "uint16", "end_of_text_id": True, "vocab_size": 9}, r"must be \{\"dtype\""),
        (
            {"dtype": "uint16", "end_of_text_id": 9, "vocab_size": 9},
            r"must be in \[0, vocab_size=9\)",
        ),
    ],
    ids=["missing", "broken", "list", "incomplete", "dtype", "bool", "end_of_text"],
)
def test_rejects_meta(write_shard, meta, message):
    folder = write_shard([1, 0])
    if meta is None:
        (folder / "meta.json").unlink()
    else:
        (folder / "meta.json").write_text(meta if isinstance(meta, str) else json.dumps(meta))
    with pytest.raises(DataError, match=message):
        read(folder)


def test_a_shard_is_mapped_and_never_unpickled(write_shard):
    folder = write_shard([1, 2, 0])
    assert isinstance(contents(folder)[0], np.memmap)
    np.save(folder / "shard.bin", np.array([{}], object), allow_pickle=True)
    (folder / "shard.bin").write_bytes((folder / "shard.bin.npy").read_bytes())
    with pytest.raises(DataError, match=r"shard\.bin: (token|\d+ bytes)"):
        read(folder / "shard.bin")

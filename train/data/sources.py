"""Finds the files that `--data.path` stands for and reads documents out of them, one at a time.

A document is a text, or an array of token ids from a pre-tokenised shard. Nothing here holds more
than one document of a text file, one line of a JSONL file, a thousand rows of a Parquet file, or
one memory-mapped shard.
"""

import dataclasses
import json
import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from train.config import DataConfig
from train.data.errors import DataError

STDLIB = "python-stdlib"
PACKAGES = "python-packages"
SHARD_META = "meta.json"
SHARD_TOKENIZER = "tokenizer.json"

# A text file above the first size is cut at line ends into documents of at most the second: a
# single big file can then be streamed, tokenised in parallel and held out from. Both are far above
# the length of a training sequence.
WHOLE_FILE_BYTES = 1 << 20
PIECE_BYTES = 1 << 16

_PACKAGE_FOLDERS = frozenset(("site-packages", "dist-packages"))
_PARQUET_ROWS = 1024  # rows decoded at a time
_SCAN_TOKENS = 1 << 24  # tokens of a shard checked at a time

_TEXT_ENDINGS = frozenset(
    ".txt .text .md .markdown .rst .tex .html .htm .xml .csv .tsv .json .yaml .yml .toml .ini"
    " .cfg .log .srt .py .pyi .c .h .cc .cpp .cxx .hpp .cu .cuh .rs .go .java .kt .scala .js .ts"
    " .jsx .tsx .css .sh .sql .rb .php"
    " .pl .lua .r .jl .hs .ml .cs .swift .asm .s .f90 .m".split()
)
_ENDINGS = (
    dict.fromkeys(_TEXT_ENDINGS, "text")
    | dict.fromkeys((".jsonl", ".ndjson"), "jsonl")
    | dict.fromkeys((".parquet", ".pq"), "parquet")
    | {".bin": "tokens"}
)


@dataclasses.dataclass(frozen=True, slots=True)
class ShardMeta:
    """What the `meta.json` beside pre-tokenised shards says about them."""

    dtype: str
    end_of_text_id: int
    vocab_size: int


@dataclasses.dataclass(frozen=True, slots=True)
class SourceFile:
    """One file to read, and what identifies its content without reading it."""

    path: Path
    format: str
    size: int
    modified_ns: int
    skip_undecodable: bool = False
    shard: ShardMeta | None = None
    unit: str = ""
    """What its documents are held out with; empty: each document for itself."""


class Document(NamedTuple):
    """A text, or the token ids of a document without its end-of-text; and where it stands."""

    content: str | np.ndarray
    where: str


def find_files(config: DataConfig) -> list[SourceFile]:
    """Lists the files of `config.path`, in the given order; those of a folder by relative path.

    Hidden files and folders are left out, as are `meta.json` and `tokenizer.json` beside
    pre-tokenised shards.

    Raises:
      DataError: if a path is missing or empty, a folder has no file that matches `config.glob`, or
        the format of a file cannot be told from its ending.
    """
    files = []
    for name in config.path:
        if name in (STDLIB, PACKAGES):
            files += _python_files(name, config)
            continue
        path = Path(name).expanduser()
        if path.is_dir():
            files += [
                _source_file(match, config, unit=_unit(match, path, config))
                for match in _folder_matches(path, config)
            ]
        elif not path.exists():
            raise DataError(
                f"--data.path {name!r} does not exist (looked for {path.absolute()}); give a"
                f" file, a folder, {STDLIB!r} or {PACKAGES!r}"
            )
        elif path.stat().st_size == 0 or not path.is_file():
            raise DataError(f"--data.path {name!r} is empty or not a regular file; nothing to read")
        else:
            files.append(_source_file(path, config))
    return files


def _folder_matches(folder: Path, config: DataConfig) -> list[Path]:
    if ".." in Path(config.glob).parts or Path(config.glob).is_absolute() or not config.glob:
        raise DataError(
            f"--data.glob {config.glob!r} must be a pattern inside the folder, like '**/*.txt'"
        )
    try:
        matches = [
            match
            for match in folder.glob(config.glob)
            if match.is_file()
            and not any(part.startswith(".") for part in match.relative_to(folder).parts)
        ]
    except (ValueError, OSError) as error:
        raise DataError(f"--data.glob {config.glob!r} in {folder}: {error}") from error
    shards = {match.parent for match in matches if match.suffix == ".bin"}
    matches = [
        match
        for match in matches
        if match.parent not in shards or match.name not in (SHARD_META, SHARD_TOKENIZER)
    ]
    if not matches:
        raise DataError(
            f"--data.path {str(folder)!r} has no file that matches --data.glob {config.glob!r}"
            " (hidden ones are left out); change the pattern or the folder"
        )
    return sorted(matches, key=lambda match: match.relative_to(folder).as_posix())


def _unit(file: Path, folder: Path, config: DataConfig) -> str:
    """The entry of `folder` that `file` lies in, where that is what is held out."""
    return file.relative_to(folder).parts[0] if config.validation_unit == "folder" else ""


def _source_file(path: Path, config: DataConfig, unit: str = "") -> SourceFile:
    kind = config.format if config.format != "auto" else _ENDINGS.get(path.suffix.lower())
    if kind is None:
        raise DataError(
            f"{path}: cannot tell its format from the ending {path.suffix!r} (known: .jsonl,"
            " .parquet, .bin, and text endings such as .txt, .md, .py); set --data.format, or"
            " leave the file out with --data.glob"
        )
    stat = path.stat()
    shard = _shard_meta(path) if kind == "tokens" else None
    return SourceFile(path.absolute(), kind, stat.st_size, stat.st_mtime_ns, shard=shard, unit=unit)


def _python_files(name: str, config: DataConfig) -> list[SourceFile]:
    """Lists the `*.py` files that STDLIB or PACKAGES stands for, each with its package as unit."""
    if name == STDLIB:
        roots, apart = [Path(sysconfig.get_path("stdlib"))], _PACKAGE_FOLDERS
    else:
        roots, apart = _package_folders(), frozenset[str]()
    files = []
    for root in roots:
        matches = [
            match
            for match in root.rglob("*.py")
            if match.is_file() and not apart & set(match.relative_to(root).parts)
        ]
        for match in sorted(matches, key=lambda match: match.relative_to(root).as_posix()):
            stat = match.stat()
            # A few test files are in other encodings on purpose.
            file = SourceFile(match, "text", stat.st_size, stat.st_mtime_ns, skip_undecodable=True)
            files.append(dataclasses.replace(file, unit=_unit(match, root, config)))
    if not files:
        raise DataError(
            f"--data.path {name!r}: no *.py files in {', '.join(map(str, roots)) or 'sys.path'};"
            " this Python ships without sources there, so give files"
        )
    return files


def _package_folders() -> list[Path]:
    """The folders of installed packages that this Python imports from, in the order of sys.path."""
    return [
        Path(entry)
        for entry in dict.fromkeys(sys.path)
        if Path(entry).name in _PACKAGE_FOLDERS and Path(entry).is_dir()
    ]


def _shard_meta(path: Path) -> ShardMeta:
    meta_path = path.with_name(SHARD_META)
    shape = '{"dtype": "uint16" or "uint32", "end_of_text_id": int, "vocab_size": int}'
    try:
        fields = json.loads(meta_path.read_text("utf-8"))
        meta = ShardMeta(*(fields[field.name] for field in dataclasses.fields(ShardMeta)))
    except FileNotFoundError:
        raise DataError(
            f"{path}: a pre-tokenised shard needs {meta_path.name} beside it: {shape}"
        ) from None
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise DataError(f"{meta_path}: {error!r}; it must hold {shape}") from error
    ids = (meta.end_of_text_id, meta.vocab_size)
    if meta.dtype not in ("uint16", "uint32") or not all(type(value) is int for value in ids):
        raise DataError(f"{meta_path}: {fields} must be {shape}")
    if not 0 <= meta.end_of_text_id < meta.vocab_size:
        raise DataError(
            f"{meta_path}: end_of_text_id={meta.end_of_text_id} must be in [0,"
            f" vocab_size={meta.vocab_size})"
        )
    return meta


def read_documents(file: SourceFile, text_column: str) -> Iterator[Document | None]:
    """Yields the documents of one file in order; None stands for a file that is skipped on purpose.

    Args:
      file: what to read.
      text_column: field of a JSONL line or column of a Parquet file that holds the text.

    Raises:
      DataError: naming the file and the line, row, byte or token that cannot be read.
    """
    try:
        if file.format == "text":
            yield from _text_documents(file)
        elif file.format == "jsonl":
            yield from _jsonl_documents(file.path, text_column)
        elif file.format == "parquet":
            yield from _parquet_documents(file.path, text_column)
        else:
            yield from _shard_documents(file)
    except OSError as error:
        raise DataError(f"{file.path} cannot be read: {error}") from error


def _text_documents(file: SourceFile) -> Iterator[Document | None]:
    with open(file.path, "rb") as stream:
        for offset, piece in _pieces(stream, file.size):
            try:
                text = piece.decode("utf-8")
            except UnicodeDecodeError as error:
                if file.skip_undecodable:
                    yield None
                    return
                raise DataError(
                    f"{file.path} is not UTF-8 text (byte {offset + error.start}:"
                    f" {error.reason}); convert it, leave it out with --data.glob, or set"
                    " --data.format if it is not text"
                ) from error
            if "\0" in text:
                raise DataError(
                    f"{file.path} is a binary file (byte {offset + piece.index(0)} is zero);"
                    " leave it out with --data.glob, or set --data.format if it is not text"
                )
            yield Document(text, str(file.path) if offset == 0 else f"{file.path}, byte {offset}")


def _pieces(stream: BinaryIO, size: int) -> Iterator[tuple[int, bytes]]:
    if size <= WHOLE_FILE_BYTES:
        yield 0, stream.read()
        return
    offset = 0
    while piece := stream.read(PIECE_BYTES):
        if len(piece) == PIECE_BYTES:
            piece = piece[: _cut(piece)]
            stream.seek(offset + len(piece))
        yield offset, piece
        offset += len(piece)


def _cut(piece: bytes) -> int:
    """Length of `piece` to its last empty line or line end, if past the middle, else character."""
    for border in (b"\n\n", b"\n"):
        cut = piece.rfind(border) + len(border)
        if cut > len(piece) // 2:
            return cut
    # UTF-8 continuation bytes are 0b10xxxxxx; a character has at most three.
    return next(
        (end for end in range(len(piece) - 1, len(piece) - 4, -1) if piece[end] & 0xC0 != 0x80),
        len(piece),
    )


def _jsonl_documents(path: Path, column: str) -> Iterator[Document]:
    with open(path, "rb") as stream:
        for number, line in enumerate(stream, start=1):
            where = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f"{where}: not a line of JSON in UTF-8 ({error}); mend or remove the line"
                ) from error
            if not isinstance(record, dict) or column not in record:
                found = sorted(record) if isinstance(record, dict) else type(record).__name__
                raise DataError(
                    f"{where}: no field {column!r} (found: {found}); set --data.text-column"
                )
            yield Document(_text(record[column], column, where), where)


def _parquet_documents(path: Path, column: str) -> Iterator[Document]:
    try:
        with pq.ParquetFile(path, memory_map=True) as parquet:
            schema = parquet.schema_arrow
            if column not in schema.names:
                raise DataError(
                    f"{path}: no column {column!r} (columns: {', '.join(schema.names)}); set"
                    " --data.text-column"
                )
            if not _is_text(schema.field(column).type):
                raise DataError(
                    f"{path}: column {column!r} holds {schema.field(column).type}, not text; set"
                    " --data.text-column"
                )
            row = 0
            for batch in parquet.iter_batches(_PARQUET_ROWS, columns=[column]):
                for value in batch.column(0).to_pylist():
                    where = f"{path}, row {row}"
                    yield Document(_text(value, column, where), where)
                    row += 1
    except pa.ArrowException as error:
        raise DataError(f"{path}: not a readable Parquet file ({error})") from error


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _text(value: object, column: str, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(
            f"{where}: {column!r} holds {'null' if value is None else type(value).__name__}, not"
            " text; mend or remove it, or set --data.text-column"
        )
    return value


def _shard_documents(file: SourceFile) -> Iterator[Document]:
    meta, path = file.shard, file.path
    assert meta is not None, "find_files reads the meta.json of every shard"
    dtype = np.dtype(meta.dtype).newbyteorder("<")
    size = os.path.getsize(path)
    if size % dtype.itemsize:
        raise DataError(f"{path}: {size} bytes are not whole {meta.dtype} tokens; is it cut short?")
    if size == 0:
        return
    tokens = np.memmap(path, dtype, mode="r")
    ends = []
    for start in range(0, len(tokens), _SCAN_TOKENS):
        chunk = tokens[start : start + _SCAN_TOKENS]
        if chunk.max() >= meta.vocab_size:
            position = int(np.argmax(chunk >= meta.vocab_size))
            raise DataError(
                f"{path}: token {start + position} is {chunk[position]}, but ids must be below"
                f" vocab_size={meta.vocab_size} of its {SHARD_META}; tokenise again, or correct"
                f" {SHARD_META}"
            )
        ends.append(np.flatnonzero(chunk == meta.end_of_text_id) + start)
    start = 0
    for end in (*np.concatenate(ends).tolist(), len(tokens)):
        # What follows the last end-of-text is a document only if there is something.
        if start < end or end < len(tokens):
            yield Document(tokens[start:end], f"{path}, token {start}")
        start = end + 1

"""The tokens of both splits on disk, memory-mapped, in a folder named after all they depend on.

    <cache_directory>/<key>/
      train.tokens       unsigned little-endian ids, every document closed by end-of-text
      train.offsets      int64 little-endian, where each document starts, and the number of tokens
      validation.*       the same for the documents held out
      tokenizer.json
      meta.json          what is in the files, their sizes and checksums, and its own

A folder is built beside its place and renamed into it, under a lock that the kernel drops with the
process, so it is whole or not there. It may be deleted at any time; the next run builds it again.
"""

import array
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import time
import uuid
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
import tokenizers
from tokenizers import Tokenizer

from train.config import DataConfig
from train.data import documents, sources
from train.data import tokenizer as tokenizer_lib
from train.data.errors import DataError
from train.data.packing import TokenStream

Log = Callable[[str], None]

SPLITS = ("train", "validation")

_MAGIC = "jfp8 token cache"
_VERSION = 1  # of the layout, and of how documents become tokens
_CHECKED_BYTES = 1 << 20  # of a file's beginning and of its end
_ENCODED_BYTES = (
    8 << 20
)  # text handed to the tokenizer at a time; its results need about 40 times as much memory
_COPIED_TOKENS = 1 << 20  # of a pre-tokenised document, at a time
_PROGRESS_S = 10.0


class DamagedCacheError(Exception):
    """A folder of the cache that is not what was written."""


@dataclasses.dataclass(frozen=True, slots=True)
class TokenCache:
    """Both splits, the tokenizer, and the numbers of `meta.json`."""

    train: TokenStream
    validation: TokenStream
    tokenizer: Tokenizer
    counts: dict[str, int]
    sources_fingerprint: str


def open_cache(config: DataConfig, vocab_size: int, log: Log) -> TokenCache:
    """Maps the tokens of `config`, building them first unless they are there.

    Args:
      config: sources, tokenizer, split and the cache's folder.
      vocab_size: rows of the embedding; ids are below it.
      log: told in one line when something is built, waited for or rebuilt.

    Raises:
      DataError: for sources or a tokenizer that cannot be used, or a folder that cannot be written.
    """
    files = sources.find_files(config)
    tokenizer = _given_tokenizer(files, config, vocab_size)
    root = Path(config.cache_directory).expanduser()
    directory = root / _key(files, tokenizer, config, vocab_size)
    cached = _load(directory, log)
    if cached:
        return cached
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _lock(root / f"{directory.name}.lock", log):
            # Another process may have built it in the meantime; damage has been said once already.
            cached = _load(directory, lambda line: None)
            if cached:
                return cached
            _build(directory, files, tokenizer, config, vocab_size, log)
        return _read(directory)
    except OSError as error:
        raise DataError(
            f"--data.cache-directory={config.cache_directory!r} cannot be written: {error}; free"
            " space there or choose another folder"
        ) from error


def _given_tokenizer(
    files: Sequence[sources.SourceFile], config: DataConfig, vocab_size: int
) -> Tokenizer | None:
    """The tokenizer to load; None if one is to be trained."""
    shards = [file for file in files if file.shard]
    folders = sorted({file.path.parent for file in shards})
    paths = [Path(config.tokenizer)] if config.tokenizer else []
    paths = paths or [folder / sources.SHARD_TOKENIZER for folder in folders]
    for path in paths:
        if not config.tokenizer and not path.exists():
            raise DataError(
                f"{path.parent}: pre-tokenised shards need their {path.name} beside them or"
                " --data.tokenizer"
            )
    loaded = [tokenizer_lib.load_tokenizer(path) for path in paths]
    if not loaded:
        return None
    if len(set(map(tokenizer_lib.tokenizer_hash, loaded))) > 1:
        raise DataError(
            f"the shards were made with different tokenizers: {', '.join(map(str, paths))}; use"
            " one of them, or set --data.tokenizer if they mean the same ids"
        )
    size = tokenizer_lib.vocabulary_size(loaded[0])
    tokenizer_lib.require_vocabulary(size, vocab_size, f"tokenizer {str(paths[0])!r}")
    end_of_text = tokenizer_lib.end_of_text_id(loaded[0])
    for file in shards:
        assert file.shard is not None
        meta_path = file.path.with_name(sources.SHARD_META)
        tokenizer_lib.require_vocabulary(file.shard.vocab_size, vocab_size, str(meta_path))
        if file.shard.end_of_text_id != end_of_text:
            raise DataError(
                f"{meta_path}: end_of_text_id={file.shard.end_of_text_id}, but it is"
                f" {end_of_text} in the tokenizer {str(paths[0])!r}; load the tokenizer that made"
                " the shards"
            )
    return loaded[0]


def _key(
    files: Sequence[sources.SourceFile],
    tokenizer: Tokenizer | None,
    config: DataConfig,
    vocab_size: int,
) -> str:
    """Hash of all that the tokens depend on, short of reading the files."""
    trained = {"vocab_size": vocab_size, "training_bytes": config.tokenizer_training_bytes}
    described = {
        "version": [_VERSION, tokenizers.__version__],
        "files": [dataclasses.astuple(file) for file in files],
        "tokenizer": tokenizer_lib.tokenizer_hash(tokenizer) if tokenizer else trained,
        "text_column": config.text_column,
        "max_bytes": config.max_bytes,
        "validation_fraction": config.validation_fraction,
    }
    return hashlib.sha256(json.dumps(described, default=str).encode()).hexdigest()[:32]


@contextlib.contextmanager
def _lock(path: Path, log: Log) -> Generator[None, None, None]:
    with open(path, "ab") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log("data: waiting for another process that is tokenising the same text")
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _build(
    directory: Path,
    files: Sequence[sources.SourceFile],
    tokenizer: Tokenizer | None,
    config: DataConfig,
    vocab_size: int,
    log: Log,
) -> None:
    """Writes `directory`; the caller holds its lock."""
    for leftover in directory.parent.glob(f"{directory.name}.*.tmp"):
        shutil.rmtree(leftover)  # of a process that was killed
    temporary = directory.with_name(f"{directory.name}.{uuid.uuid4().hex}.tmp")
    temporary.mkdir()
    try:
        if tokenizer is None:
            started = time.perf_counter()
            sample = documents.tokenizer_sample(files, config)
            tokenizer = tokenizer_lib.train_tokenizer(sample, vocab_size)
            log(
                f"data: trained a tokenizer of {tokenizer_lib.vocabulary_size(tokenizer)} tokens in"
                f" {time.perf_counter() - started:.1f} s"
            )
        (temporary / "tokenizer.json").write_text(tokenizer.to_str(), "utf-8")
        meta = _write_tokens(temporary, files, tokenizer, config, log)
        _write_meta(temporary, meta)
        _publish(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_tokens(
    directory: Path,
    files: Sequence[sources.SourceFile],
    tokenizer: Tokenizer,
    config: DataConfig,
    log: Log,
) -> dict:
    """Writes the streams of both splits; returns what `meta.json` says of them."""
    ids = max([tokenizer_lib.vocabulary_size(tokenizer), *_shard_vocabularies(files)])
    dtype = np.dtype("<u2" if ids <= 1 << 16 else "<u4")
    end_of_text = tokenizer_lib.end_of_text_id(tokenizer)
    fingerprint = hashlib.blake2b(digest_size=16)
    tally = documents.Tally()
    started = reported = time.perf_counter()
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(_StreamWriter(directory, name, dtype)) for name in SPLITS]
        for item, token_ids in _encode(documents.split_documents(files, config, tally), tokenizer):
            writers[item.is_validation].append(token_ids, end_of_text)
            fingerprint.update(item.digest + bytes([item.is_validation]))
            now = time.perf_counter()
            if now - reported > _PROGRESS_S:
                reported = now
                log(f"data: tokenised {tally.bytes / 1e6:.0f} MB in {now - started:.0f} s")
    counts = {"bytes": tally.bytes}
    for name, writer in zip(SPLITS, writers, strict=True):
        counts[f"{name}_documents"] = len(writer.offsets) - 1
        counts[f"{name}_tokens"] = writer.offsets[-1]
    if not tally.bytes:
        raise DataError(
            f"--data.path {' '.join(config.path)}: no text in {len(files)} files ({tally.empty}"
            f" empty documents, --data.max-bytes={config.max_bytes})"
        )
    counts |= {
        f"{name}_left_out": getattr(tally, name) for name in ("duplicates", "empty", "undecodable")
    }
    log(
        f"data: tokenised {tally.bytes / 1e6:.1f} MB in {time.perf_counter() - started:.1f} s:"
        f" {counts['train_tokens']} tokens to train on, {counts['validation_tokens']} held out;"
        f" left out {tally.duplicates} repeated, {tally.empty} empty and {tally.undecodable}"
        " undecodable documents"
    )
    return {"dtype": dtype.str, "counts": counts, "sources_fingerprint": fingerprint.hexdigest()}


def _shard_vocabularies(files: Sequence[sources.SourceFile]) -> list[int]:
    return [file.shard.vocab_size for file in files if file.shard]


def _encode(
    items: Iterator[documents.SplitDocument], tokenizer: Tokenizer
) -> Iterator[tuple[documents.SplitDocument, np.ndarray]]:
    """Yields each document with its ids, in order.

    A thread tokenises one batch (on all cores: the library's own threads, without the GIL) while
    this one reads the next and unpacks the last.
    """

    def encode(batch: list[documents.SplitDocument]) -> list:
        texts = [item.document.content for item in batch if isinstance(item.document.content, str)]
        return tokenizer.encode_batch_fast(texts, add_special_tokens=False)

    def unpack(batch: list[documents.SplitDocument], future: Future) -> Iterator:
        encodings = iter(future.result())
        for item in batch:
            content = item.document.content
            yield (
                item,
                (np.array(next(encodings).ids, np.uint32) if isinstance(content, str) else content),
            )

    with ThreadPoolExecutor(1) as executor:
        running: deque[tuple[list[documents.SplitDocument], Future]] = deque()
        batch, batch_bytes = [], 0
        for item in items:
            batch.append(item)
            batch_bytes += item.size
            if batch_bytes >= _ENCODED_BYTES:
                running.append((batch, executor.submit(encode, batch)))
                batch, batch_bytes = [], 0
                if len(running) > 1:
                    yield from unpack(*running.popleft())
        running.append((batch, executor.submit(encode, batch)))
        for pending in running:
            yield from unpack(*pending)


class _StreamWriter:
    """Appends documents to the two files of a split."""

    def __init__(self, directory: Path, name: str, dtype: np.dtype):
        self.offsets = array.array("q", [0])
        self._paths = (directory / f"{name}.tokens", directory / f"{name}.offsets")
        self._dtype = dtype
        self._stream: BinaryIO = open(self._paths[0], "wb")

    def append(self, token_ids: np.ndarray, end_of_text: int) -> None:
        for start in range(0, len(token_ids), _COPIED_TOKENS):
            self._stream.write(token_ids[start : start + _COPIED_TOKENS].astype(self._dtype).data)
        self._stream.write(np.array([end_of_text], self._dtype).data)
        self.offsets.append(self.offsets[-1] + len(token_ids) + 1)

    def __enter__(self) -> "_StreamWriter":
        return self

    def __exit__(self, error_type: object, *_: object) -> None:
        with self._stream:
            if error_type is None:
                _sync(self._stream)
        if error_type is None:
            with open(self._paths[1], "wb") as stream:
                stream.write(np.asarray(self.offsets, "<i8").data)
                _sync(stream)


def _sync(stream: BinaryIO) -> None:
    """A rename may reach the disk before the bytes do; not after this."""
    stream.flush()
    os.fsync(stream.fileno())


def _write_meta(directory: Path, meta: dict) -> None:
    files = {
        path.name: {"bytes": path.stat().st_size, "checksum": _checksum(path)}
        for path in sorted(directory.iterdir())
    }
    meta = {"magic": _MAGIC, "version": _VERSION, **meta, "files": files}
    with open(directory / "meta.json", "wb") as stream:
        stream.write(json.dumps(meta | {"checksum": _meta_checksum(meta)}, indent=1).encode())
        _sync(stream)


def _meta_checksum(meta: dict) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _checksum(path: Path) -> str:
    """BLAKE2b of the first and last MiB: finds cut, zeroed or foreign files in constant time."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as stream:
        digest.update(stream.read(_CHECKED_BYTES))
        stream.seek(max(stream.tell(), path.stat().st_size - _CHECKED_BYTES))
        digest.update(stream.read(_CHECKED_BYTES))
    return digest.hexdigest()


def _publish(temporary: Path, directory: Path) -> None:
    if (
        directory.exists()
    ):  # damaged; a process that maps it keeps its files until it lets go of them
        discarded = temporary.with_name(f"{directory.name}.{uuid.uuid4().hex}.tmp")
        directory.rename(discarded)
        shutil.rmtree(discarded)
    try:
        temporary.rename(directory)
    except OSError:
        # On a file system whose locks do not reach another machine, that one may have been first:
        # the same bytes.
        if not directory.exists():
            raise


def _load(directory: Path, log: Log) -> TokenCache | None:
    """The cache in `directory`; None if there is none, or (said in the log) a damaged one."""
    if not directory.exists():
        return None
    try:
        return _read(directory)
    except (DamagedCacheError, OSError, ValueError, LookupError, TypeError) as error:
        log(f"data: token cache {directory} is damaged ({error}); building it again")
        return None


def _read(directory: Path) -> TokenCache:
    meta = json.loads((directory / "meta.json").read_text("utf-8"))
    if not isinstance(meta, dict):
        raise DamagedCacheError("meta.json is not what was written")
    if meta.pop("checksum") != _meta_checksum(meta) or meta["magic"] != _MAGIC:
        raise DamagedCacheError("meta.json is not what was written")
    names = {
        "tokenizer.json",
        *(f"{name}.{part}" for name in SPLITS for part in ("tokens", "offsets")),
    }
    for name in sorted(names):
        path, expected = directory / name, meta["files"][name]
        if path.stat().st_size != expected["bytes"]:
            raise DamagedCacheError(
                f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
            )
        if _checksum(path) != expected["checksum"]:
            raise DamagedCacheError(f"the checksum of {name} differs")
    train, validation = (
        TokenStream(
            _map(directory / f"{name}.tokens", meta["dtype"]),
            _map(directory / f"{name}.offsets", "<i8"),
        )
        for name in SPLITS
    )
    text = (directory / "tokenizer.json").read_text("utf-8")
    tokenizer = tokenizer_lib.parse_tokenizer(text, str(directory / "tokenizer.json"))
    return TokenCache(train, validation, tokenizer, meta["counts"], meta["sources_fingerprint"])


def _map(path: Path, dtype: str) -> np.ndarray:
    if path.stat().st_size == 0:
        return np.zeros(0, dtype)  # an empty file cannot be mapped
    return np.memmap(path, dtype, mode="r")

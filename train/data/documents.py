"""Documents as they are trained on: none empty, each once, each on its side of the split."""

import dataclasses
import hashlib
import os
from collections.abc import Iterator, Sequence

import numpy as np

from train.config import DataConfig
from train.data.errors import DataError
from train.data.sources import Document, SourceFile, read_documents

_HASH_TOKENS = 1 << 20  # ids widened and hashed at a time


@dataclasses.dataclass(slots=True)
class Tally:
    """What was read and what was left out."""

    bytes: int = 0
    duplicates: int = 0
    empty: int = 0
    undecodable: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class SplitDocument:
    """A document, its size in bytes (UTF-8 text or 32-bit ids), its digest, its side."""

    document: Document
    size: int
    digest: bytes
    is_validation: bool


def split_documents(
    files: Sequence[SourceFile], config: DataConfig, tally: Tally
) -> Iterator[SplitDocument]:
    """Yields each distinct, non-empty document of `files` up to `config.max_bytes` in all.

    The side is decided by the content alone (the first 64 bits of its BLAKE2b digest against
    `config.validation_fraction`), so it stays the same whatever other files are added. With
    `config.validation_unit="folder"` it is decided by the name of the entry of the folder.

    Args:
      files: what to read, in this order.
      config: `text_column`, `max_bytes` and `validation_fraction` are used.
      tally: counts what was left out; updated in place while iterating.

    Raises:
      DataError: as `read_documents`, and for a text that is not valid Unicode.
    """
    threshold = int(config.validation_fraction * 2**64)
    seen: set[bytes] = set()
    for file in files:
        for document in read_documents(file, config.text_column):
            if document is None:
                tally.undecodable += 1
                continue
            if len(document.content) == 0:
                tally.empty += 1
                continue
            digest, size = _digest(document)
            if digest in seen:
                tally.duplicates += 1
                continue
            if config.max_bytes and tally.bytes + size > config.max_bytes:
                return
            seen.add(digest)
            tally.bytes += size
            chosen = hashlib.blake2b(os.fsencode(file.unit), digest_size=16).digest()
            side = chosen if file.unit else digest
            is_validation = int.from_bytes(side[:8], "little") < threshold
            yield SplitDocument(document, size, digest, is_validation)


def _digest(document: Document) -> tuple[bytes, int]:
    """BLAKE2b-128 of the UTF-8 text or the ids as little-endian uint32; and the bytes hashed."""
    content = document.content
    if isinstance(content, str):
        try:
            encoded = content.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"{document.where}: the text is not valid Unicode (character {error.start}:"
                f" {error.reason}); mend or remove it"
            ) from error
        return hashlib.blake2b(encoded, digest_size=16).digest(), len(encoded)
    digest = hashlib.blake2b(b"ids:", digest_size=16)
    for start in range(0, len(content), _HASH_TOKENS):
        digest.update(content[start : start + _HASH_TOKENS].astype("<u4").tobytes())
    return digest.digest(), 4 * len(content)


def tokenizer_sample(files: Sequence[SourceFile], config: DataConfig) -> Iterator[str]:
    """Yields training text evenly from all sources, up to `config.tokenizer_training_bytes`."""
    total = sum(file.size for file in files)
    if config.max_bytes:
        total = min(total, config.max_bytes)
    limit = config.tokenizer_training_bytes
    tally = Tally()
    taken = 0
    for item in split_documents(files, config, tally):
        # A Parquet file can hold more text than its size: the share alone does not keep the limit.
        allowance = min(limit, limit * tally.bytes // max(1, total))
        if item.is_validation or isinstance(item.document.content, np.ndarray):
            continue
        if taken + item.size <= allowance:
            taken += item.size
            yield item.document.content

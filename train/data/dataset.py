"""Batches of packed sequences, in an order that depends on seed, epoch and data alone."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import grain
import numpy as np
from tokenizers import Tokenizer

from train.config import TrainConfig
from train.data import tokenizer as tokenizer_lib
from train.data.cache import Log, TokenCache, open_cache
from train.data.errors import DataError
from train.data.packing import PADDING, Batch, TokenStream, pack

_STATE_VERSION = 1
_PREFETCHED_BATCHES = 4
_PREFETCH_THREADS = 2


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def build_dataset(
    config: TrainConfig,
    *,
    process_index: int = 0,
    process_count: int = 1,
    log: Log = _to_stderr,
) -> "Dataset":
    """Finds, tokenises (or takes from the cache) and packs the text of `config.data`.

    Args:
      config: the sections `data`, `model` (vocab_size), `run` (seed) and `log` (validate_every) are
        used.
      process_index: which of the processes this one is.
      process_count: processes that share every batch; this one gets rows `[process_index * R,
        (process_index + 1) * R)` with R = batch_size // process_count.
      log: told in one line what takes time or is unusual.

    Raises:
      DataError: for every input that cannot be trained on; the message names it and the way out.
    """
    batch_size = config.data.batch_size
    if not 0 <= process_index < process_count:
        raise DataError(f"{process_index=} must be in [0, {process_count=})")
    if batch_size % process_count:
        raise DataError(
            f"--data.batch-size={batch_size} must be a multiple of the number of processes,"
            f" {process_count}"
        )
    needs_validation = config.log.validate_every > 0
    if needs_validation and config.data.validation_fraction == 0:
        raise DataError(
            "--data.validation-fraction=0 leaves nothing to validate on; raise it, or set"
            " --log.validate-every 0"
        )
    cache = open_cache(config.data, config.model.vocab_size, log)
    _require_sequence(
        "training", cache.train, config, "give more text, or lower --data.sequence-length"
    )
    if needs_validation:
        way_out = (
            "raise --data.validation-fraction, give more text, lower --data.sequence-length, or set"
            " --log.validate-every 0"
        )
        _require_sequence("validation", cache.validation, config, way_out)
    return Dataset(config, cache, process_index, process_count)


def _require_sequence(split: str, stream: TokenStream, config: TrainConfig, way_out: str) -> None:
    length = config.data.sequence_length
    if stream.sequence_count(length) == 0:
        raise DataError(
            f"--data.sequence-length={length} is longer than the {split} data: it needs"
            f" {length + 1} tokens, but there are {len(stream.tokens)} in"
            f" {len(stream.offsets) - 1} documents; {way_out}"
        )


class Dataset:
    """Training and validation batches of one process, and the tokenizer they were made with.

    A batch is a dict of arrays `[batch_size // process_count, sequence_length]`: see
    `packing.pack`.

    Attributes:
      tokenizer: a `tokenizers.Tokenizer`; its ids are below `config.model.vocab_size`.
      end_of_text_id: closes every document.
      summary: counts of documents, tokens and sequences; hashes of the tokenizer and of the
        documents. JSON-able.
    """

    def __init__(
        self, config: TrainConfig, cache: TokenCache, process_index: int, process_count: int
    ):
        rows = config.data.batch_size // process_count
        self._config = config
        self._cache = cache
        self._local_rows = slice(process_index * rows, (process_index + 1) * rows)
        self.tokenizer: Tokenizer = cache.tokenizer
        self.end_of_text_id = tokenizer_lib.end_of_text_id(cache.tokenizer)
        length = config.data.sequence_length
        self.summary: dict[str, int | str] = {
            **cache.counts,
            "sequences_per_epoch": cache.train.sequence_count(length),
            "validation_sequences": cache.validation.sequence_count(length),
            "vocab_size": tokenizer_lib.vocabulary_size(cache.tokenizer),
            "end_of_text_id": self.end_of_text_id,
            "tokenizer_hash": tokenizer_lib.tokenizer_hash(cache.tokenizer),
            "sources_fingerprint": cache.sources_fingerprint,
        }

    def train_iterator(self) -> "TrainIterator":
        """An endless iterator over training batches, from the first one."""
        return TrainIterator(self._train_batches(), self._identity())

    def validation_batches(self, n: int) -> Iterator[Batch]:
        """Yields at most `n` batches of validation sequences, the same ones every time.

        With more sequences than `n` batches hold, they are taken at even distances over the whole
        split. With fewer, every sequence comes once, the last batch is filled with rows of padding,
        and there are fewer batches.

        Raises:
          DataError: if the validation split has no sequence.
        """
        data = self._config.data
        _require_sequence(
            "validation", self._cache.validation, self._config, "see --data.validation-fraction"
        )
        available = self._cache.validation.sequence_count(data.sequence_length)
        taken = min(n * data.batch_size, available)
        numbers = np.full(-(-taken // data.batch_size) * data.batch_size, PADDING, np.int64)
        numbers[:taken] = np.arange(taken) * available // taken
        for batch in numbers.reshape(-1, data.batch_size):
            yield self._pack(self._cache.validation, batch)

    def save_tokenizer(self, path: str | Path) -> None:
        """Writes the tokenizer as a `tokenizer.json` to `path`, whole or not at all."""
        temporary = Path(f"{path}.{os.getpid()}.tmp")
        temporary.write_text(self.tokenizer.to_str(pretty=True), "utf-8")
        temporary.replace(path)

    def _pack(self, stream: TokenStream, numbers: np.ndarray) -> Batch:
        data = self._config.data
        return pack(stream, numbers[self._local_rows], data.sequence_length, data.document_mask)

    def _train_batches(self) -> grain.MapDataset:
        # Every process draws the same global batch of sequence numbers and reads its own rows
        # alone.
        data = self._config.data
        order = grain.MapDataset.range(self._cache.train.sequence_count(data.sequence_length))
        if data.shuffle:
            # grain shuffles epoch e with seed + e. Neighbouring seeds would share their epochs'
            # orders, so the seed is spread over 32 bits first.
            order = order.shuffle(
                seed=int(np.random.SeedSequence(self._config.order_seed).generate_state(1)[0])
            )
        batches = order.repeat().batch(data.batch_size, drop_remainder=True)
        return batches.map(lambda numbers: self._pack(self._cache.train, numbers))

    def _identity(self) -> dict[str, int | bool | str]:
        """What the order of the batches depends on."""
        return {
            "data.order_seed": self._config.order_seed,
            "data.shuffle": self._config.data.shuffle,
            "data.batch_size": self._config.data.batch_size,
            "data.sequence_length": self._config.data.sequence_length,
            "tokenizer": str(self.summary["tokenizer_hash"]),
            "documents": self._cache.sources_fingerprint,
        }


class TrainIterator:
    """An endless iterator over batches that can be put back to any earlier or later one, exactly.

    A few batches are prepared ahead by threads, which end with the process or with `close`.
    """

    def __init__(self, batches: grain.MapDataset, identity: dict[str, int | bool | str]):
        self._batches = batches
        self._identity = identity
        self._next_batch = 0
        self._start()

    def __iter__(self) -> "TrainIterator":
        return self

    def __next__(self) -> Batch:
        if os.getpid() != self._process_id:
            # Threads do not survive a fork: their unfinished batches would be waited for forever.
            self._start()
        batch = next(self._iterator)
        self._next_batch += 1
        return batch

    def get_state(self) -> dict:
        """The position: a small JSON-able dict for `set_state` in this or a later process."""
        return {
            "version": _STATE_VERSION,
            "next_batch": self._next_batch,
            "order": dict(self._identity),
        }

    def set_state(self, state: dict) -> None:
        """Goes to the position of `state`: the next batch is the one that followed `get_state`.

        The number of processes may be another one.

        Raises:
          DataError: if `state` is not a position, or belongs to another order of batches.
        """
        is_state = isinstance(state, dict) and state.get("version") == _STATE_VERSION
        next_batch = state.get("next_batch") if is_state else None
        if (
            type(next_batch) is not int
            or next_batch < 0
            or not isinstance(state.get("order"), dict)
        ):
            raise DataError(f"not a position in the training data: {state!r}")
        saved = state["order"]
        differing = [
            f"{name} was {saved.get(name)!r}, is {value!r}"
            for name, value in self._identity.items()
            if saved.get(name) != value
        ]
        if differing:
            raise DataError(
                f"cannot go on from this position in the data: {'; '.join(differing)}; restore"
                " these, or start a new run"
            )
        self.close()
        self._next_batch = next_batch
        self._start()

    def close(self) -> None:
        """Ends the threads."""
        self._iterator.close()

    def _start(self) -> None:
        options = grain.ReadOptions(
            num_threads=_PREFETCH_THREADS, prefetch_buffer_size=_PREFETCHED_BATCHES
        )
        self._process_id = os.getpid()
        self._iterator = iter(self._batches.to_iter_dataset(options))
        self._iterator.set_state({"next_index": self._next_batch})

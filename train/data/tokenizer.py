"""Byte-level byte-pair encoding, trained or loaded.

Sennrich et al. 2016, arXiv:1508.07909, on bytes as in GPT-2 (Radford et al. 2019).
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from train.data.errors import DataError

END_OF_TEXT = "<|endoftext|>"
# The names that published tokenizers give to the token that closes a document; the first one
# present is taken.
END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")

_SMALLEST_VOCABULARY = 256 + 1  # every byte, and the end of text


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE with `<|endoftext|>` as token 0; the same texts give the same bits.

    Args:
      texts: the training text; read once, not kept.
      vocab_size: ids are in [0, vocab_size); a small text may fill fewer.

    Raises:
      DataError: if `vocab_size` cannot hold the bytes, or there is no text at all.
    """
    if vocab_size < _SMALLEST_VOCABULARY:
        raise DataError(
            f"--model.vocab-size={vocab_size} must be at least {_SMALLEST_VOCABULARY} (256 bytes"
            f" and {END_OF_TEXT}) to train a tokenizer; raise it, or load one with --data.tokenizer"
        )
    first = next(texts, None)
    if first is None:
        raise DataError(
            "no training text for the tokenizer: every document is empty, held out for validation,"
            " past --data.max-bytes, or longer than --data.tokenizer-training-bytes; give more"
            " text, raise these limits, or load a tokenizer with --data.tokenizer"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    def all_texts() -> Iterator[str]:
        yield first
        yield from texts

    tokenizer.train_from_iterator(all_texts(), trainer)
    return parse_tokenizer(tokenizer.to_str(), "the trained tokenizer")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Reads a `tokenizer.json`.

    Raises:
      DataError: if there is none, it cannot be read, or it has no end-of-text token.
    """
    try:
        text = Path(path).expanduser().read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"--data.tokenizer {str(path)!r} cannot be read: {error}; give a tokenizer.json"
        ) from error
    return parse_tokenizer(text, f"--data.tokenizer {str(path)!r}")


def parse_tokenizer(text: str, name: str) -> Tokenizer:
    """Builds a tokenizer from the text of a `tokenizer.json`, set up to encode whole documents.

    Truncation and padding are off, and the text of a special token in a document is encoded as
    plain text: a document cannot forge the end of a document.

    Args:
      text: content of a `tokenizer.json`.
      name: what it is called in an error.
    """
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # The Rust library raises no narrower class.
        raise DataError(f"{name} is not a tokenizer.json: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    end_of_text_id(tokenizer, name)
    return tokenizer


def end_of_text_id(tokenizer: Tokenizer, name: str = "the tokenizer") -> int:
    """The id that closes every document."""
    for token in END_OF_TEXT_NAMES:
        token_id = tokenizer.token_to_id(token)
        if token_id is not None:
            return token_id
    raise DataError(
        f"{name} has no end-of-text token; it needs one of {', '.join(END_OF_TEXT_NAMES)}"
    )


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """One more than the largest id; with gaps in the ids, above the number of tokens."""
    return 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())


def require_vocabulary(size: int, vocab_size: int, name: str) -> None:
    """Raises DataError unless ids below `size` fit an embedding of `vocab_size` rows."""
    if size > vocab_size:
        rounded = -(-size // 64) * 64
        raise DataError(
            f"{name} has ids up to {size - 1}, but --model.vocab-size={vocab_size}; set"
            f" --model.vocab-size {rounded} or choose another tokenizer"
        )


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """SHA-256 of the tokenizer's JSON text, in hex."""
    return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()

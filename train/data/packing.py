"""Cuts a stream of tokens into sequences.

The stream is every document of a split, each followed by its end-of-text token. Sequence i of
length T is made of the tokens [i*T, i*T + T], T + 1 of them: the last one is a target only, and the
first input of sequence i + 1.
"""

from typing import NamedTuple

import numpy as np

Batch = dict[str, np.ndarray]

PADDING = -1  # a sequence number that stands for a row of padding


class TokenStream(NamedTuple):
    """Documents on end; usually memory-mapped.

    tokens: unsigned ids `[N]`; the last token of every document is end-of-text.
    offsets: int64 `[documents + 1]`, where each document starts, and N.
    """

    tokens: np.ndarray
    offsets: np.ndarray

    def sequence_count(self, sequence_length: int) -> int:
        """Number of whole sequences in the stream."""
        return max(0, (len(self.tokens) - 1) // sequence_length)


def pack(
    stream: TokenStream, sequence_numbers: np.ndarray, sequence_length: int, document_mask: bool
) -> Batch:
    """Builds the rows of a batch.

    Args:
      stream: where the tokens come from.
      sequence_numbers: int `[B]`, which sequence each row holds, or PADDING.
      sequence_length: T, tokens of a row.
      document_mask: whether documents inside a row are kept apart.

    Returns: arrays `[B, T]`:
      tokens: int32, inputs; 0 where padded.
      targets: int32, the token after each input; 0 where padded.
      segment_ids: int32, 1, 2, ... for the documents of a row (1 alone without `document_mask`); 0
        where padded.
      positions: int32, counted from the start of the document's part in this row (of the row
        without `document_mask`); 0 where padded.
      loss_weights: float32, 0 where padded or where the target belongs to another document (with
        `document_mask`), else 1.
    """
    shape = (len(sequence_numbers), sequence_length + 1)
    window = np.zeros(shape, np.int32)
    starts = np.zeros(shape, bool)
    for row, number in enumerate(sequence_numbers):
        if number == PADDING:
            continue
        begin = int(number) * sequence_length
        window[row] = stream.tokens[begin : begin + sequence_length + 1]
        if document_mask:
            first, last = np.searchsorted(stream.offsets, [begin + 1, begin + sequence_length + 1])
            starts[row, stream.offsets[first:last] - begin] = True
    column = np.arange(sequence_length + 1, dtype=np.int32)
    segments = 1 + np.cumsum(starts, axis=1, dtype=np.int32)
    positions = column - np.maximum.accumulate(np.where(starts, column, 0), axis=1)
    is_real = (np.asarray(sequence_numbers) != PADDING)[:, None]
    return {
        "tokens": window[:, :-1].copy(),
        "targets": window[:, 1:].copy(),
        "segment_ids": np.where(is_real, segments[:, :-1], 0).astype(np.int32),
        "positions": np.where(is_real, positions[:, :-1], 0).astype(np.int32),
        "loss_weights": (is_real & (segments[:, :-1] == segments[:, 1:])).astype(np.float32),
    }

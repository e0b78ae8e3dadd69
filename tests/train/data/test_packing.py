"""The packer against hand-made batches and a token-by-token one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.data.packing import PADDING, TokenStream, pack

END = 0


def stream_of(documents: list[list[int]]) -> TokenStream:
    tokens = [token for document in documents for token in (*document, END)]
    offsets = np.cumsum([0, *(len(document) + 1 for document in documents)])
    return TokenStream(np.array(tokens, np.uint16), offsets.astype(np.int64))


#                           0  1  2  3    4  5  6    7  8  9 10 11
THREE = stream_of([[1, 2, 3], [4, 5], [6, 7, 8, 9]])


def test_sequences_overlap_by_their_last_target():
    batch = pack(THREE, np.array([0, 1]), 4, document_mask=True)
    np.testing.assert_array_equal(batch["tokens"], [[1, 2, 3, 0], [4, 5, 0, 6]])
    np.testing.assert_array_equal(batch["targets"], [[2, 3, 0, 4], [5, 0, 6, 7]])


def test_document_mask_by_hand():
    batch = pack(THREE, np.array([0, 1]), 4, document_mask=True)
    np.testing.assert_array_equal(batch["segment_ids"], [[1, 1, 1, 1], [1, 1, 1, 2]])
    np.testing.assert_array_equal(batch["positions"], [[0, 1, 2, 3], [0, 1, 2, 0]])
    # The end of a document is learnt; the beginning of the next one cannot be known.
    np.testing.assert_array_equal(batch["loss_weights"], [[1, 1, 1, 0], [1, 1, 0, 1]])


def test_without_document_mask_a_row_is_one_segment():
    batch = pack(THREE, np.array([1]), 4, document_mask=False)
    np.testing.assert_array_equal(batch["tokens"], [[4, 5, 0, 6]])
    np.testing.assert_array_equal(batch["segment_ids"], [[1, 1, 1, 1]])
    np.testing.assert_array_equal(batch["positions"], [[0, 1, 2, 3]])
    np.testing.assert_array_equal(batch["loss_weights"], [[1, 1, 1, 1]])


def test_position_restarts_where_a_row_begins_inside_a_document():
    batch = pack(stream_of([[1, 2, 3, 4, 5, 6, 7]]), np.array([1]), 3, document_mask=True)
    np.testing.assert_array_equal(batch["tokens"], [[4, 5, 6]])
    np.testing.assert_array_equal(batch["positions"], [[0, 1, 2]])


def test_padding_rows_are_zero():
    batch = pack(THREE, np.array([1, PADDING]), 4, document_mask=True)
    for values in batch.values():
        np.testing.assert_array_equal(values[1], np.zeros(4))
    np.testing.assert_array_equal(batch["segment_ids"][0], [1, 1, 1, 2])


def test_dtypes_and_shapes():
    batch = pack(THREE, np.array([0, 1]), 4, document_mask=True)
    assert {name: (values.dtype.name, values.shape) for name, values in batch.items()} == {
        "tokens": ("int32", (2, 4)),
        "targets": ("int32", (2, 4)),
        "segment_ids": ("int32", (2, 4)),
        "positions": ("int32", (2, 4)),
        "loss_weights": ("float32", (2, 4)),
    }
    assert all(values.flags.c_contiguous for values in batch.values())


@pytest.mark.parametrize(
    ("tokens", "length", "count"), [(13, 4, 3), (12, 4, 2), (4, 4, 0), (0, 4, 0)]
)
def test_sequence_count(tokens, length, count):
    # Three sequences of 4 need 3 * 4 tokens and one more for the last target.
    stream = TokenStream(np.zeros(tokens, np.uint16), np.array([0, tokens]))
    assert stream.sequence_count(length) == count


def brute_force(documents: list[list[int]], number: int, length: int, document_mask: bool) -> dict:
    """One row, walking over the tokens with the number of the document that each belongs to."""
    flat = [
        (token, index) for index, document in enumerate(documents) for token in [*document, END]
    ]
    row = {name: [] for name in ("tokens", "targets", "segment_ids", "positions", "loss_weights")}
    segment, position, previous = 0, 0, None
    for at in range(number * length, number * length + length):
        (token, owner), (target, target_owner) = flat[at], flat[at + 1]
        if previous is None or (document_mask and owner != previous):
            segment, position = segment + 1, 0
        row["tokens"].append(token)
        row["targets"].append(target)
        row["segment_ids"].append(segment)
        row["positions"].append(position)
        row["loss_weights"].append(float(not document_mask or owner == target_owner))
        position, previous = position + 1, owner
    return row


@settings(max_examples=150, deadline=None)
@given(
    documents=st.lists(
        st.lists(st.integers(1, 60_000), min_size=1, max_size=9), min_size=1, max_size=12
    ),
    length=st.integers(2, 7),
    document_mask=st.booleans(),
)
def test_packer_agrees_with_brute_force(documents, length, document_mask):
    stream = stream_of(documents)
    total = sum(len(document) + 1 for document in documents)
    numbers = np.arange((total - 1) // length)
    assert stream.sequence_count(length) == len(numbers)
    batch = pack(stream, numbers[::-1], length, document_mask)
    for row, number in enumerate(numbers[::-1]):
        for name, values in brute_force(documents, int(number), length, document_mask).items():
            np.testing.assert_array_equal(batch[name][row], values, err_msg=f"{name} of {number}")

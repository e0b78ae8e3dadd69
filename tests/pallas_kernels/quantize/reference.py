"""Casts to 8 bits in NumPy, by ml_dtypes from the definition; shares no code with the package."""

from typing import NamedTuple

import ml_dtypes
import numpy as np


def round8(x, scale, dtype):
    """x / scale in an 8-bit ml_dtypes type: clipped if finite, NaN if not, and no negative zero
    from a zero.
    """
    largest = np.float32(ml_dtypes.finfo(dtype).max)
    scaled = np.asarray(x, np.float32) / np.float32(scale)
    rounded = np.clip(scaled, -largest, largest).astype(dtype)
    rounded[scaled == 0] = 0
    rounded[~np.isfinite(scaled)] = np.nan
    return rounded


def bits(q):
    """The bytes of an 8-bit array, with one byte for every NaN."""
    q = np.asarray(q)
    return np.where(np.isnan(q.astype(np.float32)), 255, q.view(np.uint8))


def order(q):
    """Integers that sort like the values of an 8-bit array: neighbours differ by 1."""
    byte = np.asarray(q).view(np.uint8).astype(np.int32)
    return np.where(byte & 128, -(byte & 127), byte & 127)


def amax_bits(x):
    """The bits of the float32 amax of finite values."""
    return np.abs(np.asarray(x, np.float32)).max().view(np.int32)


class Result(NamedTuple):
    """A kernel's results in the fields of `pallas_kernels.Quantized`."""

    q: np.ndarray
    q_t: np.ndarray
    amax_bits: np.ndarray

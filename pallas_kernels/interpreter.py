"""Runs the Mosaic kernels in Pallas's CPU interpreter, to test what calls them without a GPU."""

import contextlib
import contextvars
from collections.abc import Iterator

_interpreting: contextvars.ContextVar[bool] = contextvars.ContextVar("interpreting", default=False)


@contextlib.contextmanager
def interpret_kernels(enabled: bool = True) -> Iterator[None]:
    """Makes `implementation="mosaic"` of the quantising kernels run on the CPU.

    Slow, with race detection: for tiny arrays. Affects what is traced inside the block, as
    `pallas_kernels.hardware.assume_device_kind` does.
    """
    token = _interpreting.set(enabled)
    try:
        yield
    finally:
        _interpreting.reset(token)


def is_interpreting() -> bool:
    """Whether `interpret_kernels` is in force."""
    return _interpreting.get()

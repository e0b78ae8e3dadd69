"""Compiles kernels for sm_90a without a GPU, and reads what ptxas says about them."""

import contextlib
import ctypes
import dataclasses
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

# Importing the dialect sets MOSAIC_GPU_CUDA_ROOT, so it must come before `ptxas_report` does.
import jax.experimental.mosaic.gpu  # noqa: F401

from tests import aot


@dataclasses.dataclass(frozen=True)
class PtxasReport:
    """What ptxas said about all kernels of one program."""

    spilled_bytes: int
    serialised_wgmmas: list[str]
    text: str


def ptxas_report(function: Callable[..., Any], *args: Any) -> PtxasReport:
    """Compiles a jittable function whose arguments are shapes, and returns ptxas's report."""
    # MOSAIC_GPU_DUMP_TO would write every pass of the compiler too, and take as long again.
    settings = dict(MOSAIC_GPU_DUMP_PTXAS="1", MOSAIC_GPU_CUDA_ROOT=str(aot.cuda_data_dir()))
    with tempfile.TemporaryFile("w+") as printed:
        with _environment(settings), _stdout_to(printed.fileno()):
            aot.compile_for_h200(function, *args)
        printed.seek(0)
        text = printed.read()
    assert "Used" in text, "ptxas compiled no kernel"
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)
    # C7519 says that ptxas added a fence (harmless); every other C75xx serialises wgmmas.
    warnings = re.findall(r"C75(?!19)\d\d[^\n]*", text)
    return PtxasReport(sum(int(x) for pair in spills for x in pair), warnings, text)


@contextlib.contextmanager
def _environment(settings: dict[str, str]) -> Iterator[None]:
    """Sets environment variables for a while."""
    saved = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in saved.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _stdout_to(file: int) -> Iterator[None]:
    """Sends what the process prints to a file descriptor: Mosaic's C++ knows no `sys.stdout`."""

    def flush() -> None:
        sys.stdout.flush()
        ctypes.CDLL(None).fflush(None)

    flush()
    stdout = os.dup(1)
    os.dup2(file, 1)
    try:
        yield
    finally:
        flush()
        os.dup2(stdout, 1)
        os.close(stdout)

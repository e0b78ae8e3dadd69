"""Compiles kernels for sm_90a without a GPU, and reads what ptxas says about them."""

import dataclasses
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
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
    with tempfile.TemporaryDirectory() as folder:
        saved = {name: os.environ.get(name) for name in _SETTINGS}
        os.environ["MOSAIC_GPU_DUMP_TO"] = folder
        os.environ["MOSAIC_GPU_CUDA_ROOT"] = str(aot.cuda_data_dir())
        try:
            aot.compile_for_h200(function, *args)
        finally:
            for name, value in saved.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
        text = "".join(path.read_text() for path in Path(folder).glob("*.ptxas"))
    assert "Used" in text, "ptxas compiled no kernel"
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)
    # C7519 says that ptxas added a fence (harmless); every other C75xx serialises wgmmas.
    warnings = re.findall(r"C75(?!19)\d\d[^\n]*", text)
    return PtxasReport(sum(int(x) for pair in spills for x in pair), warnings, text)


_SETTINGS = ("MOSAIC_GPU_DUMP_TO", "MOSAIC_GPU_CUDA_ROOT")

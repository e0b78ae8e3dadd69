"""Where the tests run: on eight CPU devices, or with `-m gpu` on the GPU.

The environment is set here, before any test or other conftest imports JAX, which reads it once.
pytest has not read its arguments by then.
"""

import os
import sys

import pytest


def _asks_for_gpu(markers: str) -> bool:
    words = markers.split()
    return "gpu" in words and "not" not in words


def _marker_argument(arguments: list[str]) -> str:
    for i, argument in enumerate(arguments):
        if argument == "-m":
            return "".join(arguments[i + 1 : i + 2])
        if argument.startswith("-m"):
            return argument.removeprefix("-m").removeprefix("=")
    return ""


if not _asks_for_gpu(_marker_argument(sys.argv[1:])):
    os.environ["JAX_PLATFORMS"] = "cpu"
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    eight_devices = "--xla_force_host_platform_device_count=8"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {eight_devices}".strip()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if _asks_for_gpu(config.option.markexpr):
        return
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu:
        config.hook.pytest_deselected(items=on_gpu)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]

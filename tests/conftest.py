"""Where the tests run: on eight CPU devices, or with `-m gpu` on the GPU.

The environment is set before anything imports JAX, which reads it once.
"""

import os

import pytest


def _asks_for_gpu(config: pytest.Config) -> bool:
    words = config.option.markexpr.split()
    return "gpu" in words and "not" not in words


def pytest_configure(config: pytest.Config) -> None:
    if not _asks_for_gpu(config):
        os.environ["JAX_PLATFORMS"] = "cpu"
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" not in flags:
        flags += " --xla_force_host_platform_device_count=8"
    os.environ["XLA_FLAGS"] = flags.strip()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if _asks_for_gpu(config):
        return
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu:
        config.hook.pytest_deselected(items=on_gpu)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]

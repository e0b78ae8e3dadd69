"""What the JAX contenders report about their process."""

import importlib.metadata
import os
from typing import Any

import jax

from jfp8 import diagnostics

_GIB = 2**30


def describe() -> dict[str, Any]:
    """Device, versions and flags of this process, and the most memory it has held."""
    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    peak = stats.get("peak_bytes_in_use")
    return {
        "device": device.device_kind,
        "peak_memory_gib": peak / _GIB if peak else None,
        "versions": {
            name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")
        },
        "platform_version": device.client.platform_version,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def planned_memory_gib(compiled: jax.stages.Compiled) -> float | None:
    """What the compiler plans for arguments, results and temporaries of one call."""
    plan = compiled.memory_analysis()
    if plan is None:
        return None
    outputs = plan.output_size_in_bytes - plan.alias_size_in_bytes
    return (plan.argument_size_in_bytes + outputs + plan.temp_size_in_bytes) / _GIB


def gemms(report: diagnostics.DotReport) -> dict[str, Any]:
    """How many GEMMs, and what share of their FLOPs, are in FP8."""
    return {
        "fp8_gemms": report.fp8_count,
        "other_gemms": report.other_count,
        "fp8_flop_fraction": report.fp8_flop_fraction,
    }

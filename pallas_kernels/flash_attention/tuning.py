"""Which kernel config a call runs with: a table measured on the H200, else a rule of thumb."""

import dataclasses
import functools
import importlib.resources
import itertools
import json
from collections.abc import Iterator

from pallas_kernels.flash_attention import sm90_bwd_plan
from pallas_kernels.flash_attention.config import (
    AttentionSpec,
    BackwardConfig,
    ForwardConfig,
    Precision,
)
from pallas_kernels.flash_attention.fp8 import BLOCK as FP8_BLOCK
from pallas_kernels.flash_attention.sm90_fwd_plan import Plan, smem_bytes
from pallas_kernels.hardware import SM90_SMEM_BYTES_PER_BLOCK

_TABLE = "tuned_h200.json"


def mask_kind(spec: AttentionSpec) -> str:
    """Returns the class of masks that a config is tuned for: "full", "causal", "window" or
    "packed".
    """
    if spec.has_segments:
        return "packed"
    if spec.band.left is not None:
        return "window"
    return "full" if spec.band.right is None else "causal"


@functools.cache
def tuned_forward_configs(precision: Precision = "bf16") -> dict[tuple[int, str], ForwardConfig]:
    """Returns the shipped forward configs by head dim and kind of mask."""
    section = "forward" if precision == "bf16" else f"forward_{precision}"
    text = importlib.resources.files(__package__).joinpath(_TABLE).read_text()
    return {
        (entry["head_dim"], entry["mask"]): ForwardConfig(**entry["config"])
        for entry in json.loads(text)[section]
    }


def forward_config(spec: AttentionSpec) -> ForwardConfig:
    """Returns the config for `spec`: the tuned one, or for a window that of the causal mask."""
    table = tuned_forward_configs(spec.precision)
    kind = mask_kind(spec)
    if spec.precision == "fp8" and kind == "window" and spec.key_length % FP8_BLOCK:
        kind = "packed"  # its two bounds and the end of the keys need more registers, too
    config = table.get((spec.head_dim, kind)) or table[(spec.head_dim, "causal")]
    # A single warpgroup has nobody to take turns with, and short queries would leave it idle.
    if spec.query_length <= 64 and config.compute_warpgroups > 1:
        return dataclasses.replace(config, compute_warpgroups=1, ping_pong=False)
    return config


def forward_candidates(spec: AttentionSpec) -> list[tuple[ForwardConfig, str | None]]:
    """Returns configs worth timing for `spec`, each with the reason why it is rejected, or None."""
    if spec.precision == "fp8":
        return [(config, rejection(config, spec)) for config in _fp8_candidates()]
    # (overlap, ping_pong): without either, nothing hides the softmax.
    schedules = ((True, True), (False, True), (True, False))
    candidates = []
    for wgs, block_kv, stages, (overlap, ping_pong), reuse in itertools.product(
        (2, 3), (128, 64, 192), (2, 3), schedules, (False, True)
    ):
        config = ForwardConfig(
            compute_warpgroups=wgs,
            block_kv=block_kv,
            num_stages=stages,
            overlap=overlap,
            ping_pong=ping_pong,
            reuse_q_smem=reuse,
        )
        candidates.append((config, rejection(config, spec)))
    return candidates


def _registers(config: ForwardConfig, spec: AttentionSpec) -> tuple[int, int]:
    """Registers of a thread's share of 64 rows, and of all the rest, as ptxas needs them."""
    logits, out = config.block_kv // 2, spec.head_dim // 2
    if spec.precision == "bf16":
        # S, O and P; row statistics, addresses, loop counters.
        return logits + out + config.block_kv // 4, 46
    # P in 8 bits, and P V apart from O unless O is too wide.
    product = out + config.block_kv // 8 + (out if spec.head_dim <= 128 else 0)
    if config.overlap:
        return product + logits, 32
    # In turns, one CTA for many tiles has to hold the addresses of more barriers.
    return max(out + logits, product), 24 if config.ping_pong and config.persistent else 16


def _fp8_candidates() -> Iterator[ForwardConfig]:
    """Yields the FP8 forward's configs."""
    # (ping_pong, overlap, persistent)
    schedules = (
        (False, False, True),
        (False, False, False),
        (True, False, True),
        (True, False, False),
        (True, True, True),
    )
    for wgs, (block_kv, stages), schedule in itertools.product(
        (3, 2), ((128, 4), (128, 2), (64, 4)), schedules
    ):
        ping_pong, overlap, persistent = schedule
        yield ForwardConfig(
            compute_warpgroups=wgs,
            block_kv=block_kv,
            num_stages=stages,
            ping_pong=ping_pong,
            overlap=overlap,
            persistent=persistent,
        )


@functools.cache
def tuned_backward_configs() -> dict[tuple[int, str], BackwardConfig]:
    """Returns the shipped backward configs by head dim and kind of mask."""
    text = importlib.resources.files(__package__).joinpath(_TABLE).read_text()
    return {
        (entry["head_dim"], entry["mask"]): BackwardConfig(**entry["config"])
        for entry in json.loads(text)["backward"]
    }


def backward_config(spec: AttentionSpec) -> BackwardConfig:
    """Returns the backward config for `spec`; masks by segment ids use that of a window, and the
    deterministic mode one of its own where there is one.
    """
    table, kind = tuned_backward_configs(), "window" if spec.has_segments else mask_kind(spec)
    in_order = table.get((spec.head_dim, f"{kind} in order")) if spec.deterministic else None
    return in_order or table[(spec.head_dim, kind)]


def backward_candidates(spec: AttentionSpec) -> list[tuple[BackwardConfig, str | None]]:
    """Returns configs worth timing for `spec`, each with the reason why it is rejected, or None."""
    candidates = []
    schedules = ((True, False), (False, False), (False, True))
    for (overlap, late_dq), q_stages, do_stages in itertools.product(schedules, (2, 3), (2, 1)):
        config = BackwardConfig(
            block_q=128 if spec.head_dim == 64 else 64,
            num_q_stages=q_stages,
            num_do_stages=do_stages,
            overlap=overlap,
            late_dq=late_dq and spec.head_dim < 256,
            split_channels=spec.head_dim == 256,
        )
        plan = sm90_bwd_plan.Plan(spec=spec, config=config, sm_count=1)
        used, reason = sm90_bwd_plan.smem_bytes(plan), None
        if used > SM90_SMEM_BYTES_PER_BLOCK:
            reason = f"needs {used} bytes of shared memory of {SM90_SMEM_BYTES_PER_BLOCK}"
        elif config.split_channels and overlap:
            reason = "split_channels has no overlap within a warpgroup"
        elif late_dq and spec.deterministic:
            reason = "late_dq cannot keep a fixed order"
        elif late_dq and spec.head_dim != 128:
            reason = "late_dq would spill"
        candidates.append((config, reason))
    return candidates


def rejection(config: ForwardConfig, spec: AttentionSpec) -> str | None:
    """Returns why `config` cannot or should not run `spec`, or None."""
    used = smem_bytes(Plan(spec=spec, config=config, sm_count=132))
    if used > SM90_SMEM_BYTES_PER_BLOCK:
        return f"needs {used} bytes of shared memory of {SM90_SMEM_BYTES_PER_BLOCK}"
    live, spare = _registers(config, spec)
    if live + spare > config.compute_registers:
        return f"needs about {live + spare} registers of {config.compute_registers}; would spill"
    separate = dataclasses.replace(config, reuse_q_smem=False)
    if config.reuse_q_smem:
        used = smem_bytes(Plan(spec=spec, config=separate, sm_count=132))
        if used <= SM90_SMEM_BYTES_PER_BLOCK:
            return "there is room for the output beside Q"
    return None

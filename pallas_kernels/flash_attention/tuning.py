"""Which kernel config a call runs with: a table measured on the H200, else a rule of thumb."""

import dataclasses
import functools
import importlib.resources
import itertools
import json

from pallas_kernels.flash_attention.config import AttentionSpec, ForwardConfig
from pallas_kernels.flash_attention.sm90_fwd_plan import Plan, smem_bytes
from pallas_kernels.hardware import SM90_SMEM_BYTES_PER_BLOCK

_TABLE = "tuned_h200.json"


def mask_kind(spec: AttentionSpec) -> str:
    """Returns the class of masks that a config is tuned for: "full", "causal" or "window"."""
    if spec.band.left is not None:
        return "window"
    return "full" if spec.band.right is None else "causal"


@functools.cache
def tuned_forward_configs() -> dict[tuple[int, str], ForwardConfig]:
    """Returns the shipped forward configs by head dim and kind of mask."""
    text = importlib.resources.files(__package__).joinpath(_TABLE).read_text()
    return {
        (entry["head_dim"], entry["mask"]): ForwardConfig(**entry["config"])
        for entry in json.loads(text)["forward"]
    }


def forward_config(spec: AttentionSpec) -> ForwardConfig:
    """Returns the config for `spec`: the tuned one, or for a window that of the causal mask."""
    table = tuned_forward_configs()
    kind = mask_kind(spec)
    config = table.get((spec.head_dim, kind)) or table[(spec.head_dim, "causal")]
    # A single warpgroup has nobody to take turns with, and short queries would leave it idle.
    if spec.query_length <= 64 and config.compute_warpgroups > 1:
        return dataclasses.replace(config, compute_warpgroups=1, ping_pong=False)
    return config


def forward_candidates(spec: AttentionSpec) -> list[tuple[ForwardConfig, str | None]]:
    """Returns configs worth timing for `spec`, each with the reason why it is rejected, or None."""
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


def rejection(config: ForwardConfig, spec: AttentionSpec) -> str | None:
    """Returns why `config` cannot or should not run `spec`, or None."""
    used = smem_bytes(Plan(spec=spec, config=config, sm_count=1))
    if used > SM90_SMEM_BYTES_PER_BLOCK:
        return f"needs {used} bytes of shared memory of {SM90_SMEM_BYTES_PER_BLOCK}"
    # A thread holds S, O and P of 64 rows: block_kv / 2 + H / 2 + block_kv / 4 registers.
    live = config.block_kv // 2 + spec.head_dim // 2 + config.block_kv // 4
    spare = 46  # row statistics, addresses, loop counters
    if live + spare > config.compute_registers:
        return f"needs about {live + spare} registers of {config.compute_registers}; would spill"
    separate = dataclasses.replace(config, reuse_q_smem=False)
    if config.reuse_q_smem:
        used = smem_bytes(Plan(spec=spec, config=separate, sm_count=1))
        if used <= SM90_SMEM_BYTES_PER_BLOCK:
            return "there is room for the output beside Q"
    return None

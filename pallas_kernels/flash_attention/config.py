"""What one attention call computes: the static part that every implementation decides on."""

# Shapes: B batch, T query, S key, N query heads, K key/value heads, H head dim.

import dataclasses
from typing import Literal

from pallas_kernels.flash_attention.masks import Band

Implementation = Literal["xla", "cudnn", "mosaic"]
Precision = Literal["bf16", "fp8", "int8"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AttentionSpec:
    """Shapes, type and semantics of a call; hashable, so it can be a static argument."""

    batch_size: int
    """B."""
    query_length: int
    """T."""
    key_length: int
    """S."""
    num_heads: int
    """N, a multiple of num_kv_heads."""
    num_kv_heads: int
    """K."""
    head_dim: int
    """H."""
    dtype: str
    """Name of the element type of q, k, v."""
    band: Band
    """Causal and window mask."""
    has_segments: bool
    """Whether segment ids are given."""
    softmax_scale: float
    """Factor on the logits."""
    return_lse: bool
    """Whether the log-sum-exp is wanted too."""
    precision: Precision
    """Format of the factors of the matrix products."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ForwardConfig:
    """How the sm_90 forward kernel cuts its work; changes the result by rounding at most."""

    compute_warpgroups: int = 2
    """Warpgroups that compute, each for 64 queries."""
    block_kv: int = 128
    """Keys loaded and multiplied at once."""
    num_stages: int = 2
    """Buffers for K and V blocks each."""
    ping_pong: bool = True
    """Warpgroups issue their matrix products in turn."""
    overlap: bool = True
    """A warpgroup's softmax runs during its own P V product."""
    reuse_q_smem: bool = False
    """The output leaves through Q's shared memory, which delays the next tile's Q."""
    heads_per_section: int = 1
    """(batch, head) pairs worked on together; a divisor of batch size * query heads."""
    compute_registers: int = 240
    """Registers of a compute thread."""
    producer_registers: int = 24
    """Registers of a producer thread."""

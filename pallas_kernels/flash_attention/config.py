"""What one attention call computes: the static part that every implementation decides on."""

# Shapes: B batch, T query, S key, N query heads, K key/value heads, H head dim.

import dataclasses
from typing import Literal

from pallas_kernels.flash_attention.masks import Band

RESIDUAL_NAMES = ("attention_out", "attention_lse")
"""`checkpoint_name`s of what the backward needs beside q, k and v: a remat policy that saves them,
such as `jax.checkpoint_policies.save_only_these_names(*RESIDUAL_NAMES)`, runs no kernel twice."""

Implementation = Literal["xla", "cudnn", "mosaic"]
Precision = Literal["bf16", "fp8", "int8"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Fp8Options:
    """What `precision="fp8"` leaves open; `fp8` has the equations."""

    rotate: bool = True
    """Multiply q and k by a random-sign Hadamard matrix, which spreads outliers over a head's
    channels (needs a head dim that is a power of two). It leaves q k^T as it is."""
    center_keys: bool = True
    """Subtract the mean key of each head, which moves all logits of a row alike."""
    exact_first_key: bool = True
    """Correct the logits of the first key, which many models give most of a row's weight (an
    attention sink): the rounding errors of one large logit do not average out."""
    gradient_format: Literal["e4m3", "e5m2"] = "e4m3"
    """8-bit format of the output's gradient."""
    backward: Literal["fp8", "bf16"] = "fp8"
    """Precision of the backward's matrix products."""
    quantize_implementation: Literal["xla", "mosaic"] = "xla"
    """Who rounds and transposes factors for the Mosaic kernels: XLA, or kernels that read each
    tensor once."""

    def __post_init__(self) -> None:
        for name, allowed in (
            ("gradient_format", ("e4m3", "e5m2")),
            ("backward", ("fp8", "bf16")),
            ("quantize_implementation", ("xla", "mosaic")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {allowed}")


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
    fp8: Fp8Options = Fp8Options()
    """Options of precision "fp8"."""
    deterministic: bool | None = None
    """Whether the gradients must be the same bit for bit on every run; None: as it comes."""


# Registers of a compute and of a producer thread, by number of compute warpgroups: what setmaxnreg
# can hand out of the 65536 of an SM (Shah et al. 2024, and its code).
_REGISTERS = {1: (240, 24), 2: (240, 24), 3: (160, 32)}


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
    persistent: bool = True
    """One CTA on each SM walks through many tiles; else each tile has a CTA of its own, which saves
    a few registers."""

    def __post_init__(self) -> None:
        if self.compute_warpgroups not in _REGISTERS:
            raise ValueError(f"{self.compute_warpgroups=} must be one of {tuple(_REGISTERS)}")
        if self.block_kv % 64 != 0 or not 64 <= self.block_kv <= 256:
            raise ValueError(
                f"{self.block_kv=} must be 64, 128, 192 or 256: wgmma contracts 64 keys at a time"
                " and has at most 256 columns"
            )
        if self.num_stages < 2:
            raise ValueError(
                f"{self.num_stages=} must be at least 2: one block is in use while another arrives"
            )

    @property
    def compute_registers(self) -> int:
        """Registers of a compute thread."""
        return _REGISTERS[self.compute_warpgroups][0]

    @property
    def producer_registers(self) -> int:
        """Registers of a producer thread."""
        return _REGISTERS[self.compute_warpgroups][1]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BackwardConfig:
    """How the sm_90 backward kernel cuts its work; changes the result by rounding at most."""

    block_q: int = 64
    """Queries loaded and multiplied at once."""
    num_q_stages: int = 2
    """Buffers for Q."""
    num_do_stages: int = 2
    """Buffers for the output's gradient."""
    overlap: bool = True
    """Exponentials run while a product of the same warpgroup is in flight; needs more registers."""
    late_dq: bool = False
    """dQ of a block is computed with dV of the next one, so that no warpgroup waits for the other's
    dS. Exponentials run beside dK and the copies of dQ beside dV; a warpgroup's dS runs beside no
    product of its own. Instead of `overlap`; not for a fixed order."""
    split_channels: bool = False
    """The compute warpgroups share 64 keys and halve the channels, instead of 64 keys each."""

    def __post_init__(self) -> None:
        if self.block_q not in (64, 128):
            raise ValueError(f"{self.block_q=} must be 64 or 128: wgmma has 64 rows")
        if self.split_channels and self.block_q != 64:
            raise ValueError(f"{self.block_q=} must be 64 with split_channels=True")
        if self.late_dq and (self.overlap or self.split_channels):
            raise ValueError(
                f"{self.late_dq=} needs overlap=False and split_channels=False: it is a schedule of"
                " its own"
            )
        for name in ("num_q_stages", "num_do_stages"):
            if getattr(self, name) < 1:
                raise ValueError(f"self.{name}={getattr(self, name)} must be at least 1")

    @property
    def compute_warpgroups(self) -> int:
        """Warpgroups that compute; one more loads."""
        return 2

    @property
    def block_kv(self) -> int:
        """Keys of one tile."""
        return 64 if self.split_channels else 128

    @property
    def compute_registers(self) -> int:
        """Registers of a compute thread."""
        return _REGISTERS[self.compute_warpgroups][0]

    @property
    def producer_registers(self) -> int:
        """Registers of a producer thread."""
        return _REGISTERS[self.compute_warpgroups][1]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Fp8BackwardConfig:
    """How the sm_90 FP8 backward kernel cuts its work; changes the result by rounding at most."""

    num_stages: int = 2
    """Buffers for each of the query side's factors."""
    separate_dq: bool = False
    """The warpgroup that loads also multiplies and adds dQ. Otherwise the two that compute do, each
    half of the columns, and wait for each other twice in a step."""
    early_dv: bool = False
    """dV's product starts as soon as the probabilities are there, not with dK's."""
    stagger: int | None = None
    """A tile begins so many blocks of queries after the tile before it, and comes back to those it
    has left out, because tiles that add to the same rows of dQ at the same time wait for each
    other. None: 2 where all tiles see the same blocks, else 0: under a causal mask each begins at
    its own diagonal, 2 blocks after the one before."""

    def __post_init__(self) -> None:
        if self.num_stages < 1:
            raise ValueError(f"{self.num_stages=} must be at least 1")
        if self.stagger is not None and self.stagger < 0:
            raise ValueError(f"{self.stagger=} must be at least 0, or None for the mask's own")

    @property
    def compute_registers(self) -> int:
        """Registers of a compute thread."""
        return 224 if self.separate_dq else 240

    @property
    def producer_registers(self) -> int:
        """Registers of a thread of the warpgroup that loads."""
        return 64 if self.separate_dq else 24

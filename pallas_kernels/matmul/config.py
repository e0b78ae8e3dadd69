"""What an FP8 product computes and how it cuts its work: shapes, memory, limits, chosen configs."""

# Shapes: M rows of lhs, N rows of rhs_t, K contracted; a tile is [tile_m, tile_n].

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hardware import SM90_SMEM_BYTES_PER_BLOCK
from pallas_kernels.mosaic import GMEM_ROWS, ROWS, SWIZZLE_BYTES, scratch_bytes, tile_transforms

BLOCK_K = SWIZZLE_BYTES
"""Contracted elements of a stage: one byte each, as wide as the widest swizzle."""
COMPUTE_WARPGROUPS = 2

Schedule = Literal["cooperative", "pingpong"]
Accumulation = Literal["fast", "exact"]

_MOST_ELEMENTS: dict[Accumulation, int] = {"fast": 128 * 128, "exact": 64 * 128}
"""Largest tile of one warpgroup. fast: 128 registers of each thread; exact: 64, three times."""
_K_MULTIPLE: dict[Accumulation, int] = {"fast": BLOCK_K, "exact": 2 * BLOCK_K}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MatmulConfig:
    """How the kernel cuts its work; changes no bit of the result."""

    tile_m: int = 128
    """Rows of a tile of the result."""
    tile_n: int = 256
    """Columns of a tile."""
    stages: int = 4
    """Blocks of lhs and rhs in flight."""
    schedule: Schedule = "cooperative"
    """cooperative: both warpgroups compute the same tile, half of its rows each. pingpong: they
    take turns with whole tiles, so that one stores its tile while the other multiplies."""
    cluster: int = 1
    """CTAs whose tiles lie one below the other and share the block of rhs by multicast."""
    group: int = 8
    """Tiles side by side that are walked through before the next ones, for L2."""
    group_axis: Literal[0, 1] = 0
    """Whether those are tiles of rows (0) or of columns (1)."""
    out_slots: int = 2
    """Staging buffers of 64 rows x 128 bytes per warpgroup, at most."""

    def __post_init__(self) -> None:
        # One stage is multiplied while the one before, or with exact accumulation after, is held.
        for name, least in (("stages", 2), ("group", 1), ("out_slots", 1)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"MatmulConfig.{name}={getattr(self, name)} must be at least {least}"
                )
        if self.schedule not in ("cooperative", "pingpong"):
            raise ValueError(f"MatmulConfig.{self.schedule=} must be cooperative or pingpong")
        if self.cluster not in (1, 2):
            raise ValueError(f"MatmulConfig.{self.cluster=} must be 1 or 2")
        if self.rows_per_warpgroup % ROWS or self.tile_m < ROWS:
            raise ValueError(
                f"MatmulConfig.{self.tile_m=} must give each warpgroup a multiple of {ROWS} rows"
            )
        if self.tile_n % 64 or not 64 <= self.tile_n <= 256:
            raise ValueError(f"MatmulConfig.{self.tile_n=} must be 64, 128, 192 or 256")

    @property
    def rows_per_warpgroup(self) -> int:
        """Rows of a tile that one warpgroup computes."""
        return self.tile_m if self.schedule == "pingpong" else self.tile_m // COMPUTE_WARPGROUPS

    @property
    def halves(self) -> int:
        """Accumulators of 64 rows of a warpgroup."""
        return self.rows_per_warpgroup // ROWS


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MatmulPlan:
    """Shapes, types and config of one kernel."""

    m: int
    n: int
    k: int
    lhs_dtype: Any
    rhs_dtype: Any
    out_dtype: Any
    config: MatmulConfig
    accumulation: Accumulation = "fast"
    """Of 8-bit products; see `sm90`."""
    sm_count: int = 132
    """Multiprocessors."""
    interpret: bool = False
    """Run in the CPU interpreter."""

    @property
    def grid(self) -> tuple[int, int]:
        """Tiles of rows, as one where CTAs of a cluster share one of columns, and of columns."""
        rows = self.config.tile_m * self.config.cluster
        return -(-self.m // rows), -(-self.n // self.config.tile_n)

    @property
    def num_tiles(self) -> int:
        """What the clusters walk through."""
        rows, columns = self.grid
        return rows * columns

    @property
    def programs(self) -> int:
        """Persistent clusters, no more than there are tiles."""
        return min(self.sm_count // self.config.cluster, self.num_tiles)

    @property
    def steps(self) -> int:
        """Blocks along K of a tile."""
        return self.k // BLOCK_K

    @property
    def out_columns(self) -> int:
        """Columns of a staging buffer: as wide as the widest swizzle."""
        return SWIZZLE_BYTES // jnp.dtype(self.out_dtype).itemsize

    @property
    def out_slots(self) -> int:
        """Staging buffers: as asked for, if those of a tile fill them a whole number of times. So
        each tile may begin with the first one."""
        per_tile = self.config.halves * (self.config.tile_n // self.out_columns)
        return math.gcd(self.config.out_slots, per_tile)


class Scratch(NamedTuple):
    """Shared memory of a CTA."""

    lhs: Any
    """[stages, tile_m, BLOCK_K]"""
    rhs: Any
    """[stages, tile_n, BLOCK_K]"""
    out: Any
    """[warpgroups, out_slots, 64, out_columns]"""
    full: Any
    """Barriers [stages], with pingpong [warpgroups * stages]: TMA has written the stage."""
    empty: Any
    """Barriers [stages]: the stage has been multiplied."""


def scratch_types(plan: MatmulPlan) -> Scratch:
    """The shared-memory plan: the single source of the allocation and of `smem_bytes`."""
    config = plan.config
    stages, is_pingpong = config.stages, config.schedule == "pingpong"
    readers = 1 if is_pingpong else COMPUTE_WARPGROUPS
    if config.cluster > 1:
        empty = plgpu.ClusterBarrier(
            collective_axes=("peer",), num_arrivals=readers, num_barriers=stages
        )
    else:
        empty = plgpu.Barrier(num_arrivals=readers, num_barriers=stages)
    operand = tile_transforms(1)
    out_dtype = jnp.dtype(plan.out_dtype)
    return Scratch(
        lhs=plgpu.SMEM((stages, config.tile_m, BLOCK_K), plan.lhs_dtype, transforms=operand),
        rhs=plgpu.SMEM((stages, config.tile_n, BLOCK_K), plan.rhs_dtype, transforms=operand),
        out=plgpu.SMEM(
            (COMPUTE_WARPGROUPS, plan.out_slots, ROWS, plan.out_columns),
            out_dtype,
            transforms=tile_transforms(out_dtype.itemsize),
        ),
        full=plgpu.Barrier(
            num_arrivals=2, num_barriers=stages * (COMPUTE_WARPGROUPS if is_pingpong else 1)
        ),
        empty=empty,
    )


def smem_bytes(plan: MatmulPlan) -> int:
    """Shared memory of one CTA, barriers included."""
    scratch = scratch_types(plan)
    # A barrier of a cluster takes as many bytes as one of a CTA.
    empty = plgpu.Barrier(num_barriers=plan.config.stages)
    return scratch_bytes((*scratch[:-1], empty))


def rejection(plan: MatmulPlan) -> str | None:
    """Why the config cannot be used; None if it can."""
    config = plan.config
    smem = smem_bytes(plan)
    if config.rows_per_warpgroup * config.tile_n > _MOST_ELEMENTS[plan.accumulation]:
        return (
            f"{config.rows_per_warpgroup} x {config.tile_n} sums of a warpgroup do not fit its"
            f" registers with {plan.accumulation} accumulation"
        )
    if smem > SM90_SMEM_BYTES_PER_BLOCK:
        return f"it needs {smem} bytes of shared memory; there are {SM90_SMEM_BYTES_PER_BLOCK}"
    if config.cluster * config.tile_m > max(plan.m, config.tile_m):
        return f"{config.cluster} CTAs with {config.tile_m} rows each have more than the {plan.m}"
    return None


def unsupported_reason(plan: MatmulPlan) -> str | None:
    """Why the kernel cannot run this shape or config; None if it can."""
    k_multiple = _K_MULTIPLE[plan.accumulation]
    # Mosaic GPU makes global arrays of whole tiles of shared memory; TMA clips those of results.
    rules = (
        (plan.m % GMEM_ROWS, f"the {plan.m} rows of lhs must be a multiple of {GMEM_ROWS}"),
        (
            plan.n % plan.out_columns,
            f"the {plan.n} rows of rhs_t must be a multiple of {plan.out_columns}",
        ),
        (
            plan.k % k_multiple,
            f"the {plan.k} contracted elements must be a multiple of {k_multiple}",
        ),
    )
    for remainder, reason in rules:
        if remainder:
            return f"{reason}; pad them"
    # Offsets in TMA descriptors and Mosaic's indices are int32.
    largest = max(plan.m * plan.k, plan.n * plan.k, plan.m * plan.n)
    if largest >= 2**31:
        return f"a matrix of {largest} elements does not fit int32; split the rows"
    why = rejection(plan)
    return None if why is None else f"{plan.config}: {why}"


TUNED_H200: dict[tuple[int, int, int], MatmulConfig] = {}
"""The fastest config by (m, k, n) with fast accumulation; `benchmarks.matmul` prints them."""


def config_for(
    m: int,
    n: int,
    k: int,
    out_dtype: jax.typing.DTypeLike,
    accumulation: Accumulation = "fast",
) -> MatmulConfig:
    """The config for a shape: the measured one, or by rule of thumb.

    The largest tile reads the least from L2; a smaller one where that would leave multiprocessors
    without a tile.
    """
    if accumulation == "exact":
        return MatmulConfig(tile_m=128, tile_n=128, stages=6)
    tuned = TUNED_H200.get((m, k, n))
    if tuned is not None and jnp.dtype(out_dtype).itemsize == 2:
        return tuned
    if m * n < 132 * 128 * 256:
        return MatmulConfig(tile_m=128, tile_n=128, stages=5)
    return MatmulConfig()


_TILES: tuple[tuple[int, int, int, Schedule], ...] = (
    # tile_m, tile_n, stages, schedule
    (128, 256, 4, "cooperative"),
    (128, 128, 6, "pingpong"),
    (256, 128, 4, "cooperative"),
    (64, 256, 4, "pingpong"),
    (128, 256, 3, "cooperative"),
    (128, 128, 6, "cooperative"),
)
_ORDERS: tuple[tuple[int, int, Literal[0, 1]], ...] = (
    # cluster, group, group_axis
    (1, 8, 0),
    (2, 8, 0),
    (1, 16, 0),
    (1, 8, 1),
)


def candidates(accumulation: Accumulation = "fast") -> list[MatmulConfig]:
    """Configs worth timing: every tile, and the first two in every order; then clusters of others.

    With exact accumulation the one tile that fits the registers. `rejection` says which of them a
    shape cannot use.
    """
    chosen = [(tile, _ORDERS[0]) for tile in _TILES]
    chosen += [(tile, order) for tile in _TILES[:2] for order in _ORDERS[1:]]
    chosen += [(tile, _ORDERS[1]) for tile in _TILES[2:4]]
    if accumulation == "exact":
        chosen = [(_TILES[-1], order) for order in _ORDERS]
    return [
        MatmulConfig(
            tile_m=tile_m,
            tile_n=tile_n,
            stages=stages,
            schedule=schedule,
            cluster=cluster,
            group=group,
            group_axis=axis,
        )
        for (tile_m, tile_n, stages, schedule), (cluster, group, axis) in chosen
    ]

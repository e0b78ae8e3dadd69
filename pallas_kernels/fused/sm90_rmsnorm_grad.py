"""Gradient of RMSNorm for sm_90a, added to that of the residual connection around it.

  y = x r w,   r = rsqrt(mean(x^2) + eps);   given dy, and the gradient g of x from elsewhere:
  c  = mean(dy w x) r^2,   dx = g + r (dy w - x c),   dw = sum over rows of dy x r

Each operand is read once and dx written once. A CTA is one warpgroup and takes whole rows in turn;
a thread holds the same K / 128 columns of every row, so dw is summed in registers, in a fixed
order, and leaves as one partial sum for each CTA. Several CTAs share a multiprocessor.

  step, for each row                       ordered by
  TMA loads of a row into its slot         commit_smem: all threads have read the slot
  registers <- slot; sum over the row      TMA -> `full` (one barrier per slot)
  staging buffer <- registers              the TMA store of the CTA's last row has read it
  TMA store                                commit_smem

Not supported: K not a multiple of 1024, or above 4096 (registers).
"""

# Shapes: M rows, K columns, P programs (CTAs).

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic import launcher, scratch_bytes

_STAGES = 4  # rows in flight
_INPUTS = 3  # x, dy, g
_BOX = 256  # the most that TMA copies along one dimension
_VECTOR = 8  # elements of 16 bits that a thread loads at once
_COLUMNS = 128 * _VECTOR
MAX_COLUMNS = 4096
_CTAS_PER_SM = 2  # 231 registers a thread at 4096 columns


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RmsNormGradPlan:
    """Shapes and types of one kernel."""

    rows: int
    """M."""
    columns: int
    """K."""
    dtype: Any
    """Of x and the gradients, 16 bits."""
    sm_count: int = 132
    """Multiprocessors."""
    interpret: bool = False
    """Run in the CPU interpreter."""

    @property
    def programs(self) -> int:
        """P."""
        return min(self.sm_count * _CTAS_PER_SM, self.rows)

    @property
    def row_shape(self) -> tuple[int, int]:
        """A row as boxes of TMA."""
        return self.columns // _BOX, _BOX


def unsupported_reason(plan: RmsNormGradPlan) -> str | None:
    """Why the kernel cannot run these shapes; None if it can."""
    rules = (
        (
            plan.columns % _COLUMNS == 0 and plan.columns <= MAX_COLUMNS,
            f"the {plan.columns} columns must be a multiple of {_COLUMNS} up to {MAX_COLUMNS}",
        ),
        (
            plan.rows * plan.columns < 2**31,
            f"{plan.rows} x {plan.columns} elements do not fit int32; split the rows",
        ),
        (
            jnp.dtype(plan.dtype).itemsize == 2,
            f"x.dtype={plan.dtype} must have 16 bits; cast it",
        ),
    )
    return next((reason for holds, reason in rules if not holds), None)


def scratch_types(plan: RmsNormGradPlan) -> dict[str, Any]:
    """Shared memory: the single source of its allocation and of `smem_bytes`."""
    return {
        "loaded": plgpu.SMEM((_STAGES, _INPUTS, *plan.row_shape), plan.dtype),
        "staged": plgpu.SMEM(plan.row_shape, plan.dtype),
        "full": plgpu.Barrier(num_arrivals=_INPUTS, num_barriers=_STAGES),
    }


def smem_bytes(plan: RmsNormGradPlan) -> int:
    """Shared memory of one CTA."""
    return scratch_bytes(scratch_types(plan).values())


def _kernel(
    x: Any, dy: Any, g: Any, rstd: Any, weight: Any, dx: Any, dw: Any, *,
    loaded: Any, staged: Any, full: Any, plan: RmsNormGradPlan,
) -> None:  # fmt: skip
    """Every P-th row."""
    cta, programs = lax.axis_index("cta"), plan.programs
    layout = plgpu.Layout.WG_STRIDED(plan.row_shape, vec_size=_VECTOR)
    count = lax.div(plan.rows - cta + (programs - 1), jnp.int32(programs))

    def load(i: Any, slot: Any) -> None:
        for n, source in enumerate((x, dy, g)):
            plgpu.copy_gmem_to_smem(
                source.at[cta + i * programs], loaded.at[slot, n], full.at[slot]
            )

    for i in range(_STAGES):
        pl.when(i < count)(functools.partial(load, jnp.int32(i), i))
    w = plgpu.load(weight, layout=layout, optimized=False)

    def step(i: Array, sums: Array) -> Array:
        slot, row = lax.rem(i, jnp.int32(_STAGES)), cta + i * programs
        r = rstd[row]
        plgpu.barrier_wait(full.at[slot])
        x_row, dy_row, g_row = (
            plgpu.load(loaded.at[slot, n], layout=layout).astype(jnp.float32)
            for n in range(_INPUTS)
        )
        x_row *= r
        dy_w = dy_row * w
        c = jnp.sum(dy_w * x_row) * (1.0 / plan.columns)
        result = g_row + r * (dy_w - x_row * c)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        staged[...] = result.astype(plan.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(staged, dx.at[row])
        pl.when(i + _STAGES < count)(lambda: load(i + _STAGES, slot))
        return sums + dy_row * x_row

    zeros = plgpu.layout_cast(jnp.zeros(plan.row_shape, jnp.float32), layout)
    dw.at[cta][...] = lax.fori_loop(0, count, step, zeros)
    plgpu.wait_smem_to_gmem(0)


@launcher("plan")
def launch(
    plan: RmsNormGradPlan, x: Array, dy: Array, g: Array, rstd: Array, weight: Array
) -> tuple[Array, Array]:
    """Runs the kernel.

    Args:
      plan: a supported one.
      x: `[M, K]`.
      dy: `[M, K]`.
      g: `[M, K]`.
      rstd: float32 `[M]`.
      weight: float32 `[K]`.

    Returns: dx `[M, K]`, and partial sums of dw, float32 `[P, K]`.
    """
    shape = plan.row_shape
    struct = jax.ShapeDtypeStruct
    dx, dw = plgpu.kernel(
        functools.partial(_kernel, plan=plan),
        out_type=(
            struct((plan.rows, *shape), plan.dtype),
            struct((plan.programs, *shape), jnp.float32),
        ),
        scratch_types=scratch_types(plan),
        grid=(plan.programs,),
        grid_names=("cta",),
        kernel_name="rmsnorm_grad",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if plan.interpret else None,
    )(*(a.reshape(plan.rows, *shape) for a in (x, dy, g)), rstd, weight.reshape(shape))
    return dx.reshape(plan.rows, plan.columns), dw.reshape(plan.programs, plan.columns)

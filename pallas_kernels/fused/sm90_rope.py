"""The gradient of a fused QKV projection for sm_90a: rotary positions undone, heads interleaved.

  for each key/value head and its g query heads:   dqkv = [R^T dq_1 | .. | R^T dq_g | R^T dk | dv]
  R^T turns (a, b), the two halves of a head, to (a cos + b sin, b cos - a sin)

in one pass over memory. A CTA is one warpgroup and makes the g + 2 heads of 64 tokens and one
key/value head; several CTAs share a multiprocessor. The halves of a head land in two buffers, so a
thread holds both coordinates of a plane and no element crosses registers.

  step, for head i                            ordered by
  TMA load of head i + stages into its slot   commit_smem: all threads have read the slot
  registers <- slot; rotate                   TMA -> `full` (one barrier per slot)
  staging buffer <- registers                 the TMA store of head i - 1 has read it
  TMA store                                   commit_smem

Not supported: head dims other than 64 and 128, M not a multiple of 64, more than 16 query heads to
a key/value head (the heads are unrolled).
"""

# Shapes: M tokens, K key/value heads, g query heads of each, H head dim.

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic import MATRIX, ROWS, launcher, scratch_bytes, tile_transforms

HEAD_DIMS = (64, 128)
_STAGES = 3  # heads in flight
_MAX_GROUP = 16


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RopePlan:
    """Shapes and types of one kernel."""

    tokens: int
    """M."""
    num_kv_heads: int
    """K."""
    group: int
    """g."""
    head_dim: int
    """H."""
    dtype: Any
    """Of the gradients, 16 bits."""
    interpret: bool = False
    """Run in the CPU interpreter."""

    @property
    def heads(self) -> int:
        """Heads that a CTA makes."""
        return self.group + 2


def unsupported_reason(plan: RopePlan) -> str | None:
    """Why the kernel cannot run these shapes; None if it can."""
    rules = (
        (plan.head_dim in HEAD_DIMS, f"head_dim={plan.head_dim} must be one of {HEAD_DIMS}"),
        (plan.tokens % ROWS == 0, f"the {plan.tokens} tokens must be a multiple of {ROWS}"),
        (
            plan.group <= _MAX_GROUP,
            f"{plan.group} query heads to a key/value head must be at most {_MAX_GROUP}",
        ),
        (
            plan.tokens * plan.num_kv_heads * plan.heads * plan.head_dim < 2**31,
            f"{plan.tokens} tokens of {plan.num_kv_heads * plan.heads} heads do not fit int32;"
            " split the tokens",
        ),
        (
            jnp.dtype(plan.dtype).itemsize == 2,
            f"the gradients' dtype {plan.dtype} must have 16 bits; cast them",
        ),
    )
    return next((reason for holds, reason in rules if not holds), None)


def scratch_types(plan: RopePlan) -> dict[str, Any]:
    """Shared memory: the single source of its allocation and of `smem_bytes`."""
    half = plan.head_dim // 2
    buffer = lambda slots: plgpu.SMEM(  # noqa: E731
        (slots, 2, ROWS, half), plan.dtype, transforms=tile_transforms(2, half)
    )
    return {
        "heads": buffer(_STAGES),
        "staged": buffer(1),
        "full": plgpu.Barrier(num_arrivals=2, num_barriers=_STAGES),  # TMA -> the warpgroup
    }


def smem_bytes(plan: RopePlan) -> int:
    """Shared memory of one CTA."""
    return scratch_bytes(scratch_types(plan).values())


def _load(plan: RopePlan, sources: Any, heads: Any, full: Any, i: int) -> None:
    """Starts the TMA loads of the two halves of head i."""
    row = pl.ds(lax.axis_index("tokens") * ROWS, ROWS)
    kv, half = lax.axis_index("kv_head"), plan.head_dim // 2
    if i < plan.group:
        source, head = sources[0], kv * plan.group + i
    else:
        source, head = sources[1 + i - plan.group], kv
    slot = i % _STAGES
    for part in (0, 1):
        columns = pl.ds(head * plan.head_dim + part * half, half)
        plgpu.copy_gmem_to_smem(source.at[row, columns], heads.at[slot, part], full.at[slot])


def _send(plan: RopePlan, staged: Any, out: Any, i: int) -> None:
    """Starts the TMA stores of head i, as one group."""
    row = pl.ds(lax.axis_index("tokens") * ROWS, ROWS)
    head, half = lax.axis_index("kv_head") * plan.heads + i, plan.head_dim // 2
    for part in (0, 1):
        columns = pl.ds(head * plan.head_dim + part * half, half)
        plgpu.copy_smem_to_gmem(staged.at[0, part], out.at[row, columns], commit_group=False)
    plgpu.commit_smem_to_gmem_group()


def _kernel(
    dq: Any, dk: Any, dv: Any, cos: Any, sin: Any, out: Any, *,
    heads: Any, staged: Any, full: Any, plan: RopePlan,
) -> None:  # fmt: skip
    """The heads of 64 tokens and one key/value head."""
    load = functools.partial(_load, plan, (dq, dk, dv), heads, full)
    for i in range(min(_STAGES, plan.heads)):
        load(i)
    row = pl.ds(lax.axis_index("tokens") * ROWS, ROWS)
    cos, sin = (plgpu.load(x.at[row], layout=MATRIX, optimized=False) for x in (cos, sin))
    for i in range(plan.heads):
        slot = i % _STAGES
        plgpu.barrier_wait(full.at[slot])
        a, b = (plgpu.load(heads.at[slot, part], layout=MATRIX) for part in (0, 1))
        if i <= plan.group:  # dv is not rotated
            a, b = a.astype(jnp.float32), b.astype(jnp.float32)
            a, b = a * cos + b * sin, b * cos - a * sin
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for part, x in enumerate((a, b)):
            staged.at[0, part][...] = x.astype(plan.dtype)
        plgpu.commit_smem()
        _send(plan, staged, out, i)
        if i + _STAGES < plan.heads:
            load(i + _STAGES)
    plgpu.wait_smem_to_gmem(0)


@launcher("plan")
def launch(plan: RopePlan, dq: Array, dk: Array, dv: Array, cos: Array, sin: Array) -> Array:
    """Runs the kernel.

    Args:
      plan: a supported one.
      dq: `[M, K g H]`.
      dk: `[M, K H]`.
      dv: `[M, K H]`.
      cos: float32 `[M, H / 2]`.
      sin: like cos.

    Returns: dqkv `[M, K (g + 2) H]`.
    """
    width = plan.num_kv_heads * plan.heads * plan.head_dim
    return plgpu.kernel(
        functools.partial(_kernel, plan=plan),
        out_type=jax.ShapeDtypeStruct((plan.tokens, width), plan.dtype),
        scratch_types=scratch_types(plan),
        grid=(plan.tokens // ROWS, plan.num_kv_heads),
        grid_names=("tokens", "kv_head"),
        kernel_name="rope_grad",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if plan.interpret else None,
    )(dq, dk, dv, cos, sin)

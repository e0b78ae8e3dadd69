"""The walk of persistent CTAs over the blocks of all heads, for kernels that read tensors once.

A tensor `[B, L, heads, H]` is cut into blocks of rows of a head. All CTAs run at once; CTA c of C
takes blocks c, c + C, c + 2 C and so on, heads first, because they lie side by side in memory. It
keeps as many loads in flight as it has stages:

  load 0 .. stages - 1;   for each block i: step(i), which waits for it;   load i + stages

A step must end with a barrier of the warpgroup (`plgpu.commit_smem`) behind its reads of the
stage, which the next load overwrites.

Not supported: more than one warpgroup in a CTA.
"""

# Shapes: B batch, L length, H head dim.

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class HeadBlocks:
    """The blocks of a tensor, and who takes which; the kernel's grid has one axis, "cta"."""

    batch_size: int
    """B."""
    num_heads: int
    """Of the tensor."""
    blocks_per_head: int
    """Along L."""
    max_ctas: int
    """CTAs that the device holds at once."""

    @property
    def num_blocks(self) -> int:
        """Blocks of all heads."""
        return self.batch_size * self.num_heads * self.blocks_per_head

    @property
    def num_ctas(self) -> int:
        """CTAs launched: all of them run at once."""
        return min(self.max_ctas, self.num_blocks)

    def position(self, i: Array) -> tuple[Array, Array, Array]:
        """Returns batch row, head, and block of the head, of this CTA's i-th block."""
        heads, blocks = jnp.int32(self.num_heads), jnp.int32(self.blocks_per_head)
        index = lax.axis_index("cta") + i * self.num_ctas
        rest, head = lax.div(index, heads), lax.rem(index, heads)
        return lax.div(rest, blocks), head, lax.rem(rest, blocks)

    def walk(
        self,
        load: Callable[[Array, Any], None],
        step: Callable[[Array, Array], None],
        *,
        stages: int,
        prepare: Callable[[], None] = lambda: None,
    ) -> None:
        """Takes this CTA's blocks in turn.

        Args:
          load: `load(i, stage)` starts the loads of block i into a stage.
          step: `step(i, stage)` waits for them, and ends with a barrier behind its reads.
          stages: loads in flight.
          prepare: what is done once, while the first loads are under way.
        """
        rest = self.num_blocks - lax.axis_index("cta") + (self.num_ctas - 1)
        count = lax.div(rest, jnp.int32(self.num_ctas))
        for i in range(stages):
            pl.when(i < count)(functools.partial(load, jnp.int32(i), i))
        prepare()

        def one(i: Array, _: None) -> None:
            stage = lax.rem(i, jnp.int32(stages))
            step(i, stage)
            pl.when(i + stages < count)(lambda: load(i + stages, stage))

        lax.fori_loop(0, count, one, None)

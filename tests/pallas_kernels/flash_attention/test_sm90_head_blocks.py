"""The walk over blocks of all heads; the kernels that walk so run it in their own tests."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.flash_attention.sm90_head_blocks import HeadBlocks


@pytest.mark.parametrize("max_ctas", [1, 4, 100])
def test_each_block_has_its_turn_with_one_cta_heads_first(max_ctas):
    blocks = HeadBlocks(batch_size=2, num_heads=3, blocks_per_head=5, max_ctas=max_ctas)
    assert blocks.num_ctas == min(max_ctas, 30)
    rounds = jnp.arange(-(-30 // blocks.num_ctas))
    position = jax.vmap(blocks.position, axis_name="cta", axis_size=blocks.num_ctas, in_axes=None)
    batch, head, block = (np.ravel(x)[:30] for x in jax.vmap(position)(rounds))
    want = [(b, h, i) for b in range(2) for i in range(5) for h in range(3)]
    assert list(zip(batch, head, block, strict=True)) == want

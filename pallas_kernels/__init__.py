"""Attention and FP8 kernels for NVIDIA Hopper: arrays in, arrays out; no Flax, no state.

`flash_attention` here is the function; its implementations live in the folder of the same name, so
import those with `from pallas_kernels.flash_attention import ...`.
"""

from pallas_kernels.flash_attention.api import flash_attention, flash_attention_choice

__all__ = ["flash_attention", "flash_attention_choice"]

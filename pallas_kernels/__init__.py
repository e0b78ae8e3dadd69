"""Attention and FP8 kernels for NVIDIA Hopper: arrays in, arrays out; no Flax, no state.

`flash_attention` and `quantize` here are the functions; their implementations live in the folders
of the same names, so import those with `from pallas_kernels.flash_attention import ...`.
"""

from pallas_kernels.flash_attention.api import flash_attention, flash_attention_choice
from pallas_kernels.flash_attention.config import Fp8Options
from pallas_kernels.flash_attention.rope_attention import rope_flash_attention
from pallas_kernels.fused.rmsnorm import rmsnorm, rmsnorm_quantize
from pallas_kernels.fused.rope import rope_qkv
from pallas_kernels.fused.swiglu import swiglu, swiglu_grad_quantize, swiglu_quantize
from pallas_kernels.matmul.api import fp8_matmul
from pallas_kernels.quantize.api import quantize
from pallas_kernels.quantize.contract import Quantized

__all__ = [
    "Fp8Options",
    "Quantized",
    "flash_attention",
    "flash_attention_choice",
    "fp8_matmul",
    "quantize",
    "rmsnorm",
    "rmsnorm_quantize",
    "rope_flash_attention",
    "rope_qkv",
    "swiglu",
    "swiglu_grad_quantize",
    "swiglu_quantize",
]

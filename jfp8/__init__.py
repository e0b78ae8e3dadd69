"""FP8 training for JAX on NVIDIA Hopper: a dot whose scaling state is correct by construction.

Convention: a *scale* is always the factor of dequantisation, x ~= q * scale, and a power of two.
docs/fp8_state.md explains the state. `jfp8.nnx` and `jfp8.linen` hold the Flax layers,
`jfp8.diagnostics` the proof that FP8 is what runs; import those three by name.
"""

from jfp8.dot_general import RESIDUAL_NAMES, dot_general
from jfp8.formats import E4M3, E5M2, Format
from jfp8.gemms import CastInput, CastKernel, cast_kernel
from jfp8.quantize import dequantize, quantize
from jfp8.recipe import Recipe
from jfp8.rmsnorm_cast import can_cast_norm, rmsnorm_cast
from jfp8.scaling import BINS, Health, ScalingState, health, init_state, update
from jfp8.swiglu_mlp import swiglu_mlp

__all__ = [
    "BINS",
    "CastInput",
    "CastKernel",
    "E4M3",
    "E5M2",
    "RESIDUAL_NAMES",
    "Format",
    "Health",
    "Recipe",
    "ScalingState",
    "can_cast_norm",
    "cast_kernel",
    "dequantize",
    "dot_general",
    "health",
    "init_state",
    "quantize",
    "rmsnorm_cast",
    "swiglu_mlp",
    "update",
]

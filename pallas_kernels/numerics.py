"""Constants that several kernels share."""

import math

LOG2E = math.log2(math.e)
"""exp(x) = exp2(x * LOG2E): the GPU's special function unit computes exp2."""
LN2 = math.log(2.0)
"""Converts a base-2 logarithm to a natural one."""
E4M3_MAX = 448.0
"""Largest finite float8_e4m3fn (Micikevicius et al. 2022, arXiv:2209.05433)."""
E5M2_MAX = 57344.0
"""Largest finite float8_e5m2 (the same paper)."""
INT8_MAX = 127.0
"""Largest value of a symmetric int8 format; -128 stays unused."""

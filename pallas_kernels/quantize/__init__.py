"""Implementations of `pallas_kernels.quantize`, and the tile loop that the fused kernels share."""

"""Softmax attention: one public function (`api`) over several implementations.

Where things are, for who changes a kernel:

  api, config, masks, partition    the function; what a call computes; who sees whom; meshes
  xla, cudnn                       implementations without a kernel of ours
  fp8, fp8_quantize, fp8_xla,      FP8: constants and orders of elements; factors and scales; the
  fp8_vjp                          same in XLA, which the kernels are held to; its derivative
  tuning, tuned_h200.json          which config a call runs with, and which are worth timing
  sm90, sm90_fp8                   from arrays to launches: padding, segment ids, scales
  sm90_{fwd,bwd}_{bf16,fp8}        the kernels: their text begins with maths, warps and barriers
  sm90_{fwd,bwd,bwd_fp8}_plan      shared memory, barriers, tiles: what is new begins in `Scratch`
  sm90_{fwd,bwd}_loop, sm90_softmax, sm90_isolation, sm90_bwd_fp8_{loads,dq}    their steps
  sm90_bwd_rows, sm90_quantize_fp8, sm90_columns_fp8, sm90_finish_fp8           what runs before and
  after them; `sm90_head_blocks` is how most of these walk
  rope_attention, sm90_rope_*      FP8 from a fused QKV projection, rotary positions included

What tells whether a change is right, in tests/pallas_kernels/flash_attention; only the last two
need a GPU:

  pytest test_sm90_* -k interpreted    the numbers, and no race in shared memory
  pytest test_slow_warpgroups.py       no barrier runs ahead of a warpgroup that is late
  pytest test_sm90_* -k compiles       no spills, no serialised products, for every shipped config
  pytest -m gpu .                      the numbers where A operands lie in registers
  python -m benchmarks.attention       the speed, beside cuDNN's

The loops use all registers that a thread may have. A change that adds none, even outside a loop,
can make ptxas spill or serialise the products, so compile after each; `pin`, and what is computed
anew instead of held, are there for that reason. Mosaic writes a kernel's SASS to
MOSAIC_GPU_DUMP_TO, an existing folder, if nvdisasm is in the bin of MOSAIC_GPU_CUDA_ROOT.
"""

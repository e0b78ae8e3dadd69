"""Compiles for Hopper (sm_90a) on a machine without a GPU.

Needs the extra `compile`: the CUDA plugin of JAX in the version of jaxlib, and the pip packages of
ptxas and libdevice. Nothing runs; the result's `as_text()` is the optimised HLO of the GPU.
"""

import functools
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# A GpuTargetConfigProto of an H200; figures from NVIDIA's Hopper tuning guide and data sheet.
_H200 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H200"
dnn_version_info { major: 9 minor: 10 patch: 0 }
gpu_device_info {
  name: "NVIDIA H200"
  device_vendor: "NVIDIA Corporation"
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  platform_version: "Compute Capability 9.0a"
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
  device_address_bits: 64
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  device_memory_size: 151397597184
  memory_bandwidth: 4800000000000
  l2_cache_size: 52428800
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
}
"""


def cuda_data_dir() -> Path:
    """The folder that holds bin/ptxas and nvvm/libdevice of the pip packages.

    Raises:
      RuntimeError: when they are not installed.
    """
    spec = importlib.util.find_spec("nvidia")
    for root in spec.submodule_search_locations if spec else ():
        for folder in Path(root).iterdir():
            if (folder / "bin/ptxas").exists() and (folder / "nvvm/libdevice").is_dir():
                return folder
    raise RuntimeError(
        "no ptxas and libdevice among the pip packages; install the extra: pip install '.[compile]'"
    )


@functools.cache
def h200_mesh() -> Mesh:
    """One H200 that does not exist, as a mesh with the axis "x"."""
    topology = topologies.get_topology_desc(platform="cuda", target_config=_H200, topology="1x1x1")
    return topologies.make_mesh(topo=topology, mesh_shape=(1,), axis_names=("x",))


def compile_for_h200(function: Callable[..., Any], *args: Any, **jit_options: Any) -> Any:
    """`jax.jit(function).lower(*args).compile()` for the H200.

    Triton GEMMs are off: whether one is faster than cuBLAS is measured on the GPU, which there is
    none of, so XLA would guess. Run with JAX_PLATFORMS=cpu: otherwise JAX's plugin looks for a GPU
    and its libraries, and does not register without.

    Args:
      function: to be compiled.
      *args: pytrees of arrays or `jax.ShapeDtypeStruct`; only shapes and dtypes matter.
      **jit_options: for `jax.jit`.

    Returns: a `jax.stages.Compiled` that cannot run, but can be read.
    """
    sharding = NamedSharding(h200_mesh(), PartitionSpec())
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=sharding), args
    )
    lowered = jax.jit(function, **jit_options).lower(*shapes)
    return lowered.compile(
        compiler_options={
            "xla_gpu_cuda_data_dir": str(cuda_data_dir()),
            "xla_gpu_enable_triton_gemm": False,
        }
    )


def kernel_launches(text: str) -> int:
    """How many Mosaic kernels a StableHLO module launches; equal ones share a function."""
    bodies = dict(re.findall(r"func\.func \w+ @([\w.]+)\((.*?)\n  }", text, re.S))

    @functools.cache
    def count(name: str) -> int:
        body = bodies[name]
        own = len(re.findall(r"custom_call @mosaic_gpu\w*", body))
        return own + sum(map(count, re.findall(r"(?<!custom_)call @([\w.]+)\(", body)))

    return count("main")

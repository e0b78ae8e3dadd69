"""What the kernels and the trainer need to know about a GPU, looked up by JAX's `device_kind`.

Importing this module touches no device. Peaks are NVIDIA's figures for dense matrices (H100 and
H200 data sheets, without the factor two of 2:4 sparsity), at the boost clock.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

SM90_SMEM_BYTES_PER_BLOCK = 227 * 1024
"""Shared memory that one block may use on sm_90 (CUDA programming guide, compute capabilities)."""
SM90_REGISTERS_PER_BLOCK = 65536
"""32-bit registers that one block may use on sm_90."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GpuFacts:
    """Data-sheet facts of one GPU model."""

    sm_count: int
    """Streaming multiprocessors that are enabled."""
    bf16_tflops: float
    """Dense bf16 or f16 tensor-core peak [TFLOP/s]; 8-bit formats reach twice this."""
    memory_tb_per_s: float
    """Peak bandwidth of the device memory [TB/s]."""
    compute_capability: tuple[int, int] = (9, 0)
    """CUDA compute capability."""


# The first entry whose key is a substring of the device kind wins, so the special models stand
# first.
_GPUS: dict[str, GpuFacts] = {
    "H100 PCIe": GpuFacts(sm_count=114, bf16_tflops=756.0, memory_tb_per_s=2.0),
    "H100 NVL": GpuFacts(sm_count=132, bf16_tflops=835.0, memory_tb_per_s=3.9),
    "H200 NVL": GpuFacts(sm_count=132, bf16_tflops=835.0, memory_tb_per_s=4.8),
    "H100 80GB HBM3": GpuFacts(sm_count=132, bf16_tflops=989.0, memory_tb_per_s=3.35),
    "H100 SXM": GpuFacts(sm_count=132, bf16_tflops=989.0, memory_tb_per_s=3.35),
    "GH200": GpuFacts(sm_count=132, bf16_tflops=989.0, memory_tb_per_s=4.0),
    "H200": GpuFacts(sm_count=132, bf16_tflops=989.0, memory_tb_per_s=4.8),
}
_HALF_DTYPES = ("bfloat16", "float16")
_BYTE_DTYPES = ("float8_e4m3fn", "float8_e5m2", "int8")

_assumed_device_kind: contextvars.ContextVar[str | None] = contextvars.ContextVar(
    "assumed_device_kind", default=None
)


def gpu_facts(device_kind: str) -> GpuFacts | None:
    """Returns the facts of the GPU that JAX calls `device_kind`; None if it is not in the table."""
    return next((facts for key, facts in _GPUS.items() if key in device_kind), None)


def peak_tflops(device_kind: str, dtype: DTypeLike) -> float | None:
    """Returns the dense tensor-core peak of a device.

    Args:
      device_kind: `jax.Device.device_kind`, such as "NVIDIA H200".
      dtype: element type of the factors: bfloat16, float16, float8_e4m3fn, float8_e5m2 or int8.

    Returns:
      TFLOP/s (TOP/s for int8), or None if the device or the type is not in the table.
    """
    facts = gpu_facts(device_kind)
    name = jnp.dtype(dtype).name
    if facts is None or name not in _HALF_DTYPES + _BYTE_DTYPES:
        return None
    # The data sheets round the 8-bit figure of the SXM parts to 1979.
    byte_tflops = 1979.0 if facts.bf16_tflops == 989.0 else 2 * facts.bf16_tflops
    if facts.bf16_tflops == 756.0:
        byte_tflops = 1513.0
    return facts.bf16_tflops if name in _HALF_DTYPES else byte_tflops


@contextlib.contextmanager
def assume_device_kind(device_kind: str) -> Iterator[None]:
    """Makes the kernels decide as if they ran on `device_kind`, to lower or compile without it.

    Affects what is traced inside the block. A function that `jax.jit` has already traced keeps its
    old decision.

    Raises:
      ValueError: if the table has no such GPU.
    """
    if gpu_facts(device_kind) is None:
        raise ValueError(
            f"device_kind={device_kind!r} is not a known GPU; use one whose name contains"
            f" one of {sorted(_GPUS)}"
        )
    token = _assumed_device_kind.set(device_kind)
    try:
        yield
    finally:
        _assumed_device_kind.reset(token)


def is_device_assumed() -> bool:
    """Returns whether `assume_device_kind` is in force."""
    return _assumed_device_kind.get() is not None


def current_device_kind() -> str:
    """Returns the kind of the default device, "NVIDIA H200" or "cpu"; starts JAX's backend."""
    return _assumed_device_kind.get() or jax.devices()[0].device_kind


def require_gpu(minimum_compute_capability: tuple[int, int] = (0, 0)) -> tuple[bool, str]:
    """Tells whether the default device is an NVIDIA GPU of at least some compute capability.

    Returns:
      Whether it is, and one sentence that says what was found.
    """
    capability = _current_compute_capability()
    wanted = ".".join(map(str, minimum_compute_capability))
    if capability is None:
        return False, f"the default device is {current_device_kind()!r}, not an NVIDIA GPU"
    found = f"{current_device_kind()} has compute capability {capability[0]}.{capability[1]}"
    if capability < minimum_compute_capability:
        return False, f"{found}; at least {wanted} is needed"
    return True, found


def require_sm90() -> tuple[bool, str]:
    """Tells whether the default device runs sm_90a code (wgmma, TMA): Hopper and nothing else.

    Returns:
      Whether it does, and one sentence that says what was found.
    """
    is_gpu, reason = require_gpu()
    if is_gpu and _current_compute_capability() != (9, 0):
        return False, f"{reason}; sm_90a code runs on 9.0 (Hopper) alone"
    return is_gpu, reason


def _current_compute_capability() -> tuple[int, int] | None:
    """Compute capability of the default device; None if it is no NVIDIA GPU."""
    assumed = _assumed_device_kind.get()
    if assumed is not None:
        facts = gpu_facts(assumed)
        assert facts is not None, f"assume_device_kind let {assumed!r} pass"
        return facts.compute_capability
    device = jax.devices()[0]
    # ROCm devices answer "gfx942" here.
    capability = str(getattr(device, "compute_capability", ""))
    major, _, minor = capability.partition(".")
    if device.platform != "gpu" or not (major.isdigit() and minor.isdigit()):
        return None
    return int(major), int(minor)

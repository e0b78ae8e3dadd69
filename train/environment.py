"""The environment of a run: XLA options, each with its reason; set before JAX is imported."""

import importlib.util
import os
import shutil

XLA_FLAGS = (
    # Every GEMM goes to cuBLASLt: in Triton's fusions an FP8 GEMM may run in 16 bits, unseen.
    "--xla_gpu_enable_triton_gemm=false",
    # Overlaps collectives with compute on several GPUs; also orders one GPU's work for less memory.
    "--xla_gpu_enable_latency_hiding_scheduler=true",
    # Bitwise repeatable reductions, scatters and convolutions, so that a resumed run equals an
    # undisturbed one.
    "--xla_gpu_exclude_nondeterministic_ops=true",
)


def prepare_environment() -> None:
    """Adds `XLA_FLAGS`, and keeps JAX to the CPU where there is no NVIDIA driver.

    What the user has set already stays as it is.
    """
    given = os.environ.get("XLA_FLAGS", "")
    added = [flag for flag in XLA_FLAGS if flag.split("=")[0] not in given]
    os.environ["XLA_FLAGS"] = " ".join([given, *added]).strip()
    # The CUDA plugin, installed for compiling without a GPU, would log a traceback at every start.
    has_plugin = importlib.util.find_spec("jax_cuda13_plugin") is not None
    if has_plugin and not shutil.which("nvidia-smi"):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")

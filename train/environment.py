"""The environment of a run: XLA options, each with its reason; set before JAX is imported."""

import importlib.util
import os
import shutil
from pathlib import Path

XLA_FLAGS = (
    # Every GEMM goes to cuBLASLt: in Triton's fusions an FP8 GEMM may run in 16 bits, unseen.
    "--xla_gpu_enable_triton_gemm=false",
    # Overlaps collectives with compute on several GPUs; also orders one GPU's work.
    "--xla_gpu_enable_latency_hiding_scheduler=true",
    # What the program rounds to bfloat16 is stored so. Otherwise XLA skips roundings where it can,
    # and keeps float32 activations: twice the memory traffic, and other numbers on a GPU.
    "--xla_allow_excess_precision=false",
)


# Not here: --xla_gpu_deterministic_ops and --xla_gpu_exclude_nondeterministic_ops. They turn GEMM
# autotuning off, and with several layers of cuDNN attention the compiled step fails to run.


def prepare_environment() -> None:
    """Adds `XLA_FLAGS`; gives JAX most of a GPU's memory, or the CPU where no NVIDIA driver is.

    What the user has set already stays as it is.
    """
    given = os.environ.get("XLA_FLAGS", "")
    added = [flag for flag in XLA_FLAGS if flag.split("=")[0] not in given]
    os.environ["XLA_FLAGS"] = " ".join([given, *added]).strip()
    # JAX takes 75 % at first, which leaves no room for Llama-3-8B; cuDNN and NCCL need little.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    # The CUDA plugin, installed for compiling without a GPU, would log a traceback at every start.
    has_plugin = importlib.util.find_spec("jax_cuda13_plugin") is not None
    if has_plugin and not shutil.which("nvidia-smi"):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def keep_compiled_programs(directory: Path) -> None:
    """Keeps what is compiled for a GPU in `directory`, for later starts of the same run, or where
    JAX_COMPILATION_CACHE_DIR says, which runs may share.

    Autotuning may pick another GEMM algorithm in every process, and with it other roundings: a
    resumed run would not equal an undisturbed one. It also starts faster.
    """
    import jax

    if jax.default_backend() != "gpu":
        return
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(directory.absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

"""XLA options of the trainer, each with its reason; set once, before JAX starts its backend."""

import os

XLA_FLAGS = (
    # Every GEMM goes to cuBLASLt: in Triton's fusions an FP8 GEMM may run in 16 bits, unseen.
    "--xla_gpu_enable_triton_gemm=false",
    # Overlaps collectives with compute on several GPUs; also orders one GPU's work for less memory.
    "--xla_gpu_enable_latency_hiding_scheduler=true",
    # Bitwise repeatable reductions, scatters and convolutions, so that a resumed run equals an
    # undisturbed one.
    "--xla_gpu_exclude_nondeterministic_ops=true",
)


def set_xla_flags() -> None:
    """Adds `XLA_FLAGS` to the environment; an option that the user has set already stays as it is."""
    given = os.environ.get("XLA_FLAGS", "")
    added = [flag for flag in XLA_FLAGS if flag.split("=")[0] not in given]
    os.environ["XLA_FLAGS"] = " ".join([given, *added]).strip()

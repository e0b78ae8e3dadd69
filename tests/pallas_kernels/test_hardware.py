"""Device facts against the data sheets, and the decisions that follow from an assumed device."""

import subprocess
import sys

import jax.numpy as jnp
import pytest

from pallas_kernels import hardware


@pytest.mark.parametrize(
    ("device_kind", "bf16", "fp8"),
    [
        ("NVIDIA H200", 989.0, 1979.0),
        ("NVIDIA H100 80GB HBM3", 989.0, 1979.0),
        ("NVIDIA H100 PCIe", 756.0, 1513.0),
        ("NVIDIA H100 NVL", 835.0, 1670.0),
        ("NVIDIA A100-SXM4-80GB", None, None),
        ("cpu", None, None),
    ],
)
def test_peak_tflops_is_the_dense_figure_of_the_data_sheet(device_kind, bf16, fp8):
    assert hardware.peak_tflops(device_kind, jnp.bfloat16) == bf16
    assert hardware.peak_tflops(device_kind, jnp.float16) == bf16
    assert hardware.peak_tflops(device_kind, jnp.float8_e4m3fn) == fp8
    assert hardware.peak_tflops(device_kind, jnp.float8_e5m2) == fp8
    assert hardware.peak_tflops(device_kind, jnp.int8) == fp8


def test_peak_tflops_is_unknown_for_types_without_tensor_cores_figure():
    assert hardware.peak_tflops("NVIDIA H200", jnp.float32) is None


def test_sm_counts():
    assert hardware.gpu_facts("NVIDIA H200").sm_count == 132
    assert hardware.gpu_facts("NVIDIA H100 PCIe").sm_count == 114
    assert hardware.gpu_facts("TPU v5") is None


def test_require_sm90_names_the_device_it_found():
    supported, reason = hardware.require_sm90()
    assert not supported
    assert "cpu" in reason
    with hardware.assume_device_kind("NVIDIA H200"):
        supported, reason = hardware.require_sm90()
        assert supported
        assert "NVIDIA H200" in reason and "9.0" in reason
        assert hardware.is_device_assumed()
        assert hardware.require_gpu((9, 0))[0]
        assert hardware.require_gpu((10, 0)) == (False, f"{reason}; at least 10.0 is needed")
    assert not hardware.is_device_assumed()
    assert not hardware.require_sm90()[0]


def test_assume_device_kind_rejects_an_unknown_gpu():
    with pytest.raises(ValueError, match="device_kind='GeForce 256' is not a known GPU; use one"):
        with hardware.assume_device_kind("GeForce 256"):
            pass


def test_importing_the_package_starts_no_backend():
    code = (
        "import pallas_kernels\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

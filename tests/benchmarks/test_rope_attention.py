"""The benchmark of FP8 attention's ends: its bytes by hand, and that it lowers for the GPU."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks import rope_attention
from pallas_kernels import hardware
from tests.aot import kernel_launches


def test_bytes_by_hand():
    case = rope_attention.Case(1, 10, 2, 3, head_dim=4)  # 10 heads of 4
    assert case.width == 40
    # A token: 80 bytes of projection, 40 of 8-bit numbers and 8 of v by columns, 16 of angles.
    assert case.floor_bytes("quantise") == 10 * (80 + 40 + 8 + 16)
    # 6 heads of sums in 4 bytes, dk and dv of 2 heads in 2, the gradient and the angles.
    assert case.floor_bytes("finish") == 10 * (96 + 32 + 80 + 16)


def test_difference_is_that_of_the_worst_array():
    ones = jnp.ones((4,))
    assert rope_attention.difference((ones, 1.5 * ones), (ones, ones)) == pytest.approx(0.5)


@pytest.mark.parametrize(("what", "launches"), [("quantise", (3, 3)), ("finish", (2, 1))])
def test_contenders_lower_for_cuda(what, launches):
    case = rope_attention.CASES[0]
    shapes = jax.eval_shape(lambda: rope_attention.arguments(case, what, 0))
    counted = []
    with hardware.assume_device_kind("NVIDIA H200"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "device_count", lambda: 1)
        for name in ("apart", "fused"):
            traced = jax.jit(rope_attention.contenders(case, what)[name]).trace(*shapes)
            counted.append(kernel_launches(traced.lower(lowering_platforms=("cuda",)).as_text()))
    assert tuple(counted) == launches

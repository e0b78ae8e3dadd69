"""Argument checks, one test for each rejection, and the choice of an implementation."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import flash_attention, flash_attention_choice, hardware
from pallas_kernels.flash_attention.api import _by_use
from pallas_kernels.flash_attention.config import RESIDUAL_NAMES
from tests.aot import kernel_launches


def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def ids(*shape, dtype=jnp.int32):
    return jax.ShapeDtypeStruct(shape, dtype)


Q, KV = array(2, 8, 4, 64), array(2, 16, 2, 64)


@pytest.mark.parametrize(
    ("q", "k", "v", "options", "message"),
    [
        (array(8, 4, 64), KV, KV, {}, r"q\.shape=\(8, 4, 64\) must be \[batch, length"),
        (Q, array(16, 2, 64), KV, {}, r"k\.shape=\(16, 2, 64\) must be \[batch, length"),
        (Q, KV, array(16, 2, 64), {}, r"v\.shape=\(16, 2, 64\) must be \[batch, length"),
        (Q, array(2, 0, 2, 64), KV, {}, r"k\.shape=\(2, 0, 2, 64\) .* no empty dimension"),
        (array(2, 8, 4, 64, dtype=jnp.int8), KV, KV, {}, r"q\.dtype=int8 must be bfloat16"),
        (Q, array(2, 16, 2, 64, dtype=jnp.float32), KV, {}, r"k\.dtype=float32 .* the same for"),
        (Q, KV, array(2, 16, 2, 64, dtype=jnp.float16), {}, r"v\.dtype=float16 .* the same for"),
        (Q, array(3, 16, 2, 64), KV, {}, r"k\.shape=\(3, .* must have the batch and head dim"),
        (Q, KV, array(2, 16, 2, 32), {}, r"v\.shape=.*32\) must have the batch and head dim"),
        (Q, KV, array(2, 8, 2, 64), {}, r"v\.shape=\(2, 8, 2, 64\) must equal k\.shape"),
        (array(2, 8, 3, 64), KV, KV, {}, r"q\.shape\[2\]=3 query heads must be a multiple of"),
        (Q, KV, KV, dict(q_segment_ids=ids(2, 8)), r"kv_segment_ids=None must be given"),
        (Q, KV, KV, dict(kv_segment_ids=ids(2, 16)), r"q_segment_ids=None must be given"),
        (
            Q,
            KV,
            KV,
            dict(q_segment_ids=ids(2, 9), kv_segment_ids=ids(2, 16)),
            r"q_segment_ids is int32\[2, 9\], must be int32\[2, 8\]",
        ),
        (
            Q,
            KV,
            KV,
            dict(q_segment_ids=ids(2, 8), kv_segment_ids=ids(2, 16, dtype=jnp.int8)),
            r"kv_segment_ids is int8\[2, 16\], must be int32\[2, 16\]",
        ),
        (Q, KV, KV, dict(local_window_size=-2), "local_window_size=-2 must be an int >= 0"),
        (Q, KV, KV, dict(softmax_scale=0.0), "softmax_scale=0.0 must be a positive Python float"),
        (Q, KV, KV, dict(softmax_scale=jnp.ones(())), "softmax_scale=.* must be a positive"),
        (Q, KV, KV, dict(precision="fp4"), "precision='fp4' must be one of"),
        (Q, KV, KV, dict(implementation="triton"), "implementation='triton' must be one of"),
    ],
)
def test_rejects(q, k, v, options, message):
    with pytest.raises(ValueError, match=message):
        flash_attention_choice(q, k, v, **options)


@pytest.mark.parametrize("precision", ["int8"])
def test_missing_precisions_say_what_is_missing(precision):
    message = f"precision='{precision}' needs the {precision} sm_90 kernels.* use precision='bf16'"
    with pytest.raises(NotImplementedError, match=message):
        flash_attention_choice(Q, KV, KV, precision=precision)


def test_on_a_cpu_the_choice_is_xla_and_says_why_not_the_others():
    choice = flash_attention_choice(Q, KV, KV, is_causal=True)
    assert choice.implementation == "xla"
    assert "not cudnn: cuDNN attention needs a Hopper GPU" in choice.reason


def test_an_asked_for_implementation_that_cannot_run_raises_with_the_reason():
    for implementation in ("cudnn", "mosaic"):
        with pytest.raises(NotImplementedError, match=f"'{implementation}' cannot run: .*; use"):
            x = jnp.zeros((1, 8, 1, 64), jnp.bfloat16)
            flash_attention(x, x, x, implementation=implementation)


def test_on_a_hopper_gpu_the_choice_is_cudnn_where_it_can():
    with hardware.assume_device_kind("NVIDIA H200"):
        assert flash_attention_choice(Q, KV, KV, is_causal=True).implementation == "cudnn"
        f32 = array(2, 8, 4, 64, dtype=jnp.float32)
        choice = flash_attention_choice(f32, f32, f32)
        assert choice.implementation == "xla"
        assert "not cudnn: q.dtype=float32 is not one of" in choice.reason


CAUSAL = dict(is_causal=True)
MEASURED = [
    # length, heads, options -> with gradient, without: the faster one in
    # benchmarks/results/attention_h200_2026-11-23b.json.
    (8192, (16, 16), CAUSAL, ("mosaic", "mosaic")),
    (8192, (32, 8), CAUSAL, ("mosaic", "mosaic")),
    (8192, (16, 16), {}, ("cudnn", "mosaic")),
    (2048, (16, 16), CAUSAL, ("cudnn", "mosaic")),
]


@pytest.mark.parametrize(("length", "heads", "options", "expected"), MEASURED, ids=str)
def test_on_a_hopper_gpu_the_choice_is_the_one_measured_to_be_faster(
    length, heads, options, expected
):
    q, k = (array(2, length, n, 128) for n in heads)
    with hardware.assume_device_kind("NVIDIA H200"):
        choice = flash_attention_choice(q, k, k, **options)
        asked = flash_attention_choice(q, k, k, **options, implementation="cudnn")
    assert (choice.implementation, choice.without_gradient) == expected
    assert choice.reason == "the fastest here"
    assert asked == ("cudnn", "asked for", "cudnn")


UNMEASURED = [
    dict(length=4096),
    dict(length=1024, without_gradient="cudnn"),
    dict(head_dim=64, without_gradient="cudnn"),
    dict(local_window_size=(1024, 0)),
    dict(return_lse=True, length=2048, without_gradient="cudnn"),
    dict(q_segment_ids=ids(2, 8192), kv_segment_ids=ids(2, 8192), without_gradient="cudnn"),
]


@pytest.mark.parametrize("case", UNMEASURED, ids=str)
def test_on_a_hopper_gpu_what_was_not_measured_is_left_to_cudnn(case):
    options = dict(length=8192, head_dim=128, without_gradient="mosaic") | case
    x = array(2, options.pop("length"), 16, options.pop("head_dim"))
    expected = ("cudnn", options.pop("without_gradient"))
    with hardware.assume_device_kind("NVIDIA H200"):
        choice = flash_attention_choice(x, x, x, is_causal=True, **options)
    assert (choice.implementation, choice.without_gradient) == expected


@pytest.mark.parametrize("length", [2048, 8192])
def test_the_same_bits_on_every_run_are_not_left_to_cudnn(length):
    x = array(2, length, 16, 128)
    with hardware.assume_device_kind("NVIDIA H200"):
        choice = flash_attention_choice(x, x, x, is_causal=True, deterministic=True)
        with pytest.raises(NotImplementedError, match="cuDNN's backward adds in any order"):
            flash_attention_choice(x, x, x, deterministic=True, implementation="cudnn")
    assert (choice.implementation, choice.without_gradient) == ("mosaic", "mosaic")


def test_only_a_call_that_is_not_differentiated_takes_the_other_implementation():
    # Stand-ins with tellable results: gradients of 2 and 3 a factor.
    attend = _by_use(lambda q, k, v: 2 * q + k + v, lambda q, k, v: 3 * q + k + v)
    loss = lambda x: attend(x, x, x).sum()  # noqa: E731
    x = jnp.ones((2,))
    assert loss(x) == 10 and jax.jit(loss)(x) == 10 and jax.vmap(loss)(x[:, None]).sum() == 10

    def scanned(x):
        return jax.lax.scan(lambda total, _: (total + jax.checkpoint(loss)(x), None), 0.0, None, 3)[
            0
        ]

    for function, factor in ((loss, 1), (jax.jit(jax.checkpoint(loss)), 1), (scanned, 3)):
        value, gradient = jax.value_and_grad(function)(x)
        assert value == 8 * factor and (gradient == 4 * factor).all()
    assert scanned(x) == 30


def test_a_step_lowered_for_hopper_has_the_kernels_of_the_choice():
    x = array(1, 2048, 1, 128)
    call = lambda x: flash_attention(x, x, x, is_causal=True).astype(jnp.float32).sum()  # noqa: E731
    with hardware.assume_device_kind("NVIDIA H200"):
        plain, gradient = (
            jax.jit(f).trace(x).lower(lowering_platforms=("cuda",)).as_text()
            for f in (call, jax.grad(call))
        )
    assert "mosaic_gpu" in plain and "__cudnn" not in plain
    assert "mosaic_gpu" not in gradient and "__cudnn$fmha" in gradient


@pytest.mark.parametrize("length", [2048, 8192], ids=["cudnn", "mosaic"])
def test_a_remat_policy_keeps_what_the_backward_of_the_choice_needs(length):
    x = array(1, length, 1, 128)
    policy = jax.checkpoint_policies.save_only_these_names(*RESIDUAL_NAMES)

    def launches(wrap):
        call = wrap(lambda x: jnp.sin(flash_attention(2 * x, x, x, is_causal=True)))
        loss = lambda x: call(x).astype(jnp.float32).sum()  # noqa: E731
        gradient = jax.jit(jax.value_and_grad(loss)).trace(x)
        text = gradient.lower(lowering_platforms=("cuda",)).as_text()
        return kernel_launches(text) + len(re.findall("custom_call @__cudnn", text))

    with hardware.assume_device_kind("NVIDIA H200"):
        plain = launches(lambda f: f)
        assert launches(functools.partial(jax.checkpoint, policy=policy)) == plain
        assert launches(jax.checkpoint) == plain + 1


def test_lse_is_returned_on_request():
    x = jnp.zeros((2, 8, 4, 16))
    out, lse = flash_attention(x, x, x, return_lse=True)
    assert out.shape == x.shape
    # Eight equal logits of 0: log 8.
    assert lse.shape == (2, 8, 4)
    assert jnp.allclose(lse, 2.0794415)

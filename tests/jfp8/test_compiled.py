"""What XLA makes of an FP8 dot on an H200, compiled without one: FP8 GEMMs, and few passes."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import jfp8
from jfp8.diagnostics import fp8_dot_count
from tests.aot import compile_for_h200

M, K, N = 4096, 1024, 2048
DENSE = (((1,), (0,)), ((), ()))
RECIPES = {
    "delayed": jfp8.Recipe(calibration="explicit"),
    "inline": jfp8.Recipe(),
    "current": jfp8.Recipe(name="current"),
}


@pytest.fixture(autouse=True)
def quick_compiles():
    """Overrides that of the folder: these tests are about the optimised program."""


def shape(*sizes: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


@functools.cache
def compiled_layer(recipe: jfp8.Recipe) -> str:
    """Optimised HLO of the value and the gradients of one layer with a float32 weight."""

    def layer(x, w, state, grad):
        dot = lambda x, w, s: jfp8.dot_general(x, w, DENSE, s, recipe=recipe)  # noqa: E731
        out, vjp = jax.vjp(dot, x, w, state)
        return out, vjp(grad)

    bf16 = jnp.bfloat16
    state = jax.eval_shape(lambda: jfp8.init_state(recipe))
    return compile_for_h200(
        layer, shape(M, K, dtype=bf16), shape(K, N), state, shape(M, N, dtype=bf16)
    ).as_text()


def large_passes(text: str, elements: int) -> list[str]:
    """What the kernels of the entry computation write, of those that write a large array.

    "f8e4m3fn[4096,1024] f8e4m3fn[1024,4096]" is a kernel that writes a tensor and its transpose.
    """
    entry = re.search(r"^ENTRY .*?^}", text, re.M | re.S).group()
    passes = []
    for line in entry.splitlines():
        match = re.match(
            r"\s+(?:ROOT )?%\S+ = (\(.*?\)|\S+) (fusion|copy|transpose|custom-call)\(", line
        )
        arrays = re.findall(r"(\w+)\[([\d,]+)\]", match[1]) if match else []
        large = [
            f"{dtype}[{sizes}]"
            for dtype, sizes in arrays
            if dtype != "s8" and jnp.prod(jnp.asarray([*map(int, sizes.split(","))])) >= elements
        ]
        if large:
            passes.append(" ".join(sorted(large)))
    return sorted(passes)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_all_three_gemms_are_cublaslt_fp8_and_few_passes_besides(recipe):
    text = compiled_layer(recipe)
    report = fp8_dot_count(text)
    assert sorted(
        (g.kind, g.op_name.split("fp8_dot/")[1].split("/")[0].strip(")")) for g in report.gemms
    ) == [
        ("cublaslt_fp8", "dgrad"),
        ("cublaslt_fp8", "fwd"),
        ("cublaslt_fp8", "wgrad"),
    ]
    assert report.fp8_flops == 3 * 2 * M * K * N and report.other_count == 0
    assert large_passes(text, M * K // 2) == sorted(
        [
            f"f8e4m3fn[{M},{K}]",  # cast of lhs (and its amax, if the scale does not wait for it)
            f"f8e4m3fn[{K},{M}]",  # its transpose, for wgrad
            f"f8e4m3fn[{K},{N}]",  # cast of rhs
            f"f8e4m3fn[{N},{K}]",  # its transpose, for fwd
            f"f8e5m2[{M},{N}]",  # cast of the gradient
            f"f8e5m2[{N},{M}]",  # its transpose, for wgrad
            f"bf16[{M},{N}]",  # the three GEMMs, with the scales inside
            f"bf16[{M},{K}]",
            f"f32[{K},{N}]",
        ]
    )


def test_delayed_casts_in_the_pass_that_takes_the_amax():
    text = compiled_layer(RECIPES["delayed"])
    for operand in (f"f8e4m3fn[{M},{K}]", f"f8e4m3fn[{K},{N}]", f"f8e5m2[{M},{N}]"):
        (kernel,) = [
            line
            for line in text.splitlines()
            if re.match(r"\s+%\S+ = \(.*\) fusion", line) and operand in line.split(" fusion")[0]
        ]
        assert re.search(r"s32\[\d+", kernel.split(" fusion")[0])


@pytest.mark.parametrize(
    "gemm, precision", [("fwd", "DEFAULT"), ("dgrad", "HIGHEST"), ("wgrad", "HIGHEST")]
)
def test_accumulation_is_fast_forward_and_exact_backward(gemm, precision):
    (line,) = [
        line
        for line in compiled_layer(RECIPES["delayed"]).splitlines()
        if "custom-call(" in line and f"fp8_dot/{gemm}" in line
    ]
    assert f'"operand_precision":["{precision}","{precision}"]' in line


@pytest.mark.parametrize("name, takes_amax", [("delayed", False), ("inline", True)])
def test_explicit_calibration_takes_no_amax_on_the_way_to_the_result(name, takes_amax):
    recipe = RECIPES[name]
    state = jax.eval_shape(lambda: jfp8.init_state(recipe))
    forward = jax.jit(lambda x, w, s: jfp8.dot_general(x, w, DENSE, s, recipe=recipe))
    text = forward.lower(shape(64, 64), shape(64, 64), state).compile().as_text()
    assert ("reduce_max" in text) == takes_amax


def test_scanned_and_rematerialised_layers_stay_in_fp8():
    recipe, count = RECIPES["delayed"], 4
    policy = jax.checkpoint_policies.save_only_these_names(*jfp8.RESIDUAL_NAMES)

    def layer(x, stacked):
        w, state = stacked
        return jnp.tanh(jfp8.dot_general(x, w, DENSE, state, recipe=recipe)), None

    def loss(x, weights, states):
        return lax.scan(jax.checkpoint(layer, policy=policy), x, (weights, states))[0].sum()

    states = jax.eval_shape(
        lambda: jax.tree.map(lambda a: jnp.stack([a] * count), jfp8.init_state(recipe))
    )
    compiled = compile_for_h200(
        jax.grad(loss, argnums=(1, 2)),
        shape(M, K, dtype=jnp.bfloat16),
        shape(count, K, K),
        states,
    )
    report = fp8_dot_count(compiled)
    # Three, and the forward one again for the derivative of tanh; from the saved casts.
    assert [g.executions for g in report.gemms] == [count] * 4
    assert report.fp8_flop_fraction == 1
    text = compiled.as_text()
    # Left alone, XLA transposes the stack of float32 weights for the forward GEMM.
    assert not re.search(rf"f32\[{K},{count},{K}\]\S* (copy|transpose|fusion)", text)
    assert not re.search(r"rematted_computation/fp8_dot/quantize_\w+/convert_element_type", text)


def test_a_dot_that_cannot_run_in_fp8_is_reported():
    """E5M2 times E5M2: XLA says nothing and runs 16-bit floats."""
    e5m2 = jnp.float8_e5m2
    compiled = compile_for_h200(
        lambda a, b: lax.dot(a, b, preferred_element_type=jnp.bfloat16),
        shape(1024, 1024, dtype=e5m2),
        shape(1024, 1024, dtype=e5m2),
    )
    report = fp8_dot_count(compiled)
    assert (report.fp8_count, report.other_count) == (0, 1)

"""SwiGLU's activation and its gradient for sm_90a, in one pass; mostly quantised and transposed.

The tile loop of `quantize/sm90_tiles` with one tile of gate and one of up for each hidden tile (and
one of the gradient). The maths is in `swiglu`; the exponential and the division are the fast
approximations of the GPU, good to a few units in the last place of float32. HBM bytes for each
hidden element: forward 4 + 2, backward 6 + 4; without quantising 4 + 2 and 6 + 4 too.

Not supported: groups other than 128 columns, float32 inputs.
"""

# Shapes: M rows, F hidden columns.

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.interpreter import is_interpreting
from pallas_kernels.quantize import sm90_plan, sm90_tiles
from pallas_kernels.quantize.contract import (
    Layouts,
    Quantized,
    device_reason,
    sm_count,
)
from pallas_kernels.quantize.sm90_plan import PAIR_GROUP, Slab, TileConfig, TilePlan

_GATE, _UP = 0, 1
FORWARD = TileConfig(tile_columns=128, warpgroups=1, ctas_per_sm=2)
BACKWARD = TileConfig(tile_columns=64, warpgroups=1, ctas_per_sm=2)
BACKWARD_PLAIN = TileConfig(tile_columns=64, warpgroups=1)
"""Writes the gradient in 8 and in 16 bits."""


def forward_candidates() -> list[TileConfig]:
    """Configs worth timing."""
    return [
        FORWARD,
        TileConfig(tile_columns=128, warpgroups=2),
        TileConfig(tile_columns=64, warpgroups=3),
    ]


def backward_candidates() -> list[TileConfig]:
    """Configs worth timing."""
    return [
        BACKWARD,
        TileConfig(tile_columns=64, warpgroups=2),
        TileConfig(tile_columns=64, warpgroups=1, stages=2),
    ]


def forward_plan(
    gate_up: Array | jax.ShapeDtypeStruct,
    *,
    dtype: Any = None,
    layouts: Layouts | Literal["none"] = "none",
    config: TileConfig = FORWARD,
) -> TilePlan:
    """The plan of the activation of gate_up, `[M, 2 F]`; with layouts "none" in its dtype."""
    return TilePlan(
        name="swiglu" if layouts == "none" else "swiglu_quantize",
        rows=gate_up.shape[0],
        columns=gate_up.shape[1] // 2,
        inputs=(Slab(half=_GATE), Slab(half=_UP)),
        input_dtype=gate_up.dtype,
        dtype=dtype,
        layouts=layouts,
        plain_dtype=gate_up.dtype if layouts == "none" else None,
        config=config,
        sm_count=sm_count(),
        interpret=is_interpreting(),
    )


def backward_plan(
    gate_up: Array | jax.ShapeDtypeStruct,
    *,
    dtype: Any = None,
    layouts: Layouts | Literal["none"] = "none",
    plain: bool = True,
    config: TileConfig | None = None,
) -> TilePlan:
    """The plan of the gradient of gate_up, `[M, 2 F]`."""
    is_quantised_and_plain = plain and layouts != "none"
    return TilePlan(
        name="swiglu_grad" if layouts == "none" else "swiglu_grad_quantize",
        rows=gate_up.shape[0],
        columns=gate_up.shape[1] // 2,
        inputs=(Slab(half=_GATE), Slab(half=_UP), Slab(array=1)),
        halves=(_GATE, _UP),
        input_dtype=gate_up.dtype,
        dtype=dtype,
        layouts=layouts,
        plain_dtype=gate_up.dtype if plain else None,
        config=config or (BACKWARD_PLAIN if is_quantised_and_plain else BACKWARD),
        sm_count=sm_count(),
        interpret=is_interpreting(),
    )


def unsupported_reason(
    plan: TilePlan, gate_up: Array | jax.ShapeDtypeStruct, group: int
) -> str | None:
    """Why the kernel cannot run here; None if it can."""
    if group != PAIR_GROUP:
        return f"group={group} must be {PAIR_GROUP}: a tile holds whole groups"
    if gate_up.dtype.itemsize != 2:
        return f"gate_up.dtype={gate_up.dtype} must have 16 bits; cast it"
    return device_reason() or sm90_plan.unsupported_reason(plan)


def _sigmoid(x: Array) -> Array:
    return 1.0 / (1.0 + jnp.exp(-x))


def _activation(gate: Array, up: Array) -> tuple[Array]:
    gate, up = gate.astype(jnp.float32), up.astype(jnp.float32)
    return (gate * _sigmoid(gate) * up,)


def _gradient(gate: Array, up: Array, grad: Array) -> tuple[Array, Array]:
    gate, up, grad = (x.astype(jnp.float32) for x in (gate, up, grad))
    sigmoid = _sigmoid(gate)
    weighted = grad * sigmoid
    return weighted * up * (1.0 + gate * (1.0 - sigmoid)), weighted * gate


def forward(
    gate_up: Array, scale: Array, *, dtype: Any, layouts: Layouts, config: TileConfig = FORWARD
) -> Quantized:
    """Runs the kernel of the activation, on each device's part of a sharded gate_up."""
    plan_of = functools.partial(forward_plan, dtype=dtype, layouts=layouts, config=config)
    return sm90_tiles.run(plan_of, _activation, (gate_up,), scale)[0]


def backward(
    gate_up: Array,
    grad: Array,
    scale: Array,
    *,
    dtype: Any,
    layouts: Layouts,
    plain: bool,
    config: TileConfig | None = None,
) -> tuple[Quantized, Array | None]:
    """Runs the kernel of the gradient, on each device's part of sharded arrays."""

    def plan_of(gate_up: Array, grad: Array) -> TilePlan:
        del grad
        return backward_plan(gate_up, dtype=dtype, layouts=layouts, plain=plain, config=config)

    return sm90_tiles.run(plan_of, _gradient, (gate_up, grad), scale)


def forward_plain(gate_up: Array, *, config: TileConfig = FORWARD) -> Array:
    """Runs the kernel of the activation alone: `[M, F]` in the dtype of gate_up."""
    plan_of = functools.partial(forward_plan, config=config)
    return sm90_tiles.run_plain(plan_of, _activation, (gate_up,))


def backward_plain(gate_up: Array, grad: Array, *, config: TileConfig = BACKWARD) -> Array:
    """Runs the kernel of the gradient alone: `[M, 2 F]` in the dtype of gate_up."""

    def plan_of(gate_up: Array, grad: Array) -> TilePlan:
        del grad
        return backward_plan(gate_up, config=config)

    return sm90_tiles.run_plain(plan_of, _gradient, (gate_up, grad))

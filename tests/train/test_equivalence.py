"""How a step is carried out does not change what it is: microbatches, recomputation, stacked or
separate layers, devices.

FP8 state. A scale is the smallest power of two that holds an amax, and a maximum does not depend on
the order in which it is taken. So the state is *exactly* the same wherever the amax is the same; it
may differ by one exponent only where roundings (another order of summation) carry the amax over the
edge between two exponents. `EDGE` is how far they can: a bfloat16 activation or gradient is rounded
to 2**-8 relative, and the amax of a tensor depends on a few such roundings, one after the other.

Loss. The mean over 512 tokens of numbers that each depend on those roundings. How much, shows the
plainest way itself, with each element of the embedding moved to the bfloat16 number above or below:
roundings at one place only, while another order of summation rounds otherwise everywhere. A loss
may be off by `NOISE_LIMIT` times the root mean square of what that does to it.

`python -m pytest -m campaign tests/train/test_equivalence.py` tries all 54 combinations and writes
the differences to `benchmarks/results/`; here are three of them.
"""

import dataclasses
import functools
import itertools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from saved_runs import quick_compilation
from test_step import CONFIG, make_batch, replace, with_scales

from tests.jfp8.reference import MAX_VALUE
from train.inspection import make_inspection, to_record
from train.mesh import make_mesh
from train.optimizer import make_optimizer
from train.state import TrainState, abstract_state, create_state
from train.step import abstract_batch, make_train_step

BASE = replace(CONFIG, data={"batch_size": 32})
EDGE = 2.0**-5
NOISE_LIMIT = 4
NOISE_SAMPLES = 6
MESHES = {
    "1": {"data": 1},
    "8": {"data": 8},
    "2x2x2": {"data": 2, "fsdp": 2, "tensor": 2},
}
CHOICES = ((1, 2, 4), ("none", "dots", "block"), ("scan", "unroll"), tuple(MESHES))
RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "equivalence_cpu.json"


@pytest.fixture(scope="module", autouse=True)
def quick(tmp_path_factory):
    with quick_compilation(tmp_path_factory.mktemp("xla_equivalence")):
        yield


# Among them every choice occurs, each new one beside others.
SOME = [
    (2, "dots", "unroll", "8"),
    (4, "block", "scan", "2x2x2"),
    (4, "none", "unroll", "1"),
]


def variant(accumulation: int, remat: str, loop: str, mesh: str):
    return replace(
        BASE,
        optimizer={"accumulation_steps": accumulation},
        model={"remat": remat, "layer_loop": loop},
        mesh=MESHES[mesh],
    )


@functools.cache
def base_state() -> TrainState:
    """The initial state of stacked layers, with scales that fit its tensors."""
    mesh = make_mesh(BASE.mesh, jax.devices()[:1])
    optimizer = make_optimizer(BASE.optimizer, BASE.run.steps)
    return with_scales(create_state(BASE, optimizer, mesh))


def unstack(tree):
    """The tree of separate layers."""
    layers = range(BASE.model.num_layers)
    return tree | {"blocks": {i: jax.tree.map(lambda x, i=i: x[i], tree["blocks"]) for i in layers}}


def stack(tree):
    """The tree of stacked layers; the inverse of `unstack`."""
    blocks = [tree["blocks"][i] for i in sorted(tree["blocks"])]
    return tree | {"blocks": jax.tree.map(lambda *x: np.stack(x), *blocks)}


def two_steps(config, initial: TrainState | None = None) -> tuple[list[float], dict]:
    """Losses of two steps, and the stacked FP8 state after the first."""
    optimizer = make_optimizer(config.optimizer, config.run.steps)
    count = config.mesh.data * config.mesh.fsdp * config.mesh.tensor
    mesh = make_mesh(config.mesh, jax.devices()[:count])
    state = jax.device_get(initial or base_state())
    if config.model.layer_loop == "unroll":
        params, scaling = unstack(state.params), unstack(state.scaling)
        state = state._replace(params=params, scaling=scaling, opt_state=optimizer.init(params))
    state = jax.device_put(
        state, jax.tree.map(lambda x: x.sharding, abstract_state(config, optimizer, mesh))
    )
    shardings = jax.tree.map(lambda x: x.sharding, abstract_batch(config, mesh))
    step = jax.jit(make_train_step(config, optimizer, calibrating=False))
    losses, scaling = [], {}
    for seed in (0, 1):
        state, metrics = step(state, jax.device_put(make_batch(config, seed), shardings))
        losses.append(float(metrics["loss_nats"]))
        scaling = scaling or jax.device_get(state.scaling)
    return losses, stack(scaling) if config.model.layer_loop == "unroll" else scaling


@functools.cache
def reference() -> tuple[list[float], dict, dict]:
    """Losses and state of the plainest way, and the true amaxes of its first step."""
    losses, scaling = two_steps(BASE)
    measured = jax.jit(make_inspection(BASE))(base_state(), make_batch(BASE, 0))
    return losses, scaling, to_record(jax.device_get(measured["tensors"]))


@functools.cache
def loss_limits() -> list[float]:
    """How far each of the two losses may be off, relatively."""
    expected, state, errors = reference()[0], base_state(), []
    for seed in range(NOISE_SAMPLES):
        embedding = np.asarray(state.params["embedding"])
        up_or_down = np.random.default_rng(seed).choice(np.float32([-1, 1]), embedding.shape)
        params = state.params | {"embedding": embedding * (1 + 2**-8 * up_or_down)}
        losses, _ = two_steps(BASE, state._replace(params=params))
        errors.append([a / b - 1 for a, b in zip(losses, expected, strict=True)])
    return [NOISE_LIMIT * float(x) for x in np.sqrt(np.mean(np.square(errors), axis=0))]


def compare(config) -> dict:
    """What differs from the reference; fails where it may not."""
    expected_losses, expected, amaxes = reference()
    losses, scaling = two_steps(config)
    errors = [abs(a / b - 1) for a, b in zip(losses, expected_losses, strict=True)]
    assert all(a <= b for a, b in zip(errors, loss_limits(), strict=True)), (errors, loss_limits())
    exact = different = 0
    for gemm, path in (
        ("qkv", ("attention", "qkv")),
        ("out", ("attention", "out")),
        ("gate_up", ("ffn", "gate_up")),
        ("down", ("ffn", "down")),
    ):
        ours, theirs = (t["blocks"][path[0]][path[1]]["scaling"] for t in (scaling, expected))
        for slot, tensor in enumerate(("input", "kernel", "output_grad")):
            largest = MAX_VALUE["e5m2" if tensor == "output_grad" else "e4m3"]
            for layer, amax in enumerate(amaxes[f"{gemm}.{tensor}"]["amax"]):
                got, want = (float(s.history[layer, slot, 0]) for s in (ours, theirs))
                # 0 at the lower edge of the exponent's range, 1 at its upper edge.
                place = np.log2(amax / (largest * 2.0**want)) + 1
                is_near_edge = min(place, 1 - place) < np.log2(1 + EDGE)
                assert got == want or (is_near_edge and abs(got - want) == 1), (gemm, tensor, layer)
                exact, different = exact + (got == want), different + (got != want)
                assert float(ours.scale[layer, slot]) == 2.0**got
    assert exact >= 0.9 * (exact + different)
    return {"loss_errors": errors, "states_equal": exact, "states_at_an_edge": different}


@pytest.mark.parametrize("choices", SOME, ids=str)
def test_some_combinations(choices):
    compare(variant(*choices))


@pytest.mark.campaign
def test_all_combinations():
    rows = [
        {"choices": choices, **compare(variant(*choices))}
        for choices in itertools.product(*CHOICES)
    ]
    result = {
        "jax": jax.__version__,
        "model": dataclasses.asdict(BASE.model),
        "combinations": len(rows),
        "limits_of_relative_loss_errors": loss_limits(),
        "largest_relative_loss_errors": [max(r["loss_errors"][i] for r in rows) for i in (0, 1)],
        "states_equal": sum(row["states_equal"] for row in rows),
        "states_at_an_edge": sum(row["states_at_an_edge"] for row in rows),
        "each": rows,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")

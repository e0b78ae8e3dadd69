"""An infinity or a NaN anywhere: the step is skipped and counted, the state untouched, training
goes on, and who gives up says which tensor was the first."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from saved_runs import quick_compilation
from test_step import CONFIG, assert_trees_equal, make_batch, replace, with_scales

from train import model as model_module
from train.diagnosis import first_bad_tensor
from train.mesh import make_mesh
from train.optimizer import make_optimizer
from train.state import create_state
from train.step import make_train_step

# A batch asks for a fault by the position of its first token.
ACTIVATION, GRADIENT = 777, 778
FAULTS = {
    "activation": "down.input of layer 1 (counted from 0)",
    # It goes bad inside the backward of attention, after dO was read.
    "gradient": "qkv.output_grad of layer 0 (counted from 0)",
    "loss": "the loss weights of the batch",
}
STEPS = 16


@pytest.fixture(scope="module", autouse=True)
def quick(tmp_path_factory):
    with quick_compilation(tmp_path_factory.mktemp("xla_nonfinite")):
        yield


@jax.custom_vjp
def poison_gradient(x, is_bad):
    del is_bad
    return x


def _poison_bwd(is_bad, grad):
    return grad.at[0, 2, 1, 3].set(jnp.where(is_bad, jnp.nan, grad[0, 2, 1, 3])), None


poison_gradient.defvjp(lambda x, is_bad: (x, is_bad), _poison_bwd)


@pytest.fixture
def faulty_model(monkeypatch):
    """One infinite activation in layer 1, or one NaN in a gradient of layer 0, when asked for."""
    seen: dict[str, object] = {}
    call, swiglu = model_module.Transformer.__call__, model_module.swiglu
    attention = model_module.flash_attention

    def remember(self, tokens, positions, segment_ids):
        seen.update(position=positions[0, 0], ffn=0, attention=0)
        return call(self, tokens, positions, segment_ids)

    def bad_swiglu(gate_up, **options):
        hidden, layer = swiglu(gate_up, **options), seen["ffn"]
        seen["ffn"] = layer + 1
        if layer != 1:
            return hidden
        bad = jnp.where(seen["position"] == ACTIVATION, jnp.inf, hidden[0, 3, 5])
        return hidden.at[0, 3, 5].set(bad.astype(hidden.dtype))

    def bad_attention(*args, **options):
        out, layer = attention(*args, **options), seen["attention"]
        seen["attention"] = layer + 1
        return out if layer else poison_gradient(out, seen["position"] == GRADIENT)

    monkeypatch.setattr(model_module.Transformer, "__call__", remember)
    monkeypatch.setattr(model_module, "swiglu", bad_swiglu)
    monkeypatch.setattr(model_module, "flash_attention", bad_attention)


def make_faulty_batch(config, seed, fault):
    batch = make_batch(config, seed)
    if fault == "loss":
        batch["loss_weights"][2, 3] = np.nan
    elif fault:
        batch["positions"][0, 0] = {"activation": ACTIVATION, "gradient": GRADIENT}[fault]
    return batch


@pytest.mark.parametrize("recipe", ["delayed", "bf16"])
def test_faults_at_random_steps(recipe, faulty_model):
    config = replace(CONFIG, model={"layer_loop": "unroll"}, fp8={"recipe": recipe})
    optimizer = make_optimizer(config.optimizer, config.run.steps)
    step = jax.jit(make_train_step(config, optimizer, calibrating=False))
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    start = with_scales(create_state(config, optimizer, mesh))
    random = np.random.default_rng(3)
    plan = [None] * STEPS
    for number in random.choice(STEPS, 9, replace=False):
        plan[number] = list(FAULTS)[random.integers(3)]
    assert set(plan) == {None, *FAULTS}

    def train(faults):
        state, skipped = start, 0
        for seed, fault in faults:
            before = state
            state, metrics = step(state, make_faulty_batch(config, seed, fault))
            skipped += fault is not None
            assert int(metrics["skipped_steps"]) == skipped
            consecutive = int(before.consecutive_skips) + 1 if fault else 0
            assert int(state.consecutive_skips) == consecutive
            if fault:
                for name in ("params", "opt_state", "scaling"):
                    assert_trees_equal(getattr(state, name), getattr(before, name))
        return state

    disturbed = train(list(enumerate(plan)))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(disturbed.params))
    # As if the bad batches had never been.
    spared = train([(seed, None) for seed, fault in enumerate(plan) if fault is None])
    for name in ("params", "opt_state", "scaling"):
        assert_trees_equal(getattr(disturbed, name), getattr(spared, name))

    for fault, tensor in FAULTS.items():
        batch = make_faulty_batch(config, 0, fault)
        assert first_bad_tensor(config, disturbed, batch) == tensor
    healthy = make_batch(config)
    assert first_bad_tensor(config, disturbed, healthy).startswith("none: ")
    disturbed.params["blocks"][1]["ffn"]["gate_up"]["kernel"] *= jnp.inf
    name = "parameter blocks/1/ffn/gate_up/kernel"
    assert first_bad_tensor(config, disturbed, healthy) == name

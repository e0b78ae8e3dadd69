"""The view into the numerics: each tensor is the one it is called, and NumPy finds the same."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from run_cases import make_arguments, records
from saved_runs import quick_compilation, saved_arrays
from test_step import CONFIG, make_batch, replace, with_scales

import jfp8
from jfp8.diagnostics import QUANTITIES
from tests.jfp8.reference import DTYPE, MAX_VALUE, quantize, smallest_exponent, sqnr_db
from train import heatmaps, report, whatif
from train import model as model_module
from train.inspection import MEASURES, TENSORS, make_inspection, to_record
from train.main import main
from train.mesh import make_mesh
from train.metrics import read_metrics
from train.optimizer import make_optimizer
from train.state import create_state, make_graph, make_recipe
from train.step import make_loss


@pytest.fixture(autouse=True, scope="module")
def quick(tmp_path_factory):
    with quick_compilation(tmp_path_factory.mktemp("xla_inspection")):
        yield


def inspect(config, state, batch):
    measured = jax.device_get(jax.jit(make_inspection(config))(state, batch))
    return float(measured["loss_nats"]), to_record(measured["tensors"])


def fresh_state(config):
    """An untrained state; delayed scales are set, so that no step needs to be compiled."""
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    return with_scales(
        create_state(config, make_optimizer(config.optimizer, config.run.steps), mesh)
    )


def layer(tree, path, index, loop):
    """The leaf of one layer, of stacked or of separate ones."""
    node = tree["blocks"] if loop == "scan" else tree["blocks"][index]
    for key in path:
        node = node[key]
    return jax.tree.map(lambda x: x[index], node) if loop == "scan" else node


PATHS = {
    "qkv": ("attention", "qkv"),
    "out": ("attention", "out"),
    "gate_up": ("ffn", "gate_up"),
    "down": ("ffn", "down"),
}


@pytest.mark.parametrize(
    ("loop", "recipe"), [("scan", "delayed"), ("unroll", "current"), ("unroll", "bf16")]
)
def test_tensors_are_those_that_the_step_sees(loop, recipe):
    config = replace(CONFIG, model={"layer_loop": loop}, fp8={"recipe": recipe})
    state = fresh_state(config)
    batch = make_batch(config, 7)
    weight = jnp.float32(batch["loss_weights"].sum())
    loss, record = inspect(config, state, batch)
    assert list(record) == list(TENSORS)
    # The step's own loss, and its observation of the same tensors: the edge is the smallest power
    # of two, times the largest value of the format, that holds the amax.
    function = make_loss(config, make_graph(config, make_recipe(config.fp8)))
    if recipe == "bf16":
        assert loss == float(jax.jit(function)(state.params, {}, batch, weight)[1])
    else:
        (_, nll), observed = jax.jit(jax.value_and_grad(function, argnums=1, has_aux=True))(
            state.params, state.scaling, batch, weight
        )
        assert loss == float(nll)
        health = jfp8.health(observed, make_recipe(config.fp8))
    for name, path in PATHS.items():
        for index in range(2):
            kernel = np.asarray(layer(state.params, (*path, "kernel"), index, loop), np.float64)
            amax = record[f"{name}.kernel"]["amax"][index]
            assert amax == pytest.approx(np.abs(kernel).max(), rel=1e-5)
            if recipe == "bf16":
                exponent = smallest_exponent(np.abs(kernel).max(), "e4m3")
                assert record[f"{name}.kernel"]["scale"][index] == 2.0**exponent
                continue
            edges = layer(health, (*path, "scaling"), index, loop)
            scales = layer(state.scaling, (*path, "scaling"), index, loop).scale
            for slot, tensor in enumerate(("input", "kernel", "output_grad")):
                measured = record[f"{name}.{tensor}"]
                edge = float(edges.amax_edge[slot])
                assert edge / 2 < measured["amax"][index] <= edge
                if recipe == "delayed":
                    assert measured["scale"][index] == float(scales[slot])


def test_attention_tensors_against_numpy(monkeypatch):
    """q, k, v and the gradient of the output, caught on their way into and out of attention."""
    caught: dict[str, list[np.ndarray]] = {name: [] for name in ("q", "k", "v", "output_grad")}
    original = model_module.flash_attention

    @jax.custom_vjp
    def catch_gradient(x):
        return x

    def backward(_, grad):
        jax.debug.callback(lambda x: caught["output_grad"].append(np.asarray(x)), grad)
        return (grad,)

    catch_gradient.defvjp(lambda x: (x, None), backward)

    def catching(q, k, v, **options):
        for name, x in (("q", q), ("k", k), ("v", v)):
            keep = lambda x, name=name: caught[name].append(np.asarray(x))  # noqa: E731
            jax.debug.callback(keep, x)
        return catch_gradient(original(q, k, v, **options))

    config = replace(CONFIG, model={"num_layers": 1, "layer_loop": "unroll"})
    state = fresh_state(config)
    monkeypatch.setattr(model_module, "flash_attention", catching)
    _, record = inspect(config, state, make_batch(config, 3))
    jax.effects_barrier()
    for name, format in (("q", "e4m3"), ("k", "e4m3"), ("v", "e4m3"), ("output_grad", "e5m2")):
        (x,) = caught[name]
        wide = x.astype(np.float64)
        exponent = smallest_exponent(np.abs(wide).max(), format)
        measured = {key: value[0] for key, value in record[f"attention.{name}"].items()}
        cast = (wide * 2.0**-exponent).astype(DTYPE[format]).astype(np.float64)
        assert np.abs(cast).max() <= MAX_VALUE[format]
        assert measured["amax"] == pytest.approx(np.abs(wide).max(), rel=1e-5)
        assert measured["scale"] == 2.0**exponent
        assert measured["saturated_fraction"] == 0
        lost = ((cast == 0) & (wide != 0)).mean()
        assert measured["underflowed_fraction"] == pytest.approx(lost, rel=1e-5)
        noise = sqnr_db(wide, jnp.asarray(quantize(jnp.asarray(x), exponent, format)))
        assert measured["sqnr_db"] == pytest.approx(noise, abs=2e-3)


def test_first_microbatch_is_inspected():
    config = replace(CONFIG, optimizer={"accumulation_steps": 2}, fp8={"recipe": "current"})
    whole = replace(CONFIG, fp8={"recipe": "current"}, data={"batch_size": 4})
    state = fresh_state(whole)
    batch = make_batch(config)
    batch["loss_weights"][:] = 1
    part = {name: rows[::2] for name, rows in batch.items()}
    (loss, record), (part_loss, expected) = (
        inspect(config, state, batch),
        inspect(whole, state, part),
    )
    assert loss == pytest.approx(part_loss, rel=1e-6)
    for tensor in TENSORS:
        # The weights of the batch halve the gradient, exactly.
        factor = 0.5 if tensor.endswith("grad") else 1.0
        scaled = [factor * value for value in expected[tensor]["amax"]]
        assert record[tensor]["amax"] == pytest.approx(scaled, rel=1e-5)


def test_record_has_no_number_that_json_lacks():
    tensors = {name: np.zeros((1, len(QUANTITIES)), np.float32) for name in TENSORS}
    values = {"amax": 2.0, "scale": 0.5, "count": 8, "saturated_count": 2, "signal": 50, "noise": 5}
    for name, value in values.items():
        tensors["attention.k"][0, QUANTITIES.index(name)] = value
    record = to_record(tensors)
    assert record["qkv.input"]["sqnr_db"] == record["qkv.input"]["saturated_fraction"] == [None]
    assert record["attention.k"] == {
        "amax": [2.0],
        "scale": [0.5],
        "saturated_fraction": [0.25],
        "underflowed_fraction": [0.0],
        "sqnr_db": [10.0],
    }
    json.dumps(record, allow_nan=False)


# Whole runs.


@pytest.fixture(scope="module")
def inspected(text, tmp_path_factory):
    """A run of 6 steps that is inspected at every second one; its arguments."""
    directory = tmp_path_factory.mktemp("inspected") / "run"
    options = {
        "mesh.data": 4,
        "mesh.fsdp": 2,
        "run.steps": 6,
        "log.validate-every": 0,
        "log.sample-tokens": 0,
        "model.num-layers": 2,
    }
    arguments = make_arguments(directory, text, **options, **{"fp8.inspect-every": 2})
    assert main(arguments) == 0
    plain = make_arguments(directory.with_name("plain"), text, **options)
    assert main(plain) == 0
    return directory, arguments, plain


def test_inspection_is_logged_and_changes_nothing(inspected):
    directory, arguments, plain = inspected
    rows = records(directory, "inspection")
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert records(directory, "train") == records(directory.with_name("plain"), "train")
    assert saved_arrays(arguments) == saved_arrays(plain)
    for row in rows:
        for tensor in TENSORS:
            assert set(row["tensors"][tensor]) == set(MEASURES)
            assert all(len(values) == 2 for values in row["tensors"][tensor].values())
            sqnr = row["tensors"][tensor]["sqnr_db"]
            # 3 mantissa bits give 31.5 dB and 2 give 25.5 (docs/numerics.md derives it) where
            # nothing is saturated or subnormal.
            assert all(15 < value < 35 for value in sqnr), (tensor, sqnr)


def test_report_draws_heat_maps(inspected, capsys, tmp_path):
    directory, *_ = inspected
    output = tmp_path / "report.png"
    assert report.main([str(directory), "--output", str(output)]) == 0
    picture = tmp_path / "report_run.png"
    assert f"tensors by layer and step: {picture}\n" in capsys.readouterr().out
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    steps, values = heatmaps.grid(read_metrics(directory).inspections, "down.input", "amax")
    assert steps.tolist() == [2, 4, 6]
    logged = [r["tensors"]["down.input"]["amax"] for r in records(directory, "inspection")]
    np.testing.assert_array_equal(values, np.array(logged).T)


def test_whatif_evaluates_another_recipe_on_the_next_batch(inspected, capsys, tmp_path):
    directory, *_ = inspected
    output = tmp_path / "whatif.json"
    before = sorted((p, p.stat().st_mtime_ns) for p in directory.rglob("*"))
    options = [str(directory), "--recipe", "current", "--output", str(output)]
    assert whatif.main(options) == 0
    assert sorted((p, p.stat().st_mtime_ns) for p in directory.rglob("*")) == before
    out = capsys.readouterr().out
    result = json.loads(output.read_text())
    own, tried = result["recipes"]
    assert (result["step"], own["recipe"], tried["recipe"]) == (6, "delayed", "current")
    assert f"loss {own['loss_nats']:.5f} nats with delayed (of the run)" in out
    # A delayed scale held the largest amax so far, give or take what a step changes.
    for tensor in TENSORS:
        pairs = zip(own["tensors"][tensor]["scale"], tried["tensors"][tensor]["scale"], strict=True)
        assert {math.log2(a / b) for a, b in pairs} <= {-1.0, 0.0, 1.0, 2.0, 3.0, 4.0}, tensor
        amax = [r["tensors"][tensor]["amax"] for r in (own, tried)]
        if not tensor.endswith("grad"):
            assert amax[0] == pytest.approx(amax[1], rel=0.1)


def test_whatif_with_another_margin_has_a_history_of_one_step(inspected, tmp_path):
    directory, *_ = inspected
    output = tmp_path / "whatif.json"
    options = ["--recipe", "delayed", "--margin", "2", "--output", str(output)]
    assert whatif.main([str(directory), *options]) == 0
    _, tried = json.loads(output.read_text())["recipes"]
    # The weights of the batch before are the same: their scale is that of their amax, times 4.
    for gemm in PATHS:
        measured = tried["tensors"][f"{gemm}.kernel"]
        exponents = [smallest_exponent(amax, "e4m3") for amax in measured["amax"]]
        assert measured["scale"] == [2.0 ** (exponent + 2) for exponent in exponents]


@pytest.mark.parametrize(
    ("change", "message"),
    [("gone", "no such run directory"), ("empty", "it has no config.toml")],
)
def test_whatif_needs_a_run(change, message, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert whatif.main([str(tmp_path / change), "--recipe", "current"]) == 2
    assert message in capsys.readouterr().err

import argparse
import json
import os
import sys
import textwrap
import time

import jax
import numpy as np
import pytest

from benchmarks import train_step
from benchmarks.contenders import flax_linen, ours, split_name
from train.config import parse
from train.mesh import make_mesh

TINY = [
    *train_step.config_arguments("tiny", "ours-bf16"),
    *("--model.hidden-size", "32", "--model.num-layers", "1", "--model.ffn-size", "48"),
    *("--model.num-heads", "2", "--model.num-kv-heads", "1", "--model.vocab-size", "64"),
    *("--data.sequence-length", "16", "--data.batch-size", "2"),
]


def task(variant):
    model = {"hidden_size": 32, "num_layers": 1, "ffn_size": 48, "num_heads": 2, "num_kv_heads": 1}
    model |= {"head_dim": 16, "vocab_size": 64, "rope_theta": 1e4, "norm_eps": 1e-5}
    return {"variant": variant, "model": model, "batch_size": 2, "sequence_length": 16}


def test_names_split_into_family_variant_and_options():
    assert split_name("torchao-tensorwise") == ("torchao", "tensorwise", [])
    assert split_name("flax-fp8-unroll") == ("flax", "fp8-unroll", [])
    options = ["--model.remat", "dots", "--optimizer.moment-dtype", "bfloat16"]
    name = "ours-delayed+model.remat=dots+optimizer.moment-dtype=bfloat16"
    assert split_name(name) == ("ours", "delayed", options)


@pytest.mark.parametrize("name", ["ours", "ours-fp4", "theirs-bf16", "torch-bf16+model.remat=dots"])
def test_an_unknown_contender_is_refused_before_anything_runs(name, capsys, tmp_path):
    with pytest.raises(SystemExit):
        train_step.parse_arguments(["--contenders", name, "--output", str(tmp_path / "x.json")])
    assert f"contender {name!r}" in capsys.readouterr().err


def test_the_first_of_ours_runs_again_at_the_end():
    arguments = ["--contenders", "torch-bf16,ours-delayed,ours-bf16", "--output", "x.json"]
    assert train_step.parse_arguments(arguments).repeat == "ours-delayed"
    assert train_step.parse_arguments([*arguments, "--repeat", "none"]).repeat == "none"


@pytest.mark.parametrize("model", ["8b-slice", "1b", "tiny"])
def test_all_contenders_get_the_same_shapes(model):
    shapes = set()
    for name in ("ours-bf16", "ours-delayed", "ours-current", "torch-bf16", "flax-fp8"):
        config = parse(train_step.config_arguments(model, name))
        shapes.add((config.model, config.data, config.optimizer))
    assert len(shapes) == 1


def test_ours_takes_its_recipe_and_options_and_peers_are_not_concerned():
    config = parse(train_step.config_arguments("1b", "ours-current+model.remat=dots"))
    assert (config.fp8.recipe, config.model.remat) == ("current", "dots")


def arguments_for(**changed):
    values = {"model": "tiny", "warmup": 1, "steps": 1, "torch_compile": False, "timeout": 60.0}
    return argparse.Namespace(**values | {"torch_python": sys.executable} | changed)


def test_a_missing_peer_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('no PyTorch here')\n")
    row = train_step.run_contender("torch-bf16", arguments_for(), tmp_path)
    assert (row["status"], row["reason"]) == ("missing", "no PyTorch here")


@pytest.mark.parametrize(
    ("source", "status", "reason"),
    [
        ("raise SystemExit('RESOURCE_EXHAUSTED: 99 GiB')", "out_of_memory", "RESOURCE_EXHAUSTED"),
        ("raise RuntimeError('broken')", "failed", "exit code 1: RuntimeError: broken"),
        ("import time; time.sleep(60)", "timeout", "not done after 1 s"),
    ],
)
def test_a_peer_that_fails_costs_only_its_row(source, status, reason, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "torch.py").write_text(source + "\n")
    limit = 1.0 if status == "timeout" else 60.0
    row = train_step.run_contender("torch-bf16", arguments_for(timeout=limit), tmp_path)
    assert row["status"] == status
    assert reason in row["reason"]
    assert "torch.py" in row["log_tail"] or status != "failed"


def test_what_a_contender_started_ends_with_it(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent(f"""
        import subprocess, time
        child = subprocess.Popen(["sleep", "60"])
        open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
        time.sleep(60)
        """)
    )
    command = [sys.executable, str(script)]
    assert train_step._run_process(command, dict(os.environ), tmp_path / "log", timeout=2) == -9
    child = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 5
    while _is_running(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _is_running(child)


def _is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def measured_row(name, times_s, **extra):
    result = {"step_times_s": times_s, "launch_times_s": [0.01], "device": "NVIDIA H200"}
    result |= {"loss_nats": 10.4, "peak_memory_gib": 34.56, "compile_time_s": 60.0}
    config = parse(train_step.config_arguments("8b-slice", name))
    return {"name": name, "status": "ok"} | train_step._measured(result | extra, config)


def test_rates_of_a_known_step():
    row = measured_row("torch-bf16", [0.29, 0.28, 0.30])
    assert row["step_time"]["median_ms"] == pytest.approx(290)
    assert row["tokens_per_s"] == pytest.approx(2 * 8192 / 0.29)
    # By hand: a layer has 4096 * (2 * 4096 + 2 * 1024 + 3 * 14336) weights, the head 4096 * 32768;
    # causal attention needs 6 * 6 layers * 8192 * 4096 operations a token.
    weights = 6 * 4096 * (2 * 4096 + 2 * 1024 + 3 * 14336) + 4096 * 32768
    flops = (6 * weights + 6 * 6 * 8192 * 4096) * 2 * 8192
    assert row["model_tflops"] == pytest.approx(flops / 0.29 / 1e12)
    assert row["mfu"] == pytest.approx(flops / 0.29 / 989e12)
    assert row["host_fraction"] == pytest.approx(10 / 290)


def test_table_has_ratios_and_reasons():
    gemms = {"fp8_gemms": 72, "other_gemms": 3, "fp8_flop_fraction": 0.9}
    rows = [
        measured_row("ours-delayed", [0.145], gemms=gemms),
        measured_row("torch-bf16", [0.29]),
        measured_row("ours-delayed", [0.15], gemms=gemms) | {"is_repeat": True},
        {"name": "torchao-tensorwise", "status": "missing", "reason": "No module named 'torchao'"},
    ]
    lines = train_step.table(rows).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    header, ours_row = cells[0], cells[2]
    assert ours_row[header.index("x torch-bf16")] == "2.00"
    assert ours_row[header.index("x flax-fp8")] == "-"
    assert ours_row[header.index("FP8 GEMMs")] == "72/75"
    assert cells[4][0] == "ours-delayed (again)"
    assert lines[-1] == "- torchao-tensorwise: missing: No module named 'torchao'"


def test_our_step_runs_and_reports(monkeypatch):
    monkeypatch.setattr(ours, "make_mesh", lambda mesh: make_mesh(mesh, jax.devices()[:1]))
    result = ours.run({"config_arguments": TINY, "warmup": 1, "steps": 2})
    assert len(result["step_times_s"]) == 2
    assert abs(result["loss_nats"] - np.log(64)) < 0.5  # random tokens: nothing to know
    assert result["skipped_steps"] == 0
    assert result["block_gemms"] == {"fp8_gemms": 0, "other_gemms": 12, "fp8_flop_fraction": 0.0}
    json.dumps(result)


@pytest.mark.parametrize("variant", ["bf16", "fp8", "fp8-unroll"])
def test_flax_peer_traces_with_the_same_parameters_as_ours(variant):
    shape = flax_linen.make_shape(task(variant))
    tokens = jax.ShapeDtypeStruct((2, 16), "int32")
    state = jax.eval_shape(lambda t: flax_linen.make_state(shape, t), tokens)
    after, loss = jax.eval_shape(flax_linen.train_step, state, tokens, tokens)
    assert (loss.shape, loss.dtype) == ((), "float32")
    assert jax.tree.structure(after) == jax.tree.structure(state)
    block = 32 * (2 * 32 + 2 * 16 + 3 * 48) + 2 * 32  # q, out; k, v; gate, up, down; two norms
    assert sum(x.size for x in jax.tree.leaves(state.params["params"])) == block + 2 * 64 * 32 + 32
    assert ("_overwrite_with_gradient" in state.params) == variant.startswith("fp8")

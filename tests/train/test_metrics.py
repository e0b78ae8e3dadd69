"""metrics.jsonl: always valid JSON, continued exactly; the MFU formula; the sinks beside it."""

import dataclasses
import io
import json
import math
import os
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from train import metrics, sinks
from train.config import ConfigError, DataConfig, LogConfig, ModelConfig, RunConfig, TrainConfig
from train.metrics import MetricsError, MetricsWriter, mfu, model_flops_per_token, read_metrics
from train.sinks import Console, check_sinks, open_sinks

CONFIG = TrainConfig(
    run=RunConfig(steps=100, name="unit"), data=DataConfig(batch_size=4, sequence_length=64)
)
TOKENS_PER_STEP = 256


class Recorder:
    """A sink that keeps what it gets."""

    def __init__(self):
        self.records: list[tuple] = []
        self.is_closed = False

    def write(self, kind, step, values):
        self.records.append((kind, step, dict(values)))

    def close(self):
        self.is_closed = True


def writer(directory, *, resume_step=0, config=CONFIG, **options) -> MetricsWriter:
    options.setdefault("device_count", 1)
    options.setdefault("sinks", [])
    options.setdefault("console", Console(config.run.steps, stream=io.StringIO()))
    return MetricsWriter(directory, config, resume_step=resume_step, **options)


def step_values(loss=2.5, **more):
    return {"loss_nats": loss, "grad_norm": 1.0, "lr": 1e-3, "skipped_steps": 0, **more}


def lines(directory) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


# The FLOP count.


def test_model_flops_by_hand():
    model = ModelConfig(
        hidden_size=8, num_layers=3, ffn_size=20, num_heads=4, num_kv_heads=2, vocab_size=10,
        head_dim=6,
    )  # fmt: skip
    # q 8x24, k and v 8x12, out 24x8; gate and up 8x20, down 20x8; head 8x10.
    n = 3 * (192 + 2 * 96 + 192 + 3 * 160) + 80
    assert n == 3248
    # Causal: 6 * layers * T * heads * head_dim.
    assert model_flops_per_token(model, 16) == 6 * 3248 + 6 * 3 * 16 * 4 * 6


def test_model_flops_of_a_local_window():
    model = ModelConfig(local_window_size=64)
    dense = ModelConfig()
    # Mean keys 64 - 64 * 64 / (2 * 256) = 56 instead of 256 / 2 = 128; width 4 heads * 32.
    difference = 12 * 4 * (4 * 32) * (128 - 56)
    assert model_flops_per_token(dense, 256) - model_flops_per_token(model, 256) == difference
    assert model_flops_per_token(model, 64) == model_flops_per_token(dense, 64)


def test_model_flops_of_llama_1b():
    model = ModelConfig(
        hidden_size=2048, num_layers=24, ffn_size=5632, num_heads=16, num_kv_heads=16,
        vocab_size=32768,
    )  # fmt: skip
    # 24 * (4 * 2048^2 + 3 * 2048 * 5632) + 2048 * 32768 = 1.3002e9 weights.
    assert model_flops_per_token(model, 4096) == 6 * 1_300_234_240 + 6 * 24 * 4096 * 2048


def test_tied_head_counts_as_much():
    tied = model_flops_per_token(ModelConfig(tie_embeddings=True), 256)
    assert tied == model_flops_per_token(ModelConfig(), 256)


def test_mfu_by_hand():
    # 10k tokens/s * 8 GFLOP = 80 TFLOP/s over 2 devices of 100 TFLOP/s.
    assert mfu(10_000, 8e9, 100.0, 2) == pytest.approx(0.4, rel=1e-12)


# What is written.


def test_train_record(tmp_path):
    config = dataclasses.replace(CONFIG, log=LogConfig(peak_tflops=2.0))
    with writer(tmp_path, config=config) as out:
        out.train_step(
            20,
            step_values(loss=jnp.float32(2.5), **{"fp8/qkv.input/saturated_fraction": 0.25}),
            step_time_s=0.5,
        )
    start, record = lines(tmp_path)
    assert start["kind"] == "event" and start["step"] == 0
    assert "MFU is the share of 2 TFLOP/s a device" in start["message"]
    assert (record["kind"], record["step"]) == ("train", 20)
    assert record["tokens"] == 20 * TOKENS_PER_STEP
    assert (record["loss_nats"], record["grad_norm"], record["lr"]) == (2.5, 1.0, 1e-3)
    assert (record["step_time_s"], record["tokens_per_s"]) == (0.5, 512.0)
    flops = model_flops_per_token(config.model, 64)
    assert record["mfu"] == pytest.approx(512 * flops / 2e12, rel=1e-12)
    assert record["skipped_steps"] == 0
    assert record["fp8/qkv.input/saturated_fraction"] == 0.25
    assert 0.01 < record["memory_gib"] < 1000


def test_mfu_is_null_without_a_known_peak(tmp_path):
    with writer(tmp_path) as out:
        out.train_step(10, step_values(), step_time_s=0.5)
    start, record = lines(tmp_path)
    assert "no MFU, as the peak of this device is not known" in start["message"]
    assert record["mfu"] is None


def test_mfu_takes_the_bf16_peak_of_a_known_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(
        metrics, "peak_tflops", lambda kind, dtype: {("cpu", "bfloat16"): 989.0}[kind, dtype]
    )
    with writer(tmp_path, device_count=4) as out:
        out.train_step(10, step_values(), step_time_s=0.5)
    expected = 512 * model_flops_per_token(CONFIG.model, 64) / (4 * 989e12)
    assert lines(tmp_path)[1]["mfu"] == pytest.approx(expected, rel=1e-12)


def test_validation_and_event_records(tmp_path):
    with writer(tmp_path) as out:
        out.validation(100, 3.5)
        out.event(100, "checkpoint 100 was not saved")
    _, validation, event = lines(tmp_path)
    del validation["time"], event["time"]
    assert validation == {
        "kind": "validation", "step": 100, "tokens": 25600, "validation_loss_nats": 3.5,
    }  # fmt: skip
    assert event == {"kind": "event", "step": 100, "message": "checkpoint 100 was not saved"}


def test_non_finite_numbers_are_null_with_their_text(tmp_path):
    with writer(tmp_path) as out:
        values = step_values(loss=float("nan"))
        values |= {"grad_norm": float("inf"), "lr": np.float32(-np.inf)}
        out.train_step(10, values, step_time_s=0.5)

    def refuse(text):
        raise AssertionError(text)

    text = (tmp_path / "metrics.jsonl").read_text().splitlines()[1]
    record = json.loads(text, parse_constant=refuse)
    assert record["loss_nats"] is record["grad_norm"] is record["lr"] is None
    assert record["non_finite"] == {"loss_nats": "nan", "grad_norm": "inf", "lr": "-inf"}


def test_each_line_is_in_the_file_at_once(tmp_path):
    out = writer(tmp_path)
    for step in (10, 20):
        out.train_step(step, step_values(), step_time_s=0.5)
        assert lines(tmp_path)[-1]["step"] == step
    out.close()


# Resuming.


def test_resume_drops_what_will_be_done_again(tmp_path):
    with writer(tmp_path) as out:
        for step in (10, 20, 30, 40):
            out.train_step(step, step_values(loss=float(step)), step_time_s=0.5)
        out.validation(30, 3.0)
    kept = (tmp_path / "metrics.jsonl").read_bytes().splitlines()[:3]
    with writer(tmp_path, resume_step=20) as out:
        out.train_step(30, step_values(loss=31.0), step_time_s=0.5)
    after = (tmp_path / "metrics.jsonl").read_bytes().splitlines()
    assert after[:3] == kept  # Unchanged to the byte.
    assert [(r["kind"], r["step"]) for r in map(json.loads, after[3:])] == [
        ("event", 20),
        ("train", 30),
    ]
    assert json.loads(after[4])["loss_nats"] == 31.0


@pytest.mark.parametrize("tail", [b'{"kind": "train", "st', b"\x00\x00\x00", b'{"step": 1}\n[3]\n'])
def test_resume_repairs_torn_lines(tmp_path, tail):
    with writer(tmp_path) as out:
        out.train_step(10, step_values(), step_time_s=0.5)
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    assert read_metrics(tmp_path).torn_lines == 1
    writer(tmp_path, resume_step=10).close()
    assert path.read_bytes().startswith(whole)
    records = lines(tmp_path)
    assert [r["step"] for r in records if r.get("kind") == "train"] == [10]
    assert read_metrics(tmp_path).torn_lines == 0


def test_full_disk_loses_lines_but_not_the_run(tmp_path, monkeypatch):
    screen = io.StringIO()
    out = writer(tmp_path, console=Console(100, stream=screen))
    write = os.write

    def torn(descriptor, data):
        write(descriptor, data[:9])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", torn)
        out.train_step(10, step_values(), step_time_s=0.5)
        out.train_step(20, step_values(), step_time_s=0.5)
    out.train_step(30, step_values(), step_time_s=0.5)
    out.close()
    found = read_metrics(tmp_path)
    assert [record["step"] for record in found.train] == [30]
    assert screen.getvalue().count("cannot be written (No space left on device)") == 1


def test_other_processes_of_a_run_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("jax.process_index", lambda: 1)
    with writer(tmp_path) as out:
        out.train_step(10, step_values(), step_time_s=0.5)
        out.validation(10, 3.0)
        out.event(10, "x")
    assert list(tmp_path.iterdir()) == []


# Reading.


def test_read_sorts_by_kind(tmp_path):
    with writer(tmp_path / ".") as out:
        out.train_step(10, step_values(), step_time_s=0.5)
        out.validation(10, 3.0)
    found = read_metrics(tmp_path)
    assert found.name == tmp_path.name
    assert (len(found.train), len(found.validation), len(found.events)) == (1, 1, 1)


def test_read_errors(tmp_path):
    with pytest.raises(MetricsError, match="missing: no such run directory"):
        read_metrics(tmp_path / "missing")
    with pytest.raises(MetricsError, match="it has no metrics.jsonl"):
        read_metrics(tmp_path)
    writer(tmp_path).close()
    with pytest.raises(MetricsError, match="holds no training step yet"):
        read_metrics(tmp_path)


# The console.


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_terminal_line_is_rewritten_in_place(monkeypatch):
    clock = iter([0.0, 10.0, 30.0])
    monkeypatch.setattr(sinks.time, "monotonic", lambda: next(clock))
    monkeypatch.setenv("COLUMNS", "200")
    screen = Terminal()
    console = Console(100, stream=screen)
    values = {"loss_nats": 2.5, "tokens_per_s": 12345.0, "mfu": 0.412, "step_time_s": 1.0}
    console.train(10, values)
    assert screen.getvalue() == (
        "\r\x1b[2Kstep 10/100   10%  loss 2.5000  12.3k tokens/s  MFU 41.2%  ETA 1:30"
    )
    console.train(20, {"loss_nats": None, "mfu": None, "skipped_steps": 2})
    # One second a step so far: 80 to go.
    assert screen.getvalue().endswith("\r\x1b[2Kstep 20/100   20%  2 skipped  ETA 1:20")
    console.message("hello")
    shown = screen.getvalue().split("\r\x1b[2K")
    assert shown[-2:] == ["hello\n", "step 20/100   20%  2 skipped  ETA 1:20"]
    console.train(100, values)
    assert screen.getvalue().endswith("MFU 41.2%\n")


def test_terminal_line_fits_the_window(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    screen = Terminal()
    Console(100, stream=screen).train(10, {"loss_nats": 2.5, "step_time_s": 1.0})
    assert screen.getvalue().removeprefix("\r\x1b[2K") == "step 10/100   10%  "


def test_plain_lines_come_now_and_then(monkeypatch):
    clock = iter([0.0, 1.0, 9.0, 11.0, 12.0])
    monkeypatch.setattr(sinks.time, "monotonic", lambda: next(clock))
    screen = io.StringIO()
    console = Console(50, stream=screen)
    for step in (10, 20, 30, 40, 50):
        console.train(step, {"loss_nats": 1.0, "step_time_s": 0.1})
    shown = screen.getvalue().splitlines()
    assert [line.split("/")[0] for line in shown] == ["step 10", "step 40", "step 50"]
    assert "\x1b" not in screen.getvalue()


def test_validation_loss_stays_on_the_line(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    screen = Terminal()
    console = Console(100, stream=screen)
    console.validation(10, 3.25)
    assert "step 10/100  validation loss 3.2500 nats\n" in screen.getvalue()
    console.train(20, {"loss_nats": 2.0, "step_time_s": 1.0})
    assert "loss 2.0000  validation 3.2500" in screen.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(5, "0:05"), (245, "4:05"), (3723, "1:02:03"), (176523, "2d 1:02:03"), (86400, "1d 0:00:00")],
)
def test_duration(seconds, text):
    assert sinks._duration(seconds) == text


# The other sinks.


def test_sinks_get_finite_and_non_finite_numbers_but_no_null(tmp_path):
    sink = Recorder()
    with writer(tmp_path, sinks=[sink]) as out:
        out.train_step(10, step_values(loss=float("nan")), step_time_s=0.5)
        out.validation(10, 3.0)
    (_, _, train), validation = sink.records
    assert math.isnan(train["loss_nats"])
    assert "mfu" not in train
    assert validation == ("validation", 10, {"tokens": 2560.0, "validation_loss_nats": 3.0})
    assert sink.is_closed


@pytest.mark.parametrize(
    ("log", "module", "option"),
    [
        (LogConfig(tensorboard=True), "tensorboardX", "--log.tensorboard=True"),
        (LogConfig(wandb_project="p"), "wandb", "--log.wandb-project=p"),
    ],
)
def test_missing_sink_library_is_named_with_its_pip_command(monkeypatch, log, module, option):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError) as error:
        check_sinks(log)
    assert str(error.value).startswith(f"{option} needs the package {module}")
    assert str(error.value).endswith(f"-m pip install {module}")
    check_sinks(LogConfig())


def tensorboard_scalars(directory) -> list[tuple[str, int, float]]:
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(directory.glob("events.*")):
        content = path.read_bytes()
        while content:
            # TFRecord: length as uint64, its CRC as uint32, the payload, its CRC.
            length = int.from_bytes(content[:8], "little")
            event = Event.FromString(content[12 : 12 + length])
            found += [(v.tag, event.step, v.simple_value) for v in event.summary.value]
            content = content[16 + length :]
    return found


def test_tensorboard(tmp_path):
    config = dataclasses.replace(CONFIG, log=LogConfig(tensorboard=True))
    with writer(tmp_path, config=config, sinks=None) as out:
        health = {"fp8/qkv.input/scale": 0.125}
        out.train_step(10, step_values(**health), step_time_s=0.5)
        out.validation(10, 3.5)
    scalars = tensorboard_scalars(tmp_path / "tensorboard")
    assert ("train/loss_nats", 10, 2.5) in scalars
    assert ("fp8/qkv.input/scale", 10, 0.125) in scalars
    assert ("validation/validation_loss_nats", 10, 3.5) in scalars


class FakeWandb(types.ModuleType):
    """Stands for the wandb module: keeps what it is told."""

    def __init__(self):
        super().__init__("wandb")
        self.inits: list[dict] = []
        self.logged: list[dict] = []
        self.finished = 0

    def init(self, **arguments):
        self.inits.append(arguments)
        return types.SimpleNamespace(
            define_metric=lambda *_, **__: None, log=self.logged.append, finish=self._finish
        )

    def _finish(self):
        self.finished += 1


def test_wandb_continues_its_run_after_a_resume(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = dataclasses.replace(CONFIG, log=LogConfig(wandb_project="fp8"))
    for resume_step in (0, 10):
        with writer(tmp_path, config=config, sinks=None, resume_step=resume_step) as out:
            out.train_step(resume_step + 10, step_values(), step_time_s=0.5)
    first, second = fake.inits
    assert (first["project"], first["name"], first["resume"]) == ("fp8", "unit", "allow")
    assert first["id"] == second["id"] and len(first["id"]) == 12
    assert first["config"]["model"]["hidden_size"] == CONFIG.model.hidden_size
    assert [(r["step"], r["train/loss_nats"]) for r in fake.logged] == [(10, 2.5), (20, 2.5)]
    assert fake.finished == 2


def test_no_sinks_unless_asked_for(tmp_path):
    assert open_sinks(tmp_path, CONFIG, resume_step=0) == []

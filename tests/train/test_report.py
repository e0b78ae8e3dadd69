"""The report's numbers, by hand arithmetic; the picture; runs that cannot be read."""

import json

import numpy as np
import pytest

from train import report
from train.metrics import read_metrics
from train.plots import Curve, SeedPair, plot_loss
from train.report import compare, format_table, main


def write_run(directory, losses, *, tokens_per_step=1000, validation=None, tail="", **extra):
    """Writes metrics.jsonl with one train record a step, from step 1."""
    directory.mkdir()
    records = [{"kind": "event", "step": 0, "message": "start at step 0 on 1 x cpu; no MFU"}]
    for step, loss in enumerate(losses, start=1):
        records.append(
            {
                "kind": "train", "step": step, "tokens": step * tokens_per_step, "loss_nats": loss,
                "step_time_s": 0.5, "tokens_per_s": 2000.0, "mfu": None, "memory_gib": 1.5,
                "skipped_steps": 0,
            }
            | {name: values[step - 1] for name, values in extra.items()}
        )  # fmt: skip
    for step, loss in (validation or {}).items():
        tokens = step * tokens_per_step
        records.append(
            {"kind": "validation", "step": step, "tokens": tokens, "validation_loss_nats": loss}
        )
    text = "".join(json.dumps(record) + "\n" for record in records)
    (directory / "metrics.jsonl").write_text(text + tail)
    return directory


def cells(rows, title) -> list[str]:
    return next(row.cells for row in rows if row.title == title)


def test_smoothing_is_the_mean_over_the_latest_tenth_of_the_tokens(tmp_path):
    losses = [float(i) for i in range(1, 101)]
    smoothed = Curve.of(read_metrics(write_run(tmp_path / "a", losses))).smoothed()
    assert smoothed[0] == 1.0
    assert smoothed[9] == 10.0  # 10k tokens: those after 9k.
    assert smoothed[99] == np.mean(losses[90:])
    assert smoothed[49] == np.mean(losses[45:50])


def test_smoothing_passes_over_non_finite_losses(tmp_path):
    curve = Curve.of(read_metrics(write_run(tmp_path / "a", [4.0, None, 2.0])))
    assert curve.loss.tolist() == [4.0, 2.0]
    assert curve.tokens.tolist() == [1000.0, 3000.0]


def test_table_by_hand(tmp_path):
    a = write_run(
        tmp_path / "bf16", [4.0] * 10, validation={5: 5.0, 10: 4.0},
        tokens_per_s=[1.0, 100.0, 100.0, 100.0, 100.0, 100.0, 100.0, 100.0, 300.0, 300.0],
        mfu=[0.25] * 10,
    )  # fmt: skip
    b = write_run(
        tmp_path / "fp8", [4.0] * 10 + [5.0], validation={5: 5.5, 11: 6.0},
        tokens_per_s=[150.0] * 11, skipped_steps=[0] * 8 + [2, 2, 2],
        **{
            "fp8/qkv.input/saturated_fraction": [0.0] * 5 + [0.25] + [0.0] * 5,
            "fp8/down.input/saturated_fraction": [0.125] * 11,
            "fp8/down.input/underflowed_fraction": [None] * 10 + [0.5],
        },
    )  # fmt: skip
    rows = compare([read_metrics(a), read_metrics(b)])
    assert cells(rows, "steps") == ["10", "11"]
    assert cells(rows, "tokens") == ["10,000", "11,000"]
    # b ends on the mean of steps 10 and 11; its gap is taken at step 10, where a ends.
    assert cells(rows, "train loss, smoothed [nats]") == ["4.0000", "4.5000 (+0.00%)"]
    # The last step at which both were validated is 5.
    assert cells(rows, "validation loss [nats]") == ["4.0000", "6.0000 (+10.00%)"]
    assert cells(rows, "tokens/s, median") == ["100", "150 (+50.00%)"]
    assert cells(rows, "step time, median [s]") == ["0.5", "0.5 (+0.00%)"]
    assert cells(rows, "MFU, median") == ["25.0%", "-"]
    assert cells(rows, "peak memory [GiB]") == ["1.50", "1.50"]
    assert cells(rows, "skipped steps") == ["0", "2"]
    assert cells(rows, "FP8 saturated, worst") == ["-", "2.50e-01 (qkv.input)"]
    assert cells(rows, "FP8 underflowed, worst") == ["-", "5.00e-01 (down.input)"]


def test_gap_at_the_end_of_the_shorter_run(tmp_path):
    a = write_run(tmp_path / "a", [2.0] * 10 + [1.0] * 10)
    b = write_run(tmp_path / "b", [2.5] * 10)
    rows = compare([read_metrics(a), read_metrics(b)])
    assert cells(rows, "train loss, smoothed [nats]") == ["1.0000", "2.5000 (+25.00%)"]


def test_gap_takes_only_what_both_runs_logged(tmp_path):
    """Runs of one data order, one logged at every step, the other at every second."""
    a = write_run(tmp_path / "a", [float(i) for i in range(100, 0, -1)])
    b = write_run(tmp_path / "b", [2.0 * i for i in range(99, 0, -2)], tokens_per_step=2000)
    tokens, gap = Curve.of(read_metrics(b)).gap_to(Curve.of(read_metrics(a)))
    assert tokens.tolist() == [2000.0 * i for i in range(1, 51)]
    np.testing.assert_allclose(gap, 1.0, rtol=1e-12)


def test_no_gap_without_a_common_point(tmp_path):
    a = write_run(tmp_path / "a", [2.0] * 3)
    b = write_run(tmp_path / "b", [2.0] * 3, tokens_per_step=999)
    rows = compare([read_metrics(a), read_metrics(b)])
    assert cells(rows, "train loss, smoothed [nats]") == ["2.0000", "2.0000"]
    plot_loss([a, b], tmp_path / "loss.png", band=[a, b])


def test_run_without_a_finite_loss(tmp_path):
    a = write_run(tmp_path / "a", [2.0] * 3)
    b = write_run(tmp_path / "b", [None] * 3)
    rows = compare([read_metrics(a), read_metrics(b)])
    assert cells(rows, "train loss, smoothed [nats]") == ["2.0000", "-"]
    plot_loss([a, b], tmp_path / "loss.png")
    plot_loss([b], tmp_path / "none.png")


def test_table_columns_line_up():
    rows = [report.Row("loss", ["1.0", "22.5 (+1.00%)"]), report.Row("steps", ["1000000", "3"])]
    assert format_table(["a", "b"], rows).splitlines() == [
        "             a              b",
        "-----------------------------",
        "loss       1.0  22.5 (+1.00%)",
        "steps  1000000              3",
    ]


def png_size(path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")


def test_plot_of_one_run(tmp_path):
    run = write_run(tmp_path / "run", list(np.linspace(8, 3, 40)), validation={40: 3.2})
    plot_loss([run], run / "loss.png")
    assert png_size(run / "loss.png") == (1350, 975)
    assert not list(run.glob("*.tmp"))


@pytest.mark.parametrize("count", [1, 2])
def test_plot_draws_every_run_the_gap_and_the_band(tmp_path, count):
    """An SVG keeps the texts, so what is in the picture can be read from it."""
    runs = [write_run(tmp_path / f"run{i}", [4.0 + i, 3.0 + i, 2.0 + i]) for i in range(count)]
    band = [write_run(tmp_path / f"seed{i}", [4.0 + i / 100, 3.0, 2.0]) for i in range(2)]
    plot_loss(runs, tmp_path / "plot.svg", band=band)
    comments = (tmp_path / "plot.svg").read_text()
    for text in ("loss [nats per token]", "tokens", "range of seed0, seed1", "run0 [%]", "run0"):
        assert f"<!-- {text} -->" in comments, text
    assert ("<!-- run1 -->" in comments) == (count == 2)


def test_plot_draws_other_seeds_beside_their_reference(tmp_path):
    runs = [write_run(tmp_path / name, [4.0, 3.0, 2.0]) for name in ("a", "b", "a1", "b1")]
    plot_loss(runs[:2], tmp_path / "without.svg")
    plot_loss(runs[:2], tmp_path / "plot.svg", pairs=[SeedPair(1, runs[3], runs[2])])
    without, text = ((tmp_path / name).read_text() for name in ("without.svg", "plot.svg"))
    assert "thin: other seeds" in text and "thin: other seeds" not in without
    assert text.count("stroke-width: 0.7") == without.count("stroke-width: 0.7") + 1


def test_plot_of_a_single_point(tmp_path):
    plot_loss([write_run(tmp_path / "run", [4.0])], tmp_path / "loss.png")
    assert png_size(tmp_path / "loss.png") == (1350, 975)


def test_main_prints_the_table_and_writes_the_picture(tmp_path, capsys):
    a = write_run(tmp_path / "a", [4.0, 3.0])
    b = write_run(tmp_path / "b", [4.0, 3.03], tail='{"kind": "tra')
    output = tmp_path / "out.png"
    assert main([str(a), str(b), "--output", str(output), "--band", str(a), str(b)]) == 0
    shown = capsys.readouterr().out
    assert "3.0300 (+1.00%)" in shown
    assert "note: b: 1 unreadable lines were passed over" in shown
    assert png_size(output) == (1350, 975)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}/missing"], "missing: no such run directory"),
        (["{tmp}"], "is no run directory: it has no metrics.jsonl"),
        (["{tmp}/a", "{tmp}/torn"], "holds no training step yet"),
        ([], "give one run directory or more"),
        (["{tmp}/a", "--output", "x.doc"], "--output=x.doc must end in .png, .svg, .pdf"),
        (["{tmp}/a", "--band", "{tmp}/a"], "needs two runs or more"),
        (["{tmp}/a", "--output", "{tmp}/no/x.png"], "the picture cannot be written"),
    ],
)
def test_main_errors(tmp_path, capsys, arguments, message):
    write_run(tmp_path / "a", [4.0, 3.0])
    write_run(tmp_path / "torn", [], tail='{"kind": "train", "step": 1, "tok')
    assert main([text.format(tmp=tmp_path) for text in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and message in captured.err
    assert captured.out == ""

"""Verdicts by hand arithmetic."""

import math

import pytest
from test_report import write_run

from train.metrics import read_metrics
from train.verdict import Gap, describe_run, judge, overall, train_gap, validation_gap


@pytest.mark.parametrize(
    ("loss", "reference", "passes"),
    [
        (4.0, 4.0, True),
        (3.0, 4.0, True),
        (4.01, 4.0, True),  # 0.25 %
        (4.011, 4.0, False),
        (1.0099, 1.0, True),  # 0.99 %, but below 0.01 nats
        (1.0101, 1.0, False),
        (math.nan, 4.0, False),
    ],
)
def test_gap_passes_at_a_quarter_of_a_per_cent_or_a_hundredth_of_a_nat(loss, reference, passes):
    assert Gap(loss, reference).passes is passes


def test_gaps_by_hand(tmp_path):
    # The last tenth of 20 steps is two of them.
    a = write_run(tmp_path / "a", [5.0] * 18 + [4.0, 2.0], validation={10: 9.0, 20: 8.0})
    b = write_run(tmp_path / "b", [5.0] * 18 + [4.0, 2.06], validation={20: 8.02})
    reference, run = read_metrics(a), read_metrics(b)
    train, validation = train_gap(run, reference), validation_gap(run, reference)
    assert (train.loss_nats, train.reference_nats) == (pytest.approx(3.03), 3.0)
    assert (train.relative, train.nats) == (pytest.approx(0.01), pytest.approx(0.03))
    assert (validation.loss_nats, validation.reference_nats) == (8.02, 8.0)
    result = judge(run, reference, is_complete=True)
    assert result["verdict"] == "fail"
    assert (result["train_gap"]["passes"], result["validation_gap"]["passes"]) == (False, True)
    assert judge(run, reference, is_complete=False)["verdict"] == "incomplete"
    assert judge(reference, reference, is_complete=True)["verdict"] == "pass"
    assert judge(None, reference, is_complete=False)["train_gap"] is None


def test_only_common_steps_are_compared(tmp_path):
    reference = read_metrics(write_run(tmp_path / "a", [4.0] * 30, validation={30: 1.0}))
    run = read_metrics(write_run(tmp_path / "b", [4.0] * 20 + [None] * 10, validation={20: 1.0}))
    assert train_gap(run, reference).relative == 0
    assert validation_gap(run, reference) is None


def test_run_that_ends_in_non_finite_losses_fails(tmp_path):
    reference = read_metrics(write_run(tmp_path / "a", [4.0] * 30))
    run = read_metrics(write_run(tmp_path / "b", [4.0] * 29 + [None]))
    assert judge(run, reference, is_complete=True)["verdict"] == "fail"


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        (["pass", "pass"], "pass"),
        (["pass", "incomplete"], "incomplete"),
        (["incomplete", "fail", "pass"], "fail"),
        ([], "incomplete"),
    ],
)
def test_overall(verdicts, expected):
    assert overall(verdicts) == expected


def test_curve_is_thinned_to_a_hundred_points_with_both_ends(tmp_path):
    run = read_metrics(write_run(tmp_path / "a", [float(i) for i in range(1, 1001)]))
    description = describe_run(run)
    curve = description["curve"]
    assert len(curve["tokens"]) == len(curve["smoothed_loss_nats"]) == 100
    assert (curve["tokens"][0], curve["tokens"][-1]) == (1000, 1000 * 1000)
    assert curve["smoothed_loss_nats"][-1] == 950.5  # the mean of 901 ... 1000
    assert (description["steps"], description["tokens_per_s_median"]) == (1000, 2000.0)

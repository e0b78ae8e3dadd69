"""Verdicts by hand arithmetic."""

import math

import pytest
from test_report import write_run

from train.metrics import read_metrics
from train.verdict import (
    Gap,
    MeanGap,
    Noise,
    describe_run,
    judge,
    overall,
    pair_gaps,
    train_gap,
    validation_gap,
)


@pytest.mark.parametrize(
    ("gap", "reference", "noise", "verdict", "reason"),
    [
        # The tolerance is 0.25 % of 4 nats, 0.01.
        (0.0099, 4.0, 0.0099, "pass", "gap 0.0099 nats, noise 0.0099 <= tolerance 0.0100"),
        (-0.0099, 4.0, 0.0099, "pass", ""),
        (0.0119, 4.0, 0.002, "inconclusive", "tolerance 0.0100, but within noise 0.0020"),
        (0.0121, 4.0, 0.002, "fail", "gap 0.0121 nats > tolerance 0.0100 + noise 0.0020"),
        (-0.0121, 4.0, 0.002, "fail", ""),
        (0.0, 4.0, 0.0101, "inconclusive", "noise 0.0101 nats > tolerance 0.0100"),
        (0.0202, 4.0, 0.0101, "fail", ""),
        (math.nan, 4.0, 0.002, "fail", "not finite"),
        # 0.01 nats are 1 % of 1, and 0.25 % of 8 are 0.02.
        (0.0099, 1.0, 0.005, "pass", ""),
        (0.0199, 8.0, 0.0199, "pass", ""),
    ],
)
def test_verdict_on_a_mean_gap(gap, reference, noise, verdict, reason):
    mean_gap = MeanGap((Gap(reference + gap, reference),), Noise(noise, 3))
    assert mean_gap.judge()[0] == verdict
    assert reason in mean_gap.judge()[1]


def test_unknown_noise_is_inconclusive_at_any_gap():
    for gap in (0.0, 9.0):
        mean_gap = MeanGap((Gap(4.0 + gap, 4.0),), Noise.of([gap], [4.0], [4.0]))
        assert mean_gap.judge() == (
            "inconclusive",
            "the noise is not known from one seed; train more --seeds",
        )
        assert mean_gap.as_json()["noise_nats"] is None


@pytest.mark.parametrize(
    ("differences", "seeds", "repeats", "noise", "freedom"),
    [
        # Differences: variance 1e-4 with 2 degrees of freedom, Student's t 2.920.
        ([0.01, 0.03, 0.02], [4.0, 5.0, 6.0], [4.0], 2.920 * math.sqrt(1e-4 / 3), 2),
        ([-0.01, 0.03], [4.0, 5.0], [], 6.314 * math.sqrt(8e-4 / 2), 1),
        # One: twice the variance of the seeds, 2e-4.
        ([0.5], [4.0, 4.02], [], 6.314 * math.sqrt(2 * 2e-4), 1),
        # Repeats 0.01 apart: twice 5e-5 with one more degree of freedom.
        ([0.01, 0.03, 0.02], [4.0], [4.0, 4.01], 2.353 * math.sqrt(1e-4 / 3), 3),
        ([0.5], [4.0], [4.0, 4.01], 6.314 * 0.01, 1),
        # Repeats that are equal bit for bit say nothing.
        ([0.01, 0.03, 0.02], [4.0], [4.0, 4.0], 2.920 * math.sqrt(1e-4 / 3), 2),
        # Forty differences of +-1: the table ends at ten degrees of freedom.
        ([1.0, -1.0] * 20, [4.0], [], 1.812 * math.sqrt(40 / 39 / 40), 39),
        ([], [4.0, 5.0], [], math.inf, 0),
        ([0.5], [4.0], [4.0, 4.0], math.inf, 0),
    ],
)
def test_noise_by_hand(differences, seeds, repeats, noise, freedom):
    result = Noise.of(differences, seeds, repeats)
    assert result.nats == pytest.approx(noise, rel=1e-9)
    assert result.degrees_of_freedom == freedom


def test_gaps_by_hand(tmp_path):
    # The last tenth of 20 steps is two of them.
    a = write_run(tmp_path / "a", [5.0] * 18 + [4.0, 2.0], validation={10: 9.0, 20: 8.0})
    b = write_run(tmp_path / "b", [5.0] * 18 + [4.0, 2.06], validation={20: 8.02})
    reference, run = read_metrics(a), read_metrics(b)
    train, validation = train_gap(run, reference), validation_gap(run, reference)
    assert (train.loss_nats, train.reference_nats) == (pytest.approx(3.03), 3.0)
    assert (train.relative, train.nats) == (pytest.approx(0.01), pytest.approx(0.03))
    assert (validation.loss_nats, validation.reference_nats) == (8.02, 8.0)
    assert pair_gaps(run, reference)["train_gap"]["nats"] == pytest.approx(0.03)
    assert pair_gaps(None, reference) == {"train_gap": None, "validation_gap": None}


def test_mean_gap_over_seeds_by_hand(tmp_path):
    """Each run is compared with the reference of its seed: the seeds' own spread cancels."""
    references = [4.0, 4.4, 4.2]
    gaps = [0.001, 0.003, 0.002]
    seeds = [
        read_metrics(write_run(tmp_path / f"r{i}", [x] * 10, validation={10: 2 * x}))
        for i, x in enumerate(references)
    ]
    runs = [
        read_metrics(write_run(tmp_path / f"a{i}", [x + gap] * 10, validation={10: 2 * x + 0.5}))
        for i, (x, gap) in enumerate(zip(references, gaps, strict=True))
    ]
    pairs = list(zip(runs, seeds, strict=True))
    result = judge(pairs, seeds=seeds, is_complete=True)
    train, validation = result["train_gap"], result["validation_gap"]
    assert (train["reference_nats"], train["loss_nats"]) == pytest.approx((4.2, 4.202))
    assert train["per_seed_nats"] == pytest.approx(gaps)
    assert train["noise_nats"] == pytest.approx(2.920 * 0.001 / math.sqrt(3))
    assert train["noise_relative"] == pytest.approx(2.920 * 0.001 / math.sqrt(3) / 4.2)
    assert (train["tolerance_nats"], train["verdict"]) == (pytest.approx(0.0105), "pass")
    assert (validation["noise_nats"], validation["verdict"]) == (pytest.approx(0, abs=1e-9), "fail")
    assert result["verdict"] == "fail"
    assert result["reason"].startswith("validation: gap 0.5000 nats > tolerance 0.0210")
    assert judge(pairs, seeds=seeds, is_complete=False)["verdict"] == "incomplete"
    # With its first seed alone only the seeds of the reference tell: variance 0.04.
    one = judge(pairs[:1], seeds=seeds, is_complete=True)["train_gap"]
    assert one["noise_nats"] == pytest.approx(2.920 * math.sqrt(2 * 0.04))
    assert one["verdict"] == "inconclusive"
    assert judge([], seeds=seeds, is_complete=False)["train_gap"] is None


def test_only_common_steps_are_compared(tmp_path):
    reference = read_metrics(write_run(tmp_path / "a", [4.0] * 30, validation={30: 1.0}))
    run = read_metrics(write_run(tmp_path / "b", [4.0] * 20 + [None] * 10, validation={20: 1.0}))
    assert train_gap(run, reference).relative == 0
    assert validation_gap(run, reference) is None


@pytest.mark.parametrize("is_run", [True, False])
def test_pair_that_ends_in_a_non_finite_loss_fails(is_run, tmp_path):
    good = read_metrics(write_run(tmp_path / "a", [4.0] * 30))
    bad = read_metrics(write_run(tmp_path / "b", [4.0] * 29 + [None]))
    pair = (bad, good) if is_run else (good, bad)
    result = judge([(good, good), pair], seeds=[good, pair[1]], is_complete=True)
    assert result["verdict"] == "fail"
    assert result["reason"] == "a run does not end with a finite loss"


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        (["pass", "pass"], "pass"),
        (["pass", "inconclusive"], "inconclusive"),
        (["inconclusive", "pass", "incomplete"], "incomplete"),
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

"""Whether an arm learns like the reference: gaps of their final losses, their noise, what passes.

Compared are the training loss, smoothed over the latest tenth of the tokens that both runs logged
(with the same data order the noise of single batches cancels), and the validation loss of the same
step. The gap of an arm is the mean over seeds of its loss minus the loss of the reference with the
same seed, that is, from the same initial weights on the same batches:

    d_i = arm_i - reference_i                 i = 1 ... n seeds
    gap = mean(d)                             noise = t(df) * sqrt(variance / n)

t(df) is the 95 % point of Student's distribution, so gap +- noise is the 90 % interval by which
equivalence is tested (Schuirmann 1987, J. Pharmacokinet. Biopharm. 15, 657). `variance` is that of
the d_i, n - 1 degrees of freedom. With one seed it is twice the variance of the reference's own
seeds, which is no less: the initial weights, which cancel in d, vary in it. Repeats of one
reference run, where kernels add in any order, give twice their variance; both are pooled.

With the tolerance of 0.25 % of the reference, or 0.01 nats if that is more:

    fail          |gap| > tolerance + noise, or a run does not end with a finite loss
    inconclusive  noise > tolerance, or |gap| within the noise beyond the tolerance
    pass          |gap| <= tolerance

So what passes is within the tolerance, measured at least as finely as that.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, Self

import numpy as np

from train.metrics import Metrics
from train.plots import TOLERANCE, Curve

TOLERANCE_NATS = 0.01
_CURVE_POINTS = 100
# 95 % points of Student's distribution for 1, 2, ... degrees of freedom; the last holds for more.
_STUDENT_95 = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812)

Verdict = Literal["pass", "fail", "inconclusive", "incomplete"]


@dataclasses.dataclass(frozen=True, slots=True)
class Gap:
    """A loss beside the reference's at the same tokens."""

    loss_nats: float
    reference_nats: float

    @property
    def nats(self) -> float:
        """Loss minus the reference's."""
        return self.loss_nats - self.reference_nats

    @property
    def relative(self) -> float:
        """Loss over the reference's, minus 1."""
        return self.loss_nats / self.reference_nats - 1

    def as_json(self) -> dict[str, Any]:
        """For the result file."""
        return {**dataclasses.asdict(self), "nats": self.nats, "relative": self.relative}


@dataclasses.dataclass(frozen=True, slots=True)
class Noise:
    """How far a mean gap may be off by chance."""

    nats: float
    """Half the width of its 90 % interval; infinite if nothing tells."""
    degrees_of_freedom: int
    """Of the variance it comes from; 0 if nothing tells."""

    @classmethod
    def of(
        cls, differences: Sequence[float], seeds: Sequence[float], repeats: Sequence[float]
    ) -> Self:
        """Estimates it.

        Args:
          differences: loss minus reference, one for each seed [nats].
          seeds: losses of the reference with its seeds; taken for want of two differences.
          repeats: losses of the same run of the reference, done again. Where all are equal the
            device repeats every bit, and they say nothing about the noise of other roundings.
        """
        samples = [(differences, 1.0)] if len(differences) > 1 else [(seeds, 2.0)]
        if len(set(repeats)) > 1:
            samples.append((repeats, 2.0))
        samples = [(values, factor) for values, factor in samples if len(values) > 1]
        freedom = sum(len(values) - 1 for values, _ in samples)
        if not freedom or not differences:
            return cls(math.inf, 0)
        squares = sum(factor * np.var(values) * len(values) for values, factor in samples)
        student = _STUDENT_95[min(freedom, len(_STUDENT_95)) - 1]
        return cls(student * math.sqrt(squares / freedom / len(differences)), freedom)


@dataclasses.dataclass(frozen=True, slots=True)
class MeanGap:
    """The gap of an arm in one loss, over its seeds."""

    per_seed: tuple[Gap, ...]
    """Of each seed to the reference with that seed; at least one."""
    noise: Noise

    @property
    def mean(self) -> Gap:
        """The mean losses beside each other."""
        return Gap(
            float(np.mean([gap.loss_nats for gap in self.per_seed])),
            float(np.mean([gap.reference_nats for gap in self.per_seed])),
        )

    @property
    def tolerance_nats(self) -> float:
        """What the gap may be."""
        return max(TOLERANCE * self.mean.reference_nats, TOLERANCE_NATS)

    def judge(self) -> tuple[Verdict, str]:
        """The verdict and its reason."""
        gap, noise, tolerance = abs(self.mean.nats), self.noise.nats, self.tolerance_nats
        if not math.isfinite(gap):
            return "fail", "the loss is not finite"
        if gap > tolerance + noise:
            return "fail", f"gap {gap:.4f} nats > tolerance {tolerance:.4f} + noise {noise:.4f}"
        if not self.noise.degrees_of_freedom:
            return "inconclusive", "the noise is not known from one seed; train more --seeds"
        if noise > tolerance:
            reason = f"noise {noise:.4f} nats > tolerance {tolerance:.4f}; train more --seeds"
            return "inconclusive", reason
        if gap > tolerance:
            reason = f"gap {gap:.4f} nats > tolerance {tolerance:.4f}, but within noise {noise:.4f}"
            return "inconclusive", reason
        return "pass", f"gap {gap:.4f} nats, noise {noise:.4f} <= tolerance {tolerance:.4f}"

    def as_json(self) -> dict[str, Any]:
        """For the result file; an unknown noise is null."""
        verdict, reason = self.judge()
        known = self.noise.degrees_of_freedom > 0
        return {
            **self.mean.as_json(),
            "per_seed_nats": [gap.nats for gap in self.per_seed],
            "noise_nats": self.noise.nats if known else None,
            "noise_relative": self.noise.nats / self.mean.reference_nats if known else None,
            "noise_degrees_of_freedom": self.noise.degrees_of_freedom,
            "tolerance_nats": self.tolerance_nats,
            "verdict": verdict,
            "reason": reason,
        }


def train_gap(run: Metrics, reference: Metrics) -> Gap | None:
    """The smoothed training losses at the last step that both logged; None if there is none."""
    _, own, others = Curve.of(run).smoothed_with(Curve.of(reference))
    return Gap(float(own[-1]), float(others[-1])) if len(own) else None


def validation_gap(run: Metrics, reference: Metrics) -> Gap | None:
    """The validation losses of the last step at which both were validated; None if none."""
    own, others = _validations(run), _validations(reference)
    common = max(own.keys() & others.keys(), default=None)
    return None if common is None else Gap(own[common], others[common])


_GAPS: dict[str, Callable[[Metrics, Metrics], Gap | None]] = {
    "train_gap": train_gap,
    "validation_gap": validation_gap,
}


def pair_gaps(run: Metrics | None, reference: Metrics | None) -> dict[str, Any]:
    """The gaps of one run to another, JSON-able; null where they have no point in common."""
    if run is None or reference is None:
        return dict.fromkeys(_GAPS)
    gaps = {name: gap_of(run, reference) for name, gap_of in _GAPS.items()}
    return {name: gap.as_json() if gap else None for name, gap in gaps.items()}


def judge(
    pairs: Sequence[tuple[Metrics, Metrics]],
    *,
    seeds: Sequence[Metrics],
    repeats: Sequence[Metrics] = (),
    is_complete: bool,
) -> dict[str, Any]:
    """The verdict on an arm, with its mean gaps, JSON-able.

    Args:
      pairs: its runs, each with the reference's run of the same seed; those that have begun.
      seeds: the runs of the reference with all its seeds.
      repeats: the reference's first run and those that repeat it.
      is_complete: all of these have done all their steps; otherwise the verdict is "incomplete".
    """
    gaps = {name: _mean_gap(gap_of, pairs, seeds, repeats) for name, gap_of in _GAPS.items()}
    measured = {name: gap for name, gap in gaps.items() if gap is not None}
    if not is_complete:
        verdict, reason = "incomplete", "not all runs have done all their steps"
    # The last losses themselves must be numbers, not only those that the curve is made of.
    elif gaps["train_gap"] is None or not all(_ends_finite(run) for pair in pairs for run in pair):
        verdict, reason = "fail", "a run does not end with a finite loss"
    else:
        judged = {name.partition("_")[0]: gap.judge() for name, gap in measured.items()}
        verdict = overall([word for word, _ in judged.values()])
        reason = "; ".join(
            f"{name}: {why}" for name, (word, why) in judged.items() if word == verdict
        )
    return {"verdict": verdict, "reason": reason} | {
        name: gap.as_json() if gap else None for name, gap in gaps.items()
    }


def _mean_gap(gap_of, pairs, seeds, repeats) -> MeanGap | None:
    gaps = [gap_of(run, reference) for run, reference in pairs]
    gaps = [gap for gap in gaps if gap is not None]
    if not gaps:
        return None
    losses = lambda runs: [  # noqa: E731
        gap.loss_nats for run in runs if (gap := gap_of(run, runs[0])) is not None
    ]
    return MeanGap(
        tuple(gaps), Noise.of([gap.nats for gap in gaps], losses(seeds), losses(repeats))
    )


def overall(verdicts: Sequence[Verdict]) -> Verdict:
    """The first of fail, incomplete and inconclusive that is there, else pass.

    Incomplete without any.
    """
    for verdict in ("fail", "incomplete", "inconclusive"):
        if verdict in verdicts:
            return verdict
    return "pass" if verdicts else "incomplete"


def describe_run(run: Metrics) -> dict[str, Any]:
    """The numbers of a run that a result file keeps, with its curve at up to a hundred points."""
    curve = Curve.of(run)
    shown = np.unique(np.linspace(0, len(curve.tokens) - 1, _CURVE_POINTS).round().astype(int))
    shown = shown if len(curve.tokens) else shown[:0]
    last, speeds = run.train[-1], [r["tokens_per_s"] for r in run.train if r.get("tokens_per_s")]
    return {
        "steps": last["step"],
        "tokens": last["tokens"],
        "skipped_steps": last.get("skipped_steps"),
        "tokens_per_s_median": float(np.median(speeds)) if speeds else None,
        "validation_loss_nats": {str(k): v for k, v in sorted(_validations(run).items())},
        "curve": {
            "tokens": curve.tokens[shown].astype(int).tolist(),
            "smoothed_loss_nats": [round(float(x), 6) for x in curve.smoothed()[shown]],
        },
    }


def _validations(run: Metrics) -> dict[int, float]:
    return {
        record["tokens"]: record["validation_loss_nats"]
        for record in run.validation
        if record.get("validation_loss_nats") is not None
    }


def _ends_finite(run: Metrics) -> bool:
    return run.train[-1].get("loss_nats") is not None

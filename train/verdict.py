"""Whether runs learn alike: gaps of their final losses to a reference run, and what passes.

Compared are the training loss, smoothed over the latest tenth of the tokens that both runs logged
(with the same data order the noise of single batches cancels), and the validation loss of the same
step. A gap passes if it is at most 0.25 % of the reference or at most 0.01 nats; below it always
does. Beside them stands the range of runs of the reference that differ by their initial weights.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from train.metrics import Metrics
from train.plots import TOLERANCE, Curve

TOLERANCE_NATS = 0.01
_CURVE_POINTS = 100

Verdict = Literal["pass", "fail", "incomplete"]


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

    @property
    def passes(self) -> bool:
        """Whether the gap is small enough, or negative; false for a NaN."""
        return self.relative <= TOLERANCE or self.nats <= TOLERANCE_NATS

    def as_json(self) -> dict[str, Any]:
        """For the result file."""
        return {
            **dataclasses.asdict(self),
            "nats": self.nats,
            "relative": self.relative,
            "passes": self.passes,
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


def judge(run: Metrics | None, reference: Metrics | None, *, is_complete: bool) -> dict[str, Any]:
    """The verdict on one run, with its gaps, JSON-able.

    Args:
      run: what is judged; None before its first step.
      reference: what it is compared with.
      is_complete: both have done all their steps; otherwise the verdict is "incomplete".
    """
    gaps = {"train": None, "validation": None}
    if run is not None and reference is not None:
        gaps = {"train": train_gap(run, reference), "validation": validation_gap(run, reference)}
    measured = [gap for gap in gaps.values() if gap is not None]
    if not is_complete:
        verdict: Verdict = "incomplete"
    else:
        # The last losses themselves must be numbers, not only those that the curve is made of.
        passes = gaps["train"] is not None and _ends_finite(run) and all(g.passes for g in measured)
        verdict = "pass" if passes else "fail"
    return {"verdict": verdict} | {
        f"{name}_gap": gap.as_json() if gap else None for name, gap in gaps.items()
    }


def overall(verdicts: Sequence[Verdict]) -> Verdict:
    """fail if any failed, else incomplete if any is, else pass; incomplete without any."""
    for verdict in ("fail", "incomplete"):
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


def _ends_finite(run: Metrics | None) -> bool:
    return run is not None and run.train[-1].get("loss_nats") is not None

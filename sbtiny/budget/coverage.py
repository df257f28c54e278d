"""The coverage of held-out answers: how often they kept the promises of a calibration."""

from collections.abc import Sequence
from typing import Any

from sbtiny.budget.calibration import Calibration, CalibrationAnswer, share
from sbtiny.budget.conformal import COVERAGES


def kept_coverage(calibration: Calibration, answers: Sequence[CalibrationAnswer]) -> dict[str, dict[str, Any]]:
    """Compute the `coverage` of eval.json: the share of all answers that kept their promise, by bin too. An infinite one keeps none.

    `mean_promise`: in tokens. All are None where there is no finite promise.
    """
    found = {}
    for c in COVERAGES:
        promises = [None if a.stated is None else calibration.promise(a.stated, c) for a in answers]
        made = [p for p in promises if p is not None]
        kept = [a.used is not None and p is not None and a.used <= p for a, p in zip(answers, promises, strict=True)]
        promised = calibration.scores.factor(c) is not None and bool(made)
        found[str(c)] = {
            "promised": c if promised else None,
            "kept": share(kept) if promised else None,
            "mean_promise": sum(made) / len(made) if promised else None,
            "by_bin": kept_by_bin(calibration, answers, kept) if promised else [],
        }
    return found


def kept_by_bin(calibration: Calibration, answers: Sequence[CalibrationAnswer], kept: Sequence[bool]) -> list[dict[str, Any]]:
    places = [None if a.stated is None else calibration.bin_of(a.stated) for a in answers]
    by_bin = [[ok for ok, at in zip(kept, places, strict=True) if at == i] for i in range(len(calibration.bins))]
    pairs = zip(calibration.bins, by_bin, strict=True)
    return [{"from": b.low, "to": b.high, "questions": len(part), "kept": share(part)} for b, part in pairs]

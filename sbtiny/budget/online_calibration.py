"""A calibration that follows its traffic: adaptive conformal inference (Gibbs and Candes, arXiv 2106.00170).

Each coverage c has a level a, at first 1 - c, at which answers may miss. After each answer a <- a + g (1 - c - miss), so the share of
misses tends to 1 - c whatever the traffic. The promise is the (1 - a) quantile of the last WINDOW scores. Its record lies beside
calibration.json, never in it.
"""

import math
from collections import deque
from typing import Any

from sbtiny.budget.calibration import COVERAGES, Calibration, CalibrationAnswer, scale_up
from sbtiny.budget.calibration_record import check_fields, is_finite
from sbtiny.budget.remaining import ROUNDING
from sbtiny.errors import InputError

WINDOW = 500
STEP = 0.01


class OnlineCalibration:
    """Promises that adapt. Starts from the scores of a calibration, which the newest answers push out one by one."""

    def __init__(self, calibration: Calibration, coverages: tuple[float, ...] = COVERAGES) -> None:
        scores = [*calibration.ratios, *[math.inf] * (calibration.questions - len(calibration.ratios))]
        golden = (math.sqrt(5) - 1) / 2  # its multiples mix small and large scores, so that the window drops both alike
        self.fingerprint = calibration.model_fingerprint
        self.miss_levels = {c: 1 - c for c in coverages}
        self.window = deque((scores[i] for i in sorted(range(len(scores)), key=lambda i: i * golden % 1)), WINDOW)

    def promise(self, stated: int, coverage: float) -> int | None:
        """Compute the tokens that an answer of this stated budget stays within; None without a finite promise."""
        if coverage not in self.miss_levels:
            raise InputError(f"coverage {coverage} is not followed: choose from {', '.join(map(str, self.miss_levels))}")
        rank = math.ceil((len(self.window) + 1) * (1 - self.miss_levels[coverage]) - ROUNDING)
        factor = sorted(self.window)[max(1, rank) - 1] if rank <= len(self.window) else math.inf
        return scale_up(stated, factor) if factor < math.inf else None

    def observe(self, answer: CalibrationAnswer) -> None:
        """Learn from a finished answer; one that was cut or malformed has missed every finite promise."""
        if answer.stated is None:
            return  # it had no promise
        for coverage, level in self.miss_levels.items():
            promised = self.promise(answer.stated, coverage)
            missed = promised is not None and (answer.used is None or answer.used > promised)
            self.miss_levels[coverage] = min(1.0, max(0.0, level + STEP * (1 - coverage - missed)))
        self.window.append(answer.ratio)

    def to_record(self) -> dict[str, Any]:
        """Its state as JSON; an infinite score is null."""
        levels = {str(c): level for c, level in self.miss_levels.items()}
        window = [None if score == math.inf else score for score in self.window]
        return {"model_fingerprint": self.fingerprint, "miss_levels": levels, "window": window}

    def restore(self, record: Any, where: str) -> None:
        """Go on from a record. Raises InputError for a broken one, or one of another model."""
        keys = [str(c) for c in self.miss_levels]
        fields = {
            "model_fingerprint": lambda v: v == self.fingerprint,
            "miss_levels": lambda v: isinstance(v, dict) and list(v) == keys and all(is_finite(a) and 0 <= a <= 1 for a in v.values()),
            "window": lambda v: isinstance(v, list) and 0 < len(v) <= WINDOW and all(s is None or (is_finite(s) and s >= 0) for s in v),
        }
        check_fields(record, fields, where)
        self.miss_levels = {float(c): level for c, level in record["miss_levels"].items()}
        self.window = deque((math.inf if score is None else score for score in record["window"]), WINDOW)

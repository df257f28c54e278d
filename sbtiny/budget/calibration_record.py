"""A calibration as the JSON of calibration.json, and back. Infinite scores are not written: their number is malformed + cut."""

import math
from typing import Any

from sbtiny.budget.calibration import Bin, Calibration, Scores
from sbtiny.budget.conformal import COVERAGES
from sbtiny.errors import InputError

TEXTS = ("model_fingerprint", "format", "task", "split", "date")
COUNTS = ("questions", "malformed", "cut")
REDO = "run sbtiny calibrate again"


def to_record(c: Calibration) -> dict[str, Any]:
    """The content of calibration.json. `factors`, `true_coverage_range` and those of bins follow from the ratios."""
    return {
        "model_fingerprint": c.model_fingerprint,
        "format": c.format,
        "task": c.task,
        "split": c.split,
        "temperature": c.temperature,
        "top_p": c.top_p,
        "questions": c.questions,
        "malformed": c.malformed,
        "cut": c.cut,
        "confidence": c.confidence,
        "median_stated": c.median_stated,
        "factors": c.scores.factors(),
        "true_coverage_range": c.scores.ranges(),
        "promises": None if c.median_stated is None else {str(p): c.promise(c.median_stated, p) for p in COVERAGES},
        "by_bin": [bin_record(b) for b in c.bins],
        "date": c.date,
        "ratios": list(c.ratios),
    }


def bin_record(b: Bin) -> dict[str, Any]:
    """`kept`: share of the bin's answers within the factor of all. `factors`: the bin's own, null where it uses that of all."""
    head = {"from": b.low, "to": b.high, "questions": b.scores.questions, "kept": b.kept}
    return head | {"factors": b.scores.factors() if b.own else None, "ratios": list(b.scores.ratios)}


def from_record(record: Any, where: str) -> Calibration:
    """Read the content of a calibration.json. Raises InputError, with `where`, for the first field that is missing or impossible."""
    reader = Reader(record, where)
    counts = {key: reader.count(key) for key in COUNTS}
    confidence = reader.number("confidence", optional=True)
    reader.require(confidence is None or 0 < confidence < 1, "confidence")
    ratios = reader.ratios("ratios")
    reader.require(len(ratios) + counts["malformed"] + counts["cut"] == counts["questions"] > 0, "questions")
    temperature, top_p = reader.number("temperature"), reader.number("top_p")
    reader.require(temperature >= 0, "temperature")
    reader.require(0 < top_p <= 1, "top_p")
    median = reader.count("median_stated", optional=True)
    reader.require(median != 0, "median_stated")
    texts = {key: reader.text(key) for key in TEXTS}
    found = Calibration(
        **texts, **counts, temperature=temperature, top_p=top_p, confidence=confidence, ratios=ratios, median_stated=median,
        bins=read_bins(reader, confidence),
    )  # fmt: skip
    reader.require(record.get("factors") == found.scores.factors(), "factors")
    return found


def read_bins(reader: "Reader", confidence: float | None) -> tuple[Bin, ...]:
    rows = reader.get("by_bin")
    reader.require(isinstance(rows, list), "by_bin")
    bins = []
    for number, row in enumerate(rows, 1):
        part = Reader(row, f"{reader.where}, bin {number}")
        low, high, ratios = part.count("from"), part.count("to"), part.ratios("ratios")
        part.require(bins[-1].high < low <= high if bins else 0 < low <= high, "from")
        scores = Scores(part.count("questions"), ratios, confidence)
        part.require(scores.questions >= max(1, len(ratios)), "questions")
        own = part.get("factors") is not None
        part.require(not own or row["factors"] == scores.factors(), "factors")
        bins.append(Bin(low, high, scores, own, part.shares("kept")))
    reader.require(len({b.own for b in bins}) < 2, "by_bin")
    return tuple(bins)


class Reader:
    """Reads typed fields of a JSON object; raises InputError that names the field and the place."""

    def __init__(self, record: Any, where: str) -> None:
        self.record, self.where = record, where
        if not isinstance(record, dict):
            raise InputError(f"{where} is no calibration: {REDO}")

    def require(self, holds: bool, key: str) -> None:
        if not holds:
            value = repr(self.record.get(key))
            raise InputError(f"{self.where} is broken: {key} {value[:60]}{'...' if len(value) > 60 else ''} cannot be: {REDO}")

    def get(self, key: str) -> Any:
        if key not in self.record:
            raise InputError(f"{self.where} is broken: it has no {key}: {REDO}")
        return self.record[key]

    def text(self, key: str) -> str:
        value = self.get(key)
        self.require(isinstance(value, str) and bool(value), key)
        return value

    def number(self, key: str, optional: bool = False) -> float | None:
        value = self.get(key)
        self.require((optional and value is None) or is_number(value), key)
        return value

    def count(self, key: str, optional: bool = False) -> int | None:
        value = self.number(key, optional)
        self.require(value is None or (isinstance(value, int) and value >= 0), key)
        return value

    def ratios(self, key: str) -> tuple[float, ...]:
        """Read sorted numbers from 0."""
        values = self.get(key)
        self.require(isinstance(values, list) and all(is_number(v) and v >= 0 for v in values) and values == sorted(values), key)
        return tuple(values)

    def shares(self, key: str) -> dict[str, float | None]:
        values = self.get(key)
        wanted = [str(c) for c in COVERAGES]
        whole = isinstance(values, dict) and list(values) == wanted
        self.require(whole and all(v is None or (is_number(v) and 0 <= v <= 1) for v in values.values()), key)
        return values


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

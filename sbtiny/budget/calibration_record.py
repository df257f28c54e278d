"""A calibration as the JSON of calibration.json, and back. Infinite scores are not written: their number is malformed + cut."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from sbtiny.budget.calibration import COVERAGES, Bin, Calibration, NonconformityScores
from sbtiny.errors import InputError

Fields = Mapping[str, Callable[[Any], bool]]  # key -> whether a value can be


def to_record(c: Calibration) -> dict[str, Any]:
    """The content of calibration.json. `factors`, `true_coverage_range`, `promises` and those of bins follow from the ratios."""
    return {key: getattr(c, key) for key in SCALARS} | {
        "factors": c.scores.factors(),
        "true_coverage_range": c.scores.ranges(),
        "promises": None if c.median_stated is None else {str(p): c.promise(c.median_stated, p) for p in COVERAGES},
        "by_bin": [bin_record(b) for b in c.bins],
        "ratios": list(c.ratios),
    }


def bin_record(b: Bin) -> dict[str, Any]:
    """`kept`: share of the bin's answers within the factor of all. `factors`: the bin's own, null where it uses that of all."""
    head = {"from": b.low, "to": b.high, "questions": b.scores.questions, "kept": b.kept}
    return head | {"factors": b.scores.factors() if b.own else None, "ratios": list(b.scores.ratios)}


def from_record(record: Any, where: str) -> Calibration:
    """Read the content of a calibration.json. Raises InputError, with `where`, for the first field that is missing or impossible."""
    record = {"prompt": None} | record if isinstance(record, dict) else record
    check_fields(record, FIELDS, where)
    finite = record["questions"] - record["malformed"] - record["cut"]
    bins = [
        Bin(
            b["from"],
            b["to"],
            NonconformityScores(b["questions"], tuple(b["ratios"]), record["confidence"]),
            b["factors"] is not None,
            b["kept"],
        )
        for b in record["by_bin"]
    ]
    found = Calibration(**{key: record[key] for key in SCALARS}, ratios=tuple(record["ratios"]), bins=tuple(bins))
    follows: Fields = {
        "questions": lambda n: n > 0 and finite == len(found.ratios),
        "factors": lambda factors: factors == found.scores.factors(),
        "by_bin": lambda rows: rows == [bin_record(b) for b in bins] and len({b.own for b in bins}) < 2,
    }
    check_fields(record, follows, where)
    return found


def check_fields(record: Any, fields: Fields, where: str) -> None:
    """Raise InputError, with the field and the place, for one that is missing or that its check refuses."""
    redo = "run sbtiny calibrate again"
    if not isinstance(record, dict):
        raise InputError(f"{where} is no calibration: {redo}")
    for key, can_be in fields.items():
        if key not in record:
            raise InputError(f"{where} is broken: it has no {key}: {redo}")
        if not can_be(record[key]):
            value = repr(record[key])
            raise InputError(f"{where} is broken: {key} {value[:60]}{'...' if len(value) > 60 else ''} cannot be: {redo}")


def is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_count(value: Any) -> bool:
    return is_finite(value) and isinstance(value, int) and value >= 0


def is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def is_prompt(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and all(text is None or isinstance(text, str) for text in value.values()))


def are_ratios(values: Any) -> bool:
    return isinstance(values, list) and all(is_finite(v) and v >= 0 for v in values) and values == sorted(values)


def are_bins(rows: Any) -> bool:
    if not isinstance(rows, list) or not all(isinstance(b, dict) for b in rows):
        return False
    edges = [b.get(key) for b in rows for key in ("from", "to")]
    typed = all(map(is_count, edges)) and all(is_count(b.get("questions")) and are_ratios(b.get("ratios")) for b in rows)
    whole = typed and all({"kept", "factors"} <= b.keys() and b["questions"] >= max(1, len(b["ratios"])) for b in rows)
    return whole and edges == sorted(edges) and 0 not in edges


SCALARS: Fields = {
    **dict.fromkeys(("model_fingerprint", "format", "task", "split", "date"), is_text),
    "prompt": is_prompt,
    "temperature": lambda v: is_finite(v) and v >= 0,
    "top_p": lambda v: is_finite(v) and 0 < v <= 1,
    **dict.fromkeys(("questions", "malformed", "cut"), is_count),
    "confidence": lambda v: v is None or (is_finite(v) and 0 < v < 1),
    "median_stated": lambda v: v is None or (is_count(v) and v > 0),
}
FIELDS: Fields = {**SCALARS, "ratios": are_ratios, "by_bin": are_bins}

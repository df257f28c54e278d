"""The promise of a stated budget: its factor, what infinite scores do, bins, coverage kept, the JSON and what breaks it."""

import copy
import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sbtiny.budget.calibration import COVERAGES, Calibration, CalibrationAnswer, calibrate, promise_rank
from sbtiny.budget.calibration_record import from_record, to_record
from sbtiny.budget.online_calibration import MOST_COVERAGES, STEP, WINDOW, OnlineCalibration
from sbtiny.errors import InputError

ABOUT = {
    "model_fingerprint": "a" * 16, "format": "solution", "task": "arithmetic", "split": "val", "temperature": 0.6, "top_p": 0.95,
    "date": "2026-11-26 12:00:00", "prompt": {"system": "Be brief."},
}  # fmt: skip
CUT, MALFORMED = CalibrationAnswer(40, None, cut=True), CalibrationAnswer(None, None)


def answers_of(ratios: list[float], stated: int = 1000) -> list[CalibrationAnswer]:
    return [CalibrationAnswer(stated, round(ratio * stated)) for ratio in ratios]


def made(answers: list[CalibrationAnswer], confidence: float | None = None) -> Calibration:
    return calibrate(answers, confidence, **ABOUT)


def noisy(n: int, seed: int, spread: float = 0.3, steep: bool = False) -> list[CalibrationAnswer]:
    """Answers whose length has noise; `steep`: more of it for a large budget."""
    rng = np.random.default_rng(seed)
    stated = rng.integers(20, 500, n)
    used = stated * np.exp((spread * (stated / 250 if steep else 1)) * rng.standard_normal(n))
    return [CalibrationAnswer(int(b), max(1, int(u))) for b, u in zip(stated, used, strict=True)]


def test_the_promise_is_a_rank_of_the_ratios_times_the_stated_budget() -> None:
    c = made(answers_of([i / 100 for i in range(1, 100)]))  # one bin: all state the same
    assert c.scores.factors() == {"0.8": 0.8, "0.9": 0.9, "0.95": None}
    assert [c.promise(200, p) for p in (0.8, 0.9, 0.95)] == [160, 180, None]
    assert c.promise(3, 0.8) == 3  # 2.4 tokens, rounded up
    assert [c.promise(7, 0.85), c.promise(100, 0.999)] == [6, None]
    assert (c.median_stated, c.malformed, c.cut) == (1000, 0, 0)


@given(st.integers(1, 1_000_000), st.integers(0, 4_000_000))
def test_rounding_neither_breaks_nor_widens_a_promise(stated: int, used: int) -> None:
    c = made([CalibrationAnswer(stated, used)] * 9)
    assert c.promise(stated, 0.9) == used


def test_cut_and_malformed_answers_are_infinite() -> None:
    c = made([*answers_of([1.0] * 450), *[CUT] * 30, *[MALFORMED] * 20])
    assert (c.questions, c.cut, c.malformed, len(c.ratios)) == (500, 30, 20, 450)
    assert c.scores.factors() == {"0.8": 1.0, "0.9": None, "0.95": None}  # rank 451 of 450 finite ones
    assert c.scores.ranges()["0.9"] is None
    with pytest.raises(InputError, match="coverage 90 is no share"):
        c.promise(100, 90)


@pytest.mark.parametrize("answers", [[CUT] * 500, [MALFORMED] * 500, answers_of([1.0] * 3), [CUT]])
def test_where_nothing_can_be_promised_everything_is_none(answers: list[CalibrationAnswer]) -> None:
    c = made(answers)
    assert set(c.scores.factors().values()) == {None}
    assert c.promise(100, 0.8) is None
    assert all(found["promised"] is found["kept"] is None for found in c.kept_coverage(answers).values())
    assert from_record(json.loads(json.dumps(to_record(c))), "f") == c


def test_confidence_takes_a_higher_rank() -> None:
    answers = noisy(500, 0)
    ratios = sorted(a.ratio for a in answers)
    assert made(answers).scores.factor(0.9) == ratios[450]
    assert made(answers, 0.95).scores.factor(0.9) == ratios[461]
    assert made(answers_of([1.0] * 28), 0.95).scores.factor(0.9) is None
    assert made(answers_of([1.0] * 29), 0.95).scores.factor(0.9) == 1.0


def test_bins_have_factors_where_each_has_a_hundred() -> None:
    c = made(noisy(500, 0, steep=True))
    assert [b.own for b in c.bins] == [True] * 4
    assert sum(b.scores.questions for b in c.bins) == 500
    factors = [b.scores.factor(0.9) for b in c.bins]
    assert factors == sorted(factors)  # the noise grows
    assert c.promise(30, 0.9) == math.ceil(30 * factors[0])
    assert c.promise(1, 0.9) == math.ceil(factors[0])  # the outer bins are open
    assert c.promise(9000, 0.9) == math.ceil(9000 * factors[3])
    assert c.bins[0].kept["0.9"] > 0.97 > 0.8 > c.bins[3].kept["0.9"]  # by the factor of all
    few = made(noisy(199, 0, steep=True))
    assert [b.own for b in few.bins] == [False] * 4
    assert few.promise(30, 0.9) == math.ceil(30 * few.scores.factor(0.9))
    assert [len(made(noisy(n, 0)).bins) for n in (220, 330, 450, 5000)] == [2, 3, 4, 4]


def test_equal_budgets_share_a_bin_and_answers_without_one_count_in_each() -> None:
    two = [*answers_of([1.0] * 150, stated=10), *answers_of([2.0] * 150, stated=50)]
    c = made([*two, *[MALFORMED] * 15])
    assert [(b.low, b.high, b.scores.questions, b.own) for b in c.bins] == [(10, 10, 158, True), (50, 50, 158, True)]
    assert [c.promise(stated, 0.9) for stated in (10, 50)] == [10, 100]
    assert c.bins[0].scores.factor(0.95) is None  # 8 of 158 are infinite, and 152 is the rank
    assert c.promise(10, 0.95) is None  # nor has the factor of all: 15 of 315, and 301 is the rank


def test_where_one_bin_has_no_factor_all_go_by_the_factor_of_all() -> None:
    small, large = answers_of([1.0] * 150, stated=10), answers_of([2.0] * 142, stated=50)
    c = made([*small, *large, *[CalibrationAnswer(50, None)] * 8])
    assert [b.scores.factor(0.95) for b in c.bins] == [1.0, None]
    assert [c.promise(stated, 0.9) for stated in (10, 50)] == [10, 100]
    assert [c.promise(stated, 0.95) for stated in (10, 50)] == [20, 100]
    found = c.kept_coverage([*small, *large])["0.95"]
    assert (found["promised"], found["kept"]) == (0.95, 1.0)


@pytest.mark.parametrize("steep", [False, True])
def test_coverage_on_new_answers_is_as_promised(steep: bool) -> None:
    for seed in range(5):
        c = made(noisy(500, seed, steep=steep))
        found = c.kept_coverage(noisy(5000, 100 + seed, steep=steep))
        for text, row in found.items():
            assert row["promised"] == float(text)
            assert abs(row["kept"] - float(text)) < 0.05
            assert all(abs(b["kept"] - float(text)) < 0.1 for b in row["by_bin"])
            assert sum(b["questions"] for b in row["by_bin"]) == 5000


def test_an_infinite_answer_keeps_no_promise() -> None:
    c = made(answers_of([1.0] * 500))
    found = c.kept_coverage([*answers_of([1.0] * 8), CUT, MALFORMED])["0.9"]
    assert (found["promised"], found["kept"], found["mean_promise"]) == (0.9, 0.8, pytest.approx((8 * 1000 + 40) / 9))


@given(st.lists(st.tuples(st.integers(1, 999), st.integers(0, 5000), st.sampled_from(["ok", "cut", "bad"])), min_size=1, max_size=300))
def test_json_and_back_is_the_same(rows: list[tuple[int, int, str]]) -> None:
    answers = [CalibrationAnswer(b, u if kind == "ok" else None, kind == "cut") for b, u, kind in rows]
    c = made(answers)
    text = json.dumps(to_record(c), allow_nan=False)
    assert from_record(json.loads(text), "f") == c


GOOD = to_record(made([*noisy(480, 0), *[CUT] * 12, *[MALFORMED] * 8]))
BREAKS: dict[str, Any] = {
    "questions": [0, -1, 499, 500.0, "500", None, True], "malformed": [-8, 9], "cut": [None],
    "ratios": [[], None, [2, 1], ["1"], [math.nan]],
    "temperature": [-1, "hot", math.inf], "top_p": [0, 1.1], "confidence": [0, 1, "95"], "median_stated": [0, 1.5], "format": ["", 3],
    "model_fingerprint": [None], "date": [7], "factors": [{}, {"0.8": 0.1, "0.9": 1, "0.95": 1}], "by_bin": [None, {}],
    "prompt": ["Think.", {"instruction": 3}],
}  # fmt: skip


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in BREAKS.items() for value in values])
def test_a_broken_record_is_one_line_that_names_the_field(key: str, value: Any) -> None:
    with pytest.raises(InputError, match=r"^runs/x/calibration\.json is broken: .+: run sbtiny calibrate again$") as error:
        from_record(GOOD | {key: value}, "runs/x/calibration.json")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 200


@pytest.mark.parametrize("key", sorted(GOOD.keys() - {"promises", "true_coverage_range", "prompt"}))
def test_a_missing_field_is_named(key: str) -> None:
    record = {name: value for name, value in GOOD.items() if name != key}
    with pytest.raises(InputError, match=f"it has no {key}"):
        from_record(record, "c")


@pytest.mark.parametrize(("key", "value"), [("from", 0), ("to", 1), ("questions", 3), ("ratios", [3.0, 1.0]), ("factors", {"0.8": 1})])
def test_a_broken_bin_is_refused(key: str, value: Any) -> None:
    record = copy.deepcopy(GOOD)
    record["by_bin"][1][key] = value
    with pytest.raises(InputError, match=r"c is broken: by_bin "):
        from_record(record, "c")


@pytest.mark.parametrize("value", [None, [], 3, "text"])
def test_what_is_no_object_is_no_calibration(value: Any) -> None:
    with pytest.raises(InputError, match="c is no calibration"):
        from_record(value, "c")


@pytest.mark.parametrize(
    ("used", "message"),
    [
        ({"model_fingerprint": "b" * 16}, f"of another model (model_fingerprint {'a' * 16}, here {'b' * 16})"),
        ({"format": "think"}, "of another format (format solution, here think)"),
        ({"task": "gsm8k"}, "for another task (task arithmetic, here gsm8k)"),
        ({"prompt": {"system": None}}, "for another prompt (prompt {'system': 'Be brief.'}, here {'system': None})"),
        ({"temperature": 0.0}, "at another temperature (temperature 0.6, here 0.0)"),
        ({"top_p": 1.0}, "at another top_p (top_p 0.95, here 1.0)"),
    ],
)
def test_a_mismatch_is_refused_by_name(used: dict[str, Any], message: str) -> None:
    c = made(noisy(100, 0))
    c.check_matches("c", **{key: ABOUT[key] for key in ("model_fingerprint", "format", "task", "temperature", "top_p")})
    with pytest.raises(InputError) as error:
        c.check_matches("c", **used)
    assert message in str(error.value)


def test_remaining_goes_by_the_ratios() -> None:
    c = made([*answers_of([0.5, 1.0, 1.5]), CUT])
    assert c.remaining(100, 0).tokens == 150
    assert c.remaining(100, 120).high is None
    assert c.remaining(10, 20).over == 1.0


# ---- online ------------------------------------------------------------------------------------------------------------


def test_online_follows_a_shift_that_a_fixed_promise_does_not() -> None:
    c = made(noisy(500, 0))
    online, missed = OnlineCalibration(c), []
    shifted = [replace(a, used=round(1.5 * a.used)) for a in noisy(3000, 1)]
    for answer in shifted:
        promised = online.promise(answer.stated, 0.9)
        missed.append(promised is not None and answer.used > promised)
        online.observe(answer)
    fixed = c.kept_coverage(shifted)["0.9"]["kept"]
    assert fixed < 0.7
    assert np.mean(missed[500:]) == pytest.approx(0.1, abs=0.02)


def test_online_starts_as_the_calibration_and_keeps_a_window() -> None:
    steady = [replace(a, stated=100, used=math.ceil(100 * a.ratio)) for a in noisy(490, 0)]  # one bin
    online = OnlineCalibration(made([*steady, *[CUT] * 10]))
    assert online.promise(100, 0.9) == sorted(a.used for a in steady)[promise_rank(500, 0.9) - 1]
    for answer in [*noisy(700, 3), CUT, MALFORMED]:
        online.observe(answer)
    assert len(online.window) == WINDOW


@pytest.mark.parametrize("answers", [[CUT] * 3000, [CalibrationAnswer(100, 1)] * 3000])
def test_online_levels_stay_within_0_and_1(answers: list[CalibrationAnswer]) -> None:
    online = OnlineCalibration(made(noisy(500, 0)))
    for answer in answers:
        online.observe(answer)
        assert all(0 <= level <= 1 for level in online.miss_levels.values())
    assert online.promise(100, 0.9) == (None if answers[0] is CUT else 1)


def bins_of(factors: dict[int, float], each: int = 125) -> list[CalibrationAnswer]:
    """Answers whose ratios lie around another factor for each stated budget."""
    rng = np.random.default_rng(0)
    return [CalibrationAnswer(b, max(1, round(b * f * rng.uniform(0.5, 1.5)))) for b, f in factors.items() for _ in range(each)]


@pytest.mark.parametrize("answers", [noisy(500, 2), bins_of({100: 0.5, 200: 1.0, 400: 1.5, 800: 2.0}), noisy(60, 4), noisy(9, 4)])
def test_the_first_online_promises_are_those_of_the_file(answers: list[CalibrationAnswer]) -> None:
    c = made(answers)
    online = OnlineCalibration(c)
    for coverage in (0.5, *COVERAGES):
        assert [online.promise(b, coverage) for b in (20, 100, 250, 900)] == [c.promise(b, coverage) for b in (20, 100, 250, 900)]
    assert online.remaining(100, 30) == c.remaining(100, 30)


def test_a_confident_calibration_is_as_confident_online_at_first() -> None:
    one_bin = answers_of([i / 100 for i in range(1, 501)])
    c = made(one_bin, confidence=0.95)
    assert OnlineCalibration(c).promise(1000, 0.9) == c.promise(1000, 0.9) == 4620 > made(one_bin).promise(1000, 0.9)
    binned = made(noisy(500, 1), confidence=0.95)
    assert OnlineCalibration(binned).promise(1000, 0.9) >= binned.promise(1000, 0.9)
    assert OnlineCalibration(made(noisy(120, 1), confidence=0.999)).promise(100, 0.95) is None  # as the file


def test_bins_adapt_each_by_its_own_answers() -> None:
    c = made(bins_of({100: 0.5, 200: 1.0, 400: 1.5, 800: 2.0}))
    online = OnlineCalibration(c)
    for _ in range(300):
        online.observe(CalibrationAnswer(800, 800))
    assert online.promise(800, 0.9) == 800 < c.promise(800, 0.9)
    assert online.promise(400, 0.9) >= c.promise(400, 0.9) / 2  # its window is as it was


def test_one_coverage_adapts_alone_and_few_are_followed() -> None:
    online = OnlineCalibration(made(noisy(500, 0)))
    before = dict(online.miss_levels)
    online.adapt(0.5, kept=False)
    assert online.miss_levels == before | {0.5: pytest.approx(0.495)}
    online.adapt(0.5, kept=True)
    assert online.figures()[0.5] == (pytest.approx(0.5), 0.5)
    for i in range(1000):
        online.adapt(i / 1000, kept=False)
    assert len(online.miss_levels) == MOST_COVERAGES
    assert online.promise(100, 0.777) == OnlineCalibration(made(noisy(500, 0))).promise(100, 0.777)


def test_an_answer_is_judged_by_the_promise_it_was_given() -> None:
    online, answer = OnlineCalibration(made(noisy(500, 0))), CalibrationAnswer(100, 120)
    online.observe(answer, {0.9: 119})
    assert online.figures()[0.9] == (pytest.approx(0.9 + STEP * 0.9), 0.0)
    online.observe(answer, {0.9: 120})
    online.observe(answer, {0.9: None})  # no promise to miss, and none to count
    assert online.figures()[0.9] == (pytest.approx(0.9 + STEP * 0.7), 0.5)

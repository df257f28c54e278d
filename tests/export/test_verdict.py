"""The allowed loss from rounding, with few questions and with many."""

import pytest

from sbtiny.budget.metrics import Sample
from sbtiny.export import verdict


def answered(within: int, of: int) -> verdict.ExportEval:
    """`of` well-formed answers with a budget of 100; the first `within` have that length."""
    samples = [Sample(correct=True, ok=True, budget=100, length=100 if n < within else 300) for n in range(of)]
    return verdict.evaluate_policy(samples, [True] * of)


def reasons(kind: str, trained: verdict.ExportEval, file: verdict.ExportEval) -> list[str]:
    same = {"clear_agreement": 1.0, "strings_same": 50, "prompts_same": 4}
    return list(verdict.find_failures(kind, same | {"falls": verdict.rate_drops(trained, file, kind)}, 4, 0))


@pytest.mark.parametrize(
    ("kind", "of", "lost", "refused"),
    [
        ("q8_0", 500, 0, False), ("q8_0", 500, 10, False), ("q8_0", 500, 17, False), ("q8_0", 500, 20, True), ("q8_0", 20, 1, False),
        ("q8_0", 20, 8, True), ("f16", 500, 20, True), ("q4_0", 500, 20, False), ("q4_k_m", 500, 50, True), ("q8_0", 1, 1, False),
    ],
)  # fmt: skip
def test_kept_budgets_may_fall_by_two_points_and_the_noise_of_the_questions(kind: str, of: int, lost: int, refused: bool) -> None:
    found = reasons(kind, answered(of, of), answered(of - lost, of))
    assert [reason.split(",")[0] for reason in found] == ([f"within fell by {lost / of:.3f}"] if refused else [])


def test_differences_both_ways_are_noise_and_a_gain_is_no_fault() -> None:
    before, after = [True] * 50 + [False] * 50, [False] * 10 + [True] * 90
    fell, noise = verdict.paired_drop(before, after)
    assert fell == pytest.approx(-0.4)
    assert noise == pytest.approx(2 * 0.6667 / 10, abs=1e-2)
    assert reasons("q8_0", answered(50, 100), answered(90, 100)) == []


def test_each_fault_is_a_reason_of_its_own() -> None:
    found = {"clear_agreement": 0.5, "strings_same": 49, "prompts_same": 4, "chats": 20, "chats_ended": 3}
    assert list(verdict.find_failures("q8_0", found, 4, 18.0)) == [
        "first choices agree at 50.00% of the positions where they are clear, 99.0% is the least",
        "1 of 50 strings become other tokens",
        "17 of 20 chats did not stop",
    ]

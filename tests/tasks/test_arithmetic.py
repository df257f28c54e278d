"""The generated task: honest splits, sums that come out as told, balanced levels, the same questions for the same seed."""

import random
import re
from collections import Counter
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sbtiny.errors import InputError
from sbtiny.tasks.arithmetic import BUCKETS, LEVELS, Problem, draw_problem, generate_questions
from sbtiny.tasks.sources import SPLITS, Question
from sbtiny.tasks.verify import auto

SIGN = {"finds": 1, "gets": 1, "wins": 1, "buys": 1, "loses": -1, "gives": -1, "sells": -1, "drops": -1}
FIRST = re.compile(r"[A-Z][a-z]{2} has (\d{1,2}) ([a-z]+)\.")
STEP = re.compile(r"([a-h])\) ([a-z]+) ([1-9])")


def read(story: str) -> tuple[int, tuple[int, ...]]:
    """Start and steps as a reader of the story would take them down, from its words alone."""
    first, *lines, last = story.split("\n")
    start, noun = FIRST.fullmatch(first).groups()
    assert last == f"How many {noun}?"
    steps = [STEP.fullmatch(line).groups() for line in lines]
    assert "".join(label for label, _, _ in steps) == "abcdefgh"[: len(steps)]
    return int(start), tuple(SIGN[verb] * int(size) for _, verb, size in steps)


@pytest.fixture(scope="module")
def drawn() -> dict[str, list[Question]]:
    return {split: generate_questions(split, 2000, seed=1) for split in BUCKETS}


def test_the_splits_are_those_every_source_has() -> None:
    assert set(BUCKETS) == set(SPLITS)
    assert sorted(n for buckets in BUCKETS.values() for n in buckets) == list(range(100))


def test_no_problem_is_in_two_splits(drawn: dict[str, list[Question]]) -> None:
    numbers = {split: {read(q.question) for q in found} for split, found in drawn.items()}
    for split, others in (("test", ("val", "train")), ("val", ("train",))):
        for other in others:
            assert not numbers[split] & numbers[other]
    # another seed tells other stories, but never crosses over
    again = {read(q.question) for q in generate_questions("train", 2000, seed=99)}
    assert not again & (numbers["test"] | numbers["val"])


def test_no_problem_comes_twice_in_a_draw(drawn: dict[str, list[Question]]) -> None:
    for found in drawn.values():
        assert len({read(q.question) for q in found}) == len({q.id for q in found}) == 2000


def test_the_answer_is_the_sum_the_story_tells(drawn: dict[str, list[Question]]) -> None:
    for question in (q for found in drawn.values() for q in found):
        start, steps = read(question.question)
        values = list(accumulate(steps, initial=start))
        assert question.answer == str(values[-1])
        assert question.level == len(steps)
        assert all(0 <= value <= 99 for value in values)


def test_levels_are_balanced(drawn: dict[str, list[Question]]) -> None:
    for found in drawn.values():
        counts = Counter(q.level for q in found)
        assert set(counts) == set(LEVELS) == set(range(2, 9))
        assert max(counts.values()) - min(counts.values()) <= 0.1 * 2000 / 7
    assert [q.level for q in drawn["test"][:14]] == [*LEVELS] * 2


def test_starts_gains_and_losses_are_all_met(drawn: dict[str, list[Question]]) -> None:
    told = [read(q.question) for q in drawn["train"]]
    assert {start for start, _ in told} == set(range(100))
    assert {step for _, steps in told for step in steps} == {*range(-9, 0), *range(1, 10)}


def test_the_same_seed_asks_the_same_questions() -> None:
    assert generate_questions("test", 50, seed=3) == generate_questions("test", 50, seed=3)
    assert generate_questions("test", 50, seed=3) == generate_questions("test", 80, seed=3)[:50]
    stories = [{q.question for q in generate_questions("test", 50, seed=seed)} for seed in (3, 4)]
    assert len(stories[0] & stories[1]) < 5


def test_five_hundred_unless_told() -> None:
    assert len(generate_questions()) == 500
    assert [len(generate_questions("val", n)) for n in (1, 7)] == [1, 7]


@pytest.mark.parametrize("split", ["", "Test", "validation", "dev"])
def test_an_unknown_split_is_told_with_those_there_are(split: str) -> None:
    with pytest.raises(InputError, match=r"use one of test, val, train") as caught:
        generate_questions(split)
    assert repr(split) in str(caught.value)


@given(seed=st.integers(), level=st.sampled_from(LEVELS), words=st.tuples(st.integers(), st.integers()))
def test_the_numbers_alone_decide_the_split(seed: int, level: int, words: tuple[int, int]) -> None:
    problem = draw_problem(random.Random(seed), level)
    one, other = (problem.tell(random.Random(word)) for word in words)
    assert read(one) == read(other) == (problem.start, problem.steps)
    assert Problem(*read(one)).split == problem.split in BUCKETS
    assert 0 <= problem.answer <= 99


def test_the_shares_of_the_splits_are_as_said() -> None:
    rng = random.Random(0)
    counts = Counter(draw_problem(rng, rng.choice(LEVELS)).split for _ in range(4000))
    for split, buckets in BUCKETS.items():
        assert abs(counts[split] / 4000 - len(buckets) / 100) < 0.03


def test_the_verifier_of_the_task_takes_the_right_sum_only() -> None:
    for question in generate_questions("val", 20):
        assert auto(f"so \\boxed{{{question.answer}}}", question)
        assert not auto(f"so \\boxed{{{int(question.answer) + 1}}}", question)

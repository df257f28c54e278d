"""The order of training rows: every row once, like lengths together, decided by seed and epoch alone."""

from collections import Counter
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from sbtiny.coldstart.trainer import GroupedLengthSampler

LENGTHS = [(7 * i) % 201 for i in range(1000)]
SINGLE = range(1000)  # one row a question
PAIRS = [i // 2 for i in range(1000)]
ANSWERS = [False] * 1000  # none is a row of a budget alone


def batches(order: GroupedLengthSampler) -> list[list[int]]:
    rows = list(order)
    return [rows[at : at + order.batch] for at in range(0, len(rows), order.batch)]


@given(st.lists(st.integers(1, 500), min_size=1, max_size=600), st.integers(1, 8), st.integers(0, 5))
def test_every_row_comes_once_an_epoch(lengths: list[int], batch: int, epoch: int) -> None:
    order = GroupedLengthSampler(lengths, [i // 3 for i in range(len(lengths))], [i % 2 == 0 for i in range(len(lengths))], batch, seed=0)
    order.set_epoch(epoch)
    assert sorted(order) == list(range(len(lengths)))
    assert len(order) == len(lengths)


def test_rows_of_a_batch_are_of_like_length_and_batches_are_not_sorted() -> None:
    spread = [
        max(lengths) - min(lengths)
        for lengths in ([LENGTHS[i] for i in rows] for rows in batches(GroupedLengthSampler(LENGTHS, SINGLE, ANSWERS, 4, 0)))
    ]
    assert sum(spread) / len(spread) < 5  # 120 at random
    firsts = [LENGTHS[rows[0]] for rows in batches(GroupedLengthSampler(LENGTHS, SINGLE, ANSWERS, 4, 0))]
    rising = sum(a < b for a, b in pairwise(firsts)) / (len(firsts) - 1)
    assert 0.4 < rising < 0.6


def test_seed_and_epoch_alone_decide_the_order() -> None:
    first, again, other = (GroupedLengthSampler(LENGTHS, PAIRS, ANSWERS, 4, seed) for seed in (0, 0, 1))
    epoch_0 = list(first)
    assert epoch_0 == list(first) == list(again) != list(other)
    first.set_epoch(1)
    assert epoch_0 != list(first)
    again.set_epoch(1)
    assert list(first) == list(again)


def test_the_answers_to_a_question_stand_in_one_batch_sorted() -> None:
    for rows in batches(GroupedLengthSampler(LENGTHS, PAIRS, ANSWERS, 4, 0)):
        assert sorted(PAIRS[i] for i in rows)[::2] == sorted(PAIRS[i] for i in rows)[1::2]
        assert [LENGTHS[i] for i in rows] == sorted(LENGTHS[i] for i in rows)


def test_single_answers_break_few_pairs() -> None:
    mixed = [i // 2 if i < 900 else i for i in range(1000)]
    whole = sum(
        {mixed.count(mixed[i]) for i in rows} == {2} and len({mixed[i] for i in rows}) == 2
        for rows in batches(GroupedLengthSampler(LENGTHS, mixed, ANSWERS, 4, 0))
    )
    assert whole >= 210  # of 225


def test_counts_that_do_not_divide_a_batch_break_few_pairs() -> None:
    """Behind three rows every pair would be parted."""
    counts = [3] * 101 + [2] * 200 + [1] * 97
    mixed = [question for question, count in enumerate(counts) for _ in range(count)]
    lengths = [(i * 7919) % 331 + 1 for i in range(len(mixed))]
    order = batches(GroupedLengthSampler(lengths, mixed, [False] * len(mixed), 4, 0))
    parted = [q for rows in order for q, count in Counter(mixed[i] for i in rows).items() if count < counts[q] == 2]
    assert len(parted) <= 8  # rows, of 400


def test_rows_of_a_budget_alone_have_batches_of_their_own_but_for_what_is_left() -> None:
    alone = [i % 3 == 0 for i in range(1000)]  # 334 of them beside 666 single answers
    kinds = [{alone[i] for i in rows} for rows in batches(GroupedLengthSampler(LENGTHS, SINGLE, alone, 4, 0))]
    assert kinds.count({True, False}) <= 1
    assert kinds.count({True}) >= 334 // 4 - 5

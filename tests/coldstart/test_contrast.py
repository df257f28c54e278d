"""The contrast of a cold start: which tokens it compares, and that it makes the model read the budget."""

import json
from pathlib import Path

import pytest
import torch

from sbtiny import runs
from sbtiny.coldstart.contrast import COMPARED_TOKENS, IGNORE_INDEX, Collator, add_negatives
from sbtiny.coldstart.run import run_sft
from sbtiny.coldstart.sample_correct import make_row
from sbtiny.config import Settings, SftSettings
from sbtiny.tasks import arithmetic

PROMPT = [1, 2, 3]


def example(question: str, budget: int, tag: list[int], body: list[int]) -> dict:
    written = [*tag, *body]
    mask = [0] * len(PROMPT) + [1] * len(written)
    at = len(PROMPT) + len(tag)
    return {"question": question, "budget": budget, "input_ids": [*PROMPT, *written], "completion_mask": mask, "body_at": at}


SHORT = example("q", 10, [10, 9], [50, 51, 60, 99])
LONG = example("q", 300, [30, 0, 9], [50, 51, 70, 71, 72, 73, 74, 99])
MIDDLE = example("q", 100, [11, 9], [50, 80, 81, 82, 83, 99])
ALONE = example("r", 10, [10, 9], [50, 99])


def test_the_rival_is_the_answer_with_the_furthest_budget() -> None:
    short, long, middle, alone = add_negatives([SHORT, LONG, MIDDLE, ALONE])
    assert short["rival"] == [*PROMPT, 30, 0, 9]
    assert long["rival"] == middle["rival"] == [*PROMPT, 10, 9]  # 100 is ten times 10 and a third of 300
    assert (alone["rival"], alone["lead"]) == ([], 0)
    assert [row["lead"] for row in add_negatives([SHORT, SHORT | {"budget": 12}])] == [0, 0]  # too alike


def test_the_compared_tokens_reach_from_the_body_to_where_the_answers_part_and_a_little_on() -> None:
    short, long = add_negatives([SHORT, LONG])
    assert short["lead"] == 4  # all it has
    assert long["lead"] == 2 + COMPARED_TOKENS


def test_a_batch_has_the_compared_tokens_after_their_own_budget_then_after_their_rivals() -> None:
    batch = Collator(pad_token_id=0)(add_negatives([ALONE, SHORT, LONG]))
    assert batch["input_ids"].shape == (3, 14)  # as TRL makes it
    rows = [
        [i for i, seen in zip(ids, mask, strict=True) if seen] for ids, mask in columns(batch["contrast"], "input_ids", "attention_mask")
    ]
    short, long = [50, 51, 60, 99], [50, 51, 70, 71, 72, 73]
    assert rows == [
        [*PROMPT, 10, 9, *short],
        [*PROMPT, 30, 0, 9, *long],
        [*PROMPT, 30, 0, 9, *short],
        [*PROMPT, 10, 9, *long],
    ]
    trained = [[i for i in labels if i != IGNORE_INDEX] for labels in batch["contrast"]["labels"].tolist()]
    assert trained == [short, long, short, long]
    assert "contrast" not in Collator(pad_token_id=0)(add_negatives([ALONE]))


def columns(batch: dict[str, torch.Tensor], *names: str) -> list[tuple]:
    return list(zip(*(batch[name].tolist() for name in names), strict=True))


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_by_it_a_budget_comes_to_be_read(policy, tmp_path: Path, micro_batch: int) -> None:
    """Two answers to each question that differ in their first word; micro-batches of one part a row from its rival."""
    rows = [
        make_row(policy, q, f"{opening}\\boxed{{{q.answer}}}")
        for q in arithmetic.generate_questions("train", 60, seed=5)
        for opening in ("", "so so so so ")
    ]
    runs.write_jsonl(tmp_path / "rows.jsonl", rows)
    chosen = SftSettings(rows=str(tmp_path / "rows.jsonl"), steps=24, learning_rate=3e-3, contrast=1.0, micro_batch=micro_batch)
    run_sft(Settings(four_bit=False, sft=chosen), tmp_path / "sft")
    logged = [json.loads(line) for line in (tmp_path / "sft" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["contrast"] for row in logged if "contrast" in row]
    assert len(losses) == 24
    assert sum(losses[-4:]) / 4 < 0.1 < sum(losses[:4]) / 4

"""The contrast of a cold start: which tokens it compares, and that it makes the model read the budget."""

import json
import math
import random
from pathlib import Path

import pytest
import torch

from sbtiny import runs
from sbtiny.coldstart import contrast
from sbtiny.coldstart.contrast import IGNORE_INDEX, Collator, contrast_losses, draw_rival_budget
from sbtiny.coldstart.run import run_sft
from sbtiny.coldstart.sample_correct import make_row
from sbtiny.coldstart.trainer import build_dataset
from sbtiny.config import Settings, SftSettings
from sbtiny.tasks import arithmetic

PROMPT = [1, 2, 3]


def example(question: str, budget: int, tag: list[int], body: list[int]) -> dict:
    written = [*tag, *body]
    mask = [0] * len(PROMPT) + [1] * len(written)
    at = len(PROMPT) + len(tag)
    return {"question": question, "budget": budget, "input_ids": [*PROMPT, *written], "completion_mask": mask, "body_at": at}


TAGS = {10: [10, 9], 12: [12, 9], 100: [11, 9], 300: [30, 0, 9]}


def add_negatives(examples: list[dict]) -> list[dict]:
    """With rivals' own budgets, as if each were drawn so."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contrast, "draw_rival_budget", lambda own, rival, rng: rival)
        return contrast.add_negatives(examples, TAGS.__getitem__, seed=0)


SHORT = example("q", 10, [10, 9], [50, 51, 60, 99])
LONG = example("q", 300, [30, 0, 9], [50, 51, 70, 71, 72, 73, 74, 99])
MIDDLE = example("q", 100, [11, 9], [50, 80, 81, 82, 83, 99])
ALONE = example("r", 10, [10, 9], [50, 99])


def test_the_rival_is_the_answer_with_the_furthest_budget() -> None:
    short, long, middle, alone = add_negatives([SHORT, LONG, MIDDLE, ALONE])
    assert short["rival"] == [*PROMPT, 30, 0, 9]
    assert long["rival"] == middle["rival"] == [*PROMPT, 10, 9]  # 100 is ten times 10 and a third of 300
    assert alone["rival"] == alone["compared"] == []
    assert [row["compared"] for row in add_negatives([SHORT, SHORT | {"budget": 12}])] == [[], []]  # too alike


def test_a_shorter_answer_is_compared_after_budgets_up_to_its_rivals() -> None:
    rng = random.Random(0)
    drawn = sorted(draw_rival_budget(16, 128, rng) for _ in range(400))
    assert 24 <= drawn[0] < 26
    assert 120 < drawn[-1] <= 128
    assert 50 < drawn[200] < 60  # the geometric mean is 55: as many are near as far
    assert {draw_rival_budget(128, 16, rng) for _ in range(9)} == {16}
    assert {draw_rival_budget(16, 22, rng) for _ in range(9)} == {22}  # nearer than the nearest
    short, long = contrast.add_negatives([SHORT, LONG], lambda budget: [budget, 9], seed=0)
    assert 15 <= short["rival"][-2] < 300
    assert long["rival"][-2] == 10


def test_the_rivals_drawn_follow_from_the_seed(policy) -> None:
    """Else a resumed run would go on with others."""
    asked = arithmetic.generate_questions("train", 8, seed=5)
    rows = [make_row(policy, q, f"{so}\\boxed{{{q.answer}}}") for q in asked for so in ("", "so " * 60)]
    made = [build_dataset(policy, rows, Settings(seed=seed))["rival"] for seed in (3, 3, 4)]
    assert made[0] == made[1] != made[2]


def test_compared_is_where_the_answers_part_and_where_the_shorter_ends() -> None:
    begins, loops, ends = [50, 51], [*range(100, 120)], [98, 99]
    rows = [
        SHORT | {"input_ids": [*PROMPT, 10, 9, *begins, 60, *loops, *ends]},
        LONG | {"input_ids": [*PROMPT, 30, 0, 9, *begins, 70, *loops * 3, *ends]},
    ]
    short, long = add_negatives(rows)
    assert short["compared"] == [2, 3, 4, 5, *range(17, 25)]  # to its own end
    assert long["compared"] == [2, 3, 4, 5, *range(19, 27)]  # and two tokens behind it
    assert add_negatives([SHORT, LONG])[0]["compared"] == [0, 1, 2, 3]  # all it has


def test_a_batch_has_the_compared_answers_after_their_rivals_budgets() -> None:
    batch = Collator(pad_token_id=0)(add_negatives([ALONE, SHORT, LONG]))
    assert batch["input_ids"].shape == (3, 14)  # as TRL makes it
    contrast = batch["contrast"]
    rows = [[i for i, seen in zip(ids, mask, strict=True) if seen] for ids, mask in columns(contrast, "input_ids", "attention_mask")]
    short, long = [50, 51, 60, 99], [50, 51, 70, 71, 72, 73]
    assert rows == [[*PROMPT, 30, 0, 9, *short], [*PROMPT, 10, 9, *long]]
    assert [[i for i in labels if i != IGNORE_INDEX] for labels in contrast["labels"].tolist()] == [short, long]
    assert [ids[where].tolist() for ids, where in zip(batch["input_ids"], contrast["compared"], strict=True)] == [[], short, long]
    assert "contrast" not in Collator(pad_token_id=0)(add_negatives([ALONE]))


def test_the_contrast_is_of_the_compared_tokens_of_rows_that_have_a_rival() -> None:
    """Log-probabilities are of the tokens from the second on."""
    own = torch.tensor([[-1.0, -2, -4], [-8, -16, -32], [-64, -128, -256]])
    compared = torch.tensor([[False, True, False, True], [False] * 4, [False, False, True, False]])
    losses = contrast_losses(own, torch.tensor([[-5.0, 0], [0, -125]]), compared)
    assert losses.tolist() == pytest.approx([math.log(2), math.log1p(math.exp(3))])


def test_rows_of_one_id_and_other_questions_are_no_rivals(policy) -> None:
    """Files put together may number their questions alike."""
    asked = arithmetic.generate_questions("train", 2, seed=5)
    texts = [f"\\boxed{{{asked[0].answer}}}", f"so so so so \\boxed{{{asked[1].answer}}}"]
    rows = [make_row(policy, q, text) | {"id": "same"} for q, text in zip(asked, texts, strict=True)]
    assert build_dataset(policy, rows, Settings())["compared"] == [[], []]


def test_tokens_between_are_read_and_not_compared() -> None:
    pair = [SHORT | {"input_ids": [*PROMPT, 10, 9, *range(100, 130)]}, LONG | {"input_ids": [*PROMPT, 30, 0, 9, 50, *range(200, 280)]}]
    labels = Collator(pad_token_id=0)(add_negatives(pair))["contrast"]["labels"].tolist()
    assert [i for i in labels[0] if i != IGNORE_INDEX] == [100, 101, 102, 103, *range(122, 130)]


def columns(batch: dict[str, torch.Tensor], *names: str) -> list[tuple]:
    return list(zip(*(batch[name].tolist() for name in names), strict=True))


def contrast_of(policy, folder: Path, pairs: int = 60, alone: int = 0, **chosen: object) -> list[float]:
    """The contrast of each update. Two answers to each of `pairs` questions, which differ in their first word; one to `alone` others."""
    rows = [
        make_row(policy, q, f"{opening}\\boxed{{{q.answer}}}")
        for i, q in enumerate(arithmetic.generate_questions("train", pairs + alone, seed=5))
        for opening in ("", "so so so so ")[: 2 if i < pairs else 1]
    ]
    runs.write_jsonl(folder / "rows.jsonl", rows)
    run_sft(Settings(four_bit=False, sft=SftSettings(rows=str(folder / "rows.jsonl"), contrast=1.0, **chosen)), folder / "sft")
    logged = [json.loads(line) for line in (folder / "sft" / "metrics.jsonl").read_text().splitlines()]
    return [row["contrast"] for row in logged if "contrast" in row]


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_by_it_a_budget_comes_to_be_read(policy, tmp_path: Path, micro_batch: int) -> None:
    """Micro-batches of one part a row from its rival."""
    losses = contrast_of(policy, tmp_path, steps=60, learning_rate=3e-3, contrast_share=1.0, micro_batch=micro_batch)
    assert len(losses) == 60
    assert sum(losses[-4:]) / 4 < 0.1 < sum(losses[:4]) / 4


def test_micro_batches_do_not_change_its_weight(policy, tmp_path: Path) -> None:
    """Of four rows two have a rival: in micro-batches of one the others count too."""
    losses = []
    for micro_batch in (1, 4):
        folder = tmp_path / str(micro_batch)
        folder.mkdir()
        contrast_of(policy, folder, pairs=1, alone=2, steps=1, micro_batch=micro_batch)
        losses.append(json.loads((folder / "sft" / "metrics.jsonl").read_text().splitlines()[0])["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_nothing_to_compare_is_said(policy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert contrast_of(policy, tmp_path, pairs=0, alone=4, steps=1) == []
    assert "sft.contrast compares nothing" in capsys.readouterr().err


def test_only_the_first_updates_have_it(policy, tmp_path: Path) -> None:
    assert len(contrast_of(policy, tmp_path, steps=7, contrast_share=0.4)) == 3

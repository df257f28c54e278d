"""Rows of a budget alone: the quantile of a question's correct answers, learnt apart from the answers, whose budgets are given."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from sbtiny import runs
from sbtiny.budget.protocol import render_budget
from sbtiny.coldstart.build import label_traces
from sbtiny.coldstart.rows import read_labelled
from sbtiny.coldstart.run import run_sft
from sbtiny.coldstart.trainer import GroupedLengthSampler, build_dataset
from sbtiny.config import DataSettings, Settings, SftSettings
from sbtiny.errors import InputError
from sbtiny.models.prompt import prompt_ids
from sbtiny.rollout.load_policy import load_policy
from sbtiny.rollout.policy import Policy
from sbtiny.rollout.sampling import Sampling
from sbtiny.tasks import arithmetic
from sbtiny.tasks.traces import Trace
from sbtiny.tasks.verify import auto

FILLERS = (0, 4, 9, 30)  # words before the answer


def traces(questions: int) -> list[Trace]:
    asked = arithmetic.generate_questions("train", questions, seed=5)
    return [
        Trace(q.id, q.question, q.answer, q.level, response="so " * words + f"\\boxed{{{q.answer}}}", correct=None, finished=True)
        for q in asked
        for words in FILLERS
    ]


@pytest.mark.parametrize(("quantile", "place"), [(0.01, 0), (0.99, 3)])
def test_a_question_states_the_quantile_of_its_correct_answers_and_they_have_theirs_given(
    policy: Policy, quantile: float, place: int
) -> None:
    found = label_traces(policy, traces(3), auto, DataSettings(rows_per_question=2, budget_quantile=quantile))
    told = [row for row in found.rows if row["response"] is not None]
    stated = [row for row in found.rows if row["response"] is None]
    assert [row["given"] for row in told] == [True] * 6  # the shortest and the longest of each
    assert not any("given" in row for row in stated)
    assert [row["id"] for row in stated] == [row["id"] for row in told[::2]]
    ends = [(short["budget"], longest["budget"]) for short, longest in zip(told[::2], told[1::2], strict=True)]
    assert all(abs(row["budget"] - pair[place > 0]) <= 1 for row, pair in zip(stated, ends, strict=True))
    assert found.levels()[-1]["rows"] == 6  # answers


def test_the_middle_is_that_of_all_correct_answers_not_of_those_kept(policy: Policy) -> None:
    found = label_traces(policy, traces(1), auto, DataSettings(rows_per_question=2, budget_quantile=0.5))
    kept, every = found.rows[:2], label_traces(policy, traces(1), auto, DataSettings(rows_per_question=0)).rows
    lengths = sorted(row["budget"] for row in every)
    assert found.rows[2]["budget"] == round((lengths[1] + lengths[2]) / 2) < (kept[0]["budget"] + kept[1]["budget"]) / 2


def test_only_the_budget_of_such_a_row_is_trained_in_batches_of_its_like(policy: Policy, tmp_path: Path) -> None:
    rows = label_traces(policy, traces(8), auto, DataSettings(rows_per_question=2, budget_quantile=0.5)).rows
    runs.write_jsonl(tmp_path / "rows.jsonl", rows)
    dataset = build_dataset(policy, read_labelled(str(tmp_path / "rows.jsonl")), Settings())
    alone = [i for i, row in enumerate(rows) if row["response"] is None]
    for i in alone:
        trained = [token for token, kept in zip(dataset[i]["input_ids"], dataset[i]["completion_mask"], strict=True) if kept]
        assert trained == policy.encode(render_budget(rows[i]["budget"]))
        assert dataset[i]["input_ids"] == prompt_ids(policy.tokenizer, rows[i]["question"]) + trained
        assert dataset[i]["lead"] == 0
    assert all(dataset[i]["lead"] for i in range(len(rows)) if i not in alone)  # the answers still have their rivals
    order = list(GroupedLengthSampler([len(ids) for ids in dataset["input_ids"]], dataset["question"], 4, seed=0))
    kinds = [{rows[i]["response"] is None for i in order[at : at + 4]} for at in range(0, len(order), 4)]
    assert kinds.count({True}) == 2
    assert kinds.count({False}) == 4


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"response": None, "given": True}, "a given budget and no response"),
        ({"response": 7}, "response"),
        ({}, "has no 'response'"),
    ],
)
def test_a_row_that_teaches_nothing_is_refused(tmp_path: Path, row: dict, complaint: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"id": "a", "question": "1 + 1", "budget": 5} | row) + "\n")
    with pytest.raises(InputError, match=complaint):
        read_labelled(str(file))


def test_a_run_is_trained_on_and_learns_to_state_what_the_rows_say(started: Path, tmp_path: Path) -> None:
    """The rows tell long questions from short ones; the run `started` states the same few tokens for all."""
    asked = arithmetic.generate_questions("train", 120, seed=9)
    budgets = {q.id: 90 if len(q.question) > 60 else 10 for q in asked}
    rows = [{"id": q.id, "question": q.question, "response": None, "budget": budgets[q.id]} for q in asked]
    runs.write_jsonl(tmp_path / "rows.jsonl", rows)
    sft = SftSettings(rows=str(tmp_path / "rows.jsonl"), steps=30, batch=8, micro_batch=8, learning_rate=2e-3)
    run = run_sft(Settings(sft=sft), tmp_path / "run", start=started)
    about = runs.read_run(run)
    assert about["parent"] == str(started)
    before, after = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (started, run))
    assert {name: weight.shape for name, weight in before.items()} == {name: weight.shape for name, weight in after.items()}
    policy = load_policy(str(run), Settings(), 16)
    fresh = arithmetic.generate_questions("val", 24, seed=1)
    said = policy.sample([policy.budget_request(q.question, i) for i, q in enumerate(fresh)], Sampling(0.0))
    right = [e.parsed.budget == (90 if len(q.question) > 60 else 10) for e, q in zip(said, fresh, strict=True)]
    assert sum(right) >= 20

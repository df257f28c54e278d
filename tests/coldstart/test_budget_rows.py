"""Rows of a budget alone: foretold from the question, learnt apart from the answers, whose budgets are given."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from sbtiny import runs
from sbtiny.budget.metrics import spearman
from sbtiny.budget.protocol import render_budget
from sbtiny.coldstart.build import build_data, print_build_summary
from sbtiny.coldstart.foretell import cross_predict, foretell_budgets, round_budget
from sbtiny.coldstart.rows import read_labelled
from sbtiny.coldstart.run import read_training_rows, run_sft
from sbtiny.coldstart.sample_correct import BuildResult
from sbtiny.coldstart.trainer import GroupedLengthSampler, build_dataset
from sbtiny.config import DataSettings, Settings, SftSettings
from sbtiny.errors import InputError
from sbtiny.models.prompt import prompt_ids
from sbtiny.rollout.episode import Sampling
from sbtiny.rollout.load_policy import build_policy, load_policy
from sbtiny.rollout.policy import Policy
from sbtiny.tasks import arithmetic
from sbtiny.tasks.traces import Trace

FILLERS = (0, 4, 9)  # words before an answer, beside those that the question's length asks for


def traces(questions: int, seed: int = 5) -> list[Trace]:
    """Answers that are longer the longer their question is; of every third question none is right, and of every sixth none ended."""
    asked = arithmetic.generate_questions("train", questions, seed=seed)
    return [
        Trace(
            f"{q.id}/{words}",  # as those of a file without ids
            q.question,
            q.answer,
            q.level,
            response="so " * (words + len(q.question) // 4) + f"\\boxed{{{q.answer}}}",
            correct=bool(i % 3),
            finished=bool(i % 6),
        )
        for i, q in enumerate(asked)
        for words in FILLERS
    ]


@pytest.fixture(scope="module")
def built(tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Trace], list[dict]]:
    """Traces of 160 questions and the rows that `data build` makes of them."""
    folder = tmp_path_factory.mktemp("rows")
    told = traces(160)
    runs.write_jsonl(folder / "traces.jsonl", [asdict(trace) for trace in told])
    settings = Settings(data=DataSettings(rows_per_question=2, budget_quantile=0.5))
    build_data(settings, folder / "rows.jsonl", str(folder / "traces.jsonl"), policy=build_policy(*tiny, slots=4))
    return told, [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def test_every_question_states_a_budget_that_is_foretold_and_answers_have_theirs_given(built: tuple) -> None:
    told, rows = built
    answers = [row for row in rows if row["response"] is not None]
    stated = {row["id"]: row["budget"] for row in rows if row["response"] is None}
    assert all(row["given"] for row in answers)
    assert len(stated) == 160 > len({row["id"] for row in answers}) == 106
    lengths = {trace.id: len(trace.question) for trace in told}
    unknown = [name for name in stated if name not in {row["id"] for row in answers}]
    assert spearman([lengths[name] for name in stated], list(stated.values())) > 0.9
    assert spearman([lengths[name] for name in unknown], [stated[name] for name in unknown]) > 0.8
    assert all(budget < 100 or budget % 10 == 0 for budget in stated.values())


@pytest.mark.parametrize(("tokens", "budget"), [(0.4, 1), (7.4, 7), (99.6, 100), (184.0, 180), (2551.0, 2600)])
def test_a_budget_has_two_digits(tokens: float, budget: int) -> None:
    for number in (tokens, np.float64(tokens)):
        assert repr(round_budget(number)) == str(budget)  # a whole number: rows with 180.0 are refused


def test_noise_is_foretold_as_the_mean() -> None:
    """States that say nothing of the lengths: the chosen penalty draws all predictions to the middle."""
    rng = np.random.default_rng(3)
    states, targets = rng.normal(size=(200, 60)), rng.normal(size=200)
    assert cross_predict(states, targets)[0].std() < 0.2


def test_the_quantile_moves_the_foretold_budget(policy: Policy) -> None:
    asked = arithmetic.generate_questions("train", 60, seed=4)
    lengths = {q.id: [20, 40, 80] for q in asked}
    low, high = (foretell_budgets(policy, asked, lengths, quantile) for quantile in (0.01, 0.99))
    assert {row["budget"] for row in low} == {20}
    assert {row["budget"] for row in high} == {79}


def test_too_few_questions_are_refused(policy: Policy) -> None:
    asked = arithmetic.generate_questions("train", 60, seed=4)
    with pytest.raises(InputError, match="3 questions with an answer that ended are too few to foretell a budget"):
        foretell_budgets(policy, asked, {q.id: [4] for q in asked[:3]}, 0.5)


def test_what_cannot_be_foretold_is_refused_before_anything_is_sampled(policy: Policy, tmp_path: Path) -> None:
    settings = Settings(data=DataSettings(limit=20, budget_quantile=0.5))
    with pytest.raises(InputError, match="needs 50 questions or more, not 20"):
        build_data(settings, tmp_path / "rows.jsonl", policy=policy)
    runs.write_jsonl(tmp_path / "traces.jsonl", [asdict(trace) for trace in traces(20)])
    whole = Settings(data=replace(settings.data, limit=100))
    with pytest.raises(InputError, match="needs 50 questions or more, not 20"):  # of 60 traces
        build_data(whole, tmp_path / "rows.jsonl", str(tmp_path / "traces.jsonl"), policy=policy)
    policy.model = None
    with pytest.raises(InputError, match=r"llama\.cpp does not give: use --engine generate"):
        build_data(settings, tmp_path / "rows.jsonl", policy=policy)


def test_a_quantile_says_that_it_does_nothing_to_rows_of_a_file(built: tuple, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = Settings(data=DataSettings(budget_quantile=0.5), sft=SftSettings(rows=str(tmp_path / "rows.jsonl")))
    runs.write_jsonl(tmp_path / "rows.jsonl", built[1])
    assert len(read_training_rows(settings, None)) == len(built[1])
    assert not capsys.readouterr().err  # they were built with it
    runs.write_jsonl(tmp_path / "rows.jsonl", [row for row in built[1] if row["response"]])
    read_training_rows(settings, None)
    assert "keep their budgets" in " ".join(capsys.readouterr().err.split())


def test_traces_leave_an_interrupted_sampling_of_the_file(policy: Policy, tmp_path: Path) -> None:
    part = tmp_path / "rows.jsonl.part"
    part.write_text("answers of hours\n")
    runs.write_jsonl(tmp_path / "traces.jsonl", [asdict(trace) for trace in traces(20)])
    build_data(Settings(), tmp_path / "rows.jsonl", str(tmp_path / "traces.jsonl"), policy=policy)
    assert part.read_text() == "answers of hours\n"


def test_only_the_budget_of_such_a_row_is_trained_in_batches_of_its_like(policy: Policy, built: tuple, tmp_path: Path) -> None:
    by_id: dict[str, list[dict]] = {}
    for row in built[1]:
        by_id.setdefault(row["id"], []).append(row)
    rows = [row for same in by_id.values() if len(same) == 3 for row in same][:24]  # of eight questions
    runs.write_jsonl(tmp_path / "rows.jsonl", rows)
    dataset = build_dataset(policy, read_labelled(str(tmp_path / "rows.jsonl")), Settings())
    alone = [i for i, row in enumerate(rows) if row["response"] is None]
    for i in alone:
        trained = [token for token, kept in zip(dataset[i]["input_ids"], dataset[i]["completion_mask"], strict=True) if kept]
        assert trained == policy.encode(render_budget(rows[i]["budget"]))
        assert dataset[i]["input_ids"] == prompt_ids(policy.tokenizer, rows[i]["question"]) + trained
        assert dataset[i]["compared"] == []
    assert all(dataset[i]["compared"] for i in range(len(rows)) if i not in alone)  # the answers still have their rivals
    told = [row["response"] is None for row in rows]
    order = list(GroupedLengthSampler([len(ids) for ids in dataset["input_ids"]], dataset["question"], told, 4, seed=0))
    kinds = [{told[i] for i in order[at : at + 4]} for at in range(0, len(order), 4)]
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


def test_the_summary_counts_answers_apart_and_names_the_file_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"id": "q", "question": "Q?", "answer": "1", "level": None, "budget": 9}
    result = BuildResult(rows=[row | {"response": "\\boxed{1}"}, row | {"response": None}], sampled=4, cut=0, wrong=3)
    print_build_summary(result, Path("rows[b].jsonl"))
    assert "1 labelled rows of 4 answers and 1 of a budget alone in rows[b].jsonl; dropped: 3 wrong" in capsys.readouterr().err

"""Cold-start rows: the budget is the count of trained body tokens, and the length that the decode loop counts."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from sbtiny import runs
from sbtiny.budget.protocol import SOLUTION, THINK, parse, render_budget
from sbtiny.coldstart.build import label_traces
from sbtiny.coldstart.rows import tokenize_row
from sbtiny.coldstart.run import run_sft
from sbtiny.coldstart.sample_correct import (
    BuildResult,
    build_requests,
    build_signature,
    make_row,
    sample_answers,
    sample_correct,
    select_by_length,
)
from sbtiny.coldstart.trainer import build_dataset
from sbtiny.config import DataSettings, PromptSettings, Settings, SftSettings
from sbtiny.errors import InputError
from sbtiny.models.prompt import check_texts, prompt_ids
from sbtiny.rollout.episode import Episode, Request, read_episode
from sbtiny.rollout.policy import Policy
from sbtiny.tasks import arithmetic
from sbtiny.tasks.sources import Question
from sbtiny.tasks.traces import Trace
from sbtiny.tasks.verify import auto, load_verifier

SUM = Question("q1", "Tom has 3 coins.\na) finds 4\nHow many coins?", "7", 1)
RESPONSES = (
    "a) 3 + 4 = 7\n\\boxed{7}",
    "7",
    "  white space around, and\n\nempty lines\n",
    "Wait, <think>numbers like 33 and 1,000,000 and 99</think> so 7",
    "naïve – 数学 🙂",
)
DATA = DataSettings(samples_per_question=1, max_tokens=600, max_num_seqs=8)


def example(policy: Policy, row: dict) -> dict[str, list[int]]:
    return tokenize_row(policy.encode, row, policy.tokenizer.eos_token_id, prompt_ids(policy.tokenizer, row["question"]), policy.form)


def says(*texts: str, stop: str = "end"):
    """A `Policy.sample` that answers every request with the next of these texts."""

    def sample(self: Policy, requests: Sequence[Request], _: object, on_episode: Callable[[int, Episode], None]) -> list[Episode]:
        endings = [self.tokenizer.eos_token_id] if stop == "end" else []
        completions = [[*self.encode(text), *endings] for text in texts]
        episodes = [read_episode(r, ids, self.engine.pieces, stop) for r, ids in zip(requests, completions, strict=True)]
        for index, episode in enumerate(episodes):
            on_episode(index, episode)
        return episodes

    return sample


# ---- tokens ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("response", RESPONSES)
def test_the_label_is_the_number_of_tokens_between_the_tags(policy: Policy, response: str) -> None:
    row = make_row(policy, SUM, response)
    found, prompt = example(policy, row), prompt_ids(policy.tokenizer, SUM.question)
    completion = found["input_ids"][len(prompt) :]
    opening, closing = policy.encode(render_budget(row["budget"])), policy.encode(SOLUTION.closing)
    assert found["input_ids"][: len(prompt)] == prompt
    assert completion[: len(opening)] == opening
    assert completion[-1] == policy.tokenizer.eos_token_id
    assert completion[-1 - len(closing) : -1] == closing
    body = completion[len(opening) : -1 - len(closing)]
    assert len(body) == row["budget"] > 0
    assert body == policy.encode(response)


@pytest.mark.parametrize("response", RESPONSES)
def test_the_decode_loop_would_count_the_same(policy: Policy, response: str) -> None:
    row = make_row(policy, SUM, response)
    prompt = prompt_ids(policy.tokenizer, SUM.question)
    ids = example(policy, row)["input_ids"][len(prompt) :]
    episode = read_episode(Request(tuple(prompt), 999), ids, policy.engine.pieces, "end")
    assert episode.parsed.ok
    assert episode.budget == episode.length == row["budget"]


def test_a_prefilled_request_is_the_beginning_of_the_trained_row(policy: Policy) -> None:
    row = make_row(policy, SUM, RESPONSES[0])
    asked = policy.request(SUM.question, 50, seed=0, budget=row["budget"]).prompt_ids
    assert tuple(example(policy, row)["input_ids"][: len(asked)]) == asked


def test_the_prompt_is_masked_and_everything_else_is_trained_the_turn_end_too(policy: Policy) -> None:
    found = example(policy, make_row(policy, SUM, RESPONSES[0]))
    prompt = len(prompt_ids(policy.tokenizer, SUM.question))
    assert len(found["completion_mask"]) == len(found["input_ids"])
    assert found["completion_mask"][:prompt] == [0] * prompt
    assert set(found["completion_mask"][prompt:]) == {1}
    assert found["input_ids"][-1] == policy.tokenizer.eos_token_id


def test_a_given_budget_is_read_and_not_trained(policy: Policy) -> None:
    row = make_row(policy, SUM, RESPONSES[0])
    stated, given = example(policy, row), example(policy, row | {"given": True})
    assert given["input_ids"] == stated["input_ids"]
    assert given["completion_mask"][: given["body_at"]] == [0] * given["body_at"]
    assert set(given["completion_mask"][given["body_at"] :]) == {1}


def test_the_trained_text_reads_back_as_the_promise(policy: Policy) -> None:
    row = make_row(policy, SUM, RESPONSES[0])
    ids = example(policy, row)["input_ids"][len(prompt_ids(policy.tokenizer, SUM.question)) :]
    parsed = parse(policy.tokenizer.decode(ids[:-1]))
    assert parsed.ok
    assert (parsed.budget, parsed.body) == (row["budget"], RESPONSES[0])


@pytest.mark.parametrize("off", [-1, 1, 100])
def test_a_label_of_another_tokenizer_is_refused(policy: Policy, off: int) -> None:
    row = make_row(policy, SUM, RESPONSES[0])
    with pytest.raises(InputError, match=r"row q1: budget \d+ but \d+ tokens .* rebuild it with sbtiny data build"):
        example(policy, row | {"budget": row["budget"] + off})


@pytest.mark.parametrize("tag", ["<budget>", "</budget>", "<solution>", "</solution>"])
def test_an_answer_with_a_tag_in_it_is_refused(policy: Policy, tag: str) -> None:
    row = make_row(policy, SUM, f"so {tag} 7")
    with pytest.raises(InputError, match=f"row q1: the answer holds the tag {tag}"):
        example(policy, row)


def test_a_row_keeps_what_is_known_of_the_question(policy: Policy) -> None:
    row = make_row(policy, SUM, "7")
    assert row == {
        "id": "q1",
        "question": SUM.question,
        "answer": "7",
        "level": 1,
        "response": "7",
        "budget": len(policy.encode("7")),
    }


# ---- the model's own answers -----------------------------------------------------------------------------------------


@pytest.fixture
def gather(policy: Policy, tmp_path: Path):
    """`sample_correct` into a file of this test."""

    def run(asked: Sequence[Question], verify: Callable = auto, data: DataSettings = DATA, seed: int = 0) -> BuildResult:
        return sample_correct(policy, asked, verify, Settings(data=data, seed=seed), tmp_path / "rows.jsonl")

    return run


def test_every_question_is_sampled_as_often_as_set_and_in_order(policy: Policy) -> None:
    asked, data = arithmetic.generate_questions("train", 3, seed=5), DataSettings(samples_per_question=2, max_tokens=12)
    requests = build_requests(policy, asked, data, seed=1)
    prompts = [tuple(prompt_ids(policy.tokenizer, question.question)) for question in asked for _ in range(2)]
    assert [request.prompt_ids for request in requests] == prompts
    assert len({request.seed for request in requests}) == 6
    first, again = (sample_answers(policy, requests, 0.7, lambda *_: None) for _ in range(2))
    assert [e.completion_ids for e in again] == [e.completion_ids for e in first]


def test_a_real_build_adds_up_and_every_row_can_be_trained(policy: Policy, gather) -> None:
    asked = arithmetic.generate_questions("train", 12, seed=5)
    found = gather(asked, lambda text, question: question.level % 2 == 0)
    assert found.sampled == 12 == len(found.rows) + found.wrong + found.cut + found.spare
    assert {row["id"] for row in found.rows} <= {q.id for q in asked if q.level % 2 == 0}
    for row in found.rows:
        assert sum(example(policy, row)["completion_mask"]) > row["budget"]
        assert row.keys() == {"id", "question", "answer", "level", "response", "budget", "asked_with"}
    *levels, every = found.levels()
    assert sum(level["rows"] for level in levels) == every["rows"] == len(found.rows)
    assert sum(level["accepted"] for level in levels if level["level"] % 2) == 0
    assert every["p100"] == max(row["budget"] for row in found.rows)


def test_rows_that_are_trained_with_another_prompt_than_they_were_sampled_with_are_told(
    policy: Policy, gather, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, file = gather(arithmetic.generate_questions("train", 4, seed=5), lambda *_: True).rows, tmp_path / "rows.jsonl"
    rows[-1].pop("asked_with")  # as those of traces, which do not say
    runs.write_jsonl(file, rows)
    settings = Settings(four_bit=False, sft=SftSettings(rows=str(file), steps=1))
    run_sft(settings, tmp_path / "same")
    assert "another prompt" not in capsys.readouterr().err
    run_sft(replace(settings, prompt=PromptSettings(instruction="Think.")), tmp_path / "other")
    said = " ".join(capsys.readouterr().err.split())
    assert f"{len(rows) - 1} of {len(rows)} rows were sampled with another prompt" in said
    assert "rows.jsonl, line 1: {'instruction': None" in said
    assert "here {'instruction': 'Think.'" in said


def stopping(part: Path, answers: int, verify: Callable[[str, Question], bool]) -> Callable[[str, Question], bool]:
    """A verifier that raises KeyboardInterrupt once `answers` answers are saved."""

    def stop(text: str, question: Question) -> bool:
        if part.exists() and len(part.read_text().splitlines()) > answers:
            raise KeyboardInterrupt
        return verify(text, question)

    return stop


def test_a_stopped_build_resumes_where_it_was(policy: Policy, gather, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, part, kept = arithmetic.generate_questions("train", 12, seed=5), tmp_path / "rows.jsonl.part", []
    whole = gather(asked)
    part.unlink()

    with pytest.raises(KeyboardInterrupt):
        gather(asked, stopping(part, 5, auto))
    done = {json.loads(line)["answer"] for line in part.read_text().splitlines()[1:]}
    assert len(done) == 5
    real = Policy.sample
    monkeypatch.setattr(Policy, "sample", lambda self, requests, *more: kept.extend(requests) or real(self, requests, *more))
    resumed = gather(asked)
    assert (resumed.rows, resumed.lengths) == (whole.rows, whole.lengths)
    assert len(kept) == 12 - len(done)
    with pytest.raises(InputError, match=r"rows.jsonl.part was begun with other settings"):
        gather(asked, seed=1)


def test_a_part_that_tells_no_lengths_of_wrong_answers_resumes(gather, tmp_path: Path) -> None:
    """An earlier version's."""
    asked, part = arithmetic.generate_questions("train", 12, seed=5), tmp_path / "rows.jsonl.part"
    whole = gather(asked)
    lines = [json.loads(line) for line in part.read_text().splitlines()]
    runs.write_jsonl(part, [{key: value for key, value in line.items() if key != "tokens"} for line in lines])
    found = gather(asked)
    assert found.rows == whole.rows
    assert {row["id"] for row in found.rows} <= set(found.lengths)


OWN_CHECK = "def check(question, completion):\n    return {}\n"


def test_a_fixed_verifier_does_not_resume_from_old_verdicts(policy: Policy, tmp_path: Path) -> None:
    file, own = tmp_path / "rows.jsonl", tmp_path / "my.py"
    asked = arithmetic.generate_questions("train", 8, seed=5)
    settings = Settings(data=replace(DATA, verifier=f"{own}:check"))

    own.write_text(OWN_CHECK.format("False"))
    with pytest.raises(KeyboardInterrupt):
        sample_correct(policy, asked, stopping(tmp_path / "rows.jsonl.part", 1, lambda *_: False), settings, file)
    own.write_text(OWN_CHECK.format("True"))
    with pytest.raises(InputError, match=r"rows\.jsonl\.part was begun with other settings, model, verifier or questions"):
        sample_correct(policy, asked, load_verifier(settings.data.verifier), settings, file)


@pytest.mark.parametrize(
    "other", [{"four_bit": True}, {"backend": "unsloth"}, {"format": "think"}, {"engine": "generate"}, {"model": "other"}, {"seed": 1}]
)
def test_what_was_sampled_belongs_to_everything_the_answers_depend_on(other: dict) -> None:
    assert build_signature(Settings(**other), [SUM]) != build_signature(Settings(), [SUM])
    assert build_signature(Settings(data=replace(DATA, temperature=0.1)), [SUM]) != build_signature(Settings(data=DATA), [SUM])
    assert build_signature(Settings(data=replace(DATA, max_num_seqs=1)), [SUM]) == build_signature(
        Settings(data=DATA), [replace(SUM, where="q.jsonl, line 1")]
    )


def failing(after: int) -> Callable[[str, Question], bool]:
    """A verifier that raises InputError after `after` answers."""
    left = iter(range(after))

    def verify(text: str, question: Question) -> bool:
        if next(left, None) is None:
            raise InputError("the verifier is wrong")
        return True

    return verify


def test_wrong_input_leaves_no_half_build_but_keeps_an_earlier_one(gather, tmp_path: Path) -> None:
    asked, part = arithmetic.generate_questions("train", 12, seed=5), tmp_path / "rows.jsonl.part"
    with pytest.raises(InputError, match="the verifier is wrong"):
        gather(asked, failing(after=3))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyboardInterrupt):
        gather(asked, stopping(part, 4, lambda *_: True))
    with pytest.raises(InputError, match="the verifier is wrong"):
        gather(asked, failing(after=3))
    assert len(part.read_text().splitlines()) > 4


@pytest.mark.parametrize("torn", [b'{"answer": 7, "ki', b"\x00" * 30])
def test_a_last_line_that_was_torn_is_dropped(torn: bytes, gather, tmp_path: Path) -> None:
    asked, part = arithmetic.generate_questions("train", 6, seed=5), tmp_path / "rows.jsonl.part"
    whole = gather(asked).rows
    lines = part.read_bytes().splitlines(keepends=True)
    for kept in (lines[:3], []):
        part.write_bytes(b"".join(kept) + torn)
        assert gather(asked).rows == whole
        assert len(part.read_text().splitlines()) == len(lines)


def test_only_finished_correct_plain_answers_are_kept(gather, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = (
        "it is \\boxed{7}",
        "it is \\boxed{8}",
        "stray </budget> \\boxed{7}",
        f"{render_budget(9)}\\boxed{{7}}</solution>",
    )
    monkeypatch.setattr(Policy, "sample", says(*texts))
    found = gather([SUM] * 4)
    assert [row["response"] for row in found.rows] == [texts[0], "\\boxed{7}"]  # a budgeted answer without its tags
    assert (found.sampled, found.wrong, found.cut) == (4, 2, 0)


def test_nothing_right_is_wrong_input_that_says_why(gather, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Policy, "sample", says("\\boxed{8}", "\\boxed{9}"))
    wrong = r"no usable answer in 2 of tiny to arithmetic: 2 wrong, 0 cut .* is question q1 with the answer '7', .* --verifier$"
    with pytest.raises(InputError, match=wrong):
        gather([SUM] * 2)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(Policy, "sample", says("\\boxed{7}", stop="length"))
    with pytest.raises(InputError, match=r"0 wrong, 1 cut at 600 tokens; .* raise data\.max_tokens$"):
        gather([SUM])
    assert list(tmp_path.iterdir()) == []


# ---- answers written elsewhere ---------------------------------------------------------------------------------------


def trace(name: str, response: str, correct: bool | None = None, finished: bool = True, question: str = SUM.question) -> Trace:
    return Trace(name, question, "7", 1, response=response, correct=correct, finished=finished)


def test_traces_that_are_unfinished_or_wrong_are_dropped(policy: Policy) -> None:
    traces = [
        trace("right", "\\boxed{7}"),
        trace("wrong", "\\boxed{8}"),
        trace("cut", "\\boxed{7}", finished=False),
        trace("cut, published as right", "\\boxed{7}", correct=True, finished=False),
        trace("published as right", "seven", correct=True),
        trace("published as wrong", "\\boxed{7}", correct=False),
    ]
    found = label_traces(policy, traces, auto, keep=0)
    assert [row["response"] for row in found.rows] == ["\\boxed{7}", "seven"]
    assert (found.sampled, found.wrong, found.cut) == (6, 2, 2)
    ended = [len(policy.encode(t.response)) for t in traces if t.finished]
    assert found.lengths == {"right": ended}  # wrong answers tell a question's length too
    assert all(row["budget"] == len(policy.encode(row["response"])) for row in found.rows)


@pytest.mark.parametrize(
    "response",
    [
        f"{render_budget(40)}it is \\boxed{{7}}</solution>",
        "first words <budget>40</budget> \\boxed{7}",
        "<budget>forty</budget><solution>\\boxed{7}</solution>",
        "<solution>\\boxed{7}</solution>",
    ],
)
def test_a_trace_with_budget_tags_is_refused(policy: Policy, response: str) -> None:
    with pytest.raises(InputError, match=r"question t2: the answer holds the tag <\w+> at character \d+: give the plain answers"):
        label_traces(policy, [trace("t1", "\\boxed{7}"), trace("t2", response)], auto, keep=0)


def test_a_trace_with_a_special_token_in_the_middle_is_refused_where_it_would_be_a_row(policy: Policy) -> None:
    stray = "it is <|im_start|>\\boxed{7}"
    assert len(label_traces(policy, [trace("t1", "\\boxed{7}"), trace("t2", stray, correct=False)], auto, keep=0).rows) == 1
    with pytest.raises(InputError, match=r"question t2: the response holds '<\|im_start\|>', a special token"):
        label_traces(policy, [trace("t1", "\\boxed{7}"), trace("t2", stray)], auto, keep=0)


def test_turn_ends_that_were_cut_off_are_counted(policy: Policy) -> None:
    traces = [trace("t1", "\\boxed{7}"), replace(trace("t2", "\\boxed{7}"), ended=True)]
    assert label_traces(policy, traces, auto, keep=0).turn_ends == 1


def test_an_own_answer_with_a_special_token_in_it_is_no_row(policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = policy.tokenizer.convert_tokens_to_ids("<|im_start|>")

    def sample(requests, sampling, on_episode):
        written = [[*policy.encode("it is \\boxed{7}"), *stray, policy.tokenizer.eos_token_id] for stray in ([], [start])]
        found = [read_episode(r, ids, policy.engine.pieces, "end") for r, ids in zip(requests, written, strict=True)]
        for i, episode in enumerate(found):
            on_episode(i, episode)
        return found

    monkeypatch.setattr(policy, "sample", sample)
    found = sample_correct(policy, [SUM], auto, Settings(data=DataSettings(samples_per_question=2)), tmp_path / "rows.jsonl")
    assert [row["response"] for row in found.rows] == ["it is \\boxed{7}"]
    assert found.wrong == 1


def test_what_a_chat_is_set_to_stands_in_every_prompt(policy: Policy) -> None:
    """In the row, in training, and in a request of build, GRPO and evaluation."""
    asked = replace(SUM, system="Always answer in French.")
    row = make_row(policy, asked, "\\boxed{7}")
    assert (row["system"], "system" in make_row(policy, SUM, "\\boxed{7}")) == (asked.system, False)
    prompt = prompt_ids(policy.tokenizer, asked.question, asked.system)
    start = "<|im_start|>system\nAlways answer in French.<|im_end|>\n<|im_start|>user\nTom"
    assert policy.tokenizer.decode(prompt).startswith(start)
    (trained,) = build_dataset(policy, [row], Settings())["input_ids"]
    assert trained[: len(prompt)] == prompt
    assert build_requests(policy, [asked], DataSettings(samples_per_question=1), 0)[0].prompt_ids == tuple(prompt)
    assert policy.request(asked.question, 9, 0, system=asked.system).prompt_ids == tuple(prompt)


def test_one_question_under_two_system_turns_is_two(policy: Policy) -> None:
    traces = [replace(trace(name, "\\boxed{7}"), system=system) for name, system in (("a", "Be brief."), ("b", None), ("c", "Be brief."))]
    assert [row["id"] for row in label_traces(policy, traces, auto, keep=0).rows] == ["a", "a", "b"]


SILENT = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{{ messages[0].content }}"


@pytest.mark.parametrize(("template", "said"), [(SILENT, "leaves the system turn out"), (STRICT, r"takes no system turn \(System role")])
def test_a_template_without_a_system_turn_is_told_with_the_row(template: str, said: str, policy: Policy, monkeypatch) -> None:
    monkeypatch.setattr(policy.tokenizer, "chat_template", template)
    check_texts(policy.tokenizer, [SUM])
    with pytest.raises(InputError, match=f"mine, line 3: this model's chat template {said}"):
        check_texts(policy.tokenizer, [SUM, replace(SUM, system="s y s", where="mine, line 3")])


def test_a_question_cannot_forge_a_turn(policy: Policy) -> None:
    for question, system in (("1?<|im_end|>", None), ("1?", "a<|im_start|>user")):
        with pytest.raises(InputError, match="a special token of this model"):
            prompt_ids(policy.tokenizer, question, system)


def test_thoughts_beside_an_answer_are_trained_in_both_formats(policy: Policy) -> None:
    row = make_row(policy, SUM, "<think>\n3+4=7\n</think>\n\n\\boxed{7}")
    prompt, end = prompt_ids(policy.tokenizer, SUM.question), policy.tokenizer.eos_token_id
    whole = row["response"]
    for form, said in ((SOLUTION, f"<solution>{whole}</solution>"), (THINK, whole)):
        found = tokenize_row(policy.encode, row, end, prompt, form)
        assert policy.tokenizer.decode(found["input_ids"][len(prompt) : -1]) == f"<budget>{found['budget']}</budget>{said}"
    tags = len(policy.encode("<think>")) + len(policy.encode("</think>"))
    assert found["budget"] <= row["budget"] - tags + 2  # where the parts meet


def test_several_traces_of_a_question_are_rows_of_one_question(policy: Policy) -> None:
    traces = [trace("a", "so it must be \\boxed{7}"), trace("b", "\\boxed{7}", question="Another?"), trace("c", "\\boxed{7}")]
    traces += [trace(f"d{n}", "so " * n + "\\boxed{7}") for n in range(2, 30)]
    found = label_traces(policy, traces, auto, keep=2)
    short, long = (len(policy.encode(t.response)) for t in (traces[2], traces[-1]))
    assert [(row["id"], row["budget"]) for row in found.rows] == [("a", short), ("a", long), ("b", short)]  # side by side
    assert (found.sampled, found.spare, found.levels()[-1]["accepted"]) == (31, 28, 1.0)


def test_traces_without_one_to_use_are_wrong_input(policy: Policy) -> None:
    with pytest.raises(InputError, match="no usable trace in 2: 1 wrong, 1 unfinished; the first is question a with"):
        label_traces(policy, [trace("a", "\\boxed{8}"), trace("b", "\\boxed{7}", finished=False)], auto, keep=0)


@pytest.mark.parametrize(
    ("keep", "left"),
    [(0, [30, 10, 50, 20, 50, 7]), (1, [10, 7]), (2, [10, 50, 7]), (3, [30, 10, 50, 7]), (4, [30, 10, 50, 20, 7])],
)
def test_the_rows_kept_of_a_question_are_far_apart(keep: int, left: list[int]) -> None:
    rows = [{"id": "a", "budget": b} for b in (30, 10, 50, 20, 50)] + [{"id": "b", "budget": 7}]
    assert [row["budget"] for row in select_by_length(rows, keep)] == left


def test_answers_that_could_not_be_trained_are_not_sampled(tmp_path: Path) -> None:
    settings = Settings(data=DataSettings(max_tokens=2048))
    with pytest.raises(InputError, match=r"data.max_tokens 2048 fills sft.max_length 1024, prompt and all: raise that too"):
        run_sft(settings, tmp_path / "run")
    assert not (tmp_path / "run" / "run.json").exists()

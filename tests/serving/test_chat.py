"""The turns and commands of a chat, without a terminal or a model."""

import json
from pathlib import Path

import pytest

from sbtiny.budget.protocol import BudgetChoice
from sbtiny.errors import InputError
from sbtiny.serving.ask import Answer, Ask, bare_answer, choose_budget, clean_history, describe_budget
from sbtiny.serving.chat import COMMANDS, HELP, Action, Chat

ANSWER = Answer(
    text="42", thoughts="", stated=30, given=None, source="stated", allowed=45, used=28, tokens=40, promise=None, coverage=None,
    seconds=2.0, stop_reason="end", ended=True,
)  # fmt: skip


def answered(question: str = "6 x 7?") -> Chat:
    chat = Chat(Ask())
    assert chat.handle(question) is Action.ASK
    chat.take_answer(ANSWER)
    return chat


@pytest.mark.parametrize(
    ("text", "choice", "coverage"),
    [
        ("auto", BudgetChoice("auto"), None),
        ("120", BudgetChoice("fixed", 120.0), None),
        ("30s", BudgetChoice("seconds", 30.0), None),
        ("1.5x", BudgetChoice("scaled", 1.5), None),
        ("90%", BudgetChoice("auto"), 0.9),
        ("99.5 %", BudgetChoice("auto"), 0.995),
    ],
)
def test_every_form_of_a_budget(text: str, choice: BudgetChoice, coverage: float | None) -> None:
    chat = Chat(Ask())
    assert chat.handle(f"/budget {text}") == f"budget {describe_budget(chat.ask)}"
    assert (chat.ask.choice, chat.ask.coverage) == (choice, coverage)
    assert choose_budget(Ask(), describe_budget(chat.ask)) == chat.ask
    chat.handle("/budget 7")  # the last word counts
    assert (chat.ask.choice, chat.ask.coverage) == (BudgetChoice("fixed", 7.0), None)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("/budget abc", "'abc' is not understood.* 90%"),
        ("/budget 0", "not understood"),
        ("/budget 0s", "not understood"),
        ("/budget 100%", "is no chance.* 90%"),
        ("/ceiling -1", "give a whole number from 0 to 1,000,000"),
        ("/ceiling few", "give a whole number from 0 to 1,000,000"),
        ("/think maybe", "say show or hide"),
        ("/set", "say one of temperature"),
        ("/set temperature", "and a value"),
        *((f"/set temperature {value}", "give a number from 0 to 100$") for value in ("hot", "-1", "nan", "inf", "101")),
        *((f"/set top_p {value}", "give a number from 0.01 to 1$") for value in ("0", "2", "-0.5")),
        *((f"/set min_p {value}", "give a number from 0 to 0.99$") for value in ("1", "-0.1")),
        *((f"/set top_k {value}", "give a whole number from 0 to 1,000,000$") for value in ("-1", "2.5")),
        *((f"/set seed {value}", "give a whole number from 0 to 9,007,199,254,740,992$") for value in ("-1", "1" * 99, "1" * 9999)),
        *((f"/set max_tokens {value}", "give a whole number from 1 to 1,000,000$") for value in ("0", "1000001")),
        ("/set colour 3", "say one of"),
        ("/regen", "no question yet"),
        ("/compare", "no question yet"),
        ("/save", "needs a file"),
        ("/save x.jsonl", "nothing to save"),
        ("/nonsense", "is no command"),
        ("/handle", "is no command"),
        ("/", "is no command"),
    ],
)
def test_what_is_wrong_is_said_and_changes_nothing(line: str, reason: str) -> None:
    chat = Chat(Ask())
    with pytest.raises(InputError, match=reason):
        chat.handle(line)
    assert chat == Chat(Ask())


def test_every_command_is_in_the_help() -> None:
    assert [name for name in COMMANDS if f"/{name}" not in HELP] == []


def test_turns_are_kept_without_a_question_that_has_no_answer() -> None:
    chat = answered()
    assert chat.handle("and 7 x 8?") is Action.ASK
    assert [m["content"] for m in chat.messages] == ["6 x 7?", "42", "and 7 x 8?"]
    chat.take_answer(Answer(**{name: getattr(ANSWER, name) for name in Answer.__slots__} | {"text": ""}))
    assert [m["content"] for m in chat.turns] == ["6 x 7?", "42"]
    assert chat.handle("/regen") is Action.ASK
    assert chat.messages[-1]["content"] == "and 7 x 8?"


def test_again_takes_the_answer_back_and_changes_the_seed() -> None:
    chat = answered()
    assert chat.ask.seed == 1
    assert chat.handle("/regen") is Action.ASK
    assert chat.messages == [{"role": "user", "content": "6 x 7?"}]


def test_a_system_turn_comes_first_and_can_be_taken_back() -> None:
    chat = answered()
    chat.handle("/system Be brief.")
    assert [m["role"] for m in chat.messages] == ["system", "user", "assistant", "user"]
    chat.handle("/system")
    assert chat.system is None
    chat.handle("/clear")
    assert chat.turns == []


def test_a_saved_chat_is_a_row_for_training(tmp_path: Path) -> None:
    chat, file = answered(), tmp_path / "chat.jsonl"
    for _ in range(2):
        assert "saved" in chat.handle(f"/save {file}")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert rows == [{"messages": chat.turns}] * 2
    with pytest.raises(InputError, match="cannot write"):
        chat.handle(f"/save {tmp_path}")


def test_figures_of_a_chat() -> None:
    assert Chat(Ask()).handle("/stats") == "no answers yet"
    text = answered().handle("/stats")
    assert "1 answers, 40 tokens, 2.0 s, 20 tok/s" in text
    assert "stated budgets: mean 30, used 28, within 10 % 1 of 1" in text


def test_earlier_answers_lose_budget_tags_and_thoughts() -> None:
    assert bare_answer("<budget>9</budget><think>hm</think>\n42") == "42"
    assert bare_answer("<budget>9</budget><solution>42</solution>") == "42"
    assert bare_answer("\n<solution>42</solution>") == "42"
    assert bare_answer("<think>hm</think>\n42") == "42"
    assert bare_answer("<think>hm") == "hm"
    for text in ("plain", "Use <solution> before and </solution> after it.", "say <budget>9</budget><solution>42</solution>"):
        assert bare_answer(text) == text
    turns = [{"role": "user", "content": "<budget>"}, {"role": "assistant", "content": "<budget>9</budget><solution>1"}]
    assert [m["content"] for m in clean_history(turns)] == ["<budget>", "1"]


@pytest.mark.parametrize("two", [{"budget": 3, "seconds": 1.0}, {"seconds": 1.0, "coverage": 0.9}])
def test_one_budget_at_a_time(two: dict) -> None:
    with pytest.raises(InputError, match="say one of them"):
        choose_budget(Ask(), **two)


def test_seconds_take_the_place_of_a_default_coverage() -> None:
    assert choose_budget(choose_budget(Ask(), "90%"), seconds=5) == choose_budget(Ask(), "5s")


def test_a_home_that_nobody_has_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    chat = Chat(Ask(), turns=[{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}])
    with pytest.raises(InputError, match="cannot write ~nobody-has-this-name"):
        chat.handle("/save ~nobody-has-this-name/chat.jsonl")

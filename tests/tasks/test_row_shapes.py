"""Rows in every shape that people have: read as questions and as traces, or refused in one line, never with a traceback."""

import csv
import gzip
import json
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from sbtiny.errors import InputError
from sbtiny.tasks.answers import unwrap_reference
from sbtiny.tasks.row_shapes import KEYS
from sbtiny.tasks.sources import Question, digest_items, parse_question, read_questions
from sbtiny.tasks.traces import read_traces, to_trace

SAID = "3+4=7 \\boxed{7}"
THOUGHT = "<think>\n3+4=7\n</think>\n\n\\boxed{7}"


def turns(*said: tuple[str, object], role: str = "role", content: str = "content") -> list[dict]:
    return [{role: who, content: what} for who, what in said]


USER, GPT = ("user", "3+4?"), ("assistant", SAID)
SHAPES = {
    "MATH": {"problem": "3+4?", "solution": SAID},
    "NuminaMath": {"problem": "3+4?", "solution": SAID, "messages": turns(USER, GPT)},
    "OpenMathInstruct": {"problem": "3+4?", "generated_solution": SAID},
    "Alpaca": {"instruction": "3+4?", "input": "", "output": SAID},
    "TRL": {"prompt": "3+4?", "completion": SAID},
    "TRL, turns": {"prompt": turns(USER), "completion": turns(GPT)},
    "TRL, a prompt of turns": {"prompt": turns(USER), "completion": SAID},
    "TRL, a completion of turns": {"prompt": "3+4?", "completion": turns(GPT)},
    "messages": {"messages": turns(USER, GPT)},
    "ShareGPT": {"conversations": turns(("human", "3+4?"), ("gpt", SAID), role="from", content="value")},
    "OpenThoughts": {"conversations": turns(USER, GPT, role="from", content="value"), "system": None},
    "parts": {"messages": turns(("user", [{"type": "text", "text": "3+"}, {"type": "text", "text": "4?"}]), GPT)},
    "columns of other rows": {"messages": None, "prompt": None, "problem": "3+4?", "solution": SAID, "system": None, "reasoning": None},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("more", "answer", "correct"), [({}, "7", True), ({"answer": 8}, "8", None)])
def test_every_shape_is_a_question_and_a_trace(shape: str, more: dict, answer: str, correct: bool | None) -> None:
    row = SHAPES[shape] | more
    question, trace = parse_question(row, "q, line 1", "q1"), to_trace(row, "q, line 1", "q1")
    assert (question.question, question.answer, question.system) == ("3+4?", answer, None)
    assert (trace.question, trace.answer, trace.response, trace.correct) == ("3+4?", answer, SAID, correct)


def test_the_input_of_an_instruction_is_part_of_the_question() -> None:
    row = {"instruction": "Add.", "input": "3, 4", "output": SAID}
    assert parse_question(row, "q", "q1").question == to_trace(row, "q", "q1").question == "Add.\n\n3, 4"


@pytest.mark.parametrize("key", KEYS["thoughts"])
@pytest.mark.parametrize("thoughts", ["3+4=7", " 3+4=7\n", "<think>3+4=7</think>"])
def test_thoughts_beside_an_answer_are_part_of_the_response(key: str, thoughts: str) -> None:
    said = {"role": "assistant", "content": "\\boxed{7}", key: thoughts}
    flat = {"question": "3+4?", "response": "\\boxed{7}", "answer": "7", key: thoughts}
    for row in ({"messages": [*turns(USER), said]}, flat):
        trace = to_trace(row, "q", "q1")
        assert (trace.response, trace.answer) == (THOUGHT, "7")


@pytest.mark.parametrize("thoughts", [None, "", "  ", True, {"effort": "high"}])
def test_no_thoughts_are_none(thoughts: object) -> None:
    row = {"messages": [*turns(USER), {"role": "assistant", "content": SAID, "reasoning": thoughts}]}
    assert to_trace(row, "q", "q1").response == SAID


def test_thoughts_that_stand_in_the_answer_too_are_there_once() -> None:
    row = {"messages": [*turns(USER), {"role": "assistant", "content": THOUGHT, "reasoning_content": "3+4=7"}]}
    assert to_trace(row, "q", "q1").response == THOUGHT


def test_an_answer_is_not_taken_from_the_thoughts() -> None:
    said = {"role": "assistant", "content": "seven", "reasoning_content": "perhaps \\boxed{8}"}
    assert to_trace({"messages": [*turns(USER), said]}, "q", "q1").answer == "seven"
    assert parse_question({"messages": [*turns(USER), said]}, "q", "q1").answer == "seven"


@pytest.mark.parametrize(
    "row",
    [
        {"messages": turns(("system", "In French."), USER, GPT)},
        {"messages": turns(("developer", "In French."), USER, GPT)},
        {"conversations": turns(("system", "In French."), ("human", "3+4?"), ("gpt", SAID), role="from", content="value")},
        {"conversations": turns(USER, GPT, role="from", content="value"), "system": "In French."},
        {"prompt": turns(("system", "In French."), USER), "completion": turns(GPT)},
        {"question": "3+4?", "answer": "7", "response": SAID, "system": "In French."},
        {"messages": turns(("system", "In"), ("system", "French."), USER, GPT)},
    ],
)
def test_what_a_chat_is_set_to_is_kept(row: dict) -> None:
    for found in (parse_question(row, "q", "q1"), to_trace(row, "q", "q1")):
        assert " ".join((found.system or "").split()) == "In French."


def test_an_empty_system_turn_is_none() -> None:
    assert parse_question({"messages": turns(("system", ""), USER, GPT)}, "q", "q1").system is None
    assert parse_question({"question": "3+4?", "answer": "7", "system": ""}, "q", "q1").system is None


def test_a_system_turn_counts_in_a_digest_and_none_leaves_it_as_it_was() -> None:
    plain, set_to = Question("a", "?", "7"), Question("a", "?", "7", system="s")
    assert repr(digest_items([plain])) == "[Question(id='a', question='?', answer='7', level=None, source='')]"
    assert repr(digest_items([set_to])) != repr(digest_items([plain]))
    assert plain != set_to


REFUSED = [
    ({"text": "3+4?"}, ["no 'question'", "or problem, instruction, prompt, messages, conversations", "keys found: 'text'"]),
    ({"question": "3+4?"}, ["no 'answer'", "or expected_answer", "keys found: 'question'"]),
    ({"problem": "3+4?", "solution": "It is so."}, ["problem and solution are for --traces", "a solution that boxes its own"]),
    ({"messages": turns(("user", [{"type": "image_url", "image_url": "x"}]), GPT)}, ["part of 'content'", '"image_url"', "type text"]),
    ({"messages": turns(("user", ["3+4?"]), GPT)}, ["part of 'content'", "type text"]),
    ({"messages": turns(("user", []), GPT)}, ["'content' is", "not empty"]),
    ({"conversations": [{"from": "gpt", "value": "7"}]}, ["'conversations' has no user turn"]),
    ({"conversations": "3+4?"}, ["'conversations' must be a list"]),
    ({"messages": [{"content": "3+4?"}]}, ["'messages' must be a list of objects with role and content"]),
    ({"messages": []}, ["'messages' must be a list"]),
    ({"prompt": turns(USER)}, ["no assistant turn", "'answer'"]),
]


@pytest.mark.parametrize(("row", "words"), REFUSED)
def test_another_shape_is_refused_with_what_was_found_and_what_is_wanted(row: dict, words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        parse_question(row, "q, line 1", "q1")
    assert [word for word in ["q, line 1", *words] if word not in str(caught.value)] == []


@pytest.mark.parametrize("more", [[("assistant", "and")], [("tool", "7"), ("assistant", "7")], [("user", "8?"), ("assistant", "8")]])
def test_a_trace_of_more_than_one_reply_is_refused(more: list) -> None:
    with pytest.raises(InputError, match="one question, one answer"):
        to_trace({"messages": turns(USER, GPT, *more)}, "q", "q1")


def test_a_sampled_response_of_which_nobody_says_what_is_right_is_refused() -> None:
    with pytest.raises(InputError, match="no 'answer'"):
        to_trace({"question": "3+4?", "response": SAID}, "q", "q1")


KNOWN = [key for keys in KEYS.values() for key in keys]
NAMES = st.sampled_from([*KNOWN, "type", "text", "input", "system", "id", "level", "correct"])
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
WORDS = st.sampled_from(["user", "human", "gpt", "text", "</s>", "$", "####"])
ANY = st.recursive(LEAVES | WORDS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=5), max_leaves=12)


@given(st.dictionaries(NAMES | st.text(max_size=50), ANY, max_size=8))
def test_no_row_ends_in_a_traceback(row: dict) -> None:
    for read in (parse_question, to_trace):
        try:
            found = read(row, "q, line 1", "q1")
        except InputError as error:
            said = str(error)
            problem = said.splitlines()[1:] or said[900:]
            if problem:
                pytest.fail(said)
        else:
            assert all((found.question.strip(), found.answer.strip()))


# ---- references and turn ends --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "wanted"),
    [
        ("72", "72"),
        ("72</s>", "72"),
        ("72 <|im_end|>\n<|endoftext|>", "72"),
        ("\\[ \\frac{\\pi}{2} \\]", "\\frac{\\pi}{2}"),
        ("\\(x\\)", "x"),
        ("$x+1$", "x+1"),
        ("$$ x+1 $$", "x+1"),
        ("$x$.", "x"),
        ("$5", "$5"),
        ("$5 and $6$", "$5 and $6$"),
        ("#### 72", "72"),
        ("48/2=24\n#### 1,000 ", "1,000"),
        ("so 72\n#### 72\nThe answer is: 72", "72"),  # MetaMath
        ("The answer is: 72", "72"),
        ("The final answer is $\\frac12$.", "\\frac12"),
        ("Answer: B</s>", "B"),
        ("\\boxed{72}", "72"),
        ("So it is\n$$\\boxed{\\frac{1}{2}}$$", "\\frac{1}{2}"),
        ("(3, 4)", "(3, 4)"),
        ("[1, 2]", "[1, 2]"),
        ("Jane Austen did", "Jane Austen did"),
        ("a <b> c", "a <b> c"),
    ],
)
def test_a_reference_is_read_without_what_it_comes_in(written: str, wanted: str) -> None:
    assert unwrap_reference(written) == wanted
    assert parse_question({"question": "?", "answer": written}, "q", "q1").answer == wanted


@pytest.mark.parametrize("written", ["</s>", "$$", "\\[ \\]", "work ####", "work #### </s>"])
def test_a_reference_of_which_nothing_is_left_is_refused(written: str) -> None:
    with pytest.raises(InputError, match="in 'answer'"):
        parse_question({"question": "?", "answer": written}, "q", "q1")


@given(st.text(alphabet="<|>/s $#\\[]()a\n", max_size=60))
def test_a_reference_is_read_once_and_for_all(written: str) -> None:
    assert unwrap_reference(written) == unwrap_reference(written).strip()


def test_a_very_long_reference_or_response_takes_no_time() -> None:
    for text in ("<|" * 50_000, "</s>" * 50_000, " " * 200_000 + "<", "$" * 100_000, "\\[" * 50_000):
        unwrap_reference("x" + text)


@pytest.mark.parametrize("end", ["<|im_end|>", "</s>", "<|endoftext|>", " <|eot_id|>\n", "<end_of_turn>", "<｜end▁of▁sentence｜>"])
def test_the_end_of_a_turn_is_no_part_of_a_response(end: str) -> None:
    row = {"question": "3+4?", "answer": "7", "response": SAID}
    plain, ended = to_trace(row, "q", "q1"), to_trace(row | {"response": SAID + end}, "q", "q1")
    assert (plain.response, plain.ended) == (SAID, False)
    assert (ended.response, ended.ended) == (SAID, True)
    with pytest.raises(InputError, match="'response' is nothing but the end of a turn"):
        to_trace(row | {"response": end}, "q", "q1")


# ---- files ---------------------------------------------------------------------------------------------------------------

ROWS = [{"question": f"What is {n}?", "answer": f"{n}", "response": f'a, "{n}"\n\\boxed{{{n}}}'} for n in range(40)]


def lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write(path: Path, rows: list[dict]) -> str:
    """The rows as the ending of the path says."""
    ending = path.name.removesuffix(".gz").rpartition(".")[2]
    if ending == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif ending == "csv":
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        content = lines(rows) if ending == "jsonl" else json.dumps(rows, indent=1).encode()
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)


@pytest.mark.parametrize("name", ["q.jsonl", "q.jsonl.gz", "q.json", "q.json.gz", "q.csv", "q.parquet"])
def test_a_file_of_any_kind_is_read_and_sampled(name: str, tmp_path: Path) -> None:
    path, plain = write(tmp_path / name, ROWS), write(tmp_path / "plain.jsonl", ROWS)
    strip = [(q.question, q.answer) for q in read_questions(plain)]
    assert [(q.question, q.answer) for q in read_questions(path)] == strip
    assert [t.response for t in read_traces(path)] == [row["response"] for row in ROWS]
    assert [(q.question, q.answer) for q in read_questions(f"{path}#5")] == [(q.question, q.answer) for q in read_questions(f"{plain}#5")]
    first = read_questions(path)[0]
    assert first.id == "q-00001"
    assert first.where == f"{path}, {'line' if 'jsonl' in name else 'row'} 1"


def test_json_lines_under_the_ending_of_json_are_read(tmp_path: Path) -> None:
    path = tmp_path / "q.json"
    path.write_bytes(lines(ROWS))
    assert len(read_questions(str(path))) == 40


def test_chats_of_parquet_are_read_with_the_columns_they_do_not_fill(tmp_path: Path) -> None:
    thinking = {"role": "assistant", "content": "\\boxed{7}", "reasoning_content": "3+4=7"}
    rows = [{"messages": [*turns(USER), thinking], "problem": None}, {"problem": "8?", "solution": "\\boxed{8}"}]
    rows[0]["solution"] = None
    first, second = read_traces(write(tmp_path / "q.parquet", rows))
    assert (first.response, second.response) == (THOUGHT, "\\boxed{8}")


BROKEN = {
    "q.jsonl.gz": (b"\x1f\x8b\x08 broken", "no whole gzip file"),
    "text.jsonl.gz": (lines(ROWS), "no whole gzip file"),
    "cut.jsonl.gz": (gzip.compress(lines(ROWS))[:-9], "no whole gzip file"),
    "q.parquet": (b"PAR1 broken", "no readable Parquet file"),
    "empty.parquet": (b"", "no readable Parquet file"),
    "q.json": (b'[{"question": "a?",\n "answer"]', "q.json, line 2, column 10: broken JSON"),
    "numbers.json": (b"[1, 2]", "row 1: a int, not an object"),
    "empty.json": (b"[]", "is empty"),
    "q.csv": (b'question,answer\na?,"1', "after line 1: broken CSV"),
    "many.csv": (b"question,answer\na?,1,2\n", "row 1: more fields"),
    "head.csv": (b"question,answer\n", "is empty"),
    "latin.csv": ("question,answer\ncaf\u00e9?,1\n".encode("latin-1"), "not UTF-8"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_told_in_one_line(name: str, tmp_path: Path) -> None:
    content, said = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_questions(str(tmp_path / name))
    assert said in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_values_of_parquet_that_json_has_not_are_told(tmp_path: Path) -> None:
    path = write(tmp_path / "q.parquet", [{"question": b"a?", "answer": "1"}])
    with pytest.raises(InputError, match="row 1: 'question' is"):
        read_questions(path)

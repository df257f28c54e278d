"""The format: every named outcome, the round trip, and arbitrary text that must not upset the reader."""

import re
from itertools import pairwise

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from sbtiny.budget.protocol import (
    BUDGET_CLOSE,
    BUDGET_OPEN,
    MAX_BUDGET,
    SOLUTION,
    THINK,
    BudgetChoice,
    Format,
    Outcome,
    body_length,
    parse,
    parse_budget_option,
    render_budget,
    split_response,
)
from sbtiny.errors import InputError

CASES = [
    ("<budget>5</budget><solution>x</solution>", Outcome.OK, 5, "x"),
    (" <budget> 07\n</budget>\n\n<solution> x\n</solution> \n", Outcome.OK, 7, " x\n"),
    (f"<budget>{MAX_BUDGET}</budget><solution>x</solution>", Outcome.OK, MAX_BUDGET, "x"),
    ("<budget>5</budget><solution>a < b, </b>, <Budget>, </solution</solution>", Outcome.OK, 5, None),
    ("", Outcome.EMPTY, None, None),
    (" \n\t", Outcome.EMPTY, None, None),
    ("<", Outcome.CUT, None, None),
    (" <budg", Outcome.CUT, None, None),
    ("<budget>", Outcome.CUT, None, None),
    ("<budget> 12", Outcome.CUT, None, None),
    ("<budget>0", Outcome.CUT, None, None),
    ("<budget>12 </bud", Outcome.CUT, None, None),
    ("<budget>12</budget>", Outcome.CUT, 12, None),
    ("<budget>12</budget>\n<solu", Outcome.CUT, 12, None),
    ("<budget>12</budget><solution>", Outcome.CUT, 12, ""),
    ("<budget>12</budget><solution>so far </solut", Outcome.CUT, 12, "so far "),
    ("just words", Outcome.NO_BUDGET, None, None),
    ("words <bud", Outcome.NO_BUDGET, None, None),
    ("<BUDGET>5</BUDGET>", Outcome.NO_BUDGET, None, None),
    ("<solution>x</solution>", Outcome.NO_BUDGET, None, "x"),
    ("<solution>x</solution><budget>5</budget>", Outcome.NO_BUDGET, None, "x"),
    ("</budget><budget>5</budget><solution>x</solution>", Outcome.NO_BUDGET, None, "x"),
    ("<budget></budget><solution>x</solution>", Outcome.BUDGET_NOT_A_NUMBER, None, "x"),
    ("<budget>many</budget><solution>x</solution>", Outcome.BUDGET_NOT_A_NUMBER, None, "x"),
    ("<budget>-5</budget><solution>x</solution>", Outcome.BUDGET_NOT_A_NUMBER, None, "x"),
    ("<budget>+5</budget><solution>x</solution>", Outcome.BUDGET_NOT_A_NUMBER, None, "x"),
    ("<budget>5.0</budget><solution>x</solution>", Outcome.BUDGET_NOT_A_NUMBER, None, "x"),
    ("<budget>1,000</budget><solution>x</solution>", Outcome.BUDGET_NOT_A_NUMBER, None, "x"),
    ("<budget>1 2</budget><solution>x</solution>", Outcome.BUDGET_NOT_A_NUMBER, None, "x"),
    ("<budget>٥</budget><solution>x</solution>", Outcome.BUDGET_NOT_A_NUMBER, None, "x"),
    ("<budget>²</budget><solution>x</solution>", Outcome.BUDGET_NOT_A_NUMBER, None, "x"),
    ("<budget>5 tok", Outcome.BUDGET_NOT_A_NUMBER, None, None),
    ("<budget></bud", Outcome.BUDGET_NOT_A_NUMBER, None, None),
    ("<budget>0</budget><solution>x</solution>", Outcome.BUDGET_ZERO, None, "x"),
    ("<budget>000</bud", Outcome.BUDGET_ZERO, None, None),
    ("<budget>0 ", Outcome.BUDGET_ZERO, None, None),
    (f"<budget>{MAX_BUDGET + 1}</budget><solution>x</solution>", Outcome.BUDGET_HUGE, None, "x"),
    (f"<budget>{'9' * 100_000}</budget><solution>x</solution>", Outcome.BUDGET_HUGE, None, "x"),
    (f"<budget>{'9' * 100_000}", Outcome.BUDGET_HUGE, None, None),
    (f"<budget>{'0' * 100_000}9</budget><solution>x</solution>", Outcome.OK, 9, "x"),
    ("<budget>5</budget><budget>6</budget><solution>x</solution>", Outcome.REPEATED_TAG, 5, "x"),
    ("<budget>5</budget></budget><solution>x</solution>", Outcome.REPEATED_TAG, 5, "x"),
    ("<budget>5</budget><solution>x</solution><solution>y</solution>", Outcome.REPEATED_TAG, 5, "x"),
    ("<budget>5</budget><solution>x</solution> and </solution>", Outcome.REPEATED_TAG, 5, "x"),
    ("<budget>5<budget>6</budget></budget><solution>x</solution>", Outcome.NESTED_TAG, None, "x"),
    ("<budget>5<solution>x</solution>", Outcome.NESTED_TAG, None, "x"),
    ("<budget>5</budget><solution>a<solution>b</solution>", Outcome.NESTED_TAG, 5, "a<solution>b"),
    ("<budget>5</budget><solution>a<budget>6</budget>", Outcome.NESTED_TAG, 5, "a<budget>6</budget>"),
    ("So: <budget>5</budget><solution>x</solution>", Outcome.TEXT_OUTSIDE, 5, "x"),
    ("<budget>5</budget> then <solution>x</solution>", Outcome.TEXT_OUTSIDE, 5, "x"),
    ("<budget>5</budget><solution>x</solution>!", Outcome.TEXT_OUTSIDE, 5, "x"),
    ("So: <budget>5", Outcome.TEXT_OUTSIDE, None, None),
    ("So: <budget>x</budget><solution>x</solution>", Outcome.TEXT_OUTSIDE, None, "x"),
    ("<budget>5</budget>The answer is 7.", Outcome.NO_SOLUTION, 5, None),
    ("<budget>5</budget>The <solu", Outcome.NO_SOLUTION, 5, None),
    ("<budget>5</budget>x</solution>", Outcome.NO_SOLUTION, 5, None),
    ("<budget>5</budget><solution></solution>", Outcome.EMPTY_SOLUTION, 5, ""),
    ("<budget>5</budget><solution> \n</solution>", Outcome.EMPTY_SOLUTION, 5, " \n"),
    ("<budget>5</budget><think>a</think>b", Outcome.OK, 5, "a"),
    ("<budget>5</budget>\n<think></think>\n\nb", Outcome.OK, 5, ""),
    ("<budget>5</budget><think>a <solution> </solution></think>b </solution>", Outcome.OK, 5, "a <solution> </solution>"),
    ("<budget>5</budget><thi", Outcome.CUT, 5, None),
    ("<budget>5</budget><think>a</thi", Outcome.CUT, 5, "a"),
    ("<budget>5</budget><think>a</think> \n", Outcome.CUT, 5, "a"),
    ("<budget>5</budget></think>a", Outcome.NO_SOLUTION, 5, None),
    ("<budget>5</budget> so <think>a</think>b", Outcome.NO_SOLUTION, 5, None),
    ("<budget>0</budget><think>a</think>b", Outcome.BUDGET_ZERO, None, "a"),
    ("<budget>5</budget><think>a<think>b</think>c", Outcome.NESTED_TAG, 5, "a<think>b"),
    ("<budget>5</budget><think>a</think>b</think>", Outcome.REPEATED_TAG, 5, "a"),
    ("<budget>5</budget><think>a</think>b<budget>6</budget>", Outcome.REPEATED_TAG, 5, "a"),
    ("<budget>5</budget><solution>a <think> b </think></solution>", Outcome.OK, 5, "a <think> b </think>"),
    ("<think>a</think>b", Outcome.NO_BUDGET, None, None),
]

budgets = st.integers(1, MAX_BUDGET)
bodies = st.text(max_size=40).filter(lambda body: not SOLUTION.tag.search(body))
spaces = st.text(" \n\t", max_size=3)
TAGS = [BUDGET_OPEN, BUDGET_CLOSE, SOLUTION.opening, SOLUTION.closing]
BITS = ["</think>", "<thi", "<", "</", "<bud", "get>", "</solu", "tion>", ">", "-", ".", " ", "\n", "word", "é", "٥", "\x00", "<think>"]
fragments = st.sampled_from([*TAGS, *BITS, "0", "7", "12", "9999999"])
junk = st.lists(fragments, max_size=12).map("".join)


@st.composite
def spoiled(draw: st.DrawFn) -> str:
    """A well-formed text in which one piece may be missing and another may be too many."""
    pieces = [draw(spaces), BUDGET_OPEN, draw(st.sampled_from(["1", " 12", "00", "x", ""])), BUDGET_CLOSE, draw(spaces)]
    form, after = draw(st.sampled_from([SOLUTION, THINK])), draw(spaces | junk)
    pieces += [form.opening, draw(junk), form.closing, after]
    if draw(st.booleans()):
        pieces.pop(draw(st.integers(0, len(pieces) - 1)))
    if draw(st.booleans()):
        pieces.insert(draw(st.integers(0, len(pieces))), draw(fragments))
    return "".join(pieces)


def completion(budget: int, response: str, form: Format = SOLUTION) -> str:
    """A whole completion around a plain answer."""
    body, after = split_response(response, form)
    return render_budget(budget, form) + body + form.closing + after


WELL_FORMED = re.compile(r"\s*<budget>\s*([0-9]+)\s*</budget>\s*<solution>((?:(?!</?(?:budget|solution)>).)*)</solution>\s*", re.DOTALL)
THOUGHT = re.compile(
    r"\s*<budget>\s*([0-9]+)\s*</budget>\s*<think>((?:(?!</?(?:budget|think)>).)*)</think>((?:(?!</?(?:budget|think)>).)*)", re.DOTALL
)


@pytest.mark.parametrize(("text", "outcome", "budget", "body"), CASES)
def test_named_outcomes(text: str, outcome: Outcome, budget: int | None, body: str | None):
    parsed = parse(text)
    assert parsed.outcome == outcome
    assert parsed.budget == budget
    assert parsed.ok == (outcome == "ok")
    if outcome != "ok":
        assert parsed.body == body


def test_every_outcome_has_a_case():
    assert {case[1] for case in CASES} == set(Outcome)


@given(budgets, bodies, spaces, spaces, spaces)
@example(1, "</solution", "", "", "")
@example(1, "<", "", "", "")
def test_round_trip(budget: int, body: str, before: str, between: str, after: str):
    text = completion(budget, body).replace("</budget>", f"{after}</budget>{between}", 1)
    parsed = parse(before + text + after)
    assert (parsed.budget, parsed.body) == (budget, body)
    assert parsed.outcome == ("ok" if body.strip() else "empty_solution")
    assert (before + text + after)[parsed.start : parsed.end] == body


@given(budgets, st.text(max_size=40).filter(lambda text: not THINK.tag.search(text)), bodies)
def test_think_round_trip(budget: int, thoughts: str, answer: str):
    assume(not THINK.tag.search(answer) and answer.strip())
    parsed = parse(completion(budget, f"{thoughts}</think>{answer}", THINK))
    assert (parsed.outcome, parsed.budget) == ("ok", budget)
    assert (parsed.body, parsed.answer) == (thoughts, answer)


@pytest.mark.parametrize(
    ("response", "body", "after"),
    [
        ("<think>\na\n</think>\n\nIt is 4.", "\na\n", "\n\nIt is 4."),
        ("a\n</think>\n\nIt is 4.", "a\n", "\n\nIt is 4."),  # the prompt had opened it
        ("3+1=4\nso\n\\boxed{4}\n", "3+1=4\nso\n", "\\boxed{4}"),
        ("\\boxed{4}", "", "\\boxed{4}"),
    ],
)
def test_a_plain_answer_becomes_thoughts_and_answer(response: str, body: str, after: str):
    assert split_response(response, THINK) == (body, after)
    assert split_response(response, SOLUTION) == (response, "")


@pytest.mark.parametrize("response", ["a<think>b</think>c", "a</think>b</think>c", "a <budget>"])
def test_an_answer_with_tags_left_over_is_refused(response: str):
    with pytest.raises(ValueError, match="holds the tag <"):
        split_response(response, THINK)


@given(budgets, bodies, st.data())
def test_a_strict_prefix_is_cut(budget: int, body: str, data: st.DataObject):
    text = completion(budget, body)
    at = data.draw(st.integers(1, len(text) - 1))
    parsed = parse(text[:at])
    assert parsed.outcome == "cut"
    assert parsed.budget == (budget if at >= text.index(BUDGET_CLOSE) + len(BUDGET_CLOSE) else None)
    assert parsed.body is None or body.startswith(parsed.body)


@settings(max_examples=400)
@given(junk | spoiled() | spoiled().map(lambda text: text[: len(text) // 2]))
def test_cut_means_that_it_could_still_become_right(text: str):
    templates = ("<budget>1</budget><solution>x</solution>", "<budget>1</budget><think>x</think>y")
    endings = [template[i:] for template in templates for i in range(len(template) + 1)]
    can = any(parse(text + ending).ok for ending in endings) and not parse(text).ok and bool(text.strip())
    assert (parse(text).outcome == "cut") == can


@settings(max_examples=400)
@given(junk | spoiled() | st.text())
def test_any_text_is_read_and_agrees_with_the_grammar(text: str):
    parsed = parse(text)
    match = WELL_FORMED.fullmatch(text) or THOUGHT.fullmatch(text)
    right = match and match[match.lastindex].strip() and 1 <= int(match[1]) <= MAX_BUDGET
    assert parsed.ok == bool(right)
    if right:
        assert (parsed.budget, parsed.body) == (int(match[1]), match[2])
    if parsed.body is None:
        assert (parsed.start, parsed.end) == (-1, -1)
    else:
        assert text[parsed.start : parsed.end] == parsed.body
    assert parsed.budget is None or 1 <= parsed.budget <= MAX_BUDGET


@given(budgets, bodies, st.text("ab<", min_size=1))
def test_words_outside_are_refused(budget: int, body: str, words: str):
    assert parse(words + completion(budget, body)).outcome == "text_outside"
    assert parse(completion(budget, body + "x") + words).outcome == "text_outside"


def test_budget_is_prefilled_with_the_opening_tag():
    assert render_budget(50) == "<budget>50</budget><solution>"


@pytest.mark.parametrize("budget", [0, -1, MAX_BUDGET + 1])
def test_prefill_refuses_what_parse_would_refuse(budget: int):
    with pytest.raises(InputError, match="out of range"):
        render_budget(budget)


@pytest.mark.parametrize("tag", [BUDGET_OPEN, BUDGET_CLOSE, SOLUTION.opening, SOLUTION.closing])
def test_split_refuses_tags_in_the_body(tag: str):
    with pytest.raises(ValueError, match="character 1"):
        split_response(f"a{tag}b", SOLUTION)


@given(budgets, bodies, st.data())
def test_body_length_of_any_split(budget: int, body: str, data: st.DataObject):
    text = completion(budget, body)
    parsed = parse(text)
    cuts = data.draw(st.sets(st.integers(1, len(text) - 1)))
    edges = [0, *sorted(cuts), len(text)]
    spans = list(pairwise(edges))
    held = sum(any(parsed.start <= i < parsed.end for i in range(*span)) for span in spans)
    assert body_length([text[a:b] for a, b in spans], parsed) == held
    assert body_length(list(text), parsed) == len(body)


def test_thoughts_and_answer_are_counted_together():
    pieces = ["<budget>5</budget>", "<think>", "a", "b", "</", "think", ">", "\n", "c", ""]
    assert body_length(pieces, parse("".join(pieces))) == 5  # the empty one behind the tag too
    assert body_length(["<budget>5</budget><think>a", "b</th", "ink>c"], parse("<budget>5</budget><think>ab</think>c")) == 3
    assert body_length(["<budget>5</budget><think></think>", "c", "d"], parse("<budget>5</budget><think></think>cd")) == 2


def test_body_length_by_hand():
    pieces = ["<budget>", "5", "</budget", "><", "solution>a", "b", "", "c</", "solution", ">", ""]
    assert body_length(pieces, parse("".join(pieces))) == 4  # straddling tokens and the empty one inside
    assert body_length(["<budget>5</budget><solution>", "", "a", "", "</solution>"], parse(completion(5, "a"))) == 1
    assert body_length([render_budget(5), "a", "b", "</", "sol"], parse(render_budget(5) + "ab</sol")) == 2  # cut inside the tag
    assert body_length(["<budget>5</budget><solution", "></", "solution>"], parse(completion(5, ""))) == 0
    assert body_length(["no", " tags"], parse("no tags")) == 0


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("auto", BudgetChoice("auto")),
        ("200", BudgetChoice("fixed", 200.0)),
        (" 200 ", BudgetChoice("fixed", 200.0)),
        ("0.5x", BudgetChoice("scaled", 0.5)),
        (".5x", BudgetChoice("scaled", 0.5)),
        ("2x", BudgetChoice("scaled", 2.0)),
    ],
)
def test_budget_option(text: str, choice: BudgetChoice):
    assert parse_budget_option(text) == choice


@pytest.mark.parametrize("text", ["", "0", "-5", "1.5", "0x", "0.0x", "-1x", "x", "nanx", "1e9x", "half", "1000001"])
def test_budget_option_names_the_three_forms(text: str):
    with pytest.raises(InputError, match=r"auto.*number of tokens.*0\.5x"):
        parse_budget_option(text)


def test_budget_option_survives_any_number_of_digits():
    with pytest.raises(InputError):
        parse_budget_option("9" * 100_000)
    with pytest.raises(InputError):
        parse_budget_option("9" * 100_000 + "x")

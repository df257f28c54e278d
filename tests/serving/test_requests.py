"""A request's body to an Ask: every dialect of a budget, strict types, one clear refusal."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sbtiny.budget.protocol import BudgetChoice
from sbtiny.serving.app import TURN
from sbtiny.serving.ask import AUTO, Ask
from sbtiny.serving.budget_dialects import EFFORTS, KEYS, SWITCHES, WRAPPERS
from sbtiny.serving.request_body import parse_body
from sbtiny.serving.request_error import RequestError
from sbtiny.serving.requests import REFUSED, ROLES_OF_REQUESTS, ServeRequest, read_chat, read_completion

DEFAULTS = Ask(ceiling=400, max_tokens=512)
USER = [{"role": "user", "content": "1+1?"}]


def read(defaults: Ask = DEFAULTS, **body: object) -> ServeRequest:
    return read_chat({"messages": USER} | body, defaults)


def put(key: str, value: object) -> dict[str, object]:
    outer, _, inner = key.partition(".")
    return {outer: {inner: value}} if inner else {outer: value}


def tokens(n: float) -> BudgetChoice:
    return BudgetChoice("fixed", float(n))


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_no_limit_is_the_servers(name: str) -> None:
    """llama.cpp's web page sends -1 where none is set."""
    assert read(**{name: -1}).ask.max_tokens == DEFAULTS.max_tokens


def test_a_long_key_is_looked_at_no_further_than_a_name_can_be() -> None:
    """To look for a budget in all of it takes time by its square: a megabyte would stop the server for twenty minutes."""
    assert read(**{"think" * 200_000: 1}).source == "model"
    with pytest.raises(RequestError, match="did you mean"):
        read(**{"thinking_tokens" + "x" * 1_000_000: 1})


def test_a_seed_of_minus_one_is_any() -> None:
    """llama-server and vLLM take it so."""
    asked = read(seed=-1)
    assert (asked.seeded, asked.ask.seed) == (False, DEFAULTS.seed)
    assert read(seed=-7).seeded


@pytest.mark.parametrize("wrapper", ["", *WRAPPERS])
@pytest.mark.parametrize("key", SWITCHES)
def test_a_switch_that_turns_nothing_off_is_told(key: str, wrapper: str) -> None:
    off, on = ({wrapper: put(key, value)} if wrapper else put(key, value) for value in (False, True))
    name = f"{wrapper}.{key}" if wrapper else key
    assert read(**off).warnings == (f"{name} had no effect here: use budget or reasoning_effort",)
    assert read(**off).ask == DEFAULTS
    assert read(**off, budget=9).warnings == read(**off).warnings
    assert read(**on).warnings == ()


TOKEN_KEYS = [key for key in KEYS if not key.endswith("effort")]


@pytest.mark.parametrize("key", TOKEN_KEYS)
def test_every_name_of_a_budget_in_tokens_is_read_and_echoed(key: str) -> None:
    asked = read(**put(key, 120))
    assert (asked.ask.choice, asked.source, asked.requested, asked.warnings) == (tokens(120), key, 120, ())
    assert read(**put(key, 0)).ask.choice == tokens(1)  # the least there is
    assert read(**put(key, 1)).ask.choice == tokens(1)
    with_flag = Ask(choice=tokens(50))
    for free in (-1, None):
        asked = read(with_flag, **put(key, free))
        assert (asked.ask.choice, asked.source) == (AUTO, key)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_budget_in_a_wrapper_is_honoured_with_a_warning(key: str, wrapper: str) -> None:
    asked = read(**{wrapper: put(key, "low" if key.endswith("effort") else 77)})
    assert asked.ask.choice == (BudgetChoice("scaled", 0.5) if key.endswith("effort") else tokens(77))
    assert asked.source == f"{wrapper}.{key}"
    assert "top level" in asked.warnings[0]


@pytest.mark.parametrize("first", range(len(KEYS) - 1))
def test_the_first_key_wins_and_the_other_is_told(first: int) -> None:
    high, low = KEYS[first], KEYS[first + 1]
    values = {key: "low" if key.endswith("effort") else 10 * KEYS.index(key) + 5 for key in (high, low)}
    body: dict[str, dict] = {}
    for key in (low, high):
        for outer, value in put(key, values[key]).items():
            body[outer] = {**body[outer], **value} if outer in body else value
    asked = read(**body)
    assert asked.source == high
    assert any(low in warning for warning in asked.warnings)


def test_an_effort_is_a_factor_on_the_models_own_budget() -> None:
    found = {effort: read(reasoning_effort=effort).ask.choice for effort in EFFORTS}
    assert found == {
        "none": tokens(1),
        "minimal": BudgetChoice("scaled", 0.25),
        "low": BudgetChoice("scaled", 0.5),
        "medium": AUTO,
        "high": BudgetChoice("scaled", 2.0),
        "xhigh": BudgetChoice("scaled", 4.0),
    }


@pytest.mark.parametrize(
    ("value", "choice", "coverage"),
    [
        ("12s", BudgetChoice("seconds", 12.0), None),
        ("2x", BudgetChoice("scaled", 2.0), None),
        ("auto", AUTO, None),
        ("200", tokens(200), None),
        ("0", tokens(1), None),
        ("90%", AUTO, 0.9),
        ({"tokens": 9}, tokens(9), None),
        ({"seconds": 2.5}, BudgetChoice("seconds", 2.5), None),
        ({"coverage": 0.8}, AUTO, 0.8),
    ],
)
def test_the_forms_of_budget(value: object, choice: BudgetChoice, coverage: float | None) -> None:
    asked = read(budget=value)
    assert (asked.ask.choice, asked.ask.coverage, asked.source) == (choice, coverage, "budget")


def test_without_a_wish_the_servers_flag_holds_then_the_models_own() -> None:
    assert (read().source, read().ask.choice) == ("model", AUTO)
    flagged = read(Ask(choice=tokens(50)))
    assert (flagged.source, flagged.ask.choice, flagged.requested) == ("server", tokens(50), "50")
    assert read(thinking={"type": "disabled"}).ask.choice == tokens(1)


@pytest.mark.parametrize(
    ("key", "suggested"),
    [
        ("max_thinking_tokens", "thinking_budget_tokens"),
        ("thinking_budget_token", "thinking_budget_tokens"),
        ("budget_tokens", "thinking_budget_tokens"),
        ("reasoning_efort_limit", "reasoning_effort"),
        ("thinkingBudget", "thinking_budget"),
    ],
)
def test_a_key_that_looks_like_a_budget_is_refused_with_the_right_one(key: str, suggested: str) -> None:
    for body in ({key: 5}, {"extra_body": {key: 5}}):
        with pytest.raises(RequestError, match=f"did you mean {suggested}") as caught:
            read(**body)
        assert caught.value.param.endswith(key)
    assert read(colour="red", metadata={"a": 1}).source == "model"  # other keys are ignored


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": "x"}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages[0]"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"seed": "x"}, "seed"),
        ({"stop": [1]}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"user": 4}, "user"),
        ({"priority": "high"}, "priority"),
        ({"budget": True}, "budget"),
        ({"budget": -2}, "budget"),
        ({"budget": "many"}, "budget"),
        ({"budget": {"tokens": 1, "seconds": 1}}, "budget"),
        ({"budget": {"seconds": 0}}, "budget.seconds"),
        ({"budget": {"coverage": 1}}, "budget.coverage"),
        ({"thinking_budget": "100"}, "thinking_budget"),
        ({"thinking_budget": 10**400}, "thinking_budget"),
        ({"thinking": 5}, "thinking"),
        ({"thinking": {"type": "x"}}, "thinking.type"),
        ({"reasoning_effort": "max"}, "reasoning_effort"),
        ({"extra_body": []}, "extra_body"),
        ({"chat_template": "{{ x }}"}, "chat_template"),
        ({"chat_template_kwargs": {"chat_template": "{{ x }}"}}, "chat_template_kwargs.chat_template"),
        ({"tools": [{}]}, "tools"),
        ({"logprobs": True}, "logprobs"),
        ({"n": 2}, "n"),
    ],
)
def test_what_is_wrong_is_refused_by_name(body: dict, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        read(**body)
    assert (caught.value.param, caught.value.status) == (param, 400)


def test_standard_fields_are_read() -> None:
    asked = read(
        messages=[{"role": "developer", "content": "Be terse."}, {"role": "user", "content": [{"type": "text", "text": t} for t in "ab"]}],
        stream=True,
        stream_options={"include_usage": True},
        max_completion_tokens=64,
        max_tokens=5,
        temperature=0,
        top_p=0,
        top_k=-1,
        min_p=0.1,
        seed=-7,
        stop="END",
        n=1,
        user="me",
        priority=3,
        tools=[],
        logprobs=False,
    )  # fmt: skip
    assert asked.messages == ({"role": "system", "content": "Be terse."}, {"role": "user", "content": "ab"})
    assert (asked.ask.max_tokens, asked.ask.temperature, asked.ask.top_k, asked.ask.min_p, asked.ask.seed) == (64, 0.0, 0, 0.1, -7)
    assert (asked.stream, asked.include_usage, asked.continuous_usage, asked.stop, asked.priority) == (True, True, False, ("END",), 3)
    assert asked.ask.ceiling == 400  # the server's
    capped = read(max_tokens=10_000)
    assert capped.ask.max_tokens == 512
    assert "512 at most" in capped.warnings[0]


def test_a_completion_has_one_raw_text() -> None:
    assert read_completion({"prompt": ["Once"]}, DEFAULTS).prompt == "Once"
    for prompt in (None, "", [], ["a", "b"], [1], 5):
        with pytest.raises(RequestError):
            read_completion({"prompt": prompt}, DEFAULTS)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"{", "not_json"),
        (b"\xff", "not_json"),
        (b"[]", "not_an_object"),
        (b'{"a": NaN}', "not_json"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not_json"),
        (b'{"a": "\\ud800"}', "not_unicode"),
        (b"[" * 100_000 + b"]" * 100_000, "too_deep"),
        (b'{"a": ' + b"[" * 40 + b"]" * 40 + b"}", "too_deep"),
    ],
)
def test_a_body_that_is_no_safe_json_is_refused(data: bytes, code: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_body(data)
    assert (caught.value.code, caught.value.status) == (code, 400)


NAMES = [
    *{key.partition(".")[0] for key in KEYS},
    *WRAPPERS,
    *REFUSED,
    "messages",
    "stream",
    "stop",
    "max_tokens",
    "seed",
    "stream_options",
]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["12s", "low", "90%", -1, 0])
INNER_NAMES = st.sampled_from([*NAMES, "tokens", "effort", "role", "content"])
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(INNER_NAMES, inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@settings(max_examples=400)
@given(st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=20), VALUES, max_size=5), st.booleans())
def test_any_json_gives_an_ask_or_one_clear_refusal(body: dict, with_messages: bool) -> None:
    body = body | ({"messages": USER} if with_messages else {})
    outcome = try_to(lambda: read_chat(parse_body(json.dumps(body).encode()), DEFAULTS))
    if isinstance(outcome, RequestError):
        assert str(outcome)
        assert "\n" not in str(outcome)
        assert 400 <= outcome.status < 500
    else:
        assert outcome.ask.max_tokens <= DEFAULTS.max_tokens
        outcome.ask.sampling()


@given(st.binary(max_size=200))
def test_any_bytes_give_an_object_or_a_refusal(data: bytes) -> None:
    outcome = try_to(lambda: parse_body(data))
    assert isinstance(outcome, dict) or outcome.code


def try_to(read_it: Callable[[], object]) -> object:
    try:
        return read_it()
    except RequestError as error:
        return error


def test_the_page_of_documentation_names_every_key() -> None:
    text = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    names = {*KEYS, *WRAPPERS, *EFFORTS, "priority", "stop_reason", "queue_time_ms"}
    assert {name for name in names if f"`{name}`" not in text} == set()


def test_the_schema_names_the_roles_that_are_taken() -> None:
    assert TURN["properties"]["role"]["enum"] == list(ROLES_OF_REQUESTS)

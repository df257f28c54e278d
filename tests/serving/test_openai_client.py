"""OpenAI's own client against a real server."""

import re
from pathlib import Path

import openai
import pytest
from serve_support import Served, slow_down, wait_for

from sbtiny.tasks import arithmetic

LONG = next(q.question for q in arithmetic.generate_questions("val", 99) if q.level >= 4)
MESSAGES = [{"role": "user", "content": LONG}]


def client_of(served: Served, **options: object) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, **options)


def test_an_answer_with_its_extra_fields(thinking: Served) -> None:
    client = client_of(thinking)
    answer = client.chat.completions.create(model="small", messages=MESSAGES, extra_body={"thinking_token_budget": 20})
    message = answer.choices[0].message
    assert message.content
    assert message.reasoning_content == message.reasoning
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.completion_tokens_details.reasoning_tokens > 0
    assert answer.budget["source"] == "thinking_token_budget"
    assert client.models.list().data[0].id == "small"


def test_a_stream_with_its_usage(thinking: Served) -> None:
    stream = client_of(thinking).chat.completions.create(
        model="small", messages=MESSAGES, stream=True, stream_options={"include_usage": True}, extra_body={"budget": 20}
    )
    chunks = list(stream)
    assert chunks[0].budget["requested"] == 20
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert "".join(getattr(c.choices[0].delta, "reasoning_content", "") or "" for c in chunks if c.choices)
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens > 0
    assert chunks[-2].timings["predicted_n"] == chunks[-1].usage.completion_tokens


def test_an_effort_and_a_raw_completion(served: Served) -> None:
    client = client_of(served)
    answer = client.chat.completions.create(model="small", messages=MESSAGES, reasoning_effort="low")
    assert answer.budget["source"] == "reasoning_effort"
    assert client.completions.create(model="small", prompt="1 + 1 =", max_tokens=3).choices[0].text is not None


def test_its_errors_are_of_the_right_kind(plain: Served) -> None:
    client = client_of(plain)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="small", messages=MESSAGES, extra_body={"max_thinking_tokens": 5})
    assert caught.value.param == "max_thinking_tokens"
    with pytest.raises(openai.BadRequestError, match="tools is not supported"):
        client.chat.completions.create(model="small", messages=MESSAGES, tools=[{"type": "function", "function": {"name": "f"}}])


def test_a_client_that_times_out_frees_its_slot(plain: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_down(monkeypatch, plain, 0.02)
    with pytest.raises(openai.APITimeoutError):
        client_of(plain, timeout=0.3).chat.completions.create(model="small", messages=MESSAGES)
    wait_for(lambda: plain.worker.accepted == 0 and not plain.worker.decoder.assistant.session.is_busy, 2)


def test_a_stream_that_is_closed_frees_its_slot(plain: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_down(monkeypatch, plain, 0.02)
    stream = client_of(plain).chat.completions.create(model="small", messages=MESSAGES, stream=True)
    next(iter(stream))
    stream.close()
    wait_for(lambda: plain.worker.accepted == 0 and not plain.worker.decoder.assistant.session.is_busy, 2)


def test_the_lines_of_the_readme_run(served, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    names: dict = {}
    exec(next(b for b in blocks if "openai" in b).replace("http://127.0.0.1:8000", served.url), names)
    assert names["answer"].budget["source"] == "budget"
    assert names["answer"].choices[0].message.content.strip() in capsys.readouterr().out

"""Clients that people have, each against `sbtiny serve` on a run and on a GGUF file: thoughts, answer, usage and budget arrive.

Those that are not installed are skipped: pip install llm litellm.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from serve_support import Command

from sbtiny.tasks import arithmetic

LONG = next(q.question for q in arithmetic.generate_questions("val", 99) if q.level >= 4)
MESSAGES = [{"role": "user", "content": LONG}]
FLAGS = ["--slots", "2", "--budget", "20", "--set", "serve.temperature=0", "--set", "serve.reserve=60"]


@pytest.fixture(scope="module", params=["thinker", "thinker_gguf"])
def command(request: pytest.FixtureRequest) -> Iterator[Command]:
    command = Command(str(request.getfixturevalue(request.param)), *FLAGS)
    yield command
    assert command.leave(signal.SIGTERM) == 0


@pytest.fixture(scope="module")
def said(command: Command) -> dict[str, Any]:
    """The answer as it is on the wire, which every client must show."""
    return json.loads(post(command, {"messages": MESSAGES}))


def post(command: Command, body: dict[str, Any]) -> str:
    """Ask with curl."""
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    words = ["curl", "-sSN", f"{command.url}/v1/chat/completions", "-H", "Content-Type: application/json", "-d", json.dumps(body)]
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout


def test_curl(command: Command, said: dict[str, Any]) -> None:
    (choice,) = said["choices"]
    assert "Time is up" in choice["message"]["reasoning"]
    assert choice["message"]["content"]
    assert choice["stop_reason"] == "ceiling"
    assert (said["budget"]["source"], said["budget"]["requested"], said["budget"]["allowed"]) == ("server", "20", 22)
    assert isinstance(said["budget"]["allowed"], int)
    events = post(command, {"messages": MESSAGES, "stream": True, "stream_options": {"include_usage": True}}).split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2] if not event.startswith(":")]
    assert chunks[0]["budget"]["allowed"] == 22
    for name in ("content", "reasoning", "reasoning_content"):
        assert "".join(c["choices"][0]["delta"].get(name, "") for c in chunks[:-1]) == choice["message"][name]
    assert chunks[-1]["usage"] == said["usage"]


def test_openai_python(command: Command, said: dict[str, Any]) -> None:
    client = openai.OpenAI(base_url=f"{command.url}/v1", api_key="none", max_retries=0)
    asked = {"model": "thinker", "messages": MESSAGES, "extra_body": {"budget": 20}}
    answer, expected = client.chat.completions.create(**asked), said["choices"][0]["message"]
    message = answer.choices[0].message
    assert (message.content, message.reasoning_content) == (expected["content"], expected["reasoning"])
    assert answer.usage.model_dump(exclude_none=True) == said["usage"]
    assert (answer.budget["source"], answer.budget["allowed"]) == ("budget", 22)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(getattr(c.choices[0].delta, "reasoning_content", "") for c in chunks if c.choices) == expected["reasoning"]
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == expected["content"]
    assert chunks[-1].usage.completion_tokens_details.reasoning_tokens == answer.usage.completion_tokens_details.reasoning_tokens > 0
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.001).chat.completions.create(**asked)


@pytest.mark.parametrize("flags", [[], ["--no-stream"]], ids=["stream", "whole"])
def test_llm(command: Command, said: dict[str, Any], flags: list[str], tmp_path: Path) -> None:
    """It shows no thoughts of such models (0.36), but counts them. Of our budgets it can send an effort."""
    pytest.importorskip("llm", reason="pip install llm")
    model = {"model_id": "mine", "model_name": "thinker", "api_base": f"{command.url}/v1", "reasoning": True}
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([model]))

    def run(*words: str) -> str:
        environment = os.environ | {"LLM_USER_PATH": str(tmp_path), "LLM_LOAD_PLUGINS": ""}
        done = subprocess.run([sys.executable, "-m", "llm", *words], capture_output=True, text=True, env=environment, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def last() -> dict[str, Any]:
        return json.loads(run("logs", "-n", "1", "--json"))[0]

    message, usage = said["choices"][0]["message"], said["usage"]
    assert run("-m", "mine", LONG, *flags).strip() == message["content"].strip()
    logged = last()
    assert (logged["input_tokens"], logged["output_tokens"]) == (usage["prompt_tokens"], usage["completion_tokens"])
    assert json.loads(logged["token_details"]) == {"completion_tokens_details": usage["completion_tokens_details"]}
    if flags:  # from a stream it keeps OpenAI's fields alone
        assert logged["response_json"]["budget"]["allowed"] == 22
        assert logged["response_json"]["choices"][0]["message"]["reasoning_content"] == message["reasoning"]
    assert run("-m", "mine", LONG, *flags, "-o", "reasoning_effort", "none").strip()
    assert last()["output_tokens"] < usage["completion_tokens"]


def test_litellm(command: Command, said: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What aider and many others ask through."""
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # it would fetch a table of prices
    litellm = pytest.importorskip("litellm", reason="pip install litellm")
    asked = {"model": "openai/thinker", "api_base": f"{command.url}/v1", "api_key": "none", "messages": MESSAGES}
    answer, expected = litellm.completion(**asked, extra_body={"budget": 20}), said["choices"][0]["message"]
    message = answer.choices[0].message
    assert (message.content, message.reasoning_content) == (expected["content"], expected["reasoning"])
    assert answer.usage.completion_tokens_details.reasoning_tokens == said["usage"]["completion_tokens_details"]["reasoning_tokens"]
    assert (answer.budget["source"], answer.budget["allowed"], answer.choices[0].finish_reason) == ("budget", 22, "stop")
    chunks = list(litellm.completion(**asked, stream=True, stream_options={"include_usage": True}, extra_body={"budget": 20}))
    assert "".join(getattr(c.choices[0].delta, "reasoning_content", "") or "" for c in chunks if c.choices) == expected["reasoning"]
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == expected["content"]
    assert chunks[0].budget["allowed"] == 22
    assert chunks[-1].usage.completion_tokens_details.reasoning_tokens == answer.usage.completion_tokens_details.reasoning_tokens
    least = litellm.completion(**asked, reasoning_effort="none", allowed_openai_params=["reasoning_effort"])
    assert (least.budget["source"], least.budget["allowed"]) == ("reasoning_effort", 1)
    with pytest.raises(litellm.BadRequestError, match="did you mean thinking_budget_tokens"):
        litellm.completion(**asked, extra_body={"max_thinking_tokens": 20})

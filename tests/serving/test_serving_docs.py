"""docs/serving.md says what the server does: routes, fields, defaults, refusals."""

import re
from dataclasses import asdict
from pathlib import Path
from typing import get_args

import pytest
import yaml
from serve_support import Served, text_of
from test_requests import USER
from test_server import FIELDS, SHORT

from sbtiny.config import ServeSettings
from sbtiny.rollout.memory import SPARE_SHARE
from sbtiny.serving import answers, decoder, job, queue, server
from sbtiny.serving.answer_limits import LEAST_ANSWER
from sbtiny.serving.ask import Ask, default_ask
from sbtiny.serving.budget_dialects import EFFORTS
from sbtiny.serving.guard import MOST_BYTES
from sbtiny.serving.requests import REFUSED, read_chat

TEXT = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
LINE = " ".join(TEXT.split())
SETTINGS = ServeSettings()


def names_of(text: str) -> set[str]:
    return set(re.findall(r"`([^`]+)`", text))


def section(title: str) -> str:
    return TEXT.split(f"## {title}\n")[1].split("\n## ")[0]


def test_the_routes_are_those_of_the_server(plain: Served) -> None:
    table = TEXT.split("| route | |")[1].split("\n\n")[0]
    said = set(re.findall(r"`(?:GET |POST )?(/[^` ]*)`", table))
    assert said == {route.path for route in plain.app.routes if "POST" in route.methods or route.path in plain.app.openapi()["paths"]}
    assert {"reasoning_end", "stop", "extend"} <= names_of(table)


def test_the_defaults_of_a_request_are_those_said() -> None:
    asked = read_chat({"messages": USER}, default_ask(SETTINGS))
    ask = asdict(asked.ask)
    for name in ("temperature", "top_p", "top_k", "min_p"):
        said = re.search(rf"`{name}` \(([0-9.]+)", LINE)
        assert said, name
        assert float(said[1]) == ask[name], name
    assert f"`max_completion_tokens` ({ask['max_tokens']} at most" in LINE
    assert "`stream` (false)" in LINE
    assert "`.continuous_usage_stats` (false)" in LINE
    assert (asked.stream, asked.include_usage, asked.continuous_usage, asked.priority, asked.stop) == (False, False, False, 0, ())
    assert "`priority` (0; lower goes first)" in LINE
    assert "`seed` (any; so is -1)" in LINE
    assert not asked.seeded
    assert read_chat({"messages": USER, "model": "of any name"}, Ask()).ask == Ask()


def test_what_is_refused_by_name_is_what_is_said() -> None:
    said = names_of(LINE.split("Refused by name: ")[1].split(". ")[0].rstrip("."))
    assert said <= REFUSED.keys()
    unsaid = {"best_of", "top_logprobs", "prompt_logprobs", "tool_choice", "functions", "suffix", "echo"}  # relatives and old ones
    assert REFUSED.keys() - said == unsaid | {"presence_penalty", "frequency_penalty"}
    assert "penalties" in LINE


def test_the_efforts_are_the_factors_said() -> None:
    row = next(line for line in TEXT.splitlines() if line.startswith("| `reasoning_effort`"))
    said = {name: float(factor) for name, factor in re.findall(r"`(\w+)` ([0-9.]+)", row)}
    assert said | {"none": 0.0} == EFFORTS
    assert "`none`: the least there is" in row


def test_the_figures_of_limits_and_queue_are_those_of_the_code() -> None:
    assert f"waiting requests ({SETTINGS.queue})" in LINE
    assert (SPARE_SHARE, "a fifth of it at least" in LINE) == (0.2, True)
    assert queue.SERVICES_TO_AGE == 50
    assert "in fifty mean services" in LINE
    assert MOST_BYTES == 1_000_000
    assert "bounded (1 MB)" in LINE
    assert (LEAST_ANSWER, "at eight tokens if that is less" in LINE) == (8, True)
    assert f"`serve.grace` ({SETTINGS.grace:g} seconds)" in LINE
    assert (decoder.TICK, server.PING_SECONDS) == (1.0, 5)


def test_the_fields_of_an_answer_are_those_said(served: Served) -> None:
    table = section("What an answer says")
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")][1:]
    assert set().union(*(names_of(cell) for cell in rows)) == FIELDS
    assert set(get_args(job.ServeStop)) <= names_of(table)
    answer = served.chat(SHORT).json()
    for name in ("usage", "timings", "metrics", "budget"):
        assert f"`{name}`" in table
        assert name in answer
    assert set(answer["metrics"]) <= names_of(table)
    update = job.Update(position=3, eta=12.0)
    assert answers.encode_queued(update).decode().strip() in names_of(TEXT)


@pytest.mark.parametrize("asked", [*re.findall(r"extra_body=(\{.*?\})", TEXT), '{"reasoning_effort": "low"}'])
def test_the_budgets_of_the_clients_are_read(asked: str, served: Served) -> None:
    body = yaml.safe_load(asked)
    assert served.chat(SHORT, **body).json()["budget"]["source"] in body


def test_the_files_of_the_clients_name_what_is_served(served: Served) -> None:
    files = [yaml.safe_load(block)[0] for block in re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)]
    assert [file["api_base"] for file in files if "api_base" in file] == ["http://127.0.0.1:8000/v1"]
    (sent,) = (file["extra_params"]["extra_body"] for file in files if "extra_params" in file)
    chunks = served.stream(SHORT, **sent).all()
    assert text_of(chunks)
    assert chunks[0]["budget"]["requested"] == sent["budget"]

"""The lines of an exported README, read from it and run: llama-server (in PATH or SBTINY_LLAMA_SERVER), transformers, vLLM."""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from support import easy_questions
from torch.nn import functional
from upstream_support import VLLM_ON_A_CPU, VLLM_SERVE

from sbtiny.budget.protocol import THINK, parse
from sbtiny.cli.main import app
from sbtiny.coldstart.run import run_sft
from sbtiny.coldstart.sample_correct import make_row
from sbtiny.coldstart.trainer import UNTRAINED_COSINE, UNTRAINED_NEIGHBOURS
from sbtiny.config import DataSettings, Settings, SftSettings
from sbtiny.models.load import load_model
from sbtiny.rollout.load_policy import build_policy

LLAMA_SERVER = os.environ.get("SBTINY_LLAMA_SERVER") or shutil.which("llama-server")
QUESTION = "Leo has 32 nuts.\na) wins 8\nb) loses 5\nHow many nuts?"
MESSAGES = [{"role": "user", "content": QUESTION}]
SMALL = ("-t", "1", "-np", "1", "-c", "1024")  # of llama-server
needs_llama_server = pytest.mark.skipif(not LLAMA_SERVER, reason="no llama-server in PATH or in SBTINY_LLAMA_SERVER")
pytestmark = pytest.mark.slow


def train_thinking(folder: Path, as_tokens: bool) -> Path:
    """A cold start in the other format, which repeats its answer as thoughts.

    Its tags are tokens of their own, as in R1's tokenizer, or several. The bundled model's `<` is made learnable for them.
    """
    model, tokenizer = load_model("tiny")
    torch.manual_seed(0)
    if as_tokens:
        tokenizer.add_tokens(["<think>", "</think>"])
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    weights = model.get_input_embeddings().weight.data
    alike = functional.normalize(weights, dim=1)
    for token in {token for tag in ("<think>", "</think>") for token in tokenizer.encode(tag, add_special_tokens=False)}:
        if as_tokens or int((alike @ alike[token] > UNTRAINED_COSINE).sum()) > UNTRAINED_NEIGHBOURS:
            weights[token] = torch.randn(weights.shape[1]) * 2 / weights.shape[1] ** 0.5
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    policy = build_policy(model, tokenizer, slots=2, form=THINK)
    rows = [make_row(policy, q, f"<think>{' '.join([q.answer] * 8)}</think>\\boxed{{{q.answer}}}") for q in easy_questions(64)]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sft = SftSettings(rows=str(data), steps=150, learning_rate=3e-3)
    return run_sft(Settings(model=str(folder / "base"), format="think", sft=sft, data=DataSettings(max_num_seqs=8)), folder / "sft")


@pytest.fixture(scope="module")
def solution_export(started: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(started, tmp_path_factory.mktemp("solution") / "out")


@pytest.fixture(scope="module", params=[False, True], ids=["tags of letters", "tags as tokens"])
def think_export(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("thoughts")
    return export(train_thinking(folder, request.param), folder / "out")


def export(run: Path, folder: Path) -> Path:
    app(["export", str(run), "--gguf", "q8_0", "--no-check", "--dtype", "float32", "-o", str(folder)], standalone_mode=False)
    return folder


def lines_of(folder: Path, program: str) -> str:
    """The lines of code below a program's heading in the README of an export."""
    section = re.search(rf"^## [^\n]*{program}.*?\n(.*?)(?=^## |\Z)", (folder / "README.md").read_text(), re.MULTILINE | re.DOTALL)[1]
    return "".join(line[4:] for line in section.splitlines(keepends=True) if line.startswith("    "))


def commands_of(folder: Path, program: str) -> list[list[str]]:
    return [shlex.split(line, comments=True) for line in lines_of(folder, program).replace("\\\n", " ").splitlines()]


@contextmanager
def serving(folder: Path, command: list[str], log: Path) -> Iterator[httpx.Client]:
    """Run a server's command in the exported folder, on a free port, until the block ends."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with log.open("w") as out:
        server = subprocess.Popen([*command, "--port", str(port)], cwd=folder, stdout=out, stderr=subprocess.STDOUT)
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=300, trust_env=False)
    try:
        while not is_healthy(client):
            assert server.poll() is None, log.read_text()[-2000:]
            time.sleep(0.1)
        yield client
    finally:
        client.close()
        server.terminate()
        server.wait(60)


def is_healthy(client: httpx.Client) -> bool:
    try:
        return client.get("/health").status_code == 200
    except httpx.TransportError:
        return False


def ask(client: httpx.Client, **more: Any) -> dict[str, Any]:
    """The greedy answer of a server, which ended by itself: reasoning, content and the tokens of its prompt and completion."""
    body = {"messages": MESSAGES, "temperature": 0, "max_tokens": 200} | more
    found = client.post("/v1/chat/completions", json=body).raise_for_status().json()
    choice, message = found["choices"][0], found["choices"][0]["message"]
    assert choice["finish_reason"] == "stop", found
    thoughts = message.get("reasoning_content") or message.get("reasoning") or ""
    return {"thoughts": thoughts, "content": message["content"] or "", **found["usage"]}


def run_curl(command: list[str], client: httpx.Client) -> dict[str, Any]:
    """The answer to a curl command of the README, with the question in the place of its dots."""
    asked = json.dumps(QUESTION)[1:-1]
    words = [word.replace("http://localhost:8080", str(client.base_url)).replace('"..."', f'"{asked}"') for word in command]
    done = subprocess.run([*words, "--silent", "--show-error", "--noproxy", "*"], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@needs_llama_server
def test_the_lines_for_llama_cpp_run(solution_export: Path, tmp_path: Path) -> None:
    cli, server, curl = commands_of(solution_export, "llama.cpp")
    assert (cli[0], server[0], curl[0]) == ("llama-cli", "llama-server", "curl")
    assert cli[1:] == server[1:]  # options of one parser, so that the line of the program which is not here is tried with it
    with serving(solution_export, [LLAMA_SERVER, *server[1:], *SMALL], tmp_path / "log") as client:
        stated, given = ask(client), ask(client, chat_template_kwargs={"budget": 200})
        assert parse(stated["content"]).ok
        assert given["content"] == parse(stated["content"]).body + "</solution>"
        assert given["prompt_tokens"] > stated["prompt_tokens"]
        answer = run_curl(curl, client)
        assert answer["choices"][0]["finish_reason"] == "stop"
        assert answer["usage"]["prompt_tokens"] == given["prompt_tokens"]
        assert ask(client, thinking_budget_tokens=2)["content"] == stated["content"]  # there are no thoughts in this format


@needs_llama_server
@pytest.mark.parametrize("parser", ["auto", "deepseek"])
def test_llama_server_splits_thoughts_from_the_answer_and_cuts_them(think_export: Path, tmp_path: Path, parser: str) -> None:
    _, server, _ = commands_of(think_export, "llama.cpp")
    assert '"thinking_budget_tokens": 100' in (think_export / "README.md").read_text()
    command = [LLAMA_SERVER, *server[1:], *SMALL, "--reasoning-format", parser]
    with serving(think_export, command, tmp_path / "log") as client:
        whole = ask(client, reasoning_format="none")
        assert parse(whole["content"]).ok
        stated, given = ask(client), ask(client, chat_template_kwargs={"budget": 200})
        number, thoughts = parse(whole["content"]).budget, parse(whole["content"]).body
        assert (stated["thoughts"], stated["content"]) == (f"{number}</budget><think>{thoughts}", parse(whole["content"]).answer)
        assert given["thoughts"].startswith("200</budget><think>")
        assert re.fullmatch(r"\\boxed\{\d+\}", given["content"])
        cut = ask(client, thinking_budget_tokens=14)
        assert stated["thoughts"].startswith(cut["thoughts"].rstrip())
        assert "<think>" in cut["thoughts"]
        assert cut["completion_tokens"] < stated["completion_tokens"]
        assert re.search(r"\\boxed\{\d+\}$", cut["content"])  # a model that learnt no cuts may write a bit of the tag first


def test_the_lines_for_transformers_run(solution_export: Path) -> None:
    code = lines_of(solution_export, "transformers").replace('"..."', repr(QUESTION))
    for budget in (", budget=200", ""):
        done = subprocess.run(
            [sys.executable, "-c", code.replace(", budget=200", budget)], cwd=solution_export, capture_output=True, text=True, check=True
        )
        prompt, _, answer = done.stdout.partition("<|im_start|>assistant\n")
        assert QUESTION in prompt
        assert answer.startswith("<budget>200</budget>" if budget else "<budget>")
        assert answer.endswith("<|im_end|>\n")  # it ended by itself
        assert "\\boxed{" in answer


@pytest.mark.vllm
@pytest.mark.skipif(not find_spec("vllm"), reason="no vllm: make test-vllm")
def test_the_lines_for_vllm_run(solution_export: Path, tmp_path: Path) -> None:
    server, _ = commands_of(solution_export, "vLLM")
    assert server[:2] == ["vllm", "serve"]
    with serving(solution_export, [*VLLM_SERVE, *server[2:], *VLLM_ON_A_CPU], tmp_path / "log") as client:
        stated, given = ask(client), ask(client, chat_template_kwargs={"budget": 200})
        assert parse(stated["content"]).ok
        assert given["content"] == parse(stated["content"]).body + "</solution>"


@pytest.mark.vllm
@pytest.mark.skipif(not find_spec("vllm"), reason="no vllm: make test-vllm")
def test_vllm_splits_thoughts_from_the_answer_and_cuts_them(tmp_path: Path) -> None:
    folder = export(train_thinking(tmp_path, as_tokens=True), tmp_path / "out")
    server, _ = commands_of(folder, "vLLM")
    assert server[:3] == ["vllm", "serve", "merged"]
    assert "--reasoning-parser" in server
    with serving(folder, [*VLLM_SERVE, *server[2:], *VLLM_ON_A_CPU], tmp_path / "log") as client:
        stated, given = ask(client), ask(client, chat_template_kwargs={"budget": 200})
        for found in (stated, given):
            assert re.fullmatch(r"[\d ]+", found["thoughts"])
            assert re.fullmatch(r"\\boxed\{\d+\}", found["content"])
        cut = ask(client, thinking_token_budget=4)
        assert len(cut["thoughts"]) < len(stated["thoughts"])
        assert re.search(r"\\boxed\{\d+\}$", cut["content"])

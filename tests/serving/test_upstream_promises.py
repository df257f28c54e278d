"""Budgets, their use and the promise: the same questions through our loop, llama-server and vLLM."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from upstream_support import LlamaServer, ServerProcess, VllmServer, press_at

import sbtiny
from sbtiny.cli.main import app
from sbtiny.config import EvalSettings, ServeSettings, Settings
from sbtiny.evaluation.calibrate import run_calibration
from sbtiny.serving.ask import Answer
from sbtiny.serving.assistant import Assistant
from sbtiny.tasks import arithmetic

pytestmark = pytest.mark.slow
COVERAGE = 0.3  # about half of the answers of a cold start of seconds are malformed
ASKS: list[dict[str, Any]] = [
    {},
    {"coverage": COVERAGE},
    {"budget": 20},
    {"budget": 2},
    {"budget": "2x"},
    {},
]  # the last one is asked for its answer
PARTS = ("ratios", "median_stated", "cut", "malformed", "factors", "promises", "confidence")


@pytest.fixture(scope="module")
def run(started: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an export of float32, as merged weights and as a GGUF file."""
    pytest.importorskip("gguf")
    run = Path(shutil.copytree(started, tmp_path_factory.mktemp("promises") / "run"))
    app(["export", str(run), "--gguf", "f32", "--no-check", "--dtype", "float32", "-o", str(run / "export")], standalone_mode=False)
    return run


@pytest.fixture(params=["llama-server", pytest.param("vllm", marks=pytest.mark.vllm)])
def server(request: pytest.FixtureRequest, run: Path) -> Iterator[ServerProcess]:
    folder = run / "export"
    server = LlamaServer(next(folder.glob("*.gguf"))) if request.param == "llama-server" else VllmServer(folder / "merged")
    yield server
    server.close()


def settings_for(upstream: str | None, questions: int = 200) -> Settings:
    asked = EvalSettings(limit=questions, split="val", temperature=0, max_num_seqs=8)
    serve = ServeSettings(temperature=0, top_p=asked.top_p, max_num_seqs=8, coverage=COVERAGE, context=1024)
    return Settings(four_bit=False, upstream=upstream, eval=asked, serve=serve)


def ask_each(assistant: Assistant, count: int) -> list[Answer]:
    """Answers to questions of the test split, all at once, each with the budget of its kind."""
    replies = []
    for i, q in enumerate(arithmetic.generate_questions("test", count)):
        replies.append(assistant.stream(q.question, **ASKS[i % len(ASKS)]))
        if i % len(ASKS) == len(ASKS) - 1:
            replies[-1].body.append = press_at(replies[-1].body, 2 + i % 9)
    return [reply.wait() for reply in replies]


def tell(answer: Answer) -> dict[str, Any]:
    """What a client is told of its budget, and whether the promise was kept."""
    keys = ("stated", "given", "source", "allowed", "used", "stop_reason", "promise", "coverage", "text")
    return {key: getattr(answer, key) for key in keys} | {"kept": answer.promise and answer.used <= answer.promise}


def test_promises_and_how_they_are_kept_are_those_of_our_own_loop(run: Path, server: ServerProcess) -> None:
    settings, theirs = settings_for(None), settings_for(server.url)
    records = [run_calibration(str(run), each, confidence=0.95) for each in (settings, theirs)]
    assert {key: records[1][key] for key in PARTS} == {key: records[0][key] for key in PARTS}
    expected, found = ([tell(a) for a in ask_each(sbtiny.load(str(run), settings=each), 200)] for each in (settings, theirs))
    others = [pair for pair in zip(expected, found, strict=True) if pair[0] != pair[1]]
    assert len(others) <= 2, others  # where two tokens are as likely, sums in another order decide
    assert {told["kept"] for told in expected} == {True, False, None}
    assert {told["stop_reason"] for told in expected} >= {"end", "ceiling", "interrupted"}

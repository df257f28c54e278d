"""Servers that several test files ask, and models that think."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from serve_support import SLOTS, Served, load_thinking, load_tiny
from support import skip_without_llama_cpp, write_gguf

import sbtiny
from sbtiny.budget.protocol import THINK
from sbtiny.config import DataSettings, ServeSettings, Settings, SftSettings
from sbtiny.models.aliases import BUNDLED
from sbtiny.serving.heads_first import HEAD_ROWS


@pytest.fixture(scope="session")
def served(started) -> Iterator[Served]:
    """Of a run that states a budget and answers with a bare box, greedy."""
    settings = Settings(four_bit=False, serve=ServeSettings(temperature=0.0, max_num_seqs=SLOTS + HEAD_ROWS))
    server = Served(lambda: sbtiny.load(str(started), settings=settings)).wait_ready()
    yield server
    server.close()


@pytest.fixture(scope="session")
def plain() -> Iterator[Served]:
    server = Served(load_tiny()).wait_ready()
    yield server
    server.close()


@pytest.fixture(scope="session")
def thinking() -> Iterator[Served]:
    server = Served(load_thinking()).wait_ready()
    yield server
    server.close()


@pytest.fixture(scope="session")
def thinker(started: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step whose format is `think`: what it writes under a given budget is thoughts until it is cut.

    The bundled model has never met `<`, so no cold start teaches it these tags.
    """
    from sbtiny.coldstart.run import run_sft

    folder = tmp_path_factory.mktemp("thinks") / "thinker"
    run_sft(Settings(sft=SftSettings(rows=str(started.parent / "terse.jsonl"), steps=1), data=DataSettings(max_num_seqs=8)), folder)
    about = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(about | {"format": "think"}))
    return folder


@pytest.fixture(scope="session")
def thinker_gguf(thinker: Path) -> Path:
    """The run `thinker` as a GGUF file; skips where llama.cpp is not installed."""
    skip_without_llama_cpp()
    return write_gguf(BUNDLED, "f32", thinker.parent / "thinker.gguf", thinker / "adapter", THINK)

"""Our server, its queue and its promises before llama-servers that decode elsewhere."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from serve_support import Served, text_of, wait_for
from support import write_gguf
from upstream_support import LlamaServer

import sbtiny
from sbtiny.config import EvalSettings, ServeSettings, Settings
from sbtiny.errors import InputError
from sbtiny.evaluation.calibrate import run_calibration
from sbtiny.evaluation.calibration_file import load_calibration
from sbtiny.models.aliases import BUNDLED
from sbtiny.rollout.load_policy import load_policy
from sbtiny.serving.heads_first import HEAD_ROWS
from sbtiny.tasks import arithmetic

QUESTIONS = [q.question for q in arithmetic.generate_questions("val", 200) if q.level <= 2][:32]


@pytest.fixture(scope="module")
def exported(started: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("gguf")
    return write_gguf(BUNDLED, "f32", tmp_path_factory.mktemp("gguf") / "started.gguf", started / "adapter")


@pytest.fixture
def pair(exported: Path) -> Iterator[list[LlamaServer]]:
    servers = [LlamaServer(exported, slots) for slots in (8, 20)]
    yield servers
    for server in servers:
        server.close()


def settings_for(servers: list[LlamaServer], slots: int = 28) -> Settings:
    serve = ServeSettings(temperature=0.0, max_num_seqs=slots + HEAD_ROWS)
    return Settings(four_bit=False, upstream=",".join(server.url for server in servers), serve=serve)


def ask_all(served: Served, on_text: Any = lambda: None) -> list[list[dict[str, Any]]]:
    """The chunks of an answer to each question, all asked at once."""
    answers: list[list[dict[str, Any]]] = [[] for _ in QUESTIONS]

    def read(i: int) -> None:
        stream = served.stream(QUESTIONS[i])
        for chunk in stream.chunks:
            answers[i].append(chunk)
            on_text()
        assert stream.is_done
        stream.close()

    threads = [threading.Thread(target=read, args=(i,)) for i in range(len(QUESTIONS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    return answers


def test_no_client_hangs_where_an_upstream_is_killed_among_32_streams(started: Path, pair: list[LlamaServer]) -> None:
    served = Served(lambda: sbtiny.load(str(started), settings=settings_for(pair))).wait_ready()
    whole = ask_all(served)
    assert all(chunks[-1]["choices"][0]["stop_reason"] == "end" for chunks in whole)
    assert sum(chunks[-1]["budget"]["predicted"] is not None for chunks in whole) > 24
    again = ask_all(served, pair[0].process.kill)  # at the first text
    assert [text_of(chunks) for chunks in again] == [text_of(chunks) for chunks in whole]
    assert all(chunks[-1]["choices"][0]["stop_reason"] == "end" for chunks in again)
    pair[1].process.kill()
    pair[1].process.wait()
    refused = served.chat("1 + 1?")
    assert refused.status_code == 502
    assert refused.json()["error"]["type"] == "server_error"
    assert refused.json()["error"]["code"] == "upstream_failed"
    assert " has failed in an answer" in refused.json()["error"]["message"]
    assert served.client.get("/health").status_code == 200  # it serves again when they are back
    wait_for(lambda: served.client.get("/slots").json() == [])
    served.close()


def test_a_calibration_is_that_of_the_upstream_and_another_is_refused_by_name(
    started: Path, pair: list[LlamaServer], exported: Path, tmp_path: Path
) -> None:
    file = tmp_path / "mine.gguf"
    file.write_bytes(exported.read_bytes())
    settings = replace(settings_for(pair[:1]), eval=EvalSettings(limit=120, split="val", max_num_seqs=8))
    record = run_calibration(str(file), settings, None)
    assert record["model_fingerprint"].endswith("@started.gguf")
    assert not (tmp_path / "mine.calibration.json").exists()  # that is of the file itself
    policy = load_policy(str(file), settings, 4)
    assert load_calibration(policy, str(file)).questions == 120
    assistant = sbtiny.load(str(file), settings=replace(settings, serve=ServeSettings()))
    assert assistant.calibration is not None
    assert assistant.policy.engine.foretell == assistant.calibration.remaining
    policy.engine.upstreams[0].dialect.model = "other.gguf"
    with pytest.raises(InputError, match=r"mine\.upstream\.calibration\.json: the calibration is of another model .*@other\.gguf"):
        load_calibration(policy, str(file))


def test_a_budget_in_seconds_goes_by_the_rate_of_the_upstream(started: Path, pair: list[LlamaServer]) -> None:
    assistant = sbtiny.load(str(started), settings=settings_for(pair[1:], slots=4))
    answer = assistant.ask("1 + 1?", seconds=60.0)
    assert answer.source == "seconds"
    assert answer.given > 60  # more than a token a second, as slow as the machine may be
    pair[1].close()
    assistant.rate = type(assistant.rate)()
    with pytest.raises(InputError, match="has failed"):
        assistant.ask("1 + 1?", seconds=0.5)

"""A calibrated server learns from its own answers whether promises are kept, and promises by what it has learned."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from serve_support import SLOTS, Served, slow_down, wait_for

import sbtiny
from sbtiny import runs
from sbtiny.budget.calibration import CalibrationAnswer, calibrate
from sbtiny.budget.calibration_record import to_record
from sbtiny.budget.online_calibration import STEP, OnlineCalibration
from sbtiny.config import ServeSettings, Settings
from sbtiny.evaluation.calibration_file import NAME, answering_fingerprint
from sbtiny.rollout.session import Ticket
from sbtiny.serving import decoder
from sbtiny.serving.decoder import Decoder
from sbtiny.serving.heads_first import HEAD_ROWS
from sbtiny.tasks import arithmetic

SHORT = next(q.question for q in arithmetic.generate_questions("val", 99) if q.level <= 2)
CONTROL = "/v1/chat/completions/control"
SETTINGS = Settings(four_bit=False, serve=ServeSettings(temperature=0.0, max_num_seqs=SLOTS + HEAD_ROWS))
COVERAGES = (0.8, 0.9, 0.95)
ANSWERS = [CalibrationAnswer(100, n) for n in range(1, 131)]  # a promise at 90 % is 1.18 times what is stated


@pytest.fixture(scope="module")
def run(started: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a calibration beside it."""
    run = tmp_path_factory.mktemp("calibrated") / "run"
    shutil.copytree(started, run)
    policy = sbtiny.load(str(run), settings=SETTINGS).policy
    about = {"task": "arithmetic", "split": "val", "date": "today", "temperature": 0.0, "top_p": 0.95, "format": policy.form.name}
    calibration = calibrate(ANSWERS, model_fingerprint=answering_fingerprint(policy, str(run)), **about)
    runs.write_json(run / NAME, to_record(calibration))
    return run


@pytest.fixture(scope="module")
def server(run: Path) -> Iterator[Served]:
    served = Served(lambda: sbtiny.load(str(run), settings=SETTINGS)).wait_ready()
    yield served
    served.close()


@pytest.fixture
def calibrated(server: Served) -> Served:
    """The server as if nothing had been asked of it yet."""
    decoder = server.worker.decoder
    decoder.assistant.online, decoder.promises = OnlineCalibration(decoder.assistant.calibration), {}
    return server


def levels(served: Served) -> dict[float, float]:
    return dict(served.worker.decoder.assistant.online.miss_levels)


def moved(kept: bool, times: int = 1) -> dict[float, Any]:
    return {c: pytest.approx(1 - c + times * STEP * (1 - c - (not kept))) for c in COVERAGES}


def write_answer(monkeypatch: pytest.MonkeyPatch, served: Served, length: int, stated: int = 10, after: str = "") -> None:
    """Let every answer have this budget, where none is given, and so many body tokens; then it ends, or the text `after` comes."""
    policy, append = served.worker.decoder.assistant.policy, Ticket.append
    head, end = policy.encode(f"<budget>{stated}</budget><solution>"), [policy.tokenizer.eos_token_id]
    body = [*policy.encode("7") * length, *policy.encode("</solution>"), *(policy.encode(after) if after else []), *end]

    def append_scripted(ticket: Ticket, token: int, logprob: float | None, stops: Any) -> Any:
        script = body if ticket.request.has_given_budget else head + body
        is_cut = ticket.enforcer is not None and any(ticket.enforcer.injected)
        scripted = len(ticket.written) < len(script) and not is_cut
        return append(ticket, script[len(ticket.written)] if scripted else token, logprob, stops)

    monkeypatch.setattr(Ticket, "append", append_scripted)


def metric(served: Served, name: str) -> float:
    return float(next(line.split()[-1] for line in served.client.get("/metrics").text.splitlines() if line.startswith(name)))


# ---- what it learns --------------------------------------------------------------------------------------------------------------------


def test_missed_promises_make_later_ones_wider_and_the_file_stays(calibrated: Served, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (run / NAME).read_bytes()
    write_answer(monkeypatch, calibrated, 14)
    first = calibrated.chat(SHORT).json()
    assert (first["choices"][0]["stop_reason"], first["budget"]["used"], first["budget"]["promise"]) == ("end", 14, 12)
    assert levels(calibrated) == moved(kept=False)
    for _ in range(5):
        later = calibrated.chat(SHORT).json()["budget"]
    assert levels(calibrated)[0.9] == moved(kept=False, times=6)[0.9]
    assert later["promise"] == 13
    assert later["coverage"] == 0.9
    assert metric(calibrated, 'sbtiny_promise_kept_share{coverage="0.9"}') == 0
    assert metric(calibrated, 'sbtiny_promise_level{coverage="0.9"}') == pytest.approx(0.9 + 6 * STEP * 0.9)
    assert (run / NAME).read_bytes() == before


def test_kept_promises_make_later_ones_narrower(calibrated: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    write_answer(monkeypatch, calibrated, 3)
    first = calibrated.chat(SHORT).json()["budget"]["promise"]
    assert levels(calibrated) == moved(kept=True)
    for _ in range(60):
        last = calibrated.chat(SHORT).json()["budget"]["promise"]
    assert last < first
    assert metric(calibrated, 'sbtiny_promise_kept_share{coverage="0.9"}') == 1
    assert metric(calibrated, 'sbtiny_promise_level{coverage="0.8"}') == pytest.approx(0.8 - 61 * STEP * 0.2)


def test_an_answer_cut_by_its_own_overrun_has_missed(calibrated: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    write_answer(monkeypatch, calibrated, 40)
    answer = calibrated.chat(SHORT).json()
    assert (answer["choices"][0]["stop_reason"], answer["budget"]["allowed"], answer["budget"]["forced"]) == ("ceiling", 15, True)
    assert levels(calibrated) == moved(kept=False)
    assert list(calibrated.worker.decoder.assistant.online.window)[-1] == float("inf")


def test_a_malformed_answer_has_missed(calibrated: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    write_answer(monkeypatch, calibrated, 3, after="7")
    answer = calibrated.chat(SHORT).json()
    assert answer["choices"][0]["stop_reason"] == "end"
    assert levels(calibrated) == moved(kept=False)


@pytest.mark.parametrize(("body", "kept", "reason"), [(40, False, "ceiling"), (3, True, "end")])
def test_an_answer_at_a_coverage_tells_about_that_one_alone(
    calibrated: Served, monkeypatch: pytest.MonkeyPatch, body: int, kept: bool, reason: str
) -> None:
    write_answer(monkeypatch, calibrated, body)
    window = list(calibrated.worker.decoder.assistant.online.window)
    for coverage in (0.8, 0.5):
        answer = calibrated.chat(SHORT, budget={"coverage": coverage}).json()
        assert (answer["choices"][0]["stop_reason"], answer["budget"]["coverage"]) == (reason, coverage)
        assert answer["budget"]["allowed"] == answer["budget"]["promise"]
    own = {0.8: 0.2 + STEP * (0.2 - (not kept)), 0.5: 0.5 + STEP * (0.5 - (not kept)), 0.9: 0.1, 0.95: 0.05}
    assert levels(calibrated) == {c: pytest.approx(level) for c, level in own.items()}
    assert list(calibrated.worker.decoder.assistant.online.window) == window


# ---- what tells nothing ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "body", "reason"),
    [
        (40, {"budget": 20}, "ceiling"),
        (3, {"budget": 20}, "end"),
        (3, {"budget": "2x"}, "end"),
        (3, {"budget": "60s"}, "end"),
        (3, {"temperature": 0.5}, "end"),
        (3, {"top_k": 5}, "end"),
        (70, {"max_tokens": 80}, "ceiling"),
        (12, {"stop": "777777"}, "end"),
    ],
    ids=["given, cut", "given", "scaled", "seconds", "another temperature", "top_k", "max_tokens", "stop text"],
)
def test_what_is_no_answer_of_the_calibrated_kind_tells_nothing(
    calibrated: Served, monkeypatch: pytest.MonkeyPatch, length: int, body: dict[str, Any], reason: str
) -> None:
    for name in ("FLUSH_SECONDS", "EVENT_SECONDS"):  # a stop text is looked for where text is sent: at each token here
        monkeypatch.setattr(decoder, name, 0.0)
    write_answer(monkeypatch, calibrated, length, stated=60 if "max_tokens" in body else 10)
    answer = calibrated.chat(SHORT, **body).json()
    assert answer["choices"][0]["stop_reason"] == reason
    assert levels(calibrated) == {c: pytest.approx(1 - c) for c in COVERAGES}
    assert calibrated.worker.decoder.promises == {}


def test_an_answer_that_its_user_ends_or_leaves_tells_nothing(calibrated: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    write_answer(monkeypatch, calibrated, 13)
    slow_down(monkeypatch, calibrated, 0.05)
    for action in ("reasoning_end", "stop"):
        stream = calibrated.stream(SHORT)
        first = next(stream.chunks)
        assert calibrated.client.post(CONTROL, json={"id": first["id"], "action": action}).status_code == 200
        assert stream.all()[-1]["choices"][0]["stop_reason"] == "interrupted"
    stream = calibrated.stream(SHORT)
    next(stream.chunks)
    stream.close()
    wait_for(lambda: not calibrated.worker.decoder.jobs)
    assert levels(calibrated) == {c: pytest.approx(1 - c) for c in COVERAGES}


@pytest.mark.parametrize("ceiling", [8, 15])
def test_a_ceiling_tells_nothing(calibrated: Served, monkeypatch: pytest.MonkeyPatch, ceiling: int) -> None:
    assistant = calibrated.worker.decoder.assistant
    monkeypatch.setattr(assistant, "defaults", replace(assistant.defaults, ceiling=ceiling))
    write_answer(monkeypatch, calibrated, 40)
    answer = calibrated.chat(SHORT).json()
    assert (answer["choices"][0]["stop_reason"], answer["budget"]["allowed"]) == ("ceiling", ceiling)
    assert levels(calibrated) == {c: pytest.approx(1 - c) for c in COVERAGES}


# ---- a promise stays what it was -------------------------------------------------------------------------------------------------------


def test_a_promise_that_was_told_stays_while_others_teach(calibrated: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    write_answer(monkeypatch, calibrated, 14)
    slow_down(monkeypatch, calibrated, 0.02)
    stream = calibrated.stream(SHORT)
    first = next(stream.chunks)["budget"]
    online = calibrated.worker.decoder.assistant.online
    for _ in range(100):
        online.adapt(0.9, kept=False)
    assert online.promise(10, 0.9) is None
    last = stream.all()[-1]["budget"]
    assert first["promise"] == last["promise"] == 12
    assert calibrated.chat(SHORT).json()["budget"]["promise"] is None


def test_a_server_follows_its_own_coverage_too(run: Path) -> None:
    settings = replace(SETTINGS, serve=replace(SETTINGS.serve, coverage=0.7))
    assistant = sbtiny.load(str(run), settings=settings)
    assert assistant.online is None  # a chat and Python promise by the file
    assert list(Decoder(assistant, 1).assistant.online.miss_levels) == [0.8, 0.9, 0.95, 0.7]

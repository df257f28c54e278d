"""Answers of a real server: their shape, their budget, and what others got wrong (each complaint of the field, one test)."""

import math
import time
from dataclasses import replace

import pytest
from serve_support import SLOTS, Served, slow_down, text_of, wait_for, write_script

from sbtiny.budget.calibration import Calibration, CalibrationAnswer, calibrate
from sbtiny.rollout.sampling import TagMask
from sbtiny.serving import server as server_file
from sbtiny.serving.answers import encode_queued
from sbtiny.serving.job import Update
from sbtiny.tasks import arithmetic

SHORT = next(q.question for q in arithmetic.generate_questions("val", 99) if q.level <= 2)
LONG = next(q.question for q in arithmetic.generate_questions("val", 99) if q.level >= 4)
FIELDS = {
    "predicted", "requested", "source", "allowed", "used", "remaining", "coverage", "promise", "eta_seconds", "eta_low", "eta_high",
    "queue_position", "forced",
}  # fmt: skip


def calibrated(answers: list[CalibrationAnswer]) -> Calibration:
    about = {"model_fingerprint": "x", "format": "solution", "task": "arithmetic", "split": "val", "date": "today"}
    return calibrate(answers, **about, temperature=0.0, top_p=0.95)


# ---- the shape of an answer ------------------------------------------------------------------------------------------------------------


def test_an_answer_has_openais_shape_and_our_budget(served: Served) -> None:
    answer = served.chat(SHORT).json()
    (choice,) = answer["choices"]
    assert answer["object"] == "chat.completion"
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "end")
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["completion_tokens_details"] == {"reasoning_tokens": 0}
    assert answer["timings"]["predicted_n"] == usage["completion_tokens"]
    assert answer["metrics"]["queue_time_ms"] == 0 < answer["metrics"]["time_to_first_token_ms"]
    budget = answer["budget"]
    assert budget.keys() == FIELDS
    assert budget["predicted"] > 0
    assert (budget["source"], budget["requested"], budget["remaining"], budget["forced"]) == ("model", None, 0, False)
    assert budget["allowed"] == int(1.5 * budget["predicted"])


def test_a_stream_says_the_budget_first_and_is_the_whole_answer(served: Served) -> None:
    stream = served.stream(SHORT)
    chunks = stream.all()
    assert stream.response.headers["content-type"].startswith("text/event-stream")
    assert stream.is_done
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chunks[0]["budget"].keys() == chunks[-1]["budget"].keys() == FIELDS
    assert chunks[0]["budget"]["predicted"] > 0
    assert chunks[0]["budget"]["remaining"] > 0
    assert chunks[-1]["budget"]["remaining"] == 0
    assert {c["id"] for c in chunks} == {stream.response.headers["x-request-id"]}
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert "timings" in chunks[-1]
    assert not any("usage" in c for c in chunks)  # only when asked
    assert text_of(chunks) == served.chat(SHORT).json()["choices"][0]["message"]["content"]


def test_the_usage_chunk_comes_last_without_choices_when_asked(served: Served) -> None:
    chunks = served.stream(SHORT, stream_options={"include_usage": True}).all()
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == served.chat(SHORT).json()["usage"]
    assert all(c["usage"] is None for c in chunks[:-1])
    counted = served.stream(SHORT, stream_options={"continuous_usage_stats": True}).all()
    totals = [c["usage"]["completion_tokens"] for c in counted]
    assert totals == sorted(totals)
    assert all(c["choices"] for c in counted)


def test_thoughts_come_under_both_names(thinking: Served) -> None:
    answer = thinking.chat(LONG, budget=20).json()
    message = answer["choices"][0]["message"]
    assert message["reasoning"]
    assert message["reasoning"] == message["reasoning_content"]
    assert message["content"]
    assert 0 < answer["usage"]["completion_tokens_details"]["reasoning_tokens"] < answer["usage"]["completion_tokens"]
    chunks = thinking.stream(LONG, budget=20).all()
    assert text_of(chunks, "reasoning") == text_of(chunks, "reasoning_content") == message["reasoning"]
    assert text_of(chunks) == message["content"]


# ---- budgets ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [0, 1])
@pytest.mark.parametrize("name", ["served", "plain", "thinking"])
def test_budgets_of_0_and_1_give_an_answer(name: str, budget: int, request: pytest.FixtureRequest) -> None:
    answer = request.getfixturevalue(name).chat(LONG, budget=budget).json()
    assert answer["choices"][0]["message"]["content"].strip()
    assert (answer["budget"]["requested"], answer["budget"]["source"], answer["budget"]["allowed"]) == (budget, "budget", 1)


@pytest.mark.parametrize(
    ("body", "source"),
    [
        ({"thinking_budget": 9}, "thinking_budget"),
        ({"chat_template_kwargs": {"thinking_budget": 9}}, "chat_template_kwargs.thinking_budget"),
    ],
)
def test_the_budget_that_won_is_echoed(served: Served, body: dict, source: str) -> None:
    for answer in (served.chat(SHORT, **body).json(), served.stream(SHORT, **body).all()[0]):
        assert (answer["budget"]["source"], answer["budget"]["requested"], answer["budget"]["allowed"]) == (source, 9, 9)
        assert len(answer.get("warnings", [])) == ("." in source)


def test_an_effort_scales_the_models_own_budget(served: Served) -> None:
    own = served.chat(SHORT).json()["budget"]["predicted"]
    answer = served.chat(SHORT, reasoning_effort="high").json()
    assert answer["budget"]["predicted"] == own
    assert answer["budget"]["allowed"] == int(1.1 * 2 * own)


def test_an_effort_without_a_budget_to_scale_is_told(plain: Served) -> None:
    assert "no effect" in plain.chat(LONG, reasoning_effort="low", max_tokens=2).json()["warnings"][0]
    assert "warnings" not in plain.chat(LONG, reasoning_effort="medium", max_tokens=2).json()


def test_a_calibrated_model_promises_and_keeps_to_a_coverage(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served.worker.decoder.assistant, "calibration", calibrated([CalibrationAnswer(10, n) for n in range(6, 16)] * 20))
    budget = served.stream(SHORT).all()[0]["budget"]
    assert budget["coverage"] == 0.9
    assert budget["promise"] == math.ceil(1.4 * budget["predicted"])
    assert budget["eta_low"] <= budget["eta_seconds"] <= budget["eta_high"]
    kept = served.chat(SHORT, budget={"coverage": 0.5}).json()["budget"]
    assert (kept["source"], kept["coverage"], kept["allowed"]) == ("budget", 0.5, kept["promise"])


def test_a_promise_that_cannot_be_made_ends_one_answer_and_no_other(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is known only once the budget stands."""
    cut = [CalibrationAnswer(10, None, cut=True)] * 200
    monkeypatch.setattr(served.worker.decoder.assistant, "calibration", calibrated(cut))
    slow_down(monkeypatch, served, 0.01)
    other = served.stream(SHORT)
    refused = served.chat(SHORT, budget="90%")
    assert refused.status_code == 400
    assert "no finite promise" in refused.json()["error"]["message"]
    events = served.stream(SHORT, budget="90%").all()
    assert "no finite promise" in events[-1]["error"]["message"]
    assert text_of(other.all())
    assert not served.worker.decoder.assistant.session.is_busy


def test_max_tokens_below_the_budget_leave_room_for_an_answer(plain: Served, thinking: Served) -> None:
    for served in (plain, thinking):
        answer = served.chat(LONG, budget=400, max_tokens=80).json()
        assert answer["choices"][0]["message"]["content"].strip()
        assert answer["choices"][0]["stop_reason"] == "ceiling"
        assert answer["usage"]["completion_tokens"] <= 80


@pytest.mark.parametrize("name", ["served", "plain", "thinking"])
@pytest.mark.parametrize("most", [1, 2, 5, 20, 45])
def test_a_few_tokens_are_an_answer_of_a_few_tokens(name: str, most: int, request: pytest.FixtureRequest) -> None:
    answer = request.getfixturevalue(name).chat(LONG, max_tokens=most).json()
    assert answer["choices"][0]["message"]["content"].strip()
    assert answer["usage"]["completion_tokens"] <= most


def test_a_cut_is_seen_on_the_wire(plain: Served) -> None:
    chunks = plain.stream(LONG, budget=20).all()
    forced = [c["budget"]["forced"] for c in chunks if "budget" in c]
    assert (forced[0], forced[-1]) == (False, True)
    assert forced.count(True) > 1  # when it comes, and at the end
    assert (chunks[-1]["choices"][0]["finish_reason"], chunks[-1]["choices"][0]["stop_reason"]) == ("stop", "ceiling")
    assert "Time is up" in text_of(chunks)


def test_the_budget_is_of_the_answer_not_of_a_block(thinking: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thoughts that are opened again after the answer began have no budget of their own."""
    write_script(monkeypatch, thinking, "So.</think>\n\n" + "Well <think> so it is </think> then. " * 60)
    answer = thinking.chat(LONG, budget=30).json()
    assert answer["budget"]["used"] <= 33 + 60
    assert answer["usage"]["completion_tokens"] <= 33 + 60 + 24
    assert answer["choices"][0]["finish_reason"] == "length"


# ---- text ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", range(4, 12))
def test_no_character_is_cut_in_two(plain: Served, monkeypatch: pytest.MonkeyPatch, budget: int) -> None:
    script = write_script(monkeypatch, plain, "1🙂🙃🙂🙃🙂🙃🙂🙃🙂🙃")
    assert len(script) > 15  # of several tokens each
    text = text_of(plain.stream(LONG, budget=budget).all())
    assert "Time is up" in text
    assert "\ufffd" not in text


def test_a_tag_is_never_sent_in_pieces(thinking: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    script = write_script(monkeypatch, thinking, "a < b and </th no.</think>\n\nThe answer: </b>")
    assert len(script) > 10
    chunks = thinking.stream(LONG, budget=100, max_tokens=200).all()
    assert text_of(chunks, "reasoning").strip() == "a < b and </th no."
    assert text_of(chunks).startswith("The answer: </b>")


def test_a_closing_tag_in_the_code_of_an_answer_is_text(thinking: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    write_script(monkeypatch, thinking, "So.</think>\n\n```\n</think>\n```\nDone.")
    message = thinking.chat(LONG, budget=100).json()["choices"][0]["message"]
    assert message["reasoning"].strip() == "So."
    assert message["content"].startswith("```\n</think>\n```\nDone.")


def test_there_is_no_second_close_after_a_cut(thinking: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model would close again at every step: it does not know that it was cut."""
    policy, apply = thinking.worker.decoder.assistant.policy, TagMask.apply
    closing = policy.encode("</think>")
    written = {len(policy.tokenizer.decode(closing[:i])): token for i, token in enumerate(closing)}  # characters before each token of it

    def apply_after_closing(mask: TagMask, logits, enforcers) -> None:
        for row, enforcer in enumerate(enforcers):
            if enforcer.closed_by_force:
                logits[row, written.get(enforcer.tag_matched, closing[0])] += 1e4
        apply(mask, logits, enforcers)

    monkeypatch.setattr(TagMask, "apply", apply_after_closing)
    answer = thinking.chat(LONG, budget=8).json()
    assert answer["choices"][0]["stop_reason"] == "ceiling"
    assert "</think" not in answer["choices"][0]["message"]["content"]


def test_a_stop_text_ends_the_answer_before_it(plain: Served) -> None:
    whole = plain.chat(LONG).json()["choices"][0]["message"]["content"]
    stop = whole[20:24]
    answer = plain.chat(LONG, stop=["nowhere in it", stop]).json()
    assert answer["choices"][0]["message"]["content"] == whole[: whole.index(stop)]
    assert (answer["choices"][0]["finish_reason"], answer["choices"][0]["stop_reason"]) == ("stop", "end")
    assert text_of(plain.stream(LONG, stop=stop).all()) == whole[: whole.index(stop)]


def test_a_completion_goes_on_from_a_raw_text(served: Served) -> None:
    tokenizer = served.worker.decoder.assistant.policy.tokenizer
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": SHORT}], tokenize=False, add_generation_prompt=True)
    answer = served.client.post("/v1/completions", json={"prompt": prompt}).json()
    said = served.chat(SHORT).json()
    assert answer["object"] == "text_completion"
    assert answer["budget"].keys() == FIELDS
    assert answer["budget"]["predicted"] == said["budget"]["predicted"]
    assert {"usage", "timings", "metrics"} <= answer.keys()
    assert answer["choices"][0]["text"].startswith(f"<budget>{said['budget']['predicted']}</budget>")
    assert said["choices"][0]["message"]["content"] in answer["choices"][0]["text"]
    chunks = served.stream(prompt, "/v1/completions").all()
    assert "".join(c["choices"][0]["text"] for c in chunks) == answer["choices"][0]["text"]


# ---- while it runs ---------------------------------------------------------------------------------------------------------------------


def test_answer_now_and_stop_reach_the_engine(plain: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_down(monkeypatch, plain, 0.01)
    for action, ended in (("reasoning_end", "stop"), ("stop", "stop")):
        stream = plain.stream(LONG)
        first = next(stream.chunks)
        told = plain.client.post("/v1/chat/completions/control", json={"id": first["id"], "action": action})
        assert told.json() == {"id": first["id"], "action": action, "success": True}
        last = stream.all()[-1]
        assert (last["choices"][0]["finish_reason"], last["choices"][0]["stop_reason"]) == (ended, "interrupted")
        assert last["timings"]["predicted_n"] < 100  # of 113
        assert last["budget"]["forced"] == (action == "reasoning_end")
        assert plain.worker.decoder.assistant.session.is_busy is False
        again = plain.client.post("/v1/chat/completions/control", json={"id": first["id"], "action": action})
        assert again.status_code == 404


@pytest.mark.parametrize("most", [20, 200])
def test_answer_now_does_not_cut_the_answer_after_the_thoughts(thinking: Served, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """Of 20 tokens all are answer."""
    slow_down(monkeypatch, thinking, 0.01)
    write_script(monkeypatch, thinking, "a) sells 1\n" * 30 if most == 20 else "So.</think>\n\n" + "a) sells 1\n" * 30)
    stream, asked = thinking.stream(LONG, budget=100, max_tokens=most), {"action": "reasoning_end"}
    chunks = [next(chunk for chunk in stream.chunks if text_of([chunk]))]
    told = thinking.client.post("/v1/chat/completions/control", json=asked | {"id": chunks[0]["id"]})
    assert told.json()["success"]
    chunks += stream.all()
    assert chunks[-1]["choices"][0]["stop_reason"] in ("ceiling", "length")
    assert chunks[-1]["timings"]["predicted_n"] >= min(most, 100)


def test_a_running_answer_is_given_more_tokens(plain: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_down(monkeypatch, plain, 0.01)
    stream = plain.stream(LONG, budget=40)
    first = next(stream.chunks)
    path, asked = "/v1/chat/completions/control", {"id": first["id"], "action": "extend"}
    assert plain.client.post(path, json=asked | {"tokens": 200}).status_code == 200
    assert plain.client.post(path, json=asked | {"tokens": -1}).json()["error"]["param"] == "tokens"
    last = stream.all()[-1]
    assert (first["budget"]["allowed"], last["budget"]["allowed"]) == (44, 244)
    assert last["choices"][0]["stop_reason"] == "end"


def test_who_waits_is_told_its_place(plain: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_down(monkeypatch, plain, 0.02)
    running = [plain.stream(LONG) for _ in range(SLOTS)]
    for stream in running:
        next(stream.chunks)
    waits = [plain.stream(LONG, max_tokens=60), plain.stream(LONG, max_tokens=60)]
    wait_for(lambda: plain.worker.decoder.waiting == 2)
    slots = plain.client.get("/slots").json()
    assert [s["budget"]["queue_position"] for s in slots] == [0] * SLOTS + [1, 2]
    for stream in running:
        stream.close()
    wait_for(lambda: plain.worker.decoder.waiting == 0)
    assert [s["budget"]["queue_position"] for s in plain.client.get("/slots").json()] == [0, 0]
    ended = [stream.all() for stream in waits]
    assert [text_of(chunks) for chunks in ended] == [plain.chat(LONG, max_tokens=60).json()["choices"][0]["message"]["content"]] * 2
    assert any(": queued position=2" in comment for comment in waits[1].comments)
    assert plain.client.get("/slots").json() == []


def test_a_comment_says_the_place_and_the_seconds_where_they_are_known() -> None:
    assert encode_queued(Update(position=3, eta=12.4)) == b": queued position=3 eta=12s\n\n"
    assert encode_queued(Update(position=3)) == b": queued position=3\n\n"


def test_a_lower_priority_goes_first_whatever_its_budget(plain: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_down(monkeypatch, plain, 0.02)
    running = [plain.stream(LONG, budget=100) for _ in range(SLOTS)]
    for stream in running:
        next(stream.chunks)
    waits = [plain.stream(LONG, budget=budget, priority=priority) for budget, priority in ((30, 0), (90, -1), (20, 1))]
    wait_for(lambda: plain.worker.decoder.waiting == 3)
    waiting = [s["budget"] for s in plain.client.get("/slots").json()[SLOTS:]]
    assert [(b["requested"], b["queue_position"]) for b in waiting] == [(30, 2), (90, 1), (20, 3)]
    for stream in running + waits:
        stream.close()
    wait_for(lambda: plain.client.get("/slots").json() == [])


def test_an_answer_asked_for_twice_is_not_stopped_and_cannot_be_extended(plain: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_down(monkeypatch, plain, 0.02)
    stream, path = plain.stream(LONG, budget=100), "/v1/chat/completions/control"
    asked = {"id": next(stream.chunks)["id"]}
    for _ in range(2):
        assert plain.client.post(path, json=asked | {"action": "reasoning_end"}).status_code == 200
    wait_for(lambda: any(job.is_forced for job in plain.worker.decoder.jobs))
    refused = plain.client.post(path, json=asked | {"action": "extend", "tokens": 5})
    assert (refused.status_code, "not supported now" in refused.json()["error"]["message"]) == (400, True)
    chunks = stream.all()
    assert "Time is up" in text_of(chunks)
    assert chunks[-1]["choices"][0]["stop_reason"] == "interrupted"


def test_the_servers_ceiling_caps_budgets_and_their_extension(plain: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    assistant = plain.worker.decoder.assistant
    monkeypatch.setattr(assistant, "defaults", replace(assistant.defaults, ceiling=30))
    slow_down(monkeypatch, plain, 0.01)
    for budget in (200, -1, "2x", {"seconds": 1e6}):
        assert plain.chat(LONG, budget=budget).json()["budget"]["allowed"] == 30
    stream = plain.stream(LONG, budget=10)
    asked = {"id": next(stream.chunks)["id"], "action": "extend", "tokens": 500}
    assert plain.client.post("/v1/chat/completions/control", json=asked).status_code == 200
    assert "the most here" in plain.client.post("/v1/chat/completions/control", json=asked).json()["error"]["message"]
    assert stream.all()[-1]["budget"]["allowed"] == 30


def test_silence_is_broken_by_pings(plain: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    assert server_file.PING_SECONDS <= 10
    monkeypatch.setattr(server_file, "PING_SECONDS", 0.1)
    slow_down(monkeypatch, plain, 1.5)
    stream = plain.stream(LONG, max_tokens=2)
    stream.all()
    assert sum("ping" in comment for comment in stream.comments) >= 3


def test_the_count_down_comes_about_once_a_second(plain: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_down(monkeypatch, plain, 0.03)
    began = time.monotonic()
    chunks = plain.stream(LONG, budget=100).all()
    told = [c["budget"] for c in chunks if "budget" in c and not c["budget"]["forced"]]
    seconds = time.monotonic() - began
    assert 0.6 * seconds - 2 <= len(told) <= seconds + 3  # a busy machine has fewer steps to tell it after
    assert [b["used"] for b in told] == sorted(b["used"] for b in told)
    assert any(b["eta_seconds"] and b["eta_low"] <= b["eta_seconds"] for b in told)


def test_many_at_once_give_what_each_gives_alone(served: Served) -> None:
    questions = [q.question for q in arithmetic.generate_questions("val", 9)]
    together = [served.stream(q) for q in questions]
    texts = [text_of(stream.all()) for stream in together]
    assert texts == [served.chat(q).json()["choices"][0]["message"]["content"] for q in questions]

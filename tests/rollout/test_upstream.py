"""Answers that servers elsewhere decode: what comes of them, of those servers' ends, and of what cannot be used."""

import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import httpx
import huggingface_hub
import pytest
from support import write_gguf
from upstream_support import FakeOllama, LlamaServer, make_requests, play_requests

from sbtiny import runs
from sbtiny.budget.protocol import THINK
from sbtiny.cli import main as cli
from sbtiny.config import PromptSettings, Settings
from sbtiny.errors import InputError, UpstreamError
from sbtiny.models.aliases import BUNDLED
from sbtiny.models.load import load_tokenizer
from sbtiny.rollout.engines import upstream_reader
from sbtiny.rollout.engines.upstream import UpstreamEngine
from sbtiny.rollout.engines.upstream_balance import Upstream
from sbtiny.rollout.engines.upstream_dialects import Chunk, Ollama, Vllm
from sbtiny.rollout.engines.upstream_dialects import LlamaServer as LlamaDialect
from sbtiny.rollout.engines.upstream_vocabulary import UpstreamVocabulary
from sbtiny.rollout.episode import Request, Sampling
from sbtiny.rollout.limit_enforcer import Interrupt
from sbtiny.rollout.limits import Limits
from sbtiny.rollout.load_policy import build_policy, load_policy
from sbtiny.rollout.load_upstream import check_vocabulary
from sbtiny.rollout.policy import Policy

GREEDY = Sampling(0)


@pytest.fixture(scope="module")
def exported(started: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("gguf")
    return write_gguf(BUNDLED, "f32", tmp_path_factory.mktemp("gguf") / "started.gguf", started / "adapter")


@pytest.fixture(scope="module")
def server(exported: Path) -> Iterator[LlamaServer]:
    server = LlamaServer(exported)
    yield server
    server.close()


def open_upstream(name: object, *urls: str, slots: int = 6) -> Policy:
    return load_policy(str(name), Settings(four_bit=False, upstream=",".join(urls)), slots)


# ---- through a real llama-server -----------------------------------------------------------------------------------------------


def test_limits_budgets_and_answers_now_are_those_of_our_own_loop(started: Path, exported: Path, server: LlamaServer) -> None:
    ours = load_policy(str(started), Settings(four_bit=False), 6)
    expected = play_requests(ours, make_requests(ours, 40), GREEDY)
    assert {e.stop_reason for e in expected} >= {"end", "ceiling", "interrupted"}
    for name in (started, exported):  # a run gives the tokenizer and the format as well as its file does
        policy = open_upstream(name, server.url)
        assert policy.states_budget
        found = play_requests(policy, make_requests(policy, 40), GREEDY)
        assert [e.completion_ids for e in found] == [e.completion_ids for e in expected]
        for key in ("text", "length", "stop_reason", "ended", "injected", "enforced_budget"):
            assert [getattr(e, key) for e in found] == [getattr(e, key) for e in expected]


def test_an_answer_that_is_held_and_goes_on_is_as_if_it_had_not_been(started: Path, server: LlamaServer) -> None:
    policy = open_upstream(started, server.url)
    request = make_requests(policy, 10)[9][0]
    expected = policy.sample([replace(request, limits=None, interrupt=None)], GREEDY)[0]
    session = policy.engine.open_session(512)
    ticket = session.add(request, GREEDY)
    for held in (1, 4, 9):
        while len(ticket.written) < held and not ticket.episode:
            session.step()
        if ticket.episode is None:
            session.hold(ticket)
            assert not session.is_busy
            assert session.step() == []
            session.resume(ticket)
    while session.is_busy:
        session.step()
    assert ticket.written == expected.completion_ids


def test_what_a_dropped_request_writes_is_not_read(started: Path, server: LlamaServer) -> None:
    policy = open_upstream(started, server.url)
    session = policy.engine.open_session(512)
    tickets = [session.add(request, GREEDY) for request, _ in make_requests(policy, 9)]
    session.step()
    for ticket in tickets[::2]:
        session.drop(ticket)
    while session.is_busy:
        session.step()
    assert [ticket.episode is None for ticket in tickets] == [True, False] * 4 + [True]
    for request, _ in make_requests(policy, 4):
        session.add(request, GREEDY)
    session.step()
    policy.engine.close()
    assert not session.is_busy
    assert not policy.engine.reader.thread.is_alive()


def test_sampling_is_seeded_and_varies(started: Path, server: LlamaServer) -> None:
    policy = open_upstream(started, server.url)
    request = replace(make_requests(policy, 1)[0][0], limits=None, interrupt=None)
    hot = Sampling(1.5, top_p=0.98)
    texts = [policy.sample([replace(request, seed=seed)], hot)[0].text for seed in (1, 1, 2, 3, 4)]
    assert texts[0] == texts[1]
    assert len(set(texts)) > 1
    with pytest.raises(InputError, match="log-probabilities"):
        policy.sample([request], Sampling(1.0, logprobs=True))


def test_answers_of_a_server_that_dies_go_on_at_another(started: Path, exported: Path, server: LlamaServer) -> None:
    dying = LlamaServer(exported)
    policy = open_upstream(started, dying.url, server.url, slots=16)
    made = [(replace(request, limits=None), None) for request, _ in make_requests(policy, 16)]
    expected = play_requests(open_upstream(started, server.url), made, GREEDY)
    session = policy.engine.open_session(512)
    tickets = [session.add(request, GREEDY) for request, _ in made]
    while not any(ticket.written for ticket in tickets):
        session.step()
    assert len({stream.upstream.url for stream in session.running.values()}) == 2
    dying.close()
    while session.is_busy:
        session.step()
    assert [t.written for t in tickets] == [e.completion_ids for e in expected]
    alone = open_upstream(started, server.url)
    alone.engine.upstreams = [policy.engine.upstreams[0]]
    with pytest.raises(UpstreamError, match=f"{dying.url} has failed"):
        alone.sample([made[0][0]], GREEDY)


def test_what_cannot_be_used_is_said_in_one_line(started: Path, server: LlamaServer, tiny, tmp_path: Path) -> None:
    base = LlamaServer(write_gguf(BUNDLED, "f32", tmp_path / "plain.gguf"), 2, "--api-key", "secret")
    with pytest.raises(InputError, match="refuses the key: give --upstream-key"):
        open_upstream(started, base.url)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SBTINY_UPSTREAM_KEY", "secret")
        with pytest.raises(InputError, match=r"states no budget .* serve the export of"):
            open_upstream(started, base.url)
        assert not open_upstream("tiny", base.url).states_budget  # a plain model is asked as one
    base.close()
    with pytest.raises(InputError, match="cannot use upstream"):
        open_upstream(started, base.url)
    with pytest.raises(InputError, match="is llama-server, which knows no priority"):
        open_upstream(started, server.url + "?priority")
    with pytest.raises(InputError, match="no model 'other'"):
        open_upstream(started, server.url + "#other")
    with pytest.raises(InputError, match="no URL"):
        open_upstream(started, "localhost:8080")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaDialect, "detokenize", lambda *_: "another text")
        with pytest.raises(InputError, match=r"has another model .*reads the tokens of a prompt as 'another text'"):
            open_upstream(started, server.url)
    with pytest.raises(InputError, match=r"has another model .*a vocabulary of 1600 tokens, here 1509"):
        check_vocabulary(httpx.Client(base_url=server.url), LlamaDialect("m", rows=1600), tiny[1], 1509)
    with pytest.raises(InputError, match="cannot be trained"):
        load_policy("tiny", Settings(upstream=server.url), 2, trainable=True)
    with pytest.raises(InputError, match="engine is generate"):
        Settings(upstream=server.url, engine="generate")


def test_the_command_line_takes_address_and_key_and_fails_in_one_line(
    exported: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("SBTINY_UPSTREAM_KEY", "wrong")
    locked = LlamaServer(exported, 2, "--api-key", "secret")
    asked = ["chat", str(exported), "Max has 52 apples.\na) sells 1\nHow many apples?", "--upstream", locked.url, "--json"]
    assert cli.run(asked, debug=False) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith(f"error: {locked.url} refuses the key")
    assert cli.run([*asked, "--upstream-key", "secret"], debug=False) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["used"] > 0
    assert "secret" not in said.err + said.out
    locked.close()
    assert cli.run([*asked, "--upstream-key", "secret"], debug=False) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"error: cannot use upstream {locked.url}")
    assert "secret" not in error


# ---- ollama, by its documentation ----------------------------------------------------------------------------------------------


def test_ollama_gets_text_and_gives_text(tiny) -> None:
    model, tokenizer = tiny
    ours = build_policy(model, tokenizer, slots=6)

    def answer(prompt: str, most: int) -> list[str]:
        ids = tokenizer.encode(prompt, add_special_tokens=False)
        with lock:
            return [ours.engine.pieces[i] for i in ours.sample([Request(tuple(ids), most)], GREEDY)[0].completion_ids if i != 2]

    lock = threading.Lock()
    server = FakeOllama(len(ours.engine.pieces), answer)
    policy = open_upstream("tiny", server.url)
    found = play_requests(policy, make_requests(policy, 10), GREEDY)
    expected = play_requests(ours, make_requests(ours, 10), GREEDY)
    cut = "Time is up. \\boxed{"  # what follows it was asked with a text, which is cut into other tokens than its parts were
    assert [e.text.partition(cut)[:2] for e in found] == [e.text.partition(cut)[:2] for e in expected]
    assert [e.stop_reason for e in found] == [e.stop_reason for e in expected]
    assert all(body["raw"] and body["model"] == "mine:latest" for body in server.asked)
    with pytest.raises(InputError, match=r"no model 'other': there are mine:latest"):
        open_upstream("tiny", server.url + "#other")


def test_the_weights_of_a_hub_model_are_not_fetched_where_the_run_knows_its_base(started: Path, tiny, tmp_path: Path, monkeypatch) -> None:
    run = Path(shutil.copytree(started, tmp_path / "run"))
    runs.write_json(run / "run.json", runs.read_run(run) | {"model": "owner/name"})
    fetched: list[str] = []
    bare = Path(shutil.copytree(BUNDLED, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors")))

    def fetch(ref: str, allow_patterns: list[str], **_: object) -> str:
        fetched.extend([ref, *allow_patterns])
        return str(bare)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    server = FakeOllama(len(tiny[1]), lambda *_: ["<budget>9</budget>"])
    assert open_upstream(run, server.url).states_budget
    assert fetched[0] == "owner/name"
    assert not any("safetensors" in pattern for pattern in fetched)


@pytest.mark.parametrize(("least_prefill", "waits"), [(1, True), (10**9, False)])
def test_a_longer_prompt_is_waited_for_longer(tiny, monkeypatch: pytest.MonkeyPatch, least_prefill: int, waits: bool) -> None:
    monkeypatch.setattr(upstream_reader, "READ_SECONDS", 0.3)
    monkeypatch.setattr(upstream_reader, "LEAST_PREFILL", least_prefill)
    is_over = threading.Event()

    def read_long(prompt: str, most: int) -> list[str]:
        is_over.wait(1.5 if waits else 60)
        return ["2"]

    slow = FakeOllama(tiny[0].config.vocab_size, read_long)
    policy = open_upstream("tiny", slow.url)
    request = policy.request("1 + 1?" + " please" * 100, 20, 0)
    try:
        if waits:
            assert policy.sample([request], GREEDY)[0].text == "2"
        else:
            with pytest.raises(UpstreamError, match="ReadTimeout"):
                policy.sample([request], GREEDY)
    finally:
        is_over.set()


@pytest.mark.parametrize(("status", "goes_on"), [(429, True), (401, True), (500, True), (400, False)])
def test_what_one_server_refuses_another_may_take_but_for_the_fault_of_a_request(tiny, status: int, goes_on: bool) -> None:
    rows = tiny[0].config.vocab_size
    refusing, willing = FakeOllama(rows, lambda prompt, most: [], status), FakeOllama(rows, lambda prompt, most: ["2"])
    policy = open_upstream("tiny", f"{refusing.url},{willing.url}")
    requests = [policy.request(f"{i} + 1?", 20, i) for i in range(2)]
    if goes_on:
        assert [episode.text for episode in policy.sample(requests, GREEDY)] == ["2", "2"]
        assert refusing.asked
    else:
        with pytest.raises(UpstreamError, match=f"HTTP {status}, not now"):
            policy.sample(requests, GREEDY)
        assert len(willing.asked) < 2


def test_it_is_asked_with_the_prompt_settings_and_opens_what_the_format_took_off(tiny, tmp_path: Path) -> None:
    server = FakeOllama(len(tiny[1]), lambda prompt, most: [])
    opens = shutil.copytree(BUNDLED, tmp_path / "opens")
    load_tokenizer(str(opens)).save_pretrained(opens)
    template = opens / "chat_template.jinja"
    template.write_text(template.read_text().rstrip() + "{% if add_generation_prompt %}<think>\n{% endif %}")
    asked = Settings(upstream=server.url, format="think", prompt=PromptSettings(instruction="Count aloud.", system="Be brief."))
    for name in (BUNDLED, opens):
        policy, local = load_policy(str(name), asked, 2), load_policy(str(name), replace(asked, upstream=None, four_bit=False), 2)
        text = policy.tokenizer.decode(policy.prompt("1 + 1?"))
        assert text == local.tokenizer.decode(local.prompt("1 + 1?"))
        assert "Count aloud." in text
        assert "Be brief." in text
        assert text.endswith("<think>\n") == (name is opens)


def test_a_run_is_asked_there_with_its_instruction(started: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(started, tmp_path / "run"))
    runs.write_json(run / "run.json", runs.read_run(run) | {"prompt": {"instruction": "Think.", "system": None}})
    ours = load_policy(str(run), Settings(four_bit=False), 2)
    server = FakeOllama(len(ours.engine.pieces), lambda *_: ["<budget>9</budget>"])
    assert open_upstream(run, server.url).prompt("1 + 1?") == ours.prompt("1 + 1?")
    assert all("\nThink." in body["prompt"] for body in server.asked)


# ---- what servers seldom do, played ------------------------------------------------------------------------------------------------


class PlayedReader:
    """Takes what a session asks and brings the chunks that a test sets."""

    def __init__(self) -> None:
        self.opened, self.closed, self.news = [], [], []

    def open(self, stream) -> None:
        self.opened.append(stream)

    def close(self, stream) -> None:
        self.closed.append(stream)

    def take(self, seconds: float, gathers: bool) -> list:
        news, self.news = self.news, []
        return news


@pytest.fixture
def played(tiny):
    """A session whose server is played by hand: say(chunk) brings a chunk of the stream that is open."""
    model, tokenizer = tiny
    ours = build_policy(model, tokenizer, slots=2, form=THINK)
    vocabulary = UpstreamVocabulary(ours.engine.pieces, ours.engine.stops, ours.encode)

    def make(dialect) -> SimpleNamespace:
        reader = PlayedReader()
        engine = UpstreamEngine([Upstream("http://there", dialect)], reader, vocabulary, 4, 512, "w")
        session = engine.open_session(512)

        def say(*chunks: Chunk) -> list:
            reader.news += [(reader.opened[-1], chunk) for chunk in chunks]
            return session.step()

        return SimpleNamespace(session=session, reader=reader, say=say, policy=Policy(engine, tokenizer, THINK), encode=ours.encode)

    return make


def close_by_force(there: SimpleNamespace):
    """A ticket whose thoughts were closed by force after two tokens."""
    wrap_up = tuple(there.encode("\nTime is up.\n</think>\n\n"))
    request = there.policy.request("1 + 1?", 200, 0, budget=9, limits=Limits(2, None, wrap_up, 60))
    ticket = there.session.add(request, GREEDY)
    there.session.step()
    assert there.reader.opened[-1].segment.tokens == 3  # the ceiling, and the token that shows that it is passed
    there.say(*(Chunk(tokens=(token,)) for token in there.encode("1 + 1 = 2")[:3]))
    assert tuple(ticket.written[-len(wrap_up) :]) == wrap_up
    return ticket


def test_a_second_closing_tag_is_never_written(played) -> None:
    there = played(LlamaDialect("m"))
    ticket = close_by_force(there)
    first = there.reader.opened[-1]
    assert list(first.segment.prompt[-len(ticket.written) :]) == ticket.written
    tag = there.encode("</think>")
    assert len(tag) > 1, "the tag must be split for this test"
    there.say(*(Chunk(tokens=(token,)) for token in tag))
    again = there.reader.opened[-1]
    assert again is not first
    assert (again.segment.tokens, again.segment.prompt[-1], tag[1] in again.segment.masked) == (1, tag[0], True)
    there.say(Chunk(tokens=tuple(there.encode("2"))), Chunk(end="length"))
    there.say(Chunk(tokens=(2,), end="stop"))
    assert ticket.episode.ended
    assert ticket.episode.text.partition("</think>")[2] == "\n\n</2"  # as in our own loop, what is no tag yet stands


def test_a_server_that_writes_what_is_masked_is_not_asked_for_ever(played) -> None:
    there = played(Vllm("m"))
    ticket = close_by_force(there)
    first, second = there.encode("</think>")[:2]
    asked = len(there.reader.opened)
    for token in (first, second, second, second, *there.encode("2"), first):  # one that may stand begins the count anew
        there.say(Chunk(tokens=(token,)))
    for _ in range(3):
        assert there.say(Chunk(tokens=(second,))) == []
    assert there.say(Chunk(tokens=(second,))) == [ticket]
    assert "writes tokens that it was told not to: start it without speculative decoding" in str(ticket.refusal)
    assert len(there.reader.opened) == asked + 6
    assert not there.session.is_busy


def test_a_server_that_cannot_mask_has_the_second_tag_left_out(played) -> None:
    there = played(Ollama("m"))
    ticket = close_by_force(there)
    there.say(*(Chunk(text, None) for text in ("It is ", "<", "/", "think", ">", "\n2")), Chunk("", None, end="stop"))
    text = ticket.episode.text
    assert text.count("</think>") == 1
    assert text.endswith("\n2")


def test_tokens_inside_a_character_that_are_not_shown_are_read_from_the_text(played) -> None:
    there = played(LlamaDialect("m"))
    ticket = there.session.add(there.policy.request("1 + 1?", 40, 0), GREEDY)
    there.session.step()
    tokens = there.encode("é")
    assert len(tokens) > 1
    there.say(Chunk("é", tokens[-1:], count=len(tokens)))
    assert ticket.written == tokens
    there.say(Chunk(count=len(tokens) + 1, end="length"))  # the limit came inside the next one
    assert there.reader.opened[-1].segment.tokens == 40 - len(tokens) + 4


def test_a_stated_budget_becomes_the_priority_where_it_is_scheduled_by(played) -> None:
    dialect = Vllm("m")
    dialect.schedules = True
    there = played(dialect)
    limits = Limits(100, None)
    ticket = there.session.add(there.policy.request("1 + 1?", 200, 0, limits=limits), GREEDY)
    there.session.step()
    first = there.reader.opened[-1].segment
    assert dialect.body(first)["priority"] == 0
    there.say(Chunk(tokens=tuple(there.encode("<budget>37</budget>")) + tuple(there.encode("<think>"))))
    second = there.reader.opened[-1].segment
    assert dialect.body(second)["priority"] == 37
    assert list(second.prompt) == [*first.prompt, *ticket.written]
    dialect.schedules = False
    assert "priority" not in dialect.body(second)


def test_what_a_server_writes_that_is_no_chunk_ends_the_answer(started: Path, server: LlamaServer, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = open_upstream(started, server.url)
    monkeypatch.setattr(LlamaDialect, "read", lambda self, line: [][0])
    with pytest.raises(UpstreamError, match="has failed in an answer"):
        policy.sample([policy.request("1 + 1?", 20, 0)], GREEDY)


def test_a_server_that_writes_nothing_or_other_tokens_ends_the_answer(played) -> None:
    there = played(LlamaDialect("m"))
    ticket = there.session.add(there.policy.request("1 + 1?", 40, 0), GREEDY)
    there.session.step()
    for _ in range(4):
        there.say(Chunk(end="length"))
    assert "writes nothing" in str(ticket.refusal)
    other = there.session.add(there.policy.request("1 + 1?", 40, 0), GREEDY)
    there.session.step()
    assert there.say(Chunk(tokens=(99999,))) == [other]
    assert "token 99999, outside the vocabulary" in str(other.refusal)


def test_an_earlier_session_is_told_that_another_was_opened(played) -> None:
    there = played(LlamaDialect("m"))
    ticket = there.session.add(there.policy.request("1 + 1?", 40, 0), GREEDY)
    there.session.step()
    there.policy.engine.open_session(512)
    assert [stream.ticket for stream in there.reader.closed] == [ticket]
    with pytest.raises(RuntimeError, match="another session"):  # its answers would never come
        there.session.step()


def test_the_next_answer_goes_where_the_fewest_stated_tokens_are_left(played) -> None:
    there = played(LlamaDialect("a"))
    engine = there.policy.engine
    engine.upstreams.append(Upstream("http://other", LlamaDialect("b", slots=2)))
    engine.rows = 9
    for budget in (300, 20, 40, 100, 30):
        there.session.add(there.policy.request("1 + 1?", 400, 0, budget=budget, limits=Limits(350, None)), GREEDY)
    there.session.step()
    urls = [stream.upstream.url for stream in there.session.running.values()]
    assert urls == ["http://there", "http://other", "http://other", "http://there", "http://there"]  # the other has two slots


def test_an_answer_that_waits_for_the_only_server_left_holds_up_no_other(played) -> None:
    there = played(LlamaDialect("a"))
    engine = there.policy.engine
    first, other = engine.upstreams[0], Upstream("http://other", LlamaDialect("b", slots=1))
    engine.upstreams.append(other)
    engine.rows = 9
    failed, _ = (there.session.add(there.policy.request("1 + 1?", 40, i), GREEDY) for i in range(2))
    there.session.step()
    there.reader.news.append((there.session.running[failed], UpstreamError("it broke")))
    there.session.step()
    first.failed_at = None  # it has come back
    later, stopped = (there.session.add(there.policy.request("2 + 2?", 40, i, interrupt=Interrupt()), GREEDY) for i in range(2, 4))
    stopped.request.interrupt.stop()
    assert there.session.step() == [stopped]
    assert {ticket: stream.upstream for ticket, stream in there.session.running.items() if ticket in (failed, later)} == {later: first}
    assert list(there.session.queue) == [failed]


def test_a_vllm_that_does_not_show_its_tokens_is_read_by_its_text() -> None:
    line = b'data: {"choices": [{"text": "So", "finish_reason": null%b}]}'
    assert Vllm("m").read(line % b"") == Chunk("So", None)
    assert Vllm("m").read(line % b', "token_ids": [5]') == Chunk("So", (5,))

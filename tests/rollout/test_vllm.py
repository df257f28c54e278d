"""vLLM itself (make test-vllm): its answers are ours, under the same control, by the adapter of this very update."""

import asyncio
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support import GRPO, settings_of, write_gguf
from typer.testing import CliRunner

from sbtiny.budget.protocol import THINK
from sbtiny.cli.main import app
from sbtiny.config import ServeSettings, Settings
from sbtiny.errors import InputError
from sbtiny.grpo.run import run_grpo
from sbtiny.models.aliases import BUNDLED
from sbtiny.models.load import add_lora, load_model
from sbtiny.models.prompt import prompt_ids
from sbtiny.rollout.engines.vllm_session import VllmSession
from sbtiny.rollout.episode import Episode, Request, Sampling
from sbtiny.rollout.limit_enforcer import Interrupt
from sbtiny.rollout.limits import Limits
from sbtiny.rollout.load_policy import build_policy, load_policy
from sbtiny.rollout.policy import Policy
from sbtiny.rollout.sampling import TagMask
from sbtiny.serving.ask import Ask
from sbtiny.serving.assistant import load
from sbtiny.serving.decoder import Decoder
from sbtiny.serving.heads_first import HEAD_ROWS
from sbtiny.serving.job import Job
from sbtiny.serving.requests import ServeRequest
from sbtiny.tasks import arithmetic

pytestmark = pytest.mark.vllm
WRAP_UP = "\nSo the answer is "
NEAR_TIE = 1e-4  # two sums of float32 products in another order differ by less


@pytest.fixture(scope="module")
def theirs(tiny) -> Policy:
    """The bundled model in vLLM. One engine for the file: it takes seconds to start."""
    policy = build_policy(*tiny, slots=5, engine="vllm")
    policy.engine.check_room(400)
    return policy


def asked(policy: Policy, count: int, room: int = 40, **more) -> list[Request]:
    questions = enumerate(arithmetic.generate_questions("val", count))
    return [policy.request(q.question, room - 3 * (i % 4), seed=i, expected=i % 7, **more) for i, q in questions]


def score(model: torch.nn.Module, ids: Sequence[int]) -> torch.Tensor:
    """Log-probabilities (vocabulary,) of the next token."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)


def check_same_or_tied(model: torch.nn.Module, ours: Episode, theirs: Episode) -> None:
    """Fails unless the answers are one, or part at two tokens that the model finds equally likely."""
    pairs = enumerate(zip(ours.completion_ids, theirs.completion_ids, strict=False))
    place = next((i for i, (a, b) in pairs if a != b), None)
    if place is None:
        assert len(ours.completion_ids) == len(theirs.completion_ids)
        return
    logprobs = score(model, [*ours.request.prompt_ids, *ours.completion_ids[:place]])
    a, b = (logprobs[e.completion_ids[place]].item() for e in (ours, theirs))
    assert abs(a - b) < NEAR_TIE, f"token {place}: {a} for ours, {b} for vLLM's"


@pytest.mark.parametrize("sampling", [Sampling(0, logprobs=True), Sampling(0.7, logprobs=True)])
def test_log_probabilities_are_the_models(tiny, theirs: Policy, sampling: Sampling) -> None:
    for episode in theirs.sample(asked(theirs, 6), sampling):
        ids = [*episode.request.prompt_ids, *episode.completion_ids]
        with torch.no_grad():
            logits = tiny[0](input_ids=torch.tensor([ids])).logits[0, len(episode.request.prompt_ids) - 1 : -1]
        expected = (logits / (sampling.temperature or 1)).log_softmax(-1).gather(-1, torch.tensor(episode.completion_ids)[:, None])[:, 0]
        assert np.allclose(episode.logprobs, expected, atol=1e-4)


def test_greedy_answers_are_ours_and_stop_where_ours_stop(tiny, policy: Policy, theirs: Policy) -> None:
    requests = asked(policy, 40, 300)
    ours, found = policy.sample(requests, Sampling(0)), theirs.sample(requests, Sampling(0))
    assert any(e.ended for e in found)
    for a, b in zip(ours, found, strict=True):
        check_same_or_tied(tiny[0], a, b)
        if a.completion_ids == b.completion_ids:
            assert (a.stop_reason, a.ended, a.length, a.text) == (b.stop_reason, b.ended, b.length, b.text)


def test_a_seed_decides_a_text_whatever_decodes_beside_it(theirs: Policy) -> None:
    requests, sampling = asked(theirs, 9), Sampling(1.0)
    first, again = ([e.completion_ids for e in theirs.sample(requests, sampling)] for _ in range(2))
    assert first == again
    assert theirs.sample(requests[4:5], sampling)[0].completion_ids == first[4]
    others = theirs.sample([replace(r, seed=r.seed + 2**63 + 1) for r in requests], sampling)
    assert sum(e.completion_ids != ids for e, ids in zip(others, first, strict=True)) > 4


def test_truncated_sampling_stays_among_the_likeliest(tiny, theirs: Policy) -> None:
    for episode in theirs.sample(asked(theirs, 4, 20), Sampling(1.5, top_k=2)):
        ids = list(episode.request.prompt_ids)
        for token in episode.completion_ids:
            assert token in score(tiny[0], ids).topk(2).indices
            ids.append(token)
    with pytest.raises(InputError, match="no log-probabilities of truncated sampling"):
        theirs.sample(asked(theirs, 1), Sampling(1.0, top_p=0.9, logprobs=True))


@pytest.mark.parametrize("limits", [{"ceiling": 8}, {"tolerance": 0.1}, {"ceiling": 8, "wrap_up": ()}], ids=str)
def test_limits_cut_and_wrap_up_as_ours_do(tiny, policy: Policy, theirs: Policy, limits: dict) -> None:
    chosen = Limits(**{"wrap_up": tuple(policy.encode(WRAP_UP)), "reserve": 20} | limits)
    requests = [replace(r, limits=None) if i % 3 == 2 else r for i, r in enumerate(asked(policy, 12, 60, limits=chosen, budget=12))]
    ours, found = policy.sample(requests, Sampling(0, logprobs=True)), theirs.sample(requests, Sampling(0, logprobs=True))
    assert any(any(e.injected) for e in found) == bool(chosen.wrap_up)
    for a, b in zip(ours, found, strict=True):
        check_same_or_tied(tiny[0], a, b)
        assert (a.injected, a.stop_reason, a.enforced_budget) == (b.injected, b.stop_reason, b.enforced_budget)
        assert np.allclose(a.logprobs, b.logprobs, atol=1e-4)


def test_an_answer_is_interrupted_before_it_begins_and_on_its_way(policy: Policy, theirs: Policy) -> None:
    early, late = Interrupt(), Interrupt()
    early.press()
    limits = Limits(wrap_up=tuple(policy.encode(WRAP_UP)), reserve=20)
    engine, plain = theirs.engine, asked(theirs, 3, 200)
    expected = theirs.sample(plain[2:], Sampling(0))[0].completion_ids
    session = engine.open_session(400)
    stopped, cut, whole = (
        session.add(request, Sampling(0))
        for request in (replace(plain[0], interrupt=early), replace(plain[1], limits=limits, interrupt=late), plain[2])
    )
    for _ in range(10):
        session.step()
    late.press()
    while session.is_busy:
        session.step()
    assert (stopped.episode.stop_reason, stopped.written) == ("interrupted", [])
    assert cut.episode.stop_reason == "interrupted"
    assert WRAP_UP in cut.episode.text
    assert whole.written == expected


def test_what_must_not_come_after_a_forced_closing_tag_does_not(tiny, theirs: Policy, monkeypatch) -> None:
    """The mask's tokens are those that the model likes best there, so that each would come."""
    policy = build_policy(*tiny, slots=4, form=THINK)
    limits = Limits(ceiling=6, wrap_up=tuple(policy.encode("\n</think>\n")), reserve=40)
    request = policy.request("1 + 1?", 60, 0, budget=20, limits=limits)
    free = policy.sample([request], Sampling(0))[0]
    liked = sorted({token for token, forced in zip(free.completion_ids[7:], free.injected[7:], strict=True) if not forced})
    monkeypatch.setattr(TagMask, "tokens", lambda *_: torch.tensor(liked))
    ours, found = (each.sample([request], Sampling(0))[0] for each in (policy, theirs))
    rest = [token for token, forced in zip(found.completion_ids[7:], found.injected[7:], strict=True) if not forced]
    assert set(rest).isdisjoint(liked) == bool(rest)
    assert ours.completion_ids == found.completion_ids


def test_a_masked_token_that_comes_nonetheless_ends_the_answer(policy: Policy) -> None:
    """As where vLLM guesses tokens ahead, which drops the mask; the same seed would bring it for ever."""

    names: list[str] = []

    class Core:
        def add_request(self, name: str, *_: object, **__: object) -> None:
            names.append(name)

        def abort_request(self, _: list[str]) -> None: ...

        def step(self) -> list[SimpleNamespace]:
            return [SimpleNamespace(request_id=names[-1], outputs=[SimpleNamespace(token_ids=[5])], finished=True)]

    ours = policy.engine
    parts = {"make_ticket": ours.make_ticket, "stops": ours.stops, "tag_mask": SimpleNamespace(masked_tokens=lambda _: [5])}
    engine = SimpleNamespace(core=Core(), capacity=400, rows=1, adapter=None, stop_ids=[2], **parts)
    engine.session = session = VllmSession(engine)
    ticket = session.add(asked(policy, 1)[0], Sampling(0))
    assert (session.step(), session.step()) == ([], [ticket])
    assert "told not to" in str(ticket.refusal)
    assert len(names) == 2
    assert not session.is_busy
    assert not session.masking


def test_answers_are_held_resumed_and_dropped(theirs: Policy) -> None:
    requests = asked(theirs, 4, 60)
    expected = [e.completion_ids for e in theirs.sample(requests, Sampling(0))]
    session = theirs.engine.open_session(400)
    held, dropped, *others = (session.add(r, Sampling(0)) for r in requests)
    for _ in range(8):
        session.step()
    assert len(held.written) == len(dropped.written) == 8
    session.hold(held)
    session.drop(dropped)
    for _ in range(5):
        session.step()
    assert len(held.written) == 8
    session.resume(held)
    while session.is_busy:
        session.step()
    assert [t.written for t in (held, *others)] == [expected[0], *expected[2:]]
    assert dropped.episode is None
    theirs.engine.open_session(100)
    with pytest.raises(RuntimeError, match="another session"):
        session.step()


def test_its_start_leaves_this_process_as_it_was(tiny) -> None:
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    before, set_threads, threads = (random.getstate(), torch.get_rng_state()), torch.set_num_threads, torch.get_num_threads()
    policy = build_policy(*tiny, slots=2, engine="vllm")
    policy.sample(asked(policy, 1, 5), Sampling(0))
    capacity = policy.engine.capacity
    policy.sample(asked(policy, 1, capacity), Sampling(0))  # a longer sequence needs another start
    assert policy.engine.capacity > capacity
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert torch.set_num_threads is set_threads
    assert torch.get_num_threads() == threads


# ---- adapters --------------------------------------------------------------------------------------------------------


def update(model: torch.nn.Module, ids: Sequence[int], learning_rate: float) -> None:
    """One update towards a text."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    rows = torch.tensor([list(ids)])
    model(input_ids=rows, labels=rows).loss.backward()
    optimizer.step()


def test_after_an_update_it_answers_as_the_updated_model(tiny) -> None:
    model, tokenizer = load_model("tiny")
    model = add_lora(model, rank=4)
    policy, theirs = build_policy(model, tokenizer, slots=6), build_policy(model, tokenizer, slots=6, engine="vllm")
    requests = asked(policy, 6, 30)
    answers = [[e.completion_ids for e in theirs.sample(requests, Sampling(0))]]
    for learning_rate in (0.02, 0.05):
        update(model, [*prompt_ids(tokenizer, "1 + 1?"), *policy.encode("two two two two")], learning_rate)
        policy.refresh(), theirs.refresh()
        ours, found = policy.sample(requests, Sampling(0, logprobs=True)), theirs.sample(requests, Sampling(0, logprobs=True))
        for a, b in zip(ours, found, strict=True):
            check_same_or_tied(model, a, b)
            if a.completion_ids == b.completion_ids:
                assert np.allclose(a.logprobs, b.logprobs, atol=1e-3)
        answers.append([e.completion_ids for e in found])
    assert answers[0] != answers[1] != answers[2]
    with model.disable_adapter():
        theirs.refresh()
        assert [e.completion_ids for e in theirs.sample(requests, Sampling(0))] == answers[0]
    theirs.refresh()
    assert [e.completion_ids for e in theirs.sample(requests, Sampling(0))] == answers[2]
    assert len(list(Path(theirs.engine.folder.name).iterdir())) == 1


def test_unsloths_own_engine_is_taken_where_the_model_brings_one(tiny, theirs: Policy, monkeypatch) -> None:
    requests = asked(theirs, 3, 20)
    expected = [e.completion_ids for e in theirs.sample(requests, Sampling(0))]
    monkeypatch.setattr(tiny[0], "vllm_engine", SimpleNamespace(llm_engine=theirs.engine.core), raising=False)
    policy = build_policy(*tiny, slots=3, engine="vllm")
    assert [e.completion_ids for e in policy.sample(requests, Sampling(0))] == expected
    assert policy.engine.core is theirs.engine.core
    with pytest.raises(InputError, match=f"exceed the context of {theirs.engine.capacity}"):
        policy.sample(asked(policy, 1, theirs.engine.capacity), Sampling(0))


# ---- the verbs -------------------------------------------------------------------------------------------------------


def run_verb(line: str) -> str:
    result = CliRunner().invoke(app, line.split())
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result.stdout


def test_evaluation_finds_what_ours_finds(started: Path, tmp_path: Path) -> None:
    cut = "--limit 8 --json --set eval.cut_at=0.5 --set eval.temperature=0 --set eval.max_tokens=40"
    found = [json.loads(run_verb(f"eval {started} {cut} --engine {name} -o {tmp_path / name}")) for name in ("ours", "vllm")]
    assert found[0] == found[1]
    rows = [(tmp_path / name / "eval_samples.jsonl").read_text() for name in ("ours", "vllm")]
    assert rows[0] == rows[1]


def test_data_is_built(tmp_path: Path) -> None:
    """From the plain model: its answers of 400 tokens, the right ones labelled with their length."""
    out = tmp_path / "rows.jsonl"
    run_verb(f"data build {out} --model tiny --limit 8 --engine vllm --set data.max_tokens=400 --set data.samples_per_question=2")
    assert [json.loads(line) for line in out.read_text().splitlines()]


def test_grpo_trains_on_its_answers_and_cuts_some(started: Path, tmp_path: Path) -> None:
    settings = replace(settings_of(replace(GRPO, steps=3, cut_share=0.5, user_share=0.25)), engine="vllm")
    run = run_grpo(settings, started, tmp_path / "run")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "reward" in row] == [1, 2, 3]


def test_it_is_chatted_with(started: Path) -> None:
    greedy = ServeSettings(temperature=0.0)
    theirs, ours = (load(str(started), settings=Settings(engine=name, serve=greedy)) for name in ("vllm", "ours"))
    for budget in (None, 9):
        found, expected = (each.ask("Compute 2 + 3.", budget=budget) for each in (theirs, ours))
        assert (found.text, found.stated, found.used, found.stop_reason) == (
            expected.text,
            expected.stated,
            expected.used,
            expected.stop_reason,
        )


def test_it_is_served_and_more_wait_than_it_decodes(started: Path) -> None:
    serve = ServeSettings(temperature=0.0, max_num_seqs=1 + HEAD_ROWS)

    def answers(engine: str) -> list[str]:
        """Of six requests that come at once, with one slot."""
        decoder, told = Decoder(load(str(started), settings=Settings(engine=engine, serve=serve, four_bit=False)), 9), {}
        for i in range(6):
            messages = ({"role": "user", "content": f"Compute {i} + 3."},)
            decoder.begin(Job(ServeRequest(ask=Ask(temperature=0, seed=i), messages=messages)))
        while decoder.jobs:
            decoder.turn()
        for job, update in decoder.take_news():
            assert update.error is None
            told[job] = told.get(job, "") + "".join(part.text for part in update.parts)
        return list(told.values())

    async def both() -> tuple[list[str], list[str]]:
        return answers("vllm"), answers("ours")

    found, expected = asyncio.run(both())
    assert len(found) == 6
    assert found == expected


def test_the_bench_times_it_beside_ours() -> None:
    found = json.loads(run_verb("bench rollout --engine ours,vllm --requests 8 --slots 4 --rounds 1 --mean 5 --max-tokens 20 --json"))
    assert set(found["engines"]) == {"ours", "vllm"}
    assert "ratio_vllm" in found


def test_a_gguf_file_is_unpacked_for_it(policy: Policy, tmp_path: Path) -> None:
    file = write_gguf(BUNDLED, "f32", tmp_path / "plain.gguf")
    theirs = load_policy(str(file), Settings(engine="vllm"), slots=4)
    requests = asked(theirs, 4, 30)
    found, expected = (each.sample(requests, Sampling(0)) for each in (theirs, policy))
    assert [e.completion_ids for e in found] == [e.completion_ids for e in expected]


def test_what_vllm_refuses_at_its_start_is_one_line(tiny) -> None:
    policy = build_policy(*tiny, engine="vllm", kv_cache_gib=0.0001)
    with pytest.raises(InputError, match=r"vLLM cannot start for .*use --engine ours or generate") as error:
        policy.sample(asked(policy, 1, 300), Sampling())
    assert "\n" not in str(error.value)
    policy.engine.kv_cache_gib = None
    assert policy.sample(asked(policy, 1, 20), Sampling())[0].completion_ids  # it starts anew

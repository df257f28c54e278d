"""Control inside the decode loop: ceilings, forced tokens and interruption, beside answers that have none of it."""

from dataclasses import replace
from threading import Event

import pytest
import torch

from sbtiny.budget.protocol import SOLUTION, body_length
from sbtiny.errors import InputError
from sbtiny.rollout.engine import Engine
from sbtiny.rollout.episode import Episode, Request
from sbtiny.rollout.limits import Limits
from sbtiny.rollout.sampling import Sampling
from sbtiny.tasks import arithmetic

WRAP_UP = "\nSo the answer is "


def asked(policy, count: int, **more) -> list[Request]:
    return [policy.request(q.question, 300, seed=i, **more) for i, q in enumerate(arithmetic.generate_questions("val", count))]


def body(policy, episode: Episode) -> int:
    """Tokens after the opening tag, or all of them where there is none: never fewer than the body has."""
    if episode.request.prefill or SOLUTION.opening not in episode.text:
        return len(episode.completion_ids) - episode.ended
    return body_length([policy.engine.pieces[i] for i in episode.completion_ids], episode.parsed)


def held(policy, episodes: list[Episode], limits: Limits) -> None:
    for episode in episodes:
        forced = [i for i, injected in zip(episode.completion_ids, episode.injected, strict=True) if injected]
        assert len(episode.injected) == len(episode.completion_ids)
        assert forced in ([], list(limits.wrap_up))
        tag = len(policy.encode(SOLUTION.closing)) if episode.parsed.ok else 0
        assert body(policy, episode) <= limits.ceiling + limits.reserve + tag
        assert (episode.stop_reason == "ceiling") >= bool(forced)


def test_a_ceiling_holds_and_what_was_injected_is_marked(policy):
    limits = Limits(ceiling=25, wrap_up=tuple(policy.encode(WRAP_UP)), reserve=40)
    episodes = policy.sample(asked(policy, 60, limits=limits, budget=30), Sampling(temperature=1.3, logprobs=True))
    held(policy, episodes, limits)
    cut = [e for e in episodes if any(e.injected)]
    assert len(cut) > 10
    assert {e.limited_by for e in episodes} == {"ceiling"}
    assert {e.allowed for e in episodes} == {25}
    assert all(WRAP_UP in e.text for e in cut)
    assert all(v == 0 for e in cut for v, forced in zip(e.logprobs, e.injected, strict=True) if forced)


@pytest.mark.slow
def test_a_ceiling_holds_in_two_thousand_random_episodes(policy):
    limits = Limits(ceiling=25, wrap_up=tuple(policy.encode(WRAP_UP)), reserve=40)
    for prefilled in (None, 30):
        episodes = policy.sample(asked(policy, 1000, limits=limits, budget=prefilled), Sampling(temperature=1.3))
        held(policy, episodes, limits)
        assert sum(any(e.injected) for e in episodes) > 100


def test_forced_tokens_are_read_by_the_model(policy, tiny):
    model, _ = tiny
    limits = Limits(ceiling=10, wrap_up=tuple(policy.encode(WRAP_UP)), reserve=40)
    episodes = policy.sample(asked(policy, 16, limits=limits, budget=30), Sampling(temperature=0))
    assert any(any(e.injected) for e in episodes)
    for episode in episodes:
        ids = torch.tensor([[*episode.request.prompt_ids, *episode.completion_ids]])
        with torch.no_grad():
            best = model(input_ids=ids).logits[0, len(episode.request.prompt_ids) - 1 : -1].argmax(-1).tolist()
        sampled = [i for i, forced in enumerate(episode.injected) if not forced]
        assert [best[i] for i in sampled] == [episode.completion_ids[i] for i in sampled]


def test_limits_that_do_not_bite_change_nothing_nor_do_neighbours_with_limits(policy):
    plain = asked(policy, 30)
    wide = [replace(r, limits=Limits(ceiling=5_000, wrap_up=(20,), reserve=9)) if i % 2 else r for i, r in enumerate(plain)]
    narrow = [replace(r, limits=Limits(ceiling=3)) if i % 2 else r for i, r in enumerate(plain)]
    expected = [e.completion_ids for e in policy.sample(plain, Sampling())]
    assert [e.completion_ids for e in policy.sample(wide, Sampling())] == expected
    assert [e.completion_ids for e in policy.sample(narrow, Sampling())][::2] == expected[::2]


def test_an_interruption_ends_within_two_steps(policy, monkeypatch):
    event, steps, at = Event(), 0, {}
    decode = Engine._decode

    def counted(self, *args):
        nonlocal steps
        steps += 1
        if steps == 7:
            event.set()
        return decode(self, *args)

    monkeypatch.setattr(Engine, "_decode", counted)
    requests = [replace(r, interrupt=event) for r in asked(policy, 30)]
    episodes = policy.sample(requests, Sampling(), lambda i, e: at.setdefault(i, steps))
    late = [e for e in episodes if e.stop_reason == "interrupted"]
    assert len(late) > 20
    assert max(at.values()) <= 7 + 2
    assert all(len(e.completion_ids) <= 8 for e in late)
    assert len(episodes) == 30


def test_one_is_interrupted_and_the_others_are_not(policy):
    event = Event()
    event.set()
    requests = asked(policy, 14)
    expected = [e.completion_ids for e in policy.sample(requests, Sampling())]
    requests[3] = replace(requests[3], interrupt=event)
    episodes = policy.sample(requests, Sampling())
    assert (episodes[3].stop_reason, episodes[3].completion_ids) == ("interrupted", [])
    assert [e.completion_ids for i, e in enumerate(episodes) if i != 3] == [e for i, e in enumerate(expected) if i != 3]


def test_a_stop_token_in_the_wrap_up_is_refused(policy):
    stop = int(policy.engine.stops.argmax())
    with pytest.raises(InputError, match="wrap-up"):
        policy.sample(asked(policy, 1, limits=Limits(ceiling=1, wrap_up=(stop,), reserve=2)), Sampling())

"""Control inside the decode loop: ceilings, forced tokens and interruption, beside answers that have none of it."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sbtiny.budget.protocol import SOLUTION, body_length, parse
from sbtiny.budget.stream import AnswerSplitter
from sbtiny.errors import InputError
from sbtiny.rollout.engine import Engine
from sbtiny.rollout.episode import Episode, Request, Sampling
from sbtiny.rollout.limit_enforcer import SAFE_POINT_TOKENS, Interrupt, LimitEnforcer
from sbtiny.rollout.limits import Limits
from sbtiny.rollout.load_policy import build_policy
from sbtiny.rollout.sampling import TagMask
from sbtiny.rollout.token_pieces import TokenPieces
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
    interrupt, steps, at = Interrupt(), 0, {}
    decode = Engine._decode

    def counted(self, *args):
        nonlocal steps
        steps += 1
        if steps == 7:
            interrupt.press()
        return decode(self, *args)

    monkeypatch.setattr(Engine, "_decode", counted)
    requests = [replace(r, interrupt=interrupt) for r in asked(policy, 30)]
    episodes = policy.sample(requests, Sampling(), lambda i, e: at.setdefault(i, steps))
    late = [e for e in episodes if e.stop_reason == "interrupted"]
    assert len(late) > 20
    assert max(at.values()) <= 7 + 2
    assert all(len(e.completion_ids) <= 8 for e in late)
    assert len(episodes) == 30


def test_one_is_interrupted_and_the_others_are_not(policy):
    interrupt = Interrupt()
    interrupt.press()
    requests = asked(policy, 14)
    expected = [e.completion_ids for e in policy.sample(requests, Sampling())]
    requests[3] = replace(requests[3], interrupt=interrupt)
    episodes = policy.sample(requests, Sampling())
    assert (episodes[3].stop_reason, episodes[3].completion_ids) == ("interrupted", [])
    assert [e.completion_ids for i, e in enumerate(episodes) if i != 3] == [e for i, e in enumerate(expected) if i != 3]


def test_a_stop_token_in_the_wrap_up_is_refused(policy):
    stop = int(policy.engine.stops.argmax())
    with pytest.raises(InputError, match="wrap-up"):
        policy.sample(asked(policy, 1, limits=Limits(ceiling=1, wrap_up=(stop,), reserve=2)), Sampling())


# ---- answer now: pure, by the texts of tokens -------------------------------------------------------------------------------------

WORDS = ["a", "3", ".", " b", "\n", "x\ufffd", "<", "</", "think", "solution", ">", "</think>", "</solution>", "\ufffd"]
FRAGMENTS = {5: b"x\xc3", 13: b"\xa9"}  # "xé" in two tokens
FORMS = {"solution": ("\nSo: ", "2"), "think": ("\nNow.", "</think>", "\n")}


def simulate(form: str, prefilled: bool, ceiling: int | None, presses: list[int], draws: list[int]) -> tuple[LimitEnforcer, list[str], str]:
    """An answer whose sampled tokens are `draws` of WORDS (the end of the list is a stop token), pressed before the tokens `presses`.

    Tokens that would write a masked tag are drawn again, as a sampler does. Returns (enforcer, texts written, reason).
    """
    opening = f"<budget>40</budget><{form}>"
    wrap = FORMS[form]
    pieces = TokenPieces([*WORDS, *(["<budget>", "40", "</budget>", f"<{form}>"]), *wrap], FRAGMENTS)
    limits = Limits(ceiling, None, tuple(range(len(WORDS) + 4, len(pieces))), reserve=12)
    interrupt, mask = Interrupt(), TagMask(pieces)
    enforcer = LimitEnforcer(limits, opening if prefilled else "", interrupt, pieces)
    head = [] if prefilled else list(range(len(WORDS), len(WORDS) + 4))
    written: list[str] = []
    for step, token in enumerate([*head, *draws, -1]):
        for _ in range(presses.count(step)):
            interrupt.press()
        if token >= 0 and enforcer.masked_tag and token in mask.tokens(*enforcer.masked_tag).tolist():
            token = 0
        outcome = enforcer.check_token(max(token, 0), token < 0)
        if isinstance(outcome, str):
            return enforcer, written, outcome
        if token < 0 and not enforcer.injected[-1]:
            return enforcer, written, "end"
        written.append(pieces[outcome])
    return enforcer, written, "length"


ORDERS = (
    st.sampled_from(["solution", "think"]),
    st.booleans(),
    st.none() | st.integers(0, 60),
    st.lists(st.integers(0, 90), max_size=3),
    st.lists(st.integers(0, len(WORDS) - 1), max_size=120),
)


def check_any_order(form: str, prefilled: bool, ceiling: int | None, presses: list[int], draws: list[int]) -> None:
    enforcer, written, reason = simulate(form, prefilled, ceiling, presses, draws)
    wrap, text, presses = FORMS[form], "".join(written), sorted(p for p in presses if p <= len(written))
    forced = [i for i, injected in enumerate(enforcer.injected[: len(written)]) if injected]
    assert tuple(written[i] for i in forced) == wrap[: len(forced)]
    assert forced == list(range(forced[0], forced[0] + len(forced))) if forced else True
    if reason == "interrupted":
        assert presses
    if len(presses) > 1:
        assert len(written) <= presses[1]  # the second press ends it where it is
    elif presses:
        tag = 11  # tokens of the longest closing tag: an answer is not interrupted inside one, nor in a character of 4 bytes
        assert len(written) - presses[0] <= SAFE_POINT_TOKENS + 12 + tag + 4
    if forced and enforcer.cause == "interrupted":
        inside = forced[0] and written[forced[0] - 1] == "x\ufffd"
        assert not inside or forced[0] - presses[0] >= SAFE_POINT_TOKENS  # a broken character: nothing completed it
    if forced and form == "think" and len(forced) == len(wrap):
        assert "</think>" not in "".join(written[forced[-1] + 1 :])
    splitter = AnswerSplitter(f"<budget>40</budget><{form}>" if prefilled else "")
    shown = [part for piece in written for part in splitter.feed(piece)] + splitter.close()
    streamed = {kind: "".join(p.text for p in shown if p.kind == kind) for kind in ("thoughts", "answer")}
    parsed = parse((f"<budget>40</budget><{form}>" if prefilled else "") + text)
    if parsed.ok:
        body = streamed["thoughts" if form == "think" else "answer"]
        assert body == parsed.body.lstrip()
        assert form == "solution" or streamed["answer"] == parsed.answer.lstrip()


def test_answer_now_and_limits_in_any_order() -> None:
    given(*ORDERS)(settings(max_examples=1500)(check_any_order))()


@pytest.mark.slow
def test_answer_now_and_limits_in_any_of_100_000_orders() -> None:
    given(*ORDERS)(settings(max_examples=100_000)(check_any_order))()


def test_answer_now_waits_for_the_end_of_a_line_or_sentence_but_not_for_ever() -> None:
    def point(words: list[str], press: int) -> int:
        draws = [WORDS.index(w) for w in words]
        enforcer, _, reason = simulate("solution", True, None, [press], draws + [0] * 60)
        assert (enforcer.cause, reason) == ("interrupted", "interrupted")
        return enforcer.injected.index(True)

    assert point(["a", "a", "\n", "a", "a"], 1) == 3  # after the line
    assert point(["a", "3", ".", "3", ".", " b", "a"], 1) == 5  # after the sentence, not within the decimal
    assert point(["a"] * 40, 2) == 2 + SAFE_POINT_TOKENS
    assert point([], 0) == 0  # nothing is written: at once
    assert point(["a"] * 17 + ["x\ufffd", "\ufffd", "a"], 2) == 2 + SAFE_POINT_TOKENS - 1  # a character is not begun at the end


@given(st.text("a漢é😀 ", min_size=60, max_size=90), st.integers(0, 20))
def test_answer_now_is_never_inside_a_character_nor_later_where_every_byte_is_a_token(text: str, press: int) -> None:
    fragments = {byte: bytes([byte]) for byte in range(128, 256)}
    pieces = TokenPieces([chr(byte) if byte < 128 else "\ufffd" for byte in range(256)], fragments)
    interrupt, data = Interrupt(), text.encode()
    enforcer = LimitEnforcer(Limits(None, None, (10,), 9), "<budget>40</budget><solution>", interrupt, pieces)
    for count, byte in enumerate(data):
        if count == press:
            interrupt.press()
        assert isinstance(enforcer.check_token(byte, False), int)
        if enforcer.injected[-1]:
            assert data[:count].decode() == text[: len(data[:count].decode())]
            assert press <= count <= press + SAFE_POINT_TOKENS
            return
    pytest.fail("it was never interrupted")


def test_a_press_after_the_body_ends_an_answer_and_one_before_does_not() -> None:
    close, draws = WORDS.index("</think>"), [0] * 6
    _, written, reason = simulate("think", True, None, [4], [0, close, *draws])
    assert (len(written), reason) == (4, "interrupted")
    enforcer, written, reason = simulate("think", True, None, [1], [0, close, *draws])
    assert (len(written), reason, any(enforcer.injected)) == (8, "end", False)


def test_a_model_that_closes_again_after_a_forced_close_cannot() -> None:
    policy_pieces = ["a", "</", "think", ">", "</think>", "b</thi", "<"]
    mask = TagMask(policy_pieces)
    assert mask.tokens("</think>", 0).tolist() == [4, 5]
    assert mask.tokens("</think>", 2).tolist() == [2, 4, 5]
    logits = torch.zeros(2, 7)
    limits = Limits(0, None, (4,), reserve=9)
    closed = LimitEnforcer(limits, "<budget>4</budget><think>", None, policy_pieces)
    assert [closed.check_token(t, False) for t in (0, 1)] == [4, 1]
    mask.apply(logits, [None, closed])
    assert logits[0].isfinite().all()
    assert logits[1].isneginf().tolist() == [False, False, True, False, True, True, False]


@pytest.mark.parametrize("engine", ["ours", "generate"])
def test_answer_now_gives_an_answer(tiny, engine: str, monkeypatch) -> None:
    policy = build_policy(*tiny, slots=12, engine=engine)
    wrap, interrupt, judge = tuple(policy.encode(WRAP_UP)), Interrupt(), LimitEnforcer.check_token

    def press_at_20(self, token, stop):
        if len(self.injected) == 19:
            interrupt.press()
        return judge(self, token, stop)

    monkeypatch.setattr(LimitEnforcer, "check_token", press_at_20)
    request = asked(policy, 1, budget=90, limits=Limits(wrap_up=wrap, reserve=40), interrupt=interrupt)[0]
    episode = policy.sample([request], Sampling(0))[0]
    assert episode.stop_reason == "interrupted"
    assert WRAP_UP in episode.text
    assert 19 <= episode.injected.index(True) <= 19 + SAFE_POINT_TOKENS
    assert sum(episode.injected) == len(wrap)
    assert len(episode.completion_ids) <= episode.injected.index(True) + 40 + len(policy.encode(SOLUTION.closing)) + 1


def test_a_stop_token_sampled_where_one_is_forced_does_not_hide_the_forced_close() -> None:
    pieces = ["x", "</think>", "</s>"]
    enforcer = LimitEnforcer(Limits(ceiling=1, wrap_up=(1,), reserve=8), "<budget>1</budget><think>", None, pieces)
    assert [enforcer.check_token(0, stop=False), enforcer.check_token(0, stop=False)] == [0, 1]
    assert enforcer.masked_tag is not None
    enforcer = LimitEnforcer(Limits(ceiling=1, wrap_up=(0, 1), reserve=8), "<budget>1</budget><think>", None, pieces)
    assert [enforcer.check_token(0, stop=False), enforcer.check_token(0, stop=False), enforcer.check_token(2, stop=True)] == [0, 0, 1]
    assert enforcer.masked_tag is not None

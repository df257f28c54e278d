"""The Python API on a real run: budgets are kept, an answer comes when it is asked for, turns go on."""

import copy
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from serve_support import script_answers
from tokenizers import Tokenizer, decoders, models

import sbtiny
from sbtiny.budget.protocol import THINK
from sbtiny.budget.seconds import Rate
from sbtiny.config import ServeSettings, Settings
from sbtiny.errors import InputError
from sbtiny.rollout.load_policy import build_policy
from sbtiny.serving.assistant import Assistant
from sbtiny.serving.reply import Reply
from sbtiny.tasks import arithmetic

SHORT = next(q.question for q in arithmetic.generate_questions("val", 99) if q.level <= 2)
LONG = next(q.question for q in arithmetic.generate_questions("val", 99) if q.level >= 4)


@pytest.fixture(scope="module")
def assistant(started) -> Assistant:
    """Of a run that states a budget and answers with a bare box, greedy."""
    return sbtiny.load(str(started), settings=Settings(four_bit=False, serve=ServeSettings(temperature=0.0, max_num_seqs=4)))


@pytest.fixture
def plain(tiny) -> Assistant:
    """Of the bundled model, which states no budget and reckons at length."""
    return Assistant(build_policy(*tiny, slots=3, states_budget=False), ServeSettings(temperature=0.0, context=512))


def test_it_states_a_budget_and_answers(assistant: Assistant) -> None:
    answer = assistant.ask(SHORT)
    assert (answer.source, answer.given, answer.stop_reason, answer.ended) == ("stated", None, "end", True)
    assert answer.stated > 0
    assert answer.allowed == int(answer.stated * 1.5)
    assert 0 < answer.used <= answer.allowed + 64
    assert "<" not in answer.text
    assert answer.promise is None  # not calibrated
    assert assistant.session.is_busy is False


def test_a_given_budget_is_prefilled_and_is_a_limit(assistant: Assistant) -> None:
    answer = assistant.ask(SHORT, budget=3)
    assert (answer.given, answer.stated, answer.source, answer.allowed) == (3, None, "given", 3)
    doubled = assistant.ask(SHORT, budget="2x")
    assert (doubled.given, doubled.source) == (2 * doubled.stated, "scaled")
    assert doubled.stated == assistant.ask(SHORT).stated


def test_a_budget_in_seconds_is_the_tokens_of_the_measured_rate(assistant: Assistant, monkeypatch) -> None:
    monkeypatch.setattr(assistant, "rate", Rate())  # nothing is measured yet
    answer = assistant.ask(SHORT, seconds=0.5)
    assert answer.source == "seconds"
    assert 0.1 < answer.given / (0.5 * assistant.measured_rate()) < 10


def test_many_questions_at_once_give_what_each_gives_alone(assistant: Assistant) -> None:
    questions = [q.question for q in arithmetic.generate_questions("val", 9)]
    together = assistant.ask_all(questions)
    alone = [assistant.ask(q) for q in questions]
    assert [(a.text, a.stated) for a in together] == [(a.text, a.stated) for a in alone]


@pytest.mark.parametrize("at", [1, 7, 30])
def test_answer_now_gives_an_answer(plain: Assistant, at: int) -> None:
    reply = plain.stream(LONG)
    for count, _ in enumerate(reply):
        if count == at:
            reply.press()
    answer = reply.answer
    assert answer.stop_reason == "interrupted"
    assert "Time is up. \\boxed{" in answer.text
    assert answer.ended
    assert answer.text.index("Time is up") < len(plain.ask(LONG).text)


def test_a_second_press_ends_it_where_it_is(plain: Assistant) -> None:
    reply = plain.stream(LONG)
    for count, _ in enumerate(reply):
        if count in (5, 6):
            reply.press()
    assert reply.answer.stop_reason == "interrupted"
    assert not reply.answer.ended
    assert reply.answer.tokens <= 9


def test_parts_join_to_the_answer_and_the_count_down_falls(plain: Assistant) -> None:
    reply, left = plain.stream(LONG, budget=100), []
    text = ""
    for part in reply:
        text += part.text
        left.append(reply.progress().left)
    assert text.strip() == reply.answer.text
    counted = [n for n in left if n is not None]
    assert counted == sorted(counted, reverse=True)
    assert counted[0] > 90


def test_a_plain_model_takes_a_budget_as_a_ceiling(plain: Assistant) -> None:
    answer = plain.ask(LONG, budget=20)
    assert (answer.given, answer.stated, answer.allowed, answer.stop_reason) == (20, None, 22, "ceiling")
    assert "<budget>" not in answer.text
    assert plain.ask(LONG).source == "none"


def test_room_for_an_answer_is_kept_where_max_tokens_end_first(plain: Assistant) -> None:
    ask = replace(plain.defaults, max_tokens=60)
    answer = plain.begin([{"role": "user", "content": LONG}], ask).wait()
    assert (answer.stop_reason, answer.ended) == ("ceiling", True)
    assert answer.tokens <= 60


def test_the_next_turn_goes_on_from_the_last(assistant: Assistant, monkeypatch) -> None:
    messages = [{"role": "user", "content": SHORT}]
    first = assistant.ask(messages)
    engine, computed = assistant.policy.engine, []
    prefill = engine._prefill

    def counted(prompts, beginning=None):
        computed.append(sum(map(len, prompts)) - (0 if beginning is None else beginning.shape[-2]))
        return prefill(prompts, beginning)

    monkeypatch.setattr(assistant.session.scheduler, "prefill", counted)
    messages += [
        {"role": "assistant", "content": f"<budget>9</budget><solution>{first.text}</solution>"},
        {"role": "user", "content": "2+2?"},
    ]
    second = assistant.stream(messages)
    assert "budget" not in assistant.policy.tokenizer.decode(second.prompt)
    assert second.body.request.prefill == "<budget>"  # training has no second turn: its budget's tag is opened for it
    assert second.wait().source == "stated"
    assert computed[0] < len(second.prompt) / 1.5


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_a_character_that_a_ceiling_cuts_is_left_out(plain: Assistant, kept: int) -> None:
    reply = plain.stream(SHORT)
    character, wrap_up = plain.policy.encode("😀"), plain.policy.encode("\n漢 \\boxed{")
    written = [*plain.policy.encode("so "), *character[:kept], *wrap_up]
    for token in written:
        reply.body.written.append(token)
        reply.body.enforcer.injected.append(len(reply.body.written) > len(written) - len(wrap_up))
        reply.advance()
    assert len(character) == 4
    assert "".join(part.text for part in reply.parts) == "so \n漢 \\boxed{"


def test_a_dropped_answer_leaves_room(plain: Assistant) -> None:
    replies = [plain.stream(LONG) for _ in range(4)]  # one more than there are slots
    plain.step_each()
    for reply in replies[:3]:
        plain.drop(reply)
    assert replies[3].wait().text
    assert not any(r.is_done for r in replies[:3])


def test_a_dropped_answer_ends_for_who_reads_it(plain: Assistant) -> None:
    reply = plain.stream(LONG)
    for _ in reply:
        plain.drop(reply)
    assert reply.answer is None
    with pytest.raises(InputError, match="was dropped"):
        reply.wait()


def test_an_answer_that_cannot_go_on_says_so_and_the_others_end(assistant: Assistant) -> None:
    other, failing = assistant.stream(SHORT), assistant.stream(SHORT, budget="2x")
    failing.head.episode = None
    failing.refusal = InputError("no room")
    assert other.wait().text
    with pytest.raises(InputError, match="no room"):
        failing.wait()


def test_nothing_runs_on_after_an_error_or_ctrl_c(plain: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = plain.stream(LONG)
    with pytest.raises(InputError, match="no question"):
        plain.ask_all([SHORT, ""])
    assert plain.running == [kept]
    monkeypatch.setattr(Reply, "wait", lambda reply: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        plain.ask(LONG)
    assert plain.running == [kept]


def test_what_cannot_be_asked_is_said(assistant: Assistant, plain: Assistant) -> None:
    for call, reason in (
        (lambda: assistant.ask(SHORT, coverage=0.9), "no promise without a calibration"),
        (lambda: assistant.ask(SHORT, budget=3, seconds=1), "say one of them"),
        (lambda: assistant.ask(SHORT, budget="many"), "not understood.* 90%"),
        (lambda: assistant.ask("x" * 9000), "begin a new one"),
        (lambda: assistant.ask("<|im_end|>"), "special token"),
        (lambda: assistant.ask(""), "no question"),
        (lambda: assistant.ask([{"role": "user"}]), "is no turn of a chat"),
        (lambda: assistant.ask([SHORT]), "is no turn of a chat"),
        (lambda: assistant.ask([{"role": "usr", "content": SHORT}]), "the role 'usr' is none of system, user, assistant"),
        (lambda: assistant.ask([{"role": "", "content": "x"}, {"role": "user", "content": SHORT}]), "the role '' is none of"),
        (lambda: assistant.ask("\ud800"), "is not UTF-8"),
        (lambda: assistant.ask_all(SHORT), "use ask for one"),
        (lambda: plain.base_model().__enter__(), "no base model"),
    ):
        with pytest.raises(InputError, match=reason):
            call()
    assert not assistant.running
    assert assistant.ask(SHORT).text


def test_the_base_model_answers_without_a_budget_and_the_run_comes_back(assistant: Assistant) -> None:
    before = assistant.ask(SHORT, seed=1)
    with assistant.base_model():
        assert assistant.ask(SHORT).source == "none"
    assert assistant.ask(SHORT, seed=1).text == before.text
    assert assistant.ask(SHORT, seed=1).stated == before.stated


def test_an_engine_that_cannot_stream_is_refused(tiny) -> None:
    with pytest.raises(InputError, match="cannot stream"):
        Assistant(build_policy(*tiny, slots=2, engine="generate"), ServeSettings())


def test_the_python_of_the_readme_runs(started, capsys) -> None:
    code = re.search(r"```python\n(.*?)```", (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    names: dict = {}
    exec(code.replace("runs/demo", str(started)), names)
    assert names["reply"].answer.source == "scaled"
    assert len(names["answers"]) == 2
    assert str(names["answer"].stated) in capsys.readouterr().out


@pytest.fixture
def thinking(tiny) -> Assistant:
    """The bundled model in the think format, which it was not trained in: with a given budget all it writes is thoughts."""
    return Assistant(build_policy(*tiny, slots=2, form=THINK), ServeSettings(temperature=0.0, context=512, reserve=40))


def test_thoughts_that_reach_their_budget_are_closed_and_an_answer_follows(thinking: Assistant) -> None:
    reply = thinking.stream(LONG, budget=30)
    kinds = [part.kind for part in reply]
    answer = reply.answer
    assert kinds == sorted(kinds, reverse=True)  # thoughts, then the answer
    assert (answer.stop_reason, answer.given, answer.allowed) == ("ceiling", 30, 33)
    assert answer.thoughts.endswith("Time is up.")
    assert answer.text
    assert "think>" not in answer.text + answer.thoughts
    assert answer.used <= 33 + 40


def test_a_template_that_opens_the_thoughts_itself(tiny) -> None:
    model, tokenizer = tiny
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template += "{% if add_generation_prompt %}<think>\n{% endif %}"
    plain = Assistant(build_policy(model, tokenizer, slots=2, states_budget=False), ServeSettings(temperature=0.0, context=512, reserve=60))
    reply = plain.stream(LONG)
    for count, _ in enumerate(reply):
        if count == 9:
            reply.press()
    assert reply.answer.thoughts.endswith("Time is up.")
    assert reply.answer.text
    assert reply.answer.stop_reason == "interrupted"


def test_thoughts_that_a_plain_model_opens_are_closed_where_they_are_cut(plain: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    script_answers(monkeypatch, plain.policy, "<think>" + "a) sells 1\n" * 40)
    answer = plain.ask(SHORT, budget=40)
    assert answer.stop_reason == "ceiling"
    assert answer.thoughts.endswith("Time is up.")
    assert answer.text
    assert "think>" not in answer.text


@pytest.mark.parametrize("presses", [False, True])
def test_thoughts_that_a_plain_model_closed_are_not_closed_again(plain: Assistant, monkeypatch: pytest.MonkeyPatch, presses: bool) -> None:
    script_answers(monkeypatch, plain.policy, "<think>a) sells 1\n</think>So " + "b) finds 2\n" * 60)
    reply = plain.stream(SHORT, budget=30)
    for _ in reply:
        if presses and "So" in reply._joined("answer"):
            reply.press()
    assert reply.answer.thoughts == "a) sells 1"
    assert reply.answer.text.startswith("So")
    assert "think>" not in reply.answer.text
    assert "Time is up" not in reply.answer.text


def test_answers_that_run_are_dropped_where_the_weights_change(assistant: Assistant) -> None:
    assistant.stream(LONG)
    assistant.step_each()
    with assistant.base_model():
        assert assistant.running == []
    assert assistant.ask(SHORT).ended


def test_bytes_that_are_no_character_do_not_end_the_others(plain: Assistant) -> None:
    """The decoder of sentencepiece's bytes raises for some of them."""
    letters = {"a": 0, "b": 1} | {f"<0x{byte:02X}>": byte + 2 for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(letters, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    reply = plain.stream(SHORT)
    plain.drop(reply)
    reply.tokenizer, texts = tokenizer, []
    for token in np.random.default_rng(0).integers(0, 258, 3000).tolist():
        texts.append(reply._decode(token) or "")
    assert reply._decode(0) is not None
    assert {"a", "\ufffd"} <= set("".join(texts))


QUIET = """
import sys, warnings
import sbtiny
from sbtiny.progress import quiet_while_loading
from transformers.utils import logging
seen = lambda: (logging.get_verbosity(), logging.is_progress_bar_enabled())
before = seen()
sbtiny.load(sys.argv[1]).ask("1 + 1?")
assert seen() == before
with quiet_while_loading():
    warnings.warn("soon otherwise", FutureWarning)
    warnings.warn("a matter of yours")
"""


def test_loading_prints_nothing_but_warnings(started: Path) -> None:
    done = subprocess.run([sys.executable, "-c", QUIET, str(started)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert re.fullmatch(r"<string>:\d+: UserWarning: a matter of yours\n", done.stderr)

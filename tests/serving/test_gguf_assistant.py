"""The Python API on GGUF files through llama.cpp, and characters that take several tokens."""

from dataclasses import replace
from pathlib import Path

import pytest

import sbtiny
from sbtiny.config import ServeSettings, Settings
from sbtiny.rollout.load_policy import build_gguf_policy
from sbtiny.serving.assistant import Assistant
from sbtiny.tasks import arithmetic

SHORT = next(q.question for q in arithmetic.generate_questions("val", 99) if q.level <= 2)
LONG = next(q.question for q in arithmetic.generate_questions("val", 99) if q.level >= 4)
WRAP_UP = "\n😀é漢 \\boxed{"


def test_an_exported_run_answers_as_the_run_does(started: Path, started_gguf: Path) -> None:
    greedy = Settings(four_bit=False, serve=ServeSettings(temperature=0.0, max_num_seqs=2))
    file, run = (sbtiny.load(str(model), settings=greedy) for model in (started_gguf, started))
    turns = [{"role": "user", "content": SHORT}]
    for budget in (None, 3, "2x"):
        answers = [replace(assistant.ask(SHORT, budget), seconds=0.0) for assistant in (file, run)]
        assert answers[0] == answers[1]
    for question in ("2+3?", "And 7+1?"):  # it was not trained on turns: what comes is the same, not right
        answers = [replace(assistant.ask(turns), seconds=0.0) for assistant in (file, run)]
        assert answers[0] == answers[1]
        turns += [{"role": "assistant", "content": answers[1].text}, {"role": "user", "content": question}]


@pytest.mark.parametrize("at", [1, 7, 30])
def test_answer_now_gives_an_answer_of_whole_characters(plain_gguf: Path, at: int) -> None:
    assistant = Assistant(build_gguf_policy(plain_gguf, slots=2), ServeSettings(temperature=0.0, context=512, wrap_up=WRAP_UP))
    reply, parts = assistant.stream(LONG), []
    for count, part in enumerate(reply):
        parts.append(part.text)
        if count == at:
            reply.press()
    answer = reply.answer
    assert (answer.stop_reason, answer.ended) == ("interrupted", True)
    assert "😀é漢 \\boxed{" in answer.text
    assert answer.text.rstrip().endswith("}")
    assert "".join(parts).strip() == answer.text
    assert {"😀", "é", "漢"} <= set(parts)  # each of several tokens, and each a part
    assert not any("\ufffd" in part for part in parts)

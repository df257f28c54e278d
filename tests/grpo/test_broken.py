"""Every alarm on a real run that is made to go wrong: another reward, the same model, trainer and watch.

One is run always; the others train for long, and test_alarms.py has their conditions on recorded and made-up series.
"""

import json
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
from helpers import GRPO

from sbtiny import runs
from sbtiny.pipeline import stages
from sbtiny.budget.protocol import prefill
from sbtiny.budget.reward import Reward
from sbtiny.config import DataSettings, GrpoSettings, Settings, SftSettings
from sbtiny.errors import Failed
from sbtiny.tasks import arithmetic
from sbtiny.coldstart import rows
from sbtiny.coldstart.sample_correct import label
from sbtiny.grpo.group_reward import Answer

BROKEN = replace(
    GRPO, steps=40, lr=3e-3, decay="constant_with_warmup", clip=1.0, prompts=4, group=8, micro_batch=16, temperature=1.0, limit=40,
    save_steps=0, hindsight=0, user_share=0.0, patience=4, max_tokens=60, tight_bmax=False, slots=32,
)  # fmt: skip


def paying(worth: Callable[[Answer], float]):
    """A reward of each answer by itself."""

    def reward(_: str, answers: Sequence[Answer], b_max: float, alpha: float) -> list[Reward]:
        return [Reward(worth(a), 0.0, 0.0, worth(a), a.budget is not None) for a in answers]

    return reward


def rung(start: Path, folder: Path, worth: Callable[[Answer], float], g: GrpoSettings = BROKEN) -> list[str]:
    """The alarms that rang, in their order; the run is stopped by one that says collapse."""
    with suppress(Failed):
        stages.run_grpo(Settings(grpo=g), start, folder, force=True, reward=paying(worth))
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [name for row in found for name in row.get("alarms", [])]


@pytest.mark.slow
def test_numbers_that_nothing_bounds(started: Path, tmp_path: Path) -> None:
    (tmp_path / "never.py").write_text("def check(question, completion):\n    return False\n")
    never = replace(BROKEN, steps=60, patience=5, verifier=f"{tmp_path / 'never.py'}:check")
    assert "budget inflation" in rung(started, tmp_path / "run", lambda a: math.log(a.budget) if a.budget else -1.0, never)


@pytest.mark.slow
def test_length_without_success(started: Path, tmp_path: Path) -> None:
    (tmp_path / "never.py").write_text("def check(question, completion):\n    return False\n")
    never = replace(BROKEN, verifier=f"{tmp_path / 'never.py'}:check")
    assert "wrong answers grow" in rung(started, tmp_path / "run", lambda a: a.length / 10 if a.budget else -1.0, never)


def test_a_reward_that_ceases_to_tell_answers_apart(started: Path, tmp_path: Path) -> None:
    answers = count()
    early = 8 * BROKEN.prompts * BROKEN.group
    frozen = replace(BROKEN, lr=1e-6)
    assert rung(started, tmp_path / "run", lambda a: float(a.length) if next(answers) < early else 0.0, frozen) == ["collapse of spread"]


@pytest.mark.slow
def test_words_around_the_tags(policy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cold start whose rows say a word before the solution, and a reward that does not mind."""
    asked = [q for q in arithmetic.questions("train", 400, seed=5) if q.level <= 2][:64]
    runs.write_jsonl(tmp_path / "rows.jsonl", [label(policy, q, f"\\boxed{{{q.answer}}}") for q in asked])
    with monkeypatch.context() as patched:
        patched.setattr(rows, "prefill", lambda budget, form: prefill(budget, form).replace("<sol", "\n7<sol"))
        settings = Settings(sft=SftSettings(data=str(tmp_path / "rows.jsonl"), steps=100, lr=3e-3), data=DataSettings(slots=8))
        start = stages.run_sft(settings, tmp_path / "sft")
    assert "text outside the tags" in rung(start, tmp_path / "run", lambda a: float(a.correct), replace(BROKEN, steps=6, lr=1e-5))


@pytest.mark.slow
def test_right_answers_unlearnt(tmp_path: Path) -> None:
    """From the bundled model itself, which is right without any tags."""
    easy = [q for q in arithmetic.questions("train", 400, seed=5) if q.level <= 2][:16]
    runs.write_jsonl(tmp_path / "easy.jsonl", [{"question": q.question, "answer": q.answer} for q in easy])
    start = runs.new("sft", tmp_path / "start", Settings())
    stages.open_policy("tiny", Settings(), 8, trainable=True).model.save_pretrained(start / "adapter")
    paid_wrong = replace(BROKEN, data=str(tmp_path / "easy.jsonl"), max_tokens=120, lr=1e-2)
    assert "collapse of accuracy" in rung(start, tmp_path / "run", lambda a: -float(a.correct), paid_wrong)

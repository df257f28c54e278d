"""Every alarm on a real run that a bad reward makes go wrong.

One test always runs; the others train for long. test_alarms.py checks their conditions on series.
"""

import json
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
from support import GRPO, easy_questions, train_briefly

from sbtiny import runs
from sbtiny.budget.protocol import render_budget
from sbtiny.budget.reward import Reward
from sbtiny.coldstart import rows
from sbtiny.coldstart.sample_correct import make_row
from sbtiny.config import GrpoSettings, Settings
from sbtiny.errors import Failed
from sbtiny.grpo.group_reward import RewardInput
from sbtiny.grpo.run import run_grpo
from sbtiny.rollout.load_policy import load_policy

BROKEN = replace(
    GRPO,
    steps=40,
    learning_rate=3e-3,
    lr_scheduler_type="constant_with_warmup",
    max_grad_norm=1.0,
    prompts_per_step=4,
    num_generations=8,
    micro_batch=16,
    temperature=1.0,
    limit=40,
    save_steps=0,
    relabel_per_group=0,
    user_share=0.0,
    alarm_patience=4,
    max_tokens=60,
    b_max_from_best=False,
    max_num_seqs=32,
)


def paying(worth: Callable[[RewardInput], float]):
    """A group reward that pays each answer its `worth`."""

    def reward(_: str, answers: Sequence[RewardInput], b_max: float, alpha: float) -> list[Reward]:
        return [Reward(worth(a), 0.0, 0.0, worth(a), a.budget is not None) for a in answers]

    return reward


def rung(start: Path, folder: Path, worth: Callable[[RewardInput], float], g: GrpoSettings = BROKEN) -> list[str]:
    """The alarms that rang, in order; a collapse stops the run."""
    with suppress(Failed):
        run_grpo(Settings(grpo=g), start, folder, force=True, reward=paying(worth))
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [name for row in steps for name in row.get("alarms", [])]


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cold start whose answers differ in length, and so in budget: where all are alike, a run finds a cheat by chance or not at all."""
    folder, policy = tmp_path_factory.mktemp("uneven"), load_policy("tiny", Settings(), 2)
    answers = [(q, f"{(i % 8) * '+1'}\\boxed{{{q.answer}}}") for i, q in enumerate(easy_questions(64))]
    runs.write_jsonl(folder / "rows.jsonl", [make_row(policy, q, answer) for q, answer in answers])
    return train_briefly(folder / "rows.jsonl", folder / "sft")


@pytest.mark.slow
def test_budgets_that_nothing_bounds(uneven: Path, tmp_path: Path) -> None:
    (tmp_path / "never.py").write_text("def check(question, completion):\n    return False\n")
    never = replace(BROKEN, steps=60, learning_rate=1e-3, prompts_per_step=8, alarm_patience=5, verifier=f"{tmp_path / 'never.py'}:check")
    assert "budget inflation" in rung(uneven, tmp_path / "run", lambda a: math.log(a.budget) if a.budget else -1.0, never)


@pytest.mark.slow
def test_length_without_success(uneven: Path, tmp_path: Path) -> None:
    (tmp_path / "never.py").write_text("def check(question, completion):\n    return False\n")
    never = replace(BROKEN, learning_rate=1e-3, verifier=f"{tmp_path / 'never.py'}:check")
    assert "wrong answers grow" in rung(uneven, tmp_path / "run", lambda a: a.length / 10 if a.budget else -10.0, never)


def test_a_reward_that_ceases_to_tell_answers_apart(started: Path, tmp_path: Path) -> None:
    answers = count()
    early = 8 * BROKEN.prompts_per_step * BROKEN.num_generations
    frozen = replace(BROKEN, learning_rate=1e-6)
    assert rung(started, tmp_path / "run", lambda a: float(a.length) if next(answers) < early else 0.0, frozen) == ["collapse of spread"]


@pytest.mark.slow
def test_words_around_the_tags(policy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cold start on rows with a word before the solution, and a reward that ignores it."""
    runs.write_jsonl(tmp_path / "rows.jsonl", [make_row(policy, q, f"\\boxed{{{q.answer}}}") for q in easy_questions(64)])
    with monkeypatch.context() as patched:
        patched.setattr(rows, "render_budget", lambda budget, form: render_budget(budget, form).replace("<sol", "\n7<sol"))
        start = train_briefly(tmp_path / "rows.jsonl", tmp_path / "sft")
    assert "text outside the tags" in rung(
        start, tmp_path / "run", lambda a: float(a.correct), replace(BROKEN, steps=6, learning_rate=1e-5)
    )


@pytest.mark.slow
def test_right_answers_unlearnt(tmp_path: Path) -> None:
    """From the bundled model, which is right without tags."""
    runs.write_jsonl(tmp_path / "easy.jsonl", [{"question": q.question, "answer": q.answer} for q in easy_questions(16)])
    start = runs.create_run("sft", tmp_path / "start", Settings())
    load_policy("tiny", Settings(), 8, trainable=True).model.save_pretrained(start / "adapter")
    paid_wrong = replace(BROKEN, questions=str(tmp_path / "easy.jsonl"), max_tokens=120, learning_rate=1e-2)
    assert "collapse of accuracy" in rung(start, tmp_path / "run", lambda a: -float(a.correct), paid_wrong)

"""The rewards of a group by its kind, and that another reward can replace the paper's."""

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
from rival_rewards import kimi

from sbtiny.budget.reward import Reward
from sbtiny.config import GrpoSettings, Settings
from sbtiny.grpo.group_reward import RewardInput, make_selfbudgeter_reward, scalar_reward
from sbtiny.grpo.groups import SELF_GROUP, GroupAnswer, GroupType
from sbtiny.grpo.rollouts import Rollouts
from sbtiny.rollout.episode import read_episode
from sbtiny.rollout.policy import Policy
from sbtiny.tasks import arithmetic
from sbtiny.tasks.verify import auto

PAPER = GrpoSettings(outside_slope=0.0, reward_peak=0.0)
RIGHT, WRONG, MALFORMED = RewardInput(100, 90, True), RewardInput(100, 110, False), RewardInput(None, 70, True)


def test_the_papers_golden_values() -> None:
    rewards = make_selfbudgeter_reward(PAPER)("self", [RIGHT, WRONG, MALFORMED], 99.0, 0.1)
    assert [r.total for r in rewards] == pytest.approx([1.0 - 0.4, 0.0 - 0.4, -1.0])


@pytest.mark.parametrize(
    ("chosen", "totals"), [(PAPER, (0.5, 1.0, 0.75)), (GrpoSettings(outside_slope=0.1, reward_peak=1.0), (0.4189, 0.75, 1.0))]
)
def test_the_settings_move_peak_and_slope(chosen: GrpoSettings, totals: tuple[float, ...]) -> None:
    """Right answers outside the window, on its lower edge, and of exactly the budget."""
    rewards = [make_selfbudgeter_reward(chosen)("self", [RewardInput(100, length, True)], math.inf, 0.1)[0] for length in (40, 90, 100)]
    assert [r.total for r in rewards] == pytest.approx(totals, abs=1e-4)


def test_a_given_budget_knows_no_b_max_and_a_cut_answer_only_right_and_wrong() -> None:
    reward = make_selfbudgeter_reward(PAPER)
    assert [r.budget_penalty for r in reward("user", [RIGHT, WRONG], 10.0, 6.0)] == [0.0, 0.0]
    assert [r.total for r in reward("cut", [RIGHT, WRONG, MALFORMED], 10.0, 6.0)] == [1.0, 0.0, -1.0]


def test_another_reward_sees_whole_groups_and_is_obeyed(policy: Policy, tmp_path: Path) -> None:
    """Kimi's compares the answers of a group; a relabelled answer is rewarded again with its group."""
    seen: list[tuple] = []

    def reward(kind: GroupType, answers: Sequence[RewardInput], b_max: float, alpha: float) -> list[Reward]:
        seen.append((kind, tuple(answers), b_max, alpha))
        earned = kimi([a.length for a in answers], [a.correct for a in answers])
        return [scalar_reward(a.budget, value) for a, value in zip(answers, earned, strict=True)]

    question = arithmetic.generate_questions("train", 1, seed=3)[0]
    settings = Settings(
        grpo=GrpoSettings(num_generations=2, prompts_per_step=1, micro_batch=2, relabel_per_group=1, relabel_per_user_group=0)
    )
    rollouts = Rollouts(policy, [question], auto, {question.id: 77.0}, settings, tmp_path, reward)

    def episode(stated: int, body: str):
        ids = policy.encode(f"<budget>{stated}</budget><solution>{body}</solution>")
        return read_episode(policy.request(question.question, 99, 1), [*ids, policy.tokenizer.eos_token_id], policy.engine.pieces, "end")

    box = f"\\boxed{{{question.answer}}}"
    scored = [GroupAnswer(question, SELF_GROUP, e) for e in (episode(500, box), episode(500, f"a)+1=2\n{box}"))]
    rollouts.score_answers([scored], 0.5)
    assert [s.reward.total for s in scored] == [1.5, 0.5]
    short, long = (s.episode.length for s in scored)
    assert seen == [("self", (RewardInput(500, short, True), RewardInput(500, long, True)), 77.0, 0.5)]
    rollouts.relabel(scored, 0.5)
    assert seen[1][1] == (RewardInput(short, short, True), RewardInput(500, long, True))
    assert [s.reward.total for s in scored] == [1.5, 0.5]

"""Will this run learn? Samples and scores a few groups before the first step and names the obstacles.

`find_obstacles` is pure; `measure_first_groups` samples through `Rollouts` and changes nothing.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import count
from statistics import fmean, pstdev
from typing import Any

from sbtiny.budget.protocol import detect_format
from sbtiny.config import Settings
from sbtiny.errors import Failed
from sbtiny.grpo.groups import SELF_GROUP, reward_range, split_groups
from sbtiny.grpo.rollouts import Rollouts, alpha_at_step
from sbtiny.grpo.step_metrics import ScoredEpisode
from sbtiny.tasks.sources import Question
from sbtiny.tasks.verify import Verifier

PREFLIGHT_GROUPS = 8
NONSENSE = "I do not know."
TRAINING_SHARE = 2.0  # seconds of a step over those of its generation, measured on the bundled model


@dataclass(frozen=True, slots=True)
class PreflightStats:
    """Metrics of the sampled groups; shares from 0 to 1, budgets and lengths in tokens. `hours` is a guess for the whole run.

    `reference_right`: share of reference answers that the verifier accepts. `nonsense_right`: the same for `NONSENSE`.
    `unended`: share of answers that closed their solution and went on until they were cut.
    """

    questions: int
    answers: int
    cut: float
    malformed: float
    unended: float
    accuracy: float
    reward_mean: float
    reward_std: float
    frac_reward_zero_std: float
    budget: float
    length: float
    reference_right: float
    nonsense_right: float
    hours: float


@dataclass(frozen=True, slots=True)
class Obstacle:
    cause: str
    hopeless: bool = True


def find_obstacles(f: PreflightStats, temperature: float) -> list[Obstacle]:
    """The obstacles to learning, causes before effects; else warnings, none for a run that will learn well."""
    obstacles = []
    if f.questions == 0:
        return [Obstacle("there are no questions: give others with --data or grpo.task")]
    if f.questions == 1:
        obstacles.append(Obstacle("there is one question, which it would learn by heart: give more with --data, or raise grpo.limit"))
    if f.reference_right <= 0.5:
        obstacles.append(Obstacle(f"the verifier refuses the reference answers ({f.reference_right:.0%} accepted): set grpo.verifier"))
    if f.nonsense_right > 0.5:
        obstacles.append(Obstacle(f"the verifier accepts {NONSENSE!r} ({f.nonsense_right:.0%} of the questions): set grpo.verifier"))
    if f.cut > 0.5 and f.unended > 0.5 * f.cut:
        obstacles.append(
            Obstacle("answers close their solution and do not end: the chat template has no end token that the model was trained on; "
                    "fix the template, or lengthen the cold start (sft.epochs)")
        )  # fmt: skip
    elif f.cut > 0.5:
        obstacles.append(Obstacle(f"{f.cut:.0%} of the answers are cut at the length limit: raise grpo.max_tokens"))
    elif f.malformed > 0.8:
        obstacles.append(Obstacle(f"{f.malformed:.0%} of the answers are malformed: lengthen the cold start (sft.epochs)"))
    if f.frac_reward_zero_std > 0.9 and not obstacles:
        knob = "raise grpo.temperature" if temperature < 0.5 else "raise grpo.num_generations, or give harder or easier questions"
        obstacles.append(Obstacle(f"{f.frac_reward_zero_std:.0%} of the groups have answers of equal reward, which teach nothing: {knob}"))
    return obstacles or preflight_warnings(f)


def preflight_warnings(f: PreflightStats) -> list[Obstacle]:
    """What slows a run that still learns."""
    warnings = {
        f"{f.cut:.0%} of the answers are cut: raise grpo.max_tokens": f.cut > 0.1,
        f"{f.frac_reward_zero_std:.0%} of the groups have no spread: grpo.resample_zero_std=true samples others": f.frac_reward_zero_std
        > 0.5,
        f"accuracy is {f.accuracy:.0%}: easier questions would teach more": f.accuracy < 0.05,
    }
    return [Obstacle(text, hopeless=False) for text, holds in warnings.items() if holds]


def measure_first_groups(rollouts: Rollouts, questions: Sequence[Question], verify: Verifier, settings: Settings) -> PreflightStats:
    """Sample self-budget groups of the first questions as the first step would, and check the verifier."""
    g, first = settings.grpo, questions[:PREFLIGHT_GROUPS]
    started = time.perf_counter()
    rollouts.policy.refresh()
    rows = [(q, SELF_GROUP) for q in first for _ in range(g.num_generations)]
    episodes = rollouts.sample(rows, count(settings.seed * 1_000_003))
    scored = rollouts.score_episodes(rows, episodes, alpha_at_step(0, g))
    seconds = (time.perf_counter() - started) * g.prompts_per_step / max(1, len(first)) * g.steps * TRAINING_SHARE
    return preflight_stats(scored, questions, verify, g.num_generations, seconds / 3600)


def preflight_stats(
    scored: Sequence[ScoredEpisode], questions: Sequence[Question], verify: Verifier, group: int, hours: float
) -> PreflightStats:
    first, rewards = questions[:PREFLIGHT_GROUPS], [s.reward.total for s in scored]

    def mean(values: Sequence[float]) -> float:
        return round(fmean(values), 4) if values else 0.0

    return PreflightStats(
        questions=len({q.question for q in questions}),
        answers=len(scored),
        cut=mean([not s.episode.ended for s in scored]),
        malformed=mean([s.episode.budget is None for s in scored]),
        unended=mean([not s.episode.ended and detect_format(s.episode.text).closing in s.episode.text for s in scored]),
        accuracy=mean([s.correct for s in scored]),
        reward_mean=mean(rewards),
        reward_std=round(pstdev(rewards), 4) if rewards else 0.0,
        frac_reward_zero_std=mean(
            [math.isclose(reward_range(group_rewards), 0, abs_tol=1e-9) for group_rewards in split_groups(rewards, group)]
        ),
        budget=mean([s.episode.budget for s in scored if s.episode.budget]),
        length=mean([s.episode.length for s in scored]),
        reference_right=mean([verify(f"\\boxed{{{q.answer}}}", q) for q in first]),
        nonsense_right=mean([verify(NONSENSE, q) for q in first]),
        hours=round(hours, 4),
    )


def preflight_verdict(obstacles: Sequence[Obstacle]) -> str:
    hopeless = [obstacle.cause for obstacle in obstacles if obstacle.hopeless]
    return f"will not learn, because {'; and '.join(hopeless)}" if hopeless else "will learn"


def preflight_record(f: PreflightStats, obstacles: Sequence[Obstacle]) -> dict[str, Any]:
    """preflight.json."""
    return {"verdict": preflight_verdict(obstacles), "notes": [x.cause for x in obstacles if not x.hopeless], "figures": asdict(f)}


def raise_if_hopeless(record: dict[str, Any], force: bool) -> None:
    """Raise Failed if the verdict of `to_record` is not that the run will learn, unless forced."""
    if record["verdict"] != "will learn" and not force:
        raise Failed(f"{record['verdict']} (--force trains all the same)")

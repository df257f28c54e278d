"""Will this run learn? Samples and scores a few groups before the first step and names the obstacles.

`find_obstacles` is pure; `run_first_groups` samples through `Rollouts` and changes nothing.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from sbtiny.budget.protocol import detect_format
from sbtiny.config import Settings
from sbtiny.errors import Failed
from sbtiny.grpo.groups import SELF_GROUP, GroupAnswer, are_rewards_equal
from sbtiny.grpo.rollouts import Rollouts, alpha_at_step
from sbtiny.progress import console
from sbtiny.rollout.policy import Policy
from sbtiny.tasks.sources import Question
from sbtiny.tasks.verify import Verifier, regex

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


def find_obstacles(f: PreflightStats, temperature: float) -> list[str]:
    """Why the run will not learn, causes before effects; none for a run that will."""
    if f.questions == 0:
        return ["there are no questions: give others with --data or grpo.task"]
    obstacles = []
    if f.questions == 1:
        obstacles.append("there is one question, which it would learn by heart: give more with --data, or raise grpo.limit")
    if f.reference_right <= 0.5:
        obstacles.append(f"the verifier refuses the reference answers ({f.reference_right:.0%} accepted): set grpo.verifier")
    if f.nonsense_right > 0.5:
        obstacles.append(f"the verifier accepts {NONSENSE!r} ({f.nonsense_right:.0%} of the questions): set grpo.verifier")
    if f.cut > 0.5 and f.unended > 0.5 * f.cut:
        cause = "answers close their solution and do not end: the chat template has no end token that the model was trained on"
        obstacles.append(f"{cause}; fix the template, or lengthen the cold start (sft.epochs)")
    elif f.cut > 0.5:
        obstacles.append(f"{f.cut:.0%} of the answers are cut at the length limit: raise grpo.max_tokens")
    elif f.malformed > 0.8:
        obstacles.append(f"{f.malformed:.0%} of the answers are malformed: lengthen the cold start (sft.epochs)")
    if f.frac_reward_zero_std > 0.9 and not obstacles:
        knob = "raise grpo.temperature" if temperature < 0.5 else "raise grpo.num_generations, or give harder or easier questions"
        obstacles.append(f"{f.frac_reward_zero_std:.0%} of the groups have answers of equal reward, which teach nothing: {knob}")
    return obstacles


def find_warnings(f: PreflightStats) -> list[str]:
    """What slows a run that still learns."""
    equal = f"{f.frac_reward_zero_std:.0%} of the groups have no spread"
    warnings = {
        f"{f.cut:.0%} of the answers are cut: raise grpo.max_tokens": f.cut > 0.1,
        f"{equal}: grpo.resample_zero_std=true samples others": f.frac_reward_zero_std > 0.5,
        f"accuracy is {f.accuracy:.0%}: easier questions would teach more": f.accuracy < 0.05,
    }
    return [text for text, holds in warnings.items() if holds]


def run_first_groups(policy: Policy, questions: Sequence[Question], verify: Verifier, settings: Settings) -> dict[str, Any]:
    """Sample self-budget groups of the first questions as the first step would, and check the verifier.

    Prints the verdict on stderr; returns the content of preflight.json.
    """
    g, first = settings.grpo, questions[:PREFLIGHT_GROUPS]
    rollouts = Rollouts(policy, questions, verify, {q.id: math.inf for q in questions}, settings, Path())
    started = time.perf_counter()
    policy.refresh()
    groups = rollouts.sample([(question, SELF_GROUP) for question in first], count(settings.seed * 1_000_003))
    rollouts.score_answers(groups, alpha_at_step(0, g))
    seconds = (time.perf_counter() - started) * g.prompts_per_step / max(1, len(first)) * g.steps * TRAINING_SHARE
    record = preflight_record(preflight_stats(groups, questions, verify, seconds / 3600), g.temperature)
    for line in ("preflight: " + record["verdict"], *record["notes"]):
        console.print(line, markup=False)
    return record


def preflight_stats(
    groups: Sequence[Sequence[GroupAnswer]], questions: Sequence[Question], verify: Verifier, hours: float
) -> PreflightStats:
    answers, first = [a for group in groups for a in group], questions[:PREFLIGHT_GROUPS]
    rewards = [a.reward.total for a in answers]

    def mean(values: Sequence[float]) -> float:
        return round(fmean(values), 4) if values else 0.0

    return PreflightStats(
        questions=len({q.question for q in questions}),
        answers=len(answers),
        cut=mean([not a.episode.ended for a in answers]),
        malformed=mean([a.episode.budget is None for a in answers]),
        unended=mean([not a.episode.ended and detect_format(a.episode.text).closing in a.episode.text for a in answers]),
        accuracy=mean([a.correct for a in answers]),
        reward_mean=mean(rewards),
        reward_std=round(pstdev(rewards), 4) if rewards else 0.0,
        frac_reward_zero_std=mean([are_rewards_equal(group) for group in groups]),
        budget=mean([a.episode.budget for a in answers if a.episode.budget]),
        length=mean([a.episode.length for a in answers]),
        # A pattern need not match itself.
        reference_right=1.0 if verify is regex else mean([verify(f"\\boxed{{{q.answer}}}", q) for q in first]),
        nonsense_right=mean([verify(NONSENSE, q) for q in first]),
        hours=round(hours, 4),
    )


def preflight_record(stats: PreflightStats, temperature: float) -> dict[str, Any]:
    """The content of preflight.json: the verdict, notes on a run that will learn, and the figures."""
    obstacles = find_obstacles(stats, temperature)
    verdict = f"will not learn, because {'; and '.join(obstacles)}" if obstacles else "will learn"
    return {"verdict": verdict, "notes": [] if obstacles else find_warnings(stats), "figures": asdict(stats)}


def raise_if_hopeless(record: dict[str, Any], force: bool) -> None:
    """Raise Failed if the verdict is not that the run will learn, unless forced."""
    if record["verdict"] != "will learn" and not force:
        raise Failed(f"{record['verdict']} (--force trains all the same)")

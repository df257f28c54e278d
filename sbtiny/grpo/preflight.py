"""Will this run learn? A few groups are sampled and scored before the first step, and what stands in the way is named.

`judge` is pure and looks at figures alone; `measure` samples through `Rollouts` and changes nothing.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, pstdev
from typing import Any

from sbtiny.budget.protocol import format_of
from sbtiny.config import Settings
from sbtiny.errors import Failed
from sbtiny.rollout.sampling import Sampling
from sbtiny.tasks.sources import Question
from sbtiny.grpo.step_metrics import Scored
from sbtiny.grpo.groups import SELF, spread
from sbtiny.grpo.rollouts import Rollouts, Verify, alpha_at

GROUPS = 8
NONSENSE = "I do not know."
TRAINING_SHARE = 2.0  # a step takes about twice its generation, by the metrics of runs on the bundled model


@dataclass(frozen=True, slots=True)
class Figures:
    """What the sampled groups look like; shares from 0 to 1, lengths in tokens. `hours` is a guess for the whole run.

    `reference_right`: share of questions whose own answer, boxed, the verifier accepts; `nonsense_right`: the same for words that
    answer nothing. `unended`: share of cut answers that closed their solution and then went on.
    """

    questions: int
    answers: int
    cut: float
    malformed: float
    unended: float
    accuracy: float
    reward_mean: float
    reward_std: float
    zero_spread: float
    budget: float
    length: float
    reference_right: float
    nonsense_right: float
    hours: float


@dataclass(frozen=True, slots=True)
class Finding:
    cause: str
    hopeless: bool = True


def judge(f: Figures, temperature: float) -> list[Finding]:
    """What stands in the way, causes before their effects; empty for a run that will learn."""
    found = []
    if f.questions == 0:
        return [Finding("there are no questions: give others with --data or grpo.task")]
    if f.questions == 1:
        found.append(Finding("there is one question, which it would learn by heart: give more with --data, or raise grpo.limit"))
    if f.reference_right <= 0.5:
        found.append(Finding(f"the verifier refuses the reference answers ({f.reference_right:.0%} accepted): set grpo.verifier"))
    if f.nonsense_right > 0.5:
        found.append(Finding(f"the verifier accepts {NONSENSE!r} ({f.nonsense_right:.0%} of the questions): set grpo.verifier"))
    if f.cut > 0.5 and f.unended > 0.5 * f.cut:
        found.append(
            Finding("answers close their solution and do not end: the chat template has no end token that the model was trained on; "
                    "mend the template, or lengthen the cold start (sft.epochs)")
        )  # fmt: skip
    elif f.cut > 0.5:
        found.append(Finding(f"{f.cut:.0%} of the answers are cut at the length limit: raise grpo.max_tokens"))
    elif f.malformed > 0.8:
        found.append(Finding(f"{f.malformed:.0%} of the answers are malformed: lengthen the cold start (sft.epochs)"))
    if f.zero_spread > 0.9 and not found:
        knob = "raise grpo.temperature" if temperature < 0.5 else "raise grpo.group, or give harder or easier questions"
        found.append(Finding(f"{f.zero_spread:.0%} of the groups have answers of equal reward, which teach nothing: {knob}"))
    return found or doubts(f)


def doubts(f: Figures) -> list[Finding]:
    """What slows a run that still learns."""
    notes = {
        f"{f.cut:.0%} of the answers are cut: raise grpo.max_tokens": f.cut > 0.1,
        f"{f.zero_spread:.0%} of the groups have no spread: grpo.replace_flat=true samples others": f.zero_spread > 0.5,
        f"accuracy is {f.accuracy:.0%}: easier questions would teach more": f.accuracy < 0.05,
    }
    return [Finding(text, hopeless=False) for text, holds in notes.items() if holds]


def measure(rollouts: Rollouts, questions: Sequence[Question], verify: Verify, settings: Settings) -> Figures:
    """Sample self-set groups of the first questions as the first step would, and check the verifier itself."""
    g, asked = settings.grpo, list(questions[:GROUPS])
    started = time.perf_counter()
    rollouts.policy.refresh()
    rows = [q for q in asked for _ in range(g.group)]
    requests = [rollouts._request(q, SELF, settings.seed * 1_000_003 + i) for i, q in enumerate(rows)]
    episodes = rollouts.policy.sample(requests, Sampling(temperature=g.temperature)) if rows else []
    scored = rollouts.judge([(q, "self") for q in rows], episodes, alpha_at(0, g))
    seconds = (time.perf_counter() - started) * g.prompts / max(1, len(asked)) * g.steps * TRAINING_SHARE
    return figures(scored, questions, verify, g.group, seconds / 3600)


def figures(scored: Sequence[Scored], questions: Sequence[Question], verify: Verify, group: int, hours: float) -> Figures:
    asked = questions[:GROUPS]
    rewards = [s.reward.total for s in scored]
    groups = [rewards[start : start + group] for start in range(0, len(rewards), group)]

    def mean(values: Sequence[float]) -> float:
        return round(fmean(values), 4) if values else 0.0

    return Figures(
        questions=len({q.question for q in questions}),
        answers=len(scored),
        cut=mean([not s.episode.ended for s in scored]),
        malformed=mean([s.episode.budget is None for s in scored]),
        unended=mean([not s.episode.ended and format_of(s.episode.text).closing in s.episode.text for s in scored]),
        accuracy=mean([s.correct for s in scored]),
        reward_mean=mean(rewards),
        reward_std=round(pstdev(rewards), 4) if rewards else 0.0,
        zero_spread=mean([math.isclose(spread(each), 0, abs_tol=1e-9) for each in groups]),
        budget=mean([s.episode.budget for s in scored if s.episode.budget]),
        length=mean([s.episode.length for s in scored]),
        reference_right=mean([verify(f"\\boxed{{{q.answer}}}", q) for q in asked]),
        nonsense_right=mean([verify(NONSENSE, q) for q in asked]),
        hours=round(hours, 4),
    )


def verdict(findings: Sequence[Finding]) -> str:
    hopeless = [finding.cause for finding in findings if finding.hopeless]
    return f"will not learn, because {'; and '.join(hopeless)}" if hopeless else "will learn"


def record(f: Figures, findings: Sequence[Finding]) -> dict[str, Any]:
    """preflight.json."""
    return {"verdict": verdict(findings), "notes": [x.cause for x in findings if not x.hopeless], "figures": asdict(f)}


def insist(look: dict[str, Any], force: bool) -> None:
    """Raise Failed where `record` says that training is hopeless, unless forced."""
    if look["verdict"] != "will learn" and not force:
        raise Failed(f"{look['verdict']} (--force trains all the same)")

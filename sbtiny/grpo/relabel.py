"""Hindsight for budgets: put the budget that an answer needed in place of the one it had (Andrychowicz et al. 2017, for goals).

PreB is flat outside the window |l - b| <= a b. As alpha falls, the window leaves budgets that are far from the length. All answers of
a group then earn the same, and nothing pulls the stated budget to the length (the dead zone). So some correct answers of each group are
*relabelled*. Every group then holds an answer inside the window, and the advantage does the rest; the reward stays the same. The policy
may never have sampled the new budget. Its gradient is still a policy-gradient step, with the probability under the present policy.

In a user group the given budget is read, not stated: relabelling turns a miss into an example of a kept budget.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from sbtiny.budget.protocol import render_budget
from sbtiny.config import GrpoSettings
from sbtiny.grpo.groups import GroupAnswer
from sbtiny.rollout.episode import Episode, read_episode
from sbtiny.rollout.policy import Policy


def choose_missed(group: Sequence[GroupAnswer], alpha: float, g: GrpoSettings) -> list[GroupAnswer]:
    """The correct answers of a group to relabel: some of those that missed their budget.

    Self-budget groups: the shortest correct answers; a longer one would teach the budget of a waste. Where the reward peaks off the
    budget, only once alpha is below 1: before that the window has no edge. User groups: any, so that all lengths are met, unless the
    given budget is below every right answer: beside a relabelled one the nearest would look bad.
    """
    right = [a for a in group if a.correct and a.episode.budget]
    kind = group[0].group.kind
    if kind == "self" and (alpha < 1 or g.reward_peak == 1):
        shortest = sorted(right, key=lambda a: a.episode.length)[: g.relabel_per_group]
        return [a for a in shortest if a.mismatch > g.alpha_end]
    if kind == "user" and any(a.episode.length <= a.episode.budget for a in right):
        return [a for a in right if a.mismatch > g.alpha_end][: g.relabel_per_user_group]
    return []


def best_budget(length: int, alpha: float, centre: float) -> int:
    """The budget that pays a correct answer of this length most: the largest b with b - l <= (1 - centre) alpha b."""
    return max(1, length, math.floor(length / (1 - alpha * (1 - centre))))


def relabel_budget(policy: Policy, episode: Episode, budget: int) -> Episode:
    """The same answer after another budget; the tokens of the body and after it stay as sampled."""
    pieces, tag = policy.engine.pieces, render_budget(budget, policy.form)
    tag_ids, request = policy.encode(tag), episode.request
    if request.prefill:
        prompt = request.prompt_ids[: len(request.prompt_ids) - len(policy.encode(request.prefill))]
        relabelled = replace(request, prompt_ids=(*prompt, *tag_ids), prefill=tag)
        return read_episode(relabelled, episode.completion_ids, pieces, episode.stop_reason)
    at, head = 0, ""
    while len(head) < episode.parsed.start:
        head += pieces[episode.completion_ids[at]]
        at += 1
    begun = policy.encode(head[episode.parsed.start :])  # of the body, by the token that also ends the tag
    return read_episode(request, [*tag_ids, *begun, *episode.completion_ids[at:]], pieces, episode.stop_reason)

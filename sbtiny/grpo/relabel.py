"""Hindsight for budgets: an answer told again behind the number it really took (Andrychowicz et al. 2017, for goals).

PreB is flat outside |l - b| <= a b. As alpha falls the window closes on budgets that are far from the length; every answer of a group
then earns the same and nothing pulls the number to the truth (the dead zone). Some correct answers of each group are therefore *retold*:
their number is replaced by the one they needed. The reward stays as it is; every group then holds an answer inside the window, whatever
the policy says, and the advantage does the rest. The retold number may be one the policy would never have sampled, which is the point:
its gradient is that of a policy-gradient step with the probability taken under the present policy.

In a group with a user's number, which is read and not said, retelling turns a miss into an example of a number kept.
"""

import math
from dataclasses import replace

from sbtiny.budget.protocol import prefill
from sbtiny.rollout.episode import Episode, read_episode
from sbtiny.rollout.policy import Policy


def needed(length: int, alpha: float, centre: float) -> int:
    """The budget a correct answer of this length earns most with: the largest b with b - l <= (1 - centre) alpha b."""
    return max(1, length, math.floor(length / (1 - alpha * (1 - centre))))


def retold(policy: Policy, episode: Episode, budget: int) -> Episode:
    """The same answer behind another number; tokens of the body and after it are kept as they were sampled."""
    pieces, said, request = policy.engine.pieces, policy.encode(prefill(budget, policy.form)), episode.request
    if request.prefill:
        prompt = request.prompt_ids[: len(request.prompt_ids) - len(policy.encode(request.prefill))]
        told = replace(request, prompt_ids=(*prompt, *said), prefill=prefill(budget, policy.form))
        return read_episode(told, episode.completion_ids, pieces, episode.stop_reason)
    at = seen = 0
    while seen < episode.parsed.start:
        seen += len(pieces[episode.completion_ids[at]])
        at += 1
    return read_episode(request, [*said, *episode.completion_ids[at:]], pieces, episode.stop_reason)

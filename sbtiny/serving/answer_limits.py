"""How far an answer may go: its room, its ceiling, the wrap-up, and what is kept back for it."""

import math
from collections.abc import Sequence
from dataclasses import replace

from sbtiny.budget.protocol import MAX_BUDGET, SOLUTION, THINK, render_budget
from sbtiny.config import ServeSettings
from sbtiny.errors import InputError
from sbtiny.rollout.limits import Limits
from sbtiny.rollout.policy import Policy
from sbtiny.serving.reply import Reply

LEAST_ANSWER = 8  # tokens after a wrap-up, at the least
HEAD_MARGIN = 4  # tokens of a head beyond those of its usual spelling


class Limiter:
    """Makes the limits of the answers of one policy, in a context of so many tokens."""

    def __init__(self, policy: Policy, settings: ServeSettings, context: int) -> None:
        self.policy, self.settings, self.context = policy, settings, context
        self.head_tokens = count_head_tokens(policy)
        self.wrap_up, self.thoughts_wrap_up = self._encode_wrap_ups()
        self.longest_wrap_up = max(len(self.wrap_up), len(self.thoughts_wrap_up))
        usual = policy.form if policy.states_budget else THINK  # what a plain model writes after its thoughts
        self.reserve = settings.reserve or usual.reserve  # tokens for the wrap-up and the answer, where there is room
        if self.reserve <= self.longest_wrap_up:
            what = f"serve.reserve of {self.reserve} tokens leaves none for the answer after serve.wrap_up"
            raise InputError(f"{what}, which has {self.longest_wrap_up}: raise the one or shorten the other")

    def room(self, reply: Reply) -> int:
        """The most tokens of an answer."""
        return min(reply.ask.max_tokens, self.context - len(reply.prompt) - self.head_tokens)

    @property
    def least_room(self) -> int:
        """The tokens that a head, a wrap-up and an answer after it take."""
        return self.head_tokens + self.longest_wrap_up + LEAST_ANSWER

    def limits(self, reply: Reply, budget: int | None) -> tuple[Limits, int]:
        """The limits of an answer and its most tokens: a wrap-up comes before those end.

        Below `least_room` all is answer: there is no wrap-up, a few tokens are left of any budget, and after thoughts the rest is reserve.
        """
        s, room = self.settings, self.room(reply)
        reserve = min(self.reserve, max(self.longest_wrap_up + LEAST_ANSWER, room // 4))
        is_bare = room < self.least_room
        ceilings = [room if is_bare else max(0, room - reserve - self.head_tokens)]
        if reply.ask.ceiling is not None:
            ceilings.append(reply.ask.ceiling)
        if reply.source == "coverage":
            ceilings.append(self._promised(reply))
        elif budget is not None:
            ceilings.append(math.floor(budget * (1 + s.given_tolerance)))
        if is_bare:
            ceiling = min(room, max(LEAST_ANSWER, min(ceilings)))
            return Limits(ceiling, reserve=room - ceiling), room
        tolerance = s.tolerance if budget is None and self.policy.states_budget else None
        return Limits(min(ceilings), tolerance, self.wrap_up, reserve, self.thoughts_wrap_up), room

    def extended(self, reply: Reply, tokens: int) -> Limits:
        """The limits of a running answer with so many tokens more. Raises InputError where it has the most already."""
        tracker = reply.body.enforcer.tracker
        room = reply.body.request.max_tokens - tracker.limits.reserve - self.head_tokens
        most = min(n for n in (room, reply.ask.ceiling) if n is not None)
        if tracker.allowed >= most:
            raise InputError(f"not supported: the answer may take {tracker.allowed} tokens already, which is the most here")
        return replace(tracker.limits, ceiling=min(tracker.allowed + tokens, most), tolerance=None)

    def opens_thoughts(self, prompt: Sequence[int]) -> bool:
        """Whether the prompt ends in `<think>`, as the templates of R1's distills do."""
        return self.policy.tokenizer.decode(prompt[-8:]).rstrip().endswith(THINK.opening)

    def _promised(self, reply: Reply) -> int:
        if reply.promise is None:
            reason = "the calibration has too few answers, or too many were cut or malformed"
            raise InputError(f"no finite promise at {100 * reply.ask.coverage:g} %: {reason}")
        return reply.promise

    def _encode_wrap_ups(self) -> list[tuple[int, ...]]:
        """The tokens of the wrap-up, and of that where thoughts are open. A model that states no budget may think or not."""
        if self.settings.wrap_up is not None:
            texts = self.settings.wrap_up, ""
        elif self.policy.states_budget:
            texts = self.policy.form.wrap_up, ""
        else:
            texts = SOLUTION.wrap_up, THINK.wrap_up
        return [tuple(self.policy.encode(text)) if text else () for text in texts]


def count_head_tokens(policy: Policy) -> int:
    """Room for the budget and the tags around the body: the tokens of the longest budget, of the tags and of the end."""
    budgets = (MAX_BUDGET, MAX_BUDGET - 1)  # the most digits, and the most that no tokenizer has a token for
    opening = max(len(policy.encode(render_budget(budget, policy.form))) for budget in budgets)
    return opening + len(policy.encode(policy.form.closing)) + 1 + HEAD_MARGIN

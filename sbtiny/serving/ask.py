"""What a user wants of one answer, and what came of it: data, and no model."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from sbtiny.budget.calibration import Calibration
from sbtiny.budget.protocol import BUDGET_OPEN, SOLUTION, THINK, BudgetChoice, parse, parse_budget_option
from sbtiny.budget.seconds import SecondsLeft
from sbtiny.config import ServeSettings
from sbtiny.errors import InputError
from sbtiny.models.prompt import Message
from sbtiny.rollout.episode import Sampling, StopReason

COVERAGE = re.compile(r"([0-9]{1,3}(?:\.[0-9]{1,3})?) ?%")
AUTO = BudgetChoice("auto")
ROLES = ("system", "user", "assistant")
BudgetSource = Literal["stated", "given", "scaled", "seconds", "coverage", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One answer's budget, ceiling and sampling. `coverage`: the answer may take what is promised at this chance."""

    choice: BudgetChoice = AUTO
    coverage: float | None = None
    ceiling: int | None = None
    max_tokens: int = 2048
    temperature: float = 0.6
    top_p: float = 0.95
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.coverage is not None and not 0 < self.coverage < 1:
            raise InputError(f"a coverage of {self.coverage} is no chance: use one between 0 and 1, such as 0.9 (or 90%)")
        if self.ceiling is not None and self.ceiling < 0:
            raise InputError(f"a ceiling of {self.ceiling} tokens is below 0: use 0 or more")
        if self.max_tokens < 1:
            raise InputError(f"max_tokens of {self.max_tokens}: ask for 1 or more")
        self.sampling()  # raises for values out of range

    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_p, self.top_k, self.min_p)


def describe_budget(ask: Ask) -> str:
    """The budget of an ask as a user writes it."""
    if ask.coverage is not None:
        return f"{100 * ask.coverage:g}%"
    value = ask.choice.value
    return {"auto": "auto", "fixed": f"{value or 0:g}", "scaled": f"{value or 0:g}x", "seconds": f"{value or 0:g}s"}[ask.choice.mode]


def default_ask(settings: ServeSettings, seed: int = 0) -> Ask:
    """The ask of the settings: what holds where the user says nothing."""
    ask = Ask(
        ceiling=settings.ceiling or None,
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        seed=seed,
    )
    return choose_budget(ask, settings.budget)


def choose_budget(ask: Ask, budget: int | str | None = None, seconds: float | None = None, coverage: float | None = None) -> Ask:
    """The ask with a budget in tokens or as in `--budget`, in seconds, or at a coverage. Raises InputError for two of them.

    A `budget` such as "90%" is a coverage.
    """
    given = {name: value for name, value in {"budget": budget, "seconds": seconds, "coverage": coverage}.items() if value is not None}
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)} are given: say one of them")
    if isinstance(budget, str) and (share := COVERAGE.fullmatch(budget.strip())):
        return replace(ask, coverage=float(share[1]) / 100)
    if budget is not None:
        return replace(ask, choice=parse_budget_option(str(budget), seconds=True), coverage=None)
    if seconds is not None:
        if not 0 < seconds < math.inf:
            raise InputError(f"a budget of {seconds} seconds: it must be above 0")
        return replace(ask, choice=BudgetChoice("seconds", float(seconds)), coverage=None)
    return ask if coverage is None else replace(ask, coverage=coverage)


def explain_no_promise(calibration: Calibration | None, ask: Ask) -> str:
    """Why no calibration fits an answer that is asked for so."""
    if calibration is None:
        return "no promise without a calibration: sbtiny calibrate makes one"
    made, asked = (f"temperature {at.temperature:g}, top_p {at.top_p:g}" for at in (calibration, ask))
    more = ", top_k or min_p" if ask.top_k or ask.min_p else ""
    return f"no promises: the calibration is at {made}, and the answers are at {asked}{more}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A finished answer.

    `stated` is the model's budget, `given` the one it was made to keep, both in tokens or None. `used` counts body tokens. `allowed` is
    where it is wrapped up. `promise`: the tokens it stays within with a chance of `coverage`, None where the model is not calibrated.
    """

    text: str
    thoughts: str
    stated: int | None
    given: int | None
    source: BudgetSource
    allowed: int | None
    used: int
    tokens: int
    promise: int | None
    coverage: float | None
    seconds: float
    stop_reason: StopReason
    ended: bool


def describe_answer(answer: Answer) -> str:
    """The line of figures below an answer."""
    budget = [f"stated {answer.stated}"] if answer.stated else []
    budget += [f"given {answer.given}"] if answer.given else []
    promise = [f"promised {answer.promise} ({100 * answer.coverage:.0f} %)"] if answer.promise else []
    rate = f"{answer.tokens / max(answer.seconds, 1e-9):.0f} tok/s"
    limit = f"wrapped up at its limit of {answer.allowed}"
    reasons = {"end": [], "ceiling": [limit], "interrupted": ["interrupted"], "length": ["cut at max_tokens"]}
    return " · ".join([*budget, f"used {answer.used}", *promise, f"{answer.seconds:.1f} s", rate, *reasons[answer.stop_reason]])


@dataclass(frozen=True, slots=True)
class Progress:
    """A running answer at one moment; tokens of its body. `left` is None where nothing foretells it, `seconds` before a rate is known."""

    budget: int | None
    used: int
    left: int | None
    over: float
    seconds: SecondsLeft | None


def check_messages(messages: Sequence[Message]) -> None:
    """Raise InputError unless these are turns with a role of ROLES and a text each, the last one the user's."""
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise InputError(f"{str(message)[:60]!r} is no turn of a chat: use {{'role': 'user', 'content': 'a text'}}, or one question")
        if message["role"] not in ROLES:
            raise InputError(f"the role {message['role'][:40]!r} is none of {', '.join(ROLES)}: use one of them")
        try:
            message["content"].encode()
        except UnicodeEncodeError as error:
            raise InputError(f"the {message['role']} turn is not UTF-8 at character {error.start}: take that character out") from error
    if not messages or messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
        raise InputError("no question: the last turn must be the user's, with a text")


def clean_history(messages: Sequence[Message]) -> list[Message]:
    """The turns with earlier answers bare: no budget, no tags, no thoughts, as reasoning templates do."""
    return [m | {"content": bare_answer(m["content"])} if m["role"] == "assistant" else m for m in messages]


def bare_answer(text: str) -> str:
    """The answer of a whole text: what follows the thoughts, else the body, else the text itself. Tags amid a text are words."""
    begun = text.lstrip()
    if begun.startswith(THINK.opening):  # of a model that states no budget
        thoughts, closed, answer = begun.removeprefix(THINK.opening).partition(THINK.closing)
        return (answer if closed else thoughts).strip()
    if not begun.startswith((BUDGET_OPEN, SOLUTION.opening)):
        return text
    parsed = parse(text)
    if parsed.answer is not None:
        return parsed.answer.strip()
    return text if parsed.body is None else parsed.body.strip()

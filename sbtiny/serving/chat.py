"""A chat: its turns, its settings and its slash commands. Knows no terminal: a command's result is text to show, or an action."""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from pathlib import Path
from typing import NamedTuple

from sbtiny.budget.protocol import MAX_BUDGET
from sbtiny.errors import InputError
from sbtiny.load_settings import expand_home
from sbtiny.models.prompt import Message
from sbtiny.serving.ask import Answer, Ask, choose_budget, describe_budget

HELP = """\
/budget auto|120|30s|2x|90%   stated by the model, tokens, seconds, a multiple of the stated one, or what is promised at this chance
/ceiling N          tokens that no budget may pass; 0 for none
/think show|hide    the thoughts
/regen              the last question again
/compare            the last question with the stated budget and from the base model without one
/stats              figures of this chat
/set NAME VALUE     temperature, top_p, top_k, min_p, seed, max_tokens
/system TEXT        a system turn for the chat from here on; without a text: none
/clear              forget the turns
/save FILE          append the chat to a JSONL file, as rows for training
/help, /exit
\"\"\" begins and ends a question of many lines. Ctrl-C while it thinks: answer now; again: stop. Ctrl-D leaves."""


class Bounds(NamedTuple):
    """What a number may be, ends included."""

    least: float
    most: float
    kind: Callable[[str], float] = int


CEILING = Bounds(0, MAX_BUDGET)  # 0: none
NUMBERS = {
    "temperature": Bounds(0, 100, float),
    "top_p": Bounds(0.01, 1, float),
    "top_k": Bounds(0, 1_000_000),
    "min_p": Bounds(0, 0.99, float),
    "seed": Bounds(0, 2**53),
    "max_tokens": Bounds(1, MAX_BUDGET),
}


class Action(Enum):
    """What the terminal does after a command."""

    ASK = auto()
    COMPARE = auto()
    EXIT = auto()


@dataclass
class Chat:
    """The turns so far and how the next answer is asked for. `pending` is the question that is to be answered."""

    ask: Ask
    system: str | None = None
    show_thoughts: bool = True
    turns: list[Message] = field(default_factory=list)
    pending: str | None = None
    answers: list[Answer] = field(default_factory=list)

    @property
    def messages(self) -> list[Message]:
        """The turns up to the pending question."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *self.turns, {"role": "user", "content": self.pending or ""}]

    def take_answer(self, answer: Answer) -> None:
        """Add the pending question and its answer to the turns; a question without an answer is not added, but /regen asks it again."""
        self.answers.append(answer)
        self.ask = replace(self.ask, seed=self.ask.seed + 1)
        if answer.text:
            self.turns += [{"role": "user", "content": self.pending}, {"role": "assistant", "content": answer.text}]

    def handle(self, line: str) -> Action | str:
        """A line of the user: a question, or a command. Raises InputError for a command that is wrong."""
        if not line.startswith("/"):
            return self.handle_question(line)
        word, _, rest = line.partition(" ")
        name = word.removeprefix("/")
        if name in ("exit", "bye", "quit"):
            return Action.EXIT
        command = getattr(self, f"_{name}", None) if name in COMMANDS else None
        if command is None:
            raise InputError(f"{word} is no command: /help lists them")
        return command(rest.strip())

    def handle_question(self, question: str) -> Action:
        self.pending = question
        return Action.ASK

    # ---- commands ------------------------------------------------------------------------------------------------------------------

    def _help(self, _: str) -> str:
        return HELP

    def _budget(self, text: str) -> str:
        if text:
            self.ask = choose_budget(self.ask, text)
        return f"budget {describe_budget(self.ask)}"

    def _ceiling(self, text: str) -> str:
        if text:
            self.ask = replace(self.ask, ceiling=int(parse_number("ceiling", text, CEILING)) or None)
        return f"ceiling {self.ask.ceiling or 'none'}"

    def _think(self, text: str) -> str:
        if text not in ("", "show", "hide"):
            raise InputError(f"/think {text}: say show or hide")
        self.show_thoughts = text == "show" if text else self.show_thoughts
        return f"thoughts are {'shown' if self.show_thoughts else 'hidden'}"

    def _set(self, text: str) -> str:
        name, _, value = text.partition(" ")
        if name not in NUMBERS or not value:
            raise InputError(f"/set {text}: say one of {', '.join(NUMBERS)} and a value")
        self.ask = replace(self.ask, **{name: parse_number(name, value.strip(), NUMBERS[name])})
        return f"{name} {value.strip()}"

    def _system(self, text: str) -> str:
        self.system = text or None
        return "system turn set" if text else "no system turn"

    def _clear(self, _: str) -> str:
        self.turns, self.pending = [], None
        return "the turns are forgotten"

    def _regen(self, _: str) -> Action:
        return self._again(Action.ASK)

    def _compare(self, _: str) -> Action:
        return self._again(Action.COMPARE)

    def _again(self, action: Action) -> Action:
        if self.pending is None:
            raise InputError("there is no question yet: ask one first")
        if self.turns and self.turns[-2]["content"] == self.pending:
            del self.turns[-2:]
        return action

    def _save(self, text: str) -> str:
        if not text:
            raise InputError("/save needs a file: /save chat.jsonl")
        if not self.turns:
            raise InputError("there is nothing to save yet")
        system = [{"role": "system", "content": self.system}] if self.system else []
        try:
            with Path(expand_home(text)).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"messages": [*system, *self.turns]}, ensure_ascii=False) + "\n")
        except OSError as error:
            raise InputError(f"cannot write {text}: {error.strerror}") from error
        return f"saved to {text}"

    def _stats(self, _: str) -> str:
        if not self.answers:
            return "no answers yet"
        tokens, seconds = sum(a.tokens for a in self.answers), sum(a.seconds for a in self.answers)
        lines = [f"{len(self.answers)} answers, {tokens} tokens, {seconds:.1f} s, {tokens / max(seconds, 1e-9):.0f} tok/s"]
        for kind in ("stated", "given"):
            pairs = [(getattr(a, kind), a.used) for a in self.answers if getattr(a, kind) and (kind == "given" or a.given is None)]
            if pairs:
                near = sum(abs(used - budget) <= 0.1 * budget for budget, used in pairs)
                budget, used = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
                lines.append(f"{kind} budgets: mean {budget:.0f}, used {used:.0f}, within 10 % {near} of {len(pairs)}")
        return "\n".join(lines)


COMMANDS = ("help", "budget", "ceiling", "think", "set", "system", "clear", "regen", "compare", "save", "stats")


def parse_number(name: str, text: str, bounds: Bounds) -> float:
    """Read a setting's value. Raises InputError, with the range, for what is no such number."""
    with suppress(ValueError):
        if bounds.least <= (value := bounds.kind(text)) <= bounds.most:
            return value
    kind = "whole number" if bounds.kind is int else "number"
    raise InputError(f"{name} {text[:40]!r} cannot be: give a {kind} from {bounds.least:,} to {bounds.most:,}")

"""The generated task of the bundled model: running sums as a small story.

    Tom has 33 coins.
    a) loses 8
    b) finds 5
    How many coins?

The level is the number of steps, 2 to 8. Each step is one more line of any correct solution, so a harder question needs more tokens.
Train, validation and test questions are disjoint: a hash of the numbers, without the names, decides the split of a problem.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2s

from sbtiny.errors import InputError
from sbtiny.tasks.sources import Question

LEVELS = range(2, 9)
LABELS = "abcdefgh"
NAMES = ("Tom", "Ana", "Ben", "Eva", "Max", "Mia", "Sam", "Zoe", "Leo", "Ida")
NOUNS = ("coins", "books", "cards", "eggs", "nuts", "pens", "shells", "stamps", "toys", "apples")
GAINS = ("finds", "gets", "wins", "buys")
LOSSES = ("loses", "gives", "sells", "drops")
BUCKETS = {"test": range(0, 10), "val": range(10, 20), "train": range(20, 100)}


@dataclass(frozen=True, slots=True)
class Problem:
    """A start and signed steps of 1 to 9; every running value stays within 0 to 99."""

    start: int
    steps: tuple[int, ...]

    @property
    def answer(self) -> int:
        return self.start + sum(self.steps)

    @property
    def split(self) -> str:
        digest = blake2s(f"{self.start}:{self.steps}".encode(), digest_size=8).digest()
        bucket = int.from_bytes(digest, "big") % 100
        return next(name for name, buckets in BUCKETS.items() if bucket in buckets)

    def tell(self, rng: random.Random) -> str:
        """Write the story; names and verbs are drawn and do not change the problem."""
        noun = rng.choice(NOUNS)
        lines = [f"{rng.choice(NAMES)} has {self.start} {noun}."]
        for label, step in zip(LABELS, self.steps, strict=False):
            lines.append(f"{label}) {rng.choice(GAINS if step > 0 else LOSSES)} {abs(step)}")
        return "\n".join([*lines, f"How many {noun}?"])


def draw_problem(rng: random.Random, level: int) -> Problem:
    """Draw one problem of `level` steps, of any split."""
    value = start = rng.randint(0, 99)
    steps = []
    for _ in range(level):
        step = rng.choice([s for s in range(-9, 10) if s and 0 <= value + s <= 99])
        value += step
        steps.append(step)
    return Problem(start, tuple(steps))


def draw_problems(split: str, rng: random.Random) -> Iterator[Problem]:
    """Draw problems of one split without end, cycling through the levels."""
    while True:
        for level in LEVELS:
            problem = draw_problem(rng, level)
            while problem.split != split:
                problem = draw_problem(rng, level)
            yield problem


def generate_questions(split: str = "test", limit: int | None = None, seed: int = 0) -> list[Question]:
    """Draw `limit` (500 for None) distinct questions of a split; the same seed gives the same questions.

    Raises InputError for an unknown split.
    """
    if split not in BUCKETS:
        raise InputError(f"arithmetic has no split {split!r}: use one of {', '.join(BUCKETS)}")
    rng = random.Random(f"arithmetic/{split}/{seed}")
    seen: set[Problem] = set()
    questions: list[Question] = []
    for problem in draw_problems(split, rng):
        if len(questions) == (limit or 500):
            return questions
        if problem not in seen:
            seen.add(problem)
            name = f"arithmetic-{split}-{seed}-{len(questions)}"
            questions.append(Question(name, problem.tell(rng), str(problem.answer), len(problem.steps), "arithmetic"))
    return questions

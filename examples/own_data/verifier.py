"""A verifier of one's own: times of day as a clock shows them, everything else as sbtiny checks it.

Named in settings.yaml as `verifier.py:check`. It is called with the text of a response, the question and the reference answer, and says
whether the response is right. It must not evaluate what the model wrote.
"""

import re

from sbtiny.tasks.answers import given_answer
from sbtiny.tasks.sources import Question
from sbtiny.tasks.verify import auto

CLOCK = re.compile(r"(?<![\d:])([01]?\d|2[0-3]):([0-5]\d)(?![\d:])(?:\s?([ap])\.?m\b)?", re.IGNORECASE | re.ASCII)


def check(response: str, question: str, answer: str) -> bool:
    if not CLOCK.fullmatch(answer):
        return auto(response, Question("own", question, answer))
    return minutes(given_answer(response) or response) == minutes(answer)


def minutes(text: str) -> int | None:
    """Minutes since midnight of the last time of day in a text: 15:30, 3:30 pm and 3:30 p.m. are the same."""
    found = CLOCK.findall(text)
    if not found:
        return None
    hour, minute, half = int(found[-1][0]), int(found[-1][1]), found[-1][2].lower()
    return 60 * (hour % 12 + 12 * (half == "p") if half else hour) + minute

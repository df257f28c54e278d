"""A verifier of one's own: a word, or a list of words, as people write them.

Named in settings.yaml as `verifier.py:check`. It is called with the question and the text of a response, and says whether the response is
right. In a reference answer `|` parts what is right as well, and the order of a list counts unless it stands in braces: `{bat, dolphin}`.
It must not evaluate what the model wrote.
"""

import re

from sbtiny.tasks.answers import last_line, marked_answer
from sbtiny.tasks.sources import Question

WRITTEN = re.compile(r"\\(?:text|mathrm|textbf)\s?\{([^{}]*)\}")  # LaTeX around a word
BETWEEN = re.compile(r"\s*[,;]\s*(?:and\s+)?|\s+and\s+")


def check(question: Question, completion: str) -> bool:
    said = words(marked_answer(completion) or last_line(completion))
    return any(same(said, reference.strip()) for reference in question.answer.split("|"))


def same(said: list[str], reference: str) -> bool:
    if reference.startswith("{"):
        return sorted(said) == sorted(words(reference))
    return said == words(reference)


def words(text: str) -> list[str]:
    """The words of a list, without what changes nothing: case, articles, quotes, a full stop."""
    plain = WRITTEN.sub(r"\1", text).casefold()
    parts = [part.strip(" .!\"'*`{}()$") for part in BETWEEN.split(plain)]
    return [re.sub(r"^(?:an?|the)\s+", "", part) for part in parts if part]

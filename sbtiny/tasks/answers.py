"""The answer inside a response: boxed, after ####, after `answer is`, or its last number. Searches are linear in the text."""

import re

from sbtiny.tasks.numbers import LAST_NUMBER, parse_number

# Possessive quantifiers (*+, ++) keep searches linear.
BRACES = re.compile(r"\\{1,2}(boxed|fbox)\s*+\{|\\.|[{}]", re.DOTALL)
HASHES = re.compile(r"(?<!#)####(?!#)[ \t]*+(\S[^\n]*)")
STATED = re.compile(
    r"\banswer(?:\s++is\b|\s*+\**+\s*+[:=])[\s:*]*+(?!(?:not|correct|incorrect|right|wrong|indeed)\b)(\S[^\n]*)", re.I
)
SENTENCE_END = re.compile(r"\.(?=\s|$)|<[|/]")  # a special token or a closing tag ends it too

TURN_END = re.compile(r"(?:<[|｜][^|｜<>\n]{1,40}[|｜]>|</s>|<eos>|<end_of_turn>)$")  # of any model: a reference may come from another's
BEFORE_STATED = 24  # characters: "So the correct " and the like
WRAPPERS = (("$$", "$$"), ("$", "$"), (r"\[", r"\]"), (r"\(", r"\)"))


def final_answer(text: str) -> str | None:
    r"""The last `\boxed{x}`, else the last `#### x`, else the last `answer is x` or `answer: x`, else the last number.

    Braces are balanced; an empty or unclosed box does not count. None where there is nothing of the kind.
    """
    found = given_answer(text)
    if found is None:
        for number in LAST_NUMBER.finditer(text.replace("−", "-")):
            found = number[0]
    return found


def given_answer(text: str) -> str | None:
    """The answer that a text gives expressly: boxed, after ####, or after `answer is`; None where it gives none."""
    return boxed_answer(text) or hashed_answer(text) or stated_answer(text)


def boxed_answer(text: str) -> str | None:
    """Inside the box that opens last; of nested boxes the inner one."""
    opened: list[int] = []
    latest, found = 0, None
    for token in BRACES.finditer(text):
        if token[0] == "{" or token[1]:
            opened.append(token.end() if token[1] else 0)
        elif token[0] == "}" and opened:
            start = opened.pop()
            if start > latest and (inside := text[start : token.start()].strip()):
                latest, found = start, inside
    return found


def hashed_answer(text: str) -> str | None:
    """After the last #### that is no Markdown heading: a heading is no number and has text below it."""
    found, end = None, len(text.rstrip())
    for line in HASHES.finditer(text):
        content = SENTENCE_END.split(line[1])[0].strip()
        if content and (line.end() >= end or parse_number(content) is not None):
            found = content
    return found


def stated_answer(text: str) -> str | None:
    found = None
    for line in STATED.finditer(text):
        found = SENTENCE_END.split(line[1])[0].strip(" *") or found
    return found


def last_line(text: str) -> str:
    return text.rstrip().rpartition("\n")[2].strip()


def without_turn_end(text: str) -> str:
    """The text without the tokens that end a turn at its end."""
    text = text.rstrip()
    while end := TURN_END.search(text, max(0, len(text) - 50)):
        text = text[: end.start()].rstrip()
    return text


def reference(text: str) -> str:
    r"""The answer that a reference gives, without what it comes in: turn ends, `#### `, `answer is`, a box, `$ $`, `\[ \]`."""
    text = without_turn_end(text)
    if "####" in text:
        text = text.rpartition("####")[2].strip().partition("\n")[0]
    elif boxed := boxed_answer(text):
        text = boxed
    elif (stated := STATED.search(text)) and ("\n" in text or stated.start() <= BEFORE_STATED):
        text = stated_answer(text) or text
    return unwrapped(text.strip())


def unwrapped(text: str) -> str:
    """LaTeX without the signs that put it in a line or a display."""
    for left, right in WRAPPERS:
        bare = text.rstrip(". ") if text.startswith(left) else text
        inside = bare.removeprefix(left).removesuffix(right)
        if len(inside) == len(bare) - len(left + right) and left not in inside and right not in inside:
            return unwrapped(inside.strip())
    return text

"""The answer inside a response: boxed, after ####, after `answer is`, or its last number. Searches are linear in the text."""

import re
from functools import lru_cache

from sbtiny.tasks.numbers import LAST_NUMBER, SCALES, parse_number

# Possessive quantifiers (*+, ++) keep searches linear.
BRACES = re.compile(r"\\{1,2}(boxed|fbox)\s*+\{|\\.|[{}]", re.DOTALL)
LONGEST_JOIN = 60  # characters between two boxes that are one answer
MOST_BOXES = 20
JOINS = {"and", "or", "also", "either", "maybe", "perhaps", "possibly", "text", "quad", "qquad", "boxed", "fbox"}
SPECIAL_TOKEN = re.compile(r"<\|[^<>|]*+\|>|</?s>|<(?:bos|eos|pad|unk|end_of_turn)>")
HASHES = re.compile(r"(?<!#)####(?!#)[ \t]*+(\S[^\n]*)")
STATED = re.compile(
    r"\banswer(?:\s++is\b|\s*+\**+\s*+[:=])[\s:*]*+"
    r"(?!(?:not|correct|incorrect|right|wrong|indeed)\b)(\S[^\n]*)", re.I
)
DENIED = re.compile(r"(?:\b(?:not|never|minus|negative)|n't)[\s*$(]{1,4}$", re.I)  # ahead of a number
SCALE_BEHIND = re.compile(rf"\s(?:{'|'.join(SCALES)})\b", re.I)
MATHS_BRACKETS = re.compile(r"\$\$([^$]++)\$\$\.?|\$([^$]++)\$\.?|\\\[((?:[^\\]|\\(?!\]))++)\\\]\.?|\\\(((?:[^\\]|\\(?!\)))++)\\\)\.?")
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
        start = 0
        for number in LAST_NUMBER.finditer(text := text.replace("−", "-")):
            found, start = number[0], number.start()
        if found is None or DENIED.search(text[max(start - 20, 0) : start]):
            return None
        scale = SCALE_BEHIND.match(text, start + len(found))
        return found + scale[0] if scale else found
    return found


def given_answer(text: str) -> str | None:
    """The answer that a text gives expressly: boxed, after ####, or after `answer is`; None where it gives none."""
    return boxed_answer(text) or hashed_answer(text) or stated_answer(text)


def boxed_answer(text: str) -> str | None:
    """Inside the box that opens last; of nested boxes the inner one. Boxes that only `and`, `or` or a comma part are one list."""
    boxes = innermost_boxes(text)
    if not boxes:
        return None
    start, end = boxes[-1]
    contents = [text[start:end].strip()]
    for (first, last), (later, _) in zip(boxes[-2::-1], boxes[:0:-1], strict=True):
        if len(contents) == MOST_BOXES or not is_join(text[last:later]):
            break
        contents.append(text[first:last].strip())
    return ", ".join(reversed(dict.fromkeys(contents)))


def is_join(between: str) -> bool:
    """Whether what stands between two boxes makes them one answer, rather than the later one the final answer."""
    words = re.findall("[A-Za-z]++|[0-9]", between) if len(between) <= LONGEST_JOIN else ["long"]
    return all(word in JOINS or (len(word) == 1 and word.isalpha()) for word in words)


def innermost_boxes(text: str) -> list[tuple[int, int]]:
    """Where the content of each box that holds no other begins and ends, in order; empty and unclosed ones left out."""
    opened: list[int] = []
    boxes: list[tuple[int, int]] = []
    latest = 0
    for token in BRACES.finditer(text):
        if token[0] == "{" or token[1]:
            opened.append(token.end() if token[1] else 0)
        elif token[0] == "}" and opened:
            start = opened.pop()
            if start > latest and text[start : token.start()].strip():
                latest = start
                boxes.append((start, token.start()))
    return boxes


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


@lru_cache(maxsize=4096)  # a question is asked many times
def reference_text(answer: str) -> str:
    """A reference answer without what some data sets wrap round it: special tokens, a box, `answer is`, maths brackets."""
    text = SPECIAL_TOKEN.sub("", answer).strip()
    text = given_answer(text) or text
    inner = MATHS_BRACKETS.fullmatch(text)
    return (inner[1] or inner[2] or inner[3] or inner[4]).strip() if inner else text


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

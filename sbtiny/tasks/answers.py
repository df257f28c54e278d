"""Find the answer in a response: boxed, after ####, after `answer is`, or its last number. Searches are linear in the text."""

import re
from functools import lru_cache

from sbtiny.tasks.numbers import LAST_NUMBER, SCALES, parse_number

# Possessive quantifiers (*+, ++) keep searches linear.
BRACES = re.compile(r"\\{1,2}(boxed|fbox)\s*+\{|\\.|[{}]", re.DOTALL)
LONGEST_JOIN = 60  # characters between two boxes of one answer
MOST_BOXES = 20
JOINS = {"and", "or", "also", "either", "maybe", "perhaps", "possibly", "text", "quad", "qquad", "boxed", "fbox"}
HASHES = re.compile(r"(?<!#)####(?!#)[ \t]*+(\S[^\n]*)")
STATED = re.compile(
    r"\banswer(?:\s++is\b|\s*+\**+\s*+[:=])[\s:*]*+"
    r"(?!(?:not|correct|incorrect|right|wrong|indeed)\b)(\S[^\n]*)",
    re.I,
)
DENIED = re.compile(r"(?:\b(?:not|never|minus|negative)|n't)[\s*$(]{1,4}$", re.I)  # before a number
SCALE_BEHIND = re.compile(rf"\s(?:{'|'.join(SCALES)})\b|\s?\\?%(?=\s*+(?:$|[.,;)$*\\]))", re.I)  # "2. I am 100% sure" is no answer
POWER_OF_UNIT = re.compile(r"(?<=[a-z}])\^(?:[23](?![0-9])|\{[23]\})")  # cm^2
SENTENCE_END = re.compile(r"\.(?=\s|$)|<[|/]")  # a special token or a closing tag ends it too

TURN_END = re.compile(r"(?:<[|｜][^|｜<>\n]{1,40}[|｜]>|</s>|<eos>|<end_of_turn>)$")  # of any model: references come from many
BEFORE_STATED = 24  # characters: "So the correct " and the like
WRAPPERS = (("$$", "$$"), ("$", "$"), (r"\[", r"\]"), (r"\(", r"\)"))


def final_answer(text: str) -> str | None:
    r"""Return the last `\boxed{x}`, else the last `#### x`, else the last `answer is x` or `answer: x`, else the last number.

    Braces are balanced; an empty or unclosed box does not count. None where there is none of these.
    """
    answer = marked_answer(text)
    if answer is None:
        start = 0
        for number in LAST_NUMBER.finditer(text := POWER_OF_UNIT.sub("", text.replace("−", "-"))):
            answer, start = number[0], number.start()
        if answer is None or DENIED.search(text[max(start - 20, 0) : start]):
            return None
        scale = SCALE_BEHIND.match(text, start + len(answer))
        return answer + scale[0] if scale else answer
    return answer


def marked_answer(text: str) -> str | None:
    """Return the marked answer of a text: boxed, after ####, or after `answer is`. None without a mark."""
    return boxed_answer(text) or hashed_answer(text) or stated_answer(text)


def boxed_answer(text: str) -> str | None:
    """Return the content of the box that opens last; of nested boxes the inner one. Boxes joined by `and`, `or` or a comma are a list."""
    boxes = find_innermost_box_spans(text)
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
    """Whether the text between two boxes joins them into one answer; otherwise the later box is the final answer."""
    words = re.findall("[A-Za-z]++|[0-9]", between) if len(between) <= LONGEST_JOIN else ["long"]
    return all(word in JOINS or (len(word) == 1 and word.isalpha()) for word in words)


def find_innermost_box_spans(text: str) -> list[tuple[int, int]]:
    """Find (start, end) of the content of each box without an inner box, in order. Empty and unclosed boxes are left out."""
    starts: list[int] = []
    boxes: list[tuple[int, int]] = []
    latest = 0
    for token in BRACES.finditer(text):
        if token[0] == "{" or token[1]:
            starts.append(token.end() if token[1] else 0)
        elif token[0] == "}" and starts:
            start = starts.pop()
            if start > latest and text[start : token.start()].strip():
                latest = start
                boxes.append((start, token.start()))
    return boxes


def hashed_answer(text: str) -> str | None:
    """Return the text after the last #### that is no Markdown heading. A heading is no number and has text below it."""
    answer, end = None, len(text.rstrip())
    for line in HASHES.finditer(text):
        content = SENTENCE_END.split(line[1])[0].strip()
        if content and (line.end() >= end or parse_number(content) is not None):
            answer = content
    return answer


def stated_answer(text: str) -> str | None:
    answer = None
    for line in STATED.finditer(text):
        answer = SENTENCE_END.split(line[1])[0].strip(" *") or answer
    return answer


def last_line(text: str) -> str:
    return text.rstrip().rpartition("\n")[2].strip()


def without_turn_end(text: str) -> str:
    """Strip the end-of-turn tokens from the end of a text."""
    text = text.rstrip()
    while end := TURN_END.search(text, max(0, len(text) - 50)):
        text = text[: end.start()].rstrip()
    return text


@lru_cache(maxsize=4096)  # a question is sampled many times
def unwrap_reference(text: str) -> str:
    r"""Extract the answer of a reference from its wrapping: turn ends, `#### `, `answer is`, a box, `$ $`, `\[ \]`."""
    text = without_turn_end(text)
    if "####" in text:
        text = text.rpartition("####")[2].strip().partition("\n")[0]
    elif boxed := boxed_answer(text):
        text = boxed
    elif (stated := STATED.search(text)) and ("\n" in text or stated.start() <= BEFORE_STATED):
        text = stated_answer(text) or text
    return strip_math_delimiters(text.strip())


def strip_math_delimiters(text: str) -> str:
    """Strip the inline or display delimiters from LaTeX."""
    for left, right in WRAPPERS:
        bare = text.rstrip(". ") if text.startswith(left) else text
        inside = bare.removeprefix(left).removesuffix(right)
        if len(inside) == len(bare) - len(left + right) and left not in inside and right not in inside:
            return strip_math_delimiters(inside.strip())
    return text

"""The exact value of a number as people and models write it: separators, fractions, LaTeX, currency, units.

Numbers are exact fractions of bounded size, and searches are linear in the text.
"""

import re
from fractions import Fraction

LONGEST_NUMBER = 300  # characters; Python refuses integers above 4300 digits
LARGEST_EXPONENT = 400  # 1e999999999 would fill the memory

# Possessive quantifiers (*+, ++) keep searches linear. Digits are ASCII: \d and int() take other scripts too.
WHOLE = r"(?:[0-9]{1,3}(?:,[0-9]{3})++|[0-9]++)"
DIGITS = rf"(?:{WHOLE}(?:\.[0-9]++)?|\.[0-9]++)"
POWER = r"(?:[eE]([+-]?[0-9]++)|\s?(?:\\times|\\cdot|×|\*)\s?10\s?(?:\^|\*\*)\s?\{?\s?([+-]?[0-9]++)\s?\}?)"
NUMBER = re.compile(rf"([+-]?)\s?(?:([0-9]{{1,9}})\s)?(-?{DIGITS})(?:\s?/\s?(-?{DIGITS}))?{POWER}?")
PLAIN_NUMBER = rf"\$?{DIGITS}(?:/{DIGITS})?(?:[eE][+-]?[0-9]++)?"
LAST_NUMBER = re.compile(rf"(?:(?<![\w)}}.\\-])-)?(?:\\[dt]?frac\{{{DIGITS}\}}\{{{DIGITS}\}}|{PLAIN_NUMBER})")
LONE_NUMBER = re.compile(rf"(?<![\w\\^.])-?{PLAIN_NUMBER}(?![\w^]|\s?[\\_])")
SHORT_UNIT = r"(?:[ckm]m|[km]g|m[lL]|ft|in|lbs?|hrs?|mins?|mph|[ap]m|[KMGT]B|st|nd|rd|th)\b"  # 5cm; 5xy is no unit
UNITS = re.compile(
    rf"(?:\s?%|{SHORT_UNIT}|[A-Za-z]{{4,}}|[\s(-]++[A-Za-z]{{2,}}|\s[mgshlL]\b)"
    r"(?:[\s/·.'()-]++[A-Za-z]++|\s?\^\s?\{?[23]\}?|[²³])*+[\s.,;)]*+"
)
NOT_UNITS = {"or", "and", "to", "pi", "sqrt", "sin", "cos", "tan", "log", "ln", "exp", "mod", "times", "plus", "minus"}
SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
EQUALS = re.compile(r"(?<![<>!:=])=(?!=)")
LEFT_SIDE = re.compile(r"[^0-9+*/^<>,;-]*+|[^A-Za-z]*+")  # a name or plain arithmetic, not an equation in x
REWRITES = tuple(
    (re.compile(pattern), new)
    for pattern, new in (
        ("[−﹣－]", "-"),
        (r"\\[!,]\s*+", ""),
        (r"\{,\}", ","),
        (r"\\(?:text|mbox|mathrm|textbf|mathbf)\s?\{([^{}]*+)\}", r" \1 "),
        (r"\\[dtc]?frac\s?\{([^{}]*+)\}\s?\{([^{}]*+)\}", r" \1/\2"),
        (r"\\[dtc]?frac\s?(?:\{([0-9]++)\}|([0-9]))\s?(?:\{([0-9]++)\}|([0-9]))", r" \1\2/\3\4"),
        (r"\\%", "%"),
        (r"\^\s?\{?\s?(?:\\circ|st|nd|rd|th)\b\s?\}?|°", " "),
        (r"(?<![\w)*])\*++|\*++(?![\w(])", " "),  # Markdown, not 2**10
        (r"\\left\b|\\right\b|\\[()\[\] ;:]|\\?[$€£¥₹]|~", " "),
        (r"\s++", " "),
    )
)


def parse_number(text: str) -> Fraction | None:
    r"""The exact value of a text that is one number, or None.

    Takes signs, 1,234, decimals, 3/4, \frac, mixed numbers, 1.5e3, 1.5 \times 10^3, currency, a name with `=` in front,
    and units behind, which are dropped: 50% is 50. Words such as million multiply. Exponents beyond 400 are refused.
    """
    if len(text) > LONGEST_NUMBER:
        return None
    for pattern, new in REWRITES:
        text = pattern.sub(new, text)
    *left, number = EQUALS.split(text)
    match = NUMBER.match(number := number.strip())
    if not match or not all(LEFT_SIDE.fullmatch(re.sub(r"\\[A-Za-z]++", "", part)) for part in left):
        return None
    scale = unit_scale(number[match.end() :])
    return fraction(match, scale) if scale else None


def unit_scale(rest: str) -> int | None:
    """What the text behind a number multiplies it by: 1 for nothing or a unit; None when it is more than a unit."""
    words = re.findall("[a-z]+", rest.lower())
    if NOT_UNITS.intersection(words) or (rest.strip(" .,;)") and not UNITS.fullmatch(rest)):
        return None
    return SCALES.get(words[0], 1) if words else 1


def fraction(match: re.Match[str], scale: int) -> Fraction | None:
    sign, whole, over, under, *exponents = match.groups()
    exponent = int(exponents[0] or exponents[1] or 0)
    if abs(exponent) > LARGEST_EXPONENT or (whole and not under) or ((whole or sign) and over.startswith("-")):
        return None
    value, divisor = (Fraction((part or "1").replace(",", "")) for part in (over, under))
    if not divisor:
        return None
    value = (int(whole or 0) + value / divisor) * scale * Fraction(10) ** exponent
    return -value if sign == "-" else value

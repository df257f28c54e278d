"""Parse numbers as people and models write them: separators, fractions, LaTeX, currency, units, words.

Numbers are exact fractions of bounded size, and searches are linear in the text.
"""

import re
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate
from string import ascii_lowercase
from unicodedata import normalize

Rules = list[tuple[re.Pattern[str], str]]


def compile_rules(*rules: tuple[str, str]) -> Rules:
    return [(re.compile(pattern), new) for pattern, new in rules]


def rewrite(text: str, rules: Rules) -> str:
    """Apply the rules in order."""
    for pattern, new in rules:
        text = pattern.sub(new, text)
    return text


MAX_NUMBER_CHARS = 300  # characters; Python refuses integers above 4300 digits
LARGEST_EXPONENT = 400  # 1e999999999 would fill the memory
DEEPEST_MACROS = 8  # nested macros that are unwrapped

# Possessive quantifiers (*+, ++) keep searches linear. Digits are ASCII; \d and int() accept other scripts.
WHOLE = r"(?:[0-9]{1,3}(?:,[0-9]{3})++|[0-9]++)"
DIGITS = rf"(?:{WHOLE}(?:\.[0-9]++)?|\.[0-9]++)"
POWER = r"(?:[eE]([+-]?[0-9]++)|\s?(?:\\times|\\cdot|×|\*)\s?10\s?(?:\^|\*\*)\s?\{?\s?([+-]?[0-9]++)\s?\}?)"
NUMBER = re.compile(rf"([+-]?)\s?(?:([0-9]{{1,9}})\s)?(-?{DIGITS})(?:\s?/\s?(-?{DIGITS}))?{POWER}?")
SIMPLE_NUMBER = re.compile(r"-?[0-9]++(?:\.[0-9]++)?")
PLAIN_NUMBER = rf"\$?{DIGITS}(?:/{DIGITS})?(?:[eE][+-]?[0-9]++)?"
LAST_NUMBER = re.compile(rf"(?:(?<![\w)}}.\\-])-)?(?:\\[dt]?frac\{{{DIGITS}\}}\{{{DIGITS}\}}|{PLAIN_NUMBER})")
LONE_NUMBER = re.compile(rf"(?<![\w\\^.])-?{PLAIN_NUMBER}(?![\w^!]|\s?[\\_])")
SHORT_UNIT = r"(?:[ckmd]m|[km]?g|m[lL]|ft|in|oz|yds?|mi|lbs?|hrs?|mins?|mph|[ap]m|[KMGT]B|[kM]?W|Hz|sq|cu|cc|st|nd|rd|th)\b"
UNITS = re.compile(
    rf"(?:\s?%|{SHORT_UNIT}|[A-Za-z]{{4,}}|[\s(-]++(?:[A-Za-z]{{3,}}|{SHORT_UNIT}|(?:a|an|of|at|on)\b)|\s[mgshlL]\b)"
    r"(?:[\s/·.'()-]++[A-Za-z]++|\s?\^\s?\{?[23]\}?)*+[\s.,;)]*+"
)
COUNTS = (
    "two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen "
    "nineteen twenty thirty forty fifty sixty seventy eighty ninety tens"
)
PARTS = {"half": 2, "third": 3, "fourth": 4, "quarter": 4, "fifth": 5, "sixth": 6, "seventh": 7, "eighth": 8, "ninth": 9, "tenth": 10}
PARTS |= {"hundredth": 100, "thousandth": 10**3, "millionth": 10**6}
SENTENCE_WORDS = {"or", "and", "to", "is", "are", "was", "if", "one", "times", "out", "zero"}  # may stand next to an answer
DENIALS = {"not", "no", "never", "cannot", "impossible", "wrong", "incorrect", "undefined", "unless", "except", "false"}
CHANGES = {"minus", "plus", "negative", "below", "least", "most", "squared", "cubed", "factorial", "root", "divided"}
FUNCTIONS = {"pi", "sqrt", "sin", "cos", "tan", "log", "ln", "exp", "mod", "modulo", "choose", "base", "binary", "octal", "infinity"}
MULTIPLES = {"gross", "score", "grand", "mil", "bn", "double", "doubled", "twice", "triple", "tripled", "halved", "permille", "mille"}
CHANGES_VALUE = DENIALS | CHANGES | FUNCTIONS | MULTIPLES | {*COUNTS.split(), *PARTS}
NOT_UNITS = CHANGES_VALUE | SENTENCE_WORDS
SCALES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "lakh": 10**5, "million": 10**6, "crore": 10**7}
SCALES |= {"billion": 10**9, "trillion": 10**12, "quadrillion": 10**15}
SCALES |= {f"{name}s": size for name, size in SCALES.items()}
SCALES |= {"halves" if part == "half" else f"{part}s": Fraction(1, size) for part, size in PARTS.items()}
SENTENCE_CHANGES = CHANGES_VALUE | SCALES.keys() | {"than", "between", "under"}
EQUALS = re.compile(r"(?<![<>!:=])=(?!=)")
NAME = r"(?:[A-Za-z]{1,2}|[A-Za-z ]{3,40})(?:_(?:\{[^{}]*+\}|\w))?'{0,2}(?:(?:\^\{-1\})?\([^()=]*+\))?"
LEFT_SIDE = re.compile(rf"\s*+{NAME}\s*+|[^0-9+*/^<>,;-]*+|[^A-Za-z]*+")  # a name or plain arithmetic, no equation in x
COMMAND = re.compile(r"\\[A-Za-z]++")
UNKNOWN_INSIDE = re.compile(r"\\(?:sqrt|sin|cos|tan|log|ln|exp|binom)(?![A-Za-z])|[a-z]\s?!|\|\s?[a-z]\s?\|")
FRACTION_SIGNS = re.compile("[¼-¾⅐-⅞↉]")
RAISED = re.compile("[⁰¹²³⁴-⁹⁺⁻]+")
LOWERED = re.compile("[₀-₉]+")
SIGNS = str.maketrans({"−": "-", "﹣": "-", "－": "-", "–": "-", "º": "°", "˚": "°", "∶": ":", "⁄": "/", "÷": "/"})
REPEATING = re.compile(r"([0-9]*+)\.([0-9]*+)\s?\\(?:overline|bar|dot)\s?(?:\{\s?([0-9]++)\s?\}|([0-9]))")
DOTTED = re.compile(r"([0-9]*+)\.([0-9]{0,4}?)([0-9]{1,6}?)(?:\3){2,40}(?:\.{3}|\\[lc]?dots)()")
SPACED_THOUSANDS = re.compile(r"(?<![0-9.,/] )(?<![0-9.,/^_])[1-9][0-9]{0,2}(?: [0-9]{3})++(?! ?[0-9/])")
TEXT = r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|[mh]box|math(?:rm|bf|it|sf|tt|normal)|operatorname|emph)\s?"
LAYOUT = compile_rules(
    (r"\\(?:text)?color(?:box)?\s?(?:\[[^\][]*+\]\s?)?\{[^{}]*+\}|\\(?:[hv]space|[hv]?phantom)\*?\s?\{[^{}]*+\}", " "),
    (r"(?<!\\)\{\s?\{([^{}]*+)\}\s?\}", r"{\1}"),
    (r"(?<![A-Za-z\\}])\{\s?\}", ""),
    (r"\\(?:nice|s|x)frac(?=\s?\{)", r"\\frac"),
    (r"\\(?:display|text|script)style(?![A-Za-z])|\\(?:left|right)(?![A-Za-z])\.?|\\[bB]igg?[lrm]?(?![A-Za-z])", " "),
    (r"\\(?:tiny|small|normalsize|large|Large|LARGE|huge|Huge|bf|rm|it|boldmath|checkmark)(?![A-Za-z])", " "),
    (r"\\(?:boldsymbol|bm|pmb|underline|ensuremath|boxed|fbox)(?=\s?\{)", ""),
    (r"(?<!\\)\\!\s*+", ""),
    (r"(?<!\\)\\[,;:> ]|\\q?quad(?![A-Za-z])|\\(?:thin|med|thick|en)sp?(?:ace)?(?![A-Za-z])|~", " "),
    (r"\{,\}", ","),
    (r"(?<!\\)\\[()\[\]]|\\?[$€£¥₹]", " "),
    (r"(?<![\w)*])\*++|\*++(?![\w(\\])", " "),  # Markdown, not 2**10
    (r"\s++", " "),
)
REWRITES = compile_rules(
    (rf"{TEXT}\{{([^{{}}]*+)\}}", r" \1 "),
    (r"\\[dtc]?frac\s?\{([^{}]*+)\}\s?\{([^{}]*+)\}", r" \1/\2"),
    (r"\\[dtc]?frac\s?(?:\{([0-9]++)\}|([0-9]))\s?(?:\{([0-9]++)\}|([0-9]))", r" \1\2/\3\4"),
    (r"\\%", "%"),
    (r"(?:\^\s?\{?\s?\\circ\b\s?\}?|\\(?:text)?degree(?![A-Za-z])|°)(?:\s*+[CF]\b)?", " "),
    (r"\^\s?\{?\s?(?:st|nd|rd|th)\b\s?\}?", " "),
    (r"\\approx(?![A-Za-z])|≈", "="),
    (r"^\s*+(?:\\sim(?![A-Za-z])|(?:approximately|approx\.?|about|roughly|around)\s)", " "),
    (r"^\s*+(?:minus|negative)\s++(?=[0-9.\\])", "-"),
    (r"\s++", " "),
)


def parse_number(text: str) -> Fraction | None:
    r"""Parse a text that is one number to its exact value; None for any other text.

    Takes signs, 1,234 and 10 000, decimals, 0.\overline{3}, 3/4, \frac, mixed numbers, 1.5e3, 1.5 \times 10^3, currency,
    a name with `=` before it, and units after it, which are dropped: 50% is 50. Words such as million and fifths multiply.
    Other words that change a number give None, and so do exponents beyond 400.
    """
    if len(text) > MAX_NUMBER_CHARS:
        return None
    return Fraction(text) if SIMPLE_NUMBER.fullmatch(text) else parse_marked_number(text)


@lru_cache(maxsize=4096)  # the same references come often
def parse_marked_number(text: str) -> Fraction | None:
    text = rewrite(without_layout(text), REWRITES)
    for pattern in (DOTTED, REPEATING):
        text = pattern.sub(repeating_fraction, text)
    text = joined_thousands(text)
    *left, number = EQUALS.split(text)
    if len(left) == 1 and re.fullmatch(r"\s*+[A-Za-z]\s*+", number):
        left, number = [number], left[0]
    match = NUMBER.match(number := without_braces(number.strip(" ,;")))
    if not match or not all(map(is_name_or_sum, left)):
        return None
    scale = unit_scale(number[match.end() :])
    value = fraction(match, scale) if scale else None
    return None if any(parse_number(part) not in (None, value) for part in left) else value


def is_name_or_sum(side: str) -> bool:
    """Whether the left side of an equation is a name or plain arithmetic, so that the right side is its value."""
    letters = re.search("[A-Za-z]", plain := COMMAND.sub("", side))
    return bool(LEFT_SIDE.fullmatch(plain)) and not (letters and UNKNOWN_INSIDE.search(side))


def without_layout(text: str) -> str:
    """Remove the layout of a formula: colours, sizes, spaces, outer braces, Markdown, Unicode forms."""
    if not text.isascii():
        text = FRACTION_SIGNS.sub(vulgar_fraction, text.translate(SIGNS))
        text = RAISED.sub(lambda sign: "^{" + normalize("NFKC", sign[0]).replace("−", "-") + "}", text)
        text = LOWERED.sub(lambda sign: "_{" + normalize("NFKC", sign[0]) + "}", text)
        text = normalize("NFKC", text).translate(SIGNS)
    for _ in range(DEEPEST_MACROS if "\\" in text or "{" in text else 1):
        before = text
        if (text := without_braces(rewrite(text, LAYOUT).strip())) == before:
            break
    return text


def vulgar_fraction(sign: re.Match[str]) -> str:
    return r" \frac{{{}}}{{{}}}".format(*normalize("NFKC", sign[0]).split("⁄"))


def without_braces(text: str) -> str:
    """Remove braces around the whole text."""
    while text.startswith("{") and text.endswith("}") and not re.search(r"\\}$|\\(?:choose|over)(?![A-Za-z])", text):
        depths = list(accumulate((sign == "{") - (sign == "}") for sign in text))
        if 0 in depths[:-1] or depths[-1]:
            break
        text = text[1:-1].strip()
    return text


def joined_thousands(text: str) -> str:
    return SPACED_THOUSANDS.sub(lambda match: match[0].replace(" ", ""), text)


def repeating_fraction(match: re.Match[str]) -> str:
    whole, once, again = match[1], match[2], match[3] or match[4]
    nines = 10 ** len(once) * (10 ** len(again) - 1)
    return f"{int(whole + once + again) - int(whole + once or 0)}/{nines}"


def unit_scale(rest: str) -> Fraction | int | None:
    """Read the factor of the text after a number: 1 for no text or a unit, None for anything more than a unit."""
    if not (text := rest.strip(" .,;)")):
        return 1
    below_zero = text.endswith(" below zero")
    words = lower_words(text.removesuffix(" below zero"))
    scale: Fraction | int = -1 if below_zero else 1
    while words and words[0] in SCALES:
        scale *= SCALES[words.pop(0)]
    letters = any(len(word) > 2 and word in ascii_lowercase for word in words)  # 5 abc is a product
    if letters or NOT_UNITS.intersection(words) or SCALES.keys() & words or not UNITS.fullmatch(rest):
        return None
    return scale


def lower_words(text: str) -> list[str]:
    return re.findall("[a-z]+", re.sub("n['’]t\\b", " not", text.lower()))


def fraction(match: re.Match[str], scale: Fraction | int) -> Fraction | None:
    sign, whole, over, under, *exponents = match.groups()
    exponent = int(exponents[0] or exponents[1] or 0)
    if abs(exponent) > LARGEST_EXPONENT or (whole and not under) or ((whole or sign) and over.startswith("-")):
        return None
    value, divisor = (Fraction((part or "1").replace(",", "")) for part in (over, under))
    if not divisor:
        return None
    value = (int(whole or 0) + value / divisor) * scale * Fraction(10) ** exponent
    return -value if sign == "-" else value


UNIT_NAMES = {
    name: unit
    for unit, names in {
        "cm": "cm centimeter centimetre", "mm": "mm millimeter millimetre", "m": "m meter metre", "km": "km kilometer kilometre",
        "in": "in inch inche", "ft": "ft foot feet", "yd": "yd yard", "mi": "mi mile", "g": "g gram", "kg": "kg kilogram",
        "mg": "mg milligram", "lb": "lb pound", "oz": "oz ounce", "l": "l liter litre", "ml": "ml milliliter millilitre",
        "s": "s sec second", "min": "min minute", "h": "h hr hour", "day": "day", "week": "week", "month": "month",
        "year": "year yr", "%": "% percent", "$": "$ dollar", "cent": "cent", "€": "€ euro", "£": "£",
    }.items()
    for name in names.split()
}  # fmt: skip
INLINE_FORMULA = re.compile(r"(?<!\\)\$([^$]*+)(?<!\\)\$")  # dollars that are no currency
PER = re.compile(r"\bper\b|/(?=\s?[A-Za-z])|\san?\s")
LEFT_NAME = re.compile(r"^[\s$]*+([A-Za-z])\s*+=")
UNIT = re.compile(r"[$€£%]|(?<![A-Za-z\\])[A-Za-z]++")


def measure_unit(text: str) -> str | None:
    """Find the first known unit in a short text, under one name for all spellings."""
    if SIMPLE_NUMBER.fullmatch(text) or len(text) > MAX_NUMBER_CHARS:
        return None
    text = INLINE_FORMULA.sub(r"\1", EQUALS.split(text)[-1])
    *others, last = UNIT.findall(PER.split(text)[0]) or [""]
    for word in (*(word for word in others if word != "in"), last):  # "12 in total" are no inches
        name = word.lower()
        if unit := UNIT_NAMES.get(name) or UNIT_NAMES.get(name.removesuffix("s")):
            return unit
    return None


def same_number(reference: str, answer: str) -> bool | None:
    """Whether two texts are the same number with no different units. None when either is no plain number."""
    expected, value = parse_number(reference), parse_number(answer)
    if expected is None or value is None:
        return None
    if len({*LEFT_NAME.findall(reference), *LEFT_NAME.findall(answer)}) > 1:
        return False
    if expected == value:
        units = {measure_unit(reference), measure_unit(answer)} - {None}
        return len(units) < 2
    percent = ("%" in reference or "percent" in reference, "%" in answer or "percent" in answer)
    if percent[0] is percent[1]:
        return False
    return expected == value / 100 if percent[1] else expected / 100 == value

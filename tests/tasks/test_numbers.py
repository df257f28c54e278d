from fractions import Fraction

import pytest

from sbtiny.tasks.numbers import parse_number

NUMBERS = {
    "72": 72,
    "72 clips": 72,
    "72.": 72,
    "+5": 5,
    "-5": -5,
    "−5": -5,
    "- 5": -5,
    "$5.00": 5,
    "-$5": -5,
    "\\$ 1500": 1500,
    "€1,234.5": "1234.5",
    "1,234": 1234,
    "1{,}234": 1234,
    "1 234": 1234,
    "10,\\!080": 10080,
    "11,\\! 111,\\! 111,\\! 100": 11111111100,
    "50%": 50,
    "50\\%": 50,
    "50 percent": 50,
    ".5": "1/2",
    "0.1": "1/10",
    "3/4": "3/4",
    "-3/4": "-3/4",
    "6/8": "3/4",
    "\\frac{3}{4}": "3/4",
    "\\dfrac{-3}{4}": "-3/4",
    "-\\frac 59": "-5/9",
    "\\frac9{19}": "9/19",
    "\\frac{29}4": "29/4",
    "1 1/2": "3/2",
    "-10\\frac{1}{12}": "-121/12",
    "1e3": 1000,
    "1.5e-3": "3/2000",
    "1.5 \\times 10^{3}": 1500,
    "2×10^2": 200,
    "5 km/h": 5,
    "5km": 5,
    "20 miles per hour": 20,
    "15\\mbox{ cm}^2": 15,
    "9\\text{ values}": 9,
    "1.85\\ \\text{USD}": "1.85",
    "90^\\circ": 90,
    "90^{\\circ}": 90,
    "12^{\\text{th}}\\text{ grade}": 12,
    "3 million": 3_000_000,
    "$1.5 billion dollars": 1_500_000_000,
    "x=5": 5,
    "k = \\frac{-33}{2}": "-33/2",
    "x = 9/3 = 3": 3,
    "18 / 3 = 6": 6,
    "\\text{Total} = 18": 18,
    "**72**": 72,
    "\\(72\\)": 72,
    "$72$": 72,
    "-0": 0,
}
NOT_NUMBERS = [
    "", "five", "-", ".", "1,23", "1 23", "3, 5", "3 or 5", "3 and 5", "3x", "5xy", "3i", "3\\pi", "3\\sqrt{2}",
    "18+2\\pi", "2^{10}", "2**10", "5!", "3:30", "7 - 2", "--5", "1/0", "\\frac{1}{0}", "40_9", "1_000", "0x10",
    "inf", "nan", "5e", "٣", "²", "1e999999999", "1e-999999999", "9" * 5000, "1,-2", "(3, 4)", "x \\neq 5",
    "x >= 5", "2x = 10", "AB=9, CD=4", "49x^2 - 42xy = 0", "x + y + z = 0",
]  # fmt: skip


@pytest.mark.parametrize("text", NUMBERS)
def test_numbers(text: str) -> None:
    assert parse_number(text) == Fraction(NUMBERS[text])


@pytest.mark.parametrize("text", NOT_NUMBERS)
def test_not_numbers(text: str) -> None:
    assert parse_number(text) is None

import pytest

from sbtiny.tasks.answers import final_answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so \\boxed{72}.", "72"),
        ("\\boxed{1} no, \\boxed{2}", "2"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{\\boxed{5}}", "5"),
        ("\\fbox{5}", "5"),
        ("\\\\boxed{5}", "5"),
        ("\\boxed{ \\{1, 2\\} }", "\\{1, 2\\}"),
        ("a stray { or } then \\boxed{3} and }", "3"),
        ("\\boxed{4} then \\boxed{}", "4"),
        ("\\boxed{4} then \\boxed{12", "4"),
        ("\\boxed{7} #### 8", "7"),
        ("work\n#### 1,234", "1,234"),
        ("work\n#### yes", "yes"),
        ("#### Step 1: add\nThe answer is 6", "6"),
        ("#### 5\nThe answer is 6", "5"),
        ("The answer is 6.", "6"),
        ("The answer is 6. Then 7 more.", "6"),
        ("Answer: 1\nAnswer: **2**", "2"),
        ("**Answer:** $3.50", "$3.50"),
        ("Final answer:\n\n12", "12"),
        ("the answer is 9</solution>", "9"),
        ("the answer is 9<|im_end|>", "9"),
        ("My answer is correct. Total 18.", "18"),
        ("40 + 2 makes 42 eggs.", "42"),
        ("10-5 is 5, and 5-7 = -2", "-2"),
        ("from −3", "-3"),
        ("costs $1,234.50.", "$1,234.50"),
        ("half: \\frac{1}{2}", "\\frac{1}{2}"),
        ("or 3/4.", "3/4"),
        ("nothing here", None),
        ("", None),
        ("\\boxed{", None),
    ],
)
def test_final_answer(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer

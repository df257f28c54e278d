import re
from pathlib import Path

import pytest

from sbtiny.errors import InputError
from sbtiny.tasks.sources import Question
from sbtiny.tasks.verify import load_verifier


def ask(answer: str) -> Question:
    return Question("q1", "How many?", answer)


def own(folder: Path, body: str) -> str:
    path = folder / "my.py"
    path.write_text(body)
    return f"{path}:check"


def test_own_verifier(tmp_path: Path) -> None:
    spec = own(tmp_path, "def check(response, question, answer):\n    return response == f'{question} {answer}'\n")
    check = load_verifier(spec)
    assert check("How many? 5", ask("5")) is True
    assert check("5", ask("5")) is False
    assert load_verifier(spec.removesuffix(":check"))("How many? 5", ask("5")) is True


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("def chekc(response, question, answer): ...", "has no function 'check'"),
        ("check = 5", "has no function 'check'"),
        ("def check(response): ...", "must take (response, question, answer)"),
        ("def check(:", "does not load: SyntaxError"),
        ("import nowhere_to_be", "does not load: ModuleNotFoundError: No module named 'nowhere_to_be' (my.py, line 1)"),
    ],
)
def test_broken_own_files_are_found_on_loading(body: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=re.escape(words)):
        load_verifier(own(tmp_path, body))


def test_a_missing_own_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no verifier file"):
        load_verifier(str(tmp_path / "none.py:check"))


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("    return 1 / 0", "raised ZeroDivisionError: division by zero (my.py, line 2)"),
        ("    pass", "returned None: return True or False"),
        ("    return 0.5", "returned 0.5: return True or False"),
    ],
)
def test_own_mistakes_name_file_and_question(body: str, words: str, tmp_path: Path) -> None:
    spec = own(tmp_path, f"def check(response, question, answer):\n{body}\n")
    with pytest.raises(InputError) as caught:
        load_verifier(spec)("5", ask("5"))
    assert f"verifier {spec} on question q1 {words}" == str(caught.value)

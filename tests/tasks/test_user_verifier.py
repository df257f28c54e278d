import re
import signal
import sys
from pathlib import Path

import pytest

from sbtiny.errors import InputError
from sbtiny.tasks import user_verifier
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
        ("def check(response): ...", "must take (question, completion), or (response, question, answer)"),
        ("def check(:", "does not load: SyntaxError"),
        ("import sys\nsys.exit(0)", "does not load: SystemExit: 0 (my.py, line 2)"),
        ("raise SystemExit", "does not load: SystemExit (my.py, line 1)"),
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
        ("    pass", "returned None: return True, False or a number from 0 to 1"),
        ("    return 1.5", "returned 1.5: return True, False or a number from 0 to 1"),
        ("    while True: pass", "raised VerifierTimeout: took longer than 0.05 s (my.py, line 2)"),
        ("    raise SystemExit('bye')", "raised SystemExit: bye (my.py, line 2)"),
        ("    __import__('sys').exit()", "raised SystemExit (my.py, line 2)"),
        ("    raise GeneratorExit", "raised GeneratorExit (my.py, line 2)"),
    ],
)
def test_a_failure_is_told_with_its_row_and_stops_nothing_else(
    body: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(user_verifier, "TIMEOUT_S", 0.05)
    spec = own(tmp_path, f"def check(question, completion):\n    if completion == 'fine': return True\n{body}\n")
    words = words.replace("line 2", "line 3")
    check = load_verifier(spec)
    assert check("5", ask("5")) is False
    assert capsys.readouterr().err.strip() == f"verifier {spec} on question q1 {words}; counted as wrong"
    assert check("fine", ask("5")) is True
    for _ in range(30):
        assert check("5", ask("5")) is False
    assert capsys.readouterr().err.count("on question q1") == 4


STUBBORN = """
def check(question, completion):
    while True:
        try:
            work()
        except {caught}:
            pass

def work():
    total = 0
    for number in range(1000):
        total += number
"""


@pytest.mark.parametrize("caught", ["TimeoutError", "Exception", "BaseException"])
def test_code_that_catches_everything_and_tries_again_is_stopped_as_well(
    caught: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(user_verifier, "TIMEOUT_S", 0.05)
    monkeypatch.setattr(user_verifier, "REPEAT_S", 0.001)
    check = load_verifier(own(tmp_path, STUBBORN.format(caught=caught)))
    for _ in range(10):  # alarms follow each other closely, and none comes after the end
        assert check("5", ask("5")) is False
    assert "took longer than 0.05 s" in capsys.readouterr().err
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.mark.parametrize("body", ["raise KeyboardInterrupt", "def check(question, completion):\n    raise KeyboardInterrupt"])
def test_ctrl_c_inside_a_verifier_is_ctrl_c(body: str, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        load_verifier(own(tmp_path, body))("5", ask("5"))


def test_a_verifier_that_only_fails_is_the_users_to_mend(tmp_path: Path) -> None:
    check = load_verifier(own(tmp_path, "def check(question, completion):\n    return question.anwser == completion\n"))
    assert not any(check("5", ask("5")) for _ in range(19))
    with pytest.raises(InputError, match=r"no attribute 'anwser'.* failed on each of the first 20 answers"):
        check("5", ask("5"))


def test_two_parameters_get_the_question_and_the_completion_and_may_return_a_share(tmp_path: Path) -> None:
    body = "def check(question, completion):\n    return float(completion) if question.answer == '5' else 0\n"
    check = load_verifier(own(tmp_path, body))
    assert [check(text, ask("5")) for text in ("0", "0.49", "0.5", "1")] == [False, False, True, True]
    assert check("1", ask("6")) is False


def test_an_alarm_of_the_caller_is_put_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGALRM)
    load_verifier(own(tmp_path, "def check(question, completion):\n    return True\n"))("5", ask("5"))
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


# ---- what lies beside it ---------------------------------------------------------------------------------------------

EASY = "def check(question, completion):\n    return {} == completion\n"


def helped(folder: Path, value: str, body: str = "from helpers import value\n" + EASY.format("value()")) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "helpers.py").write_text(f"def value():\n    return {value!r}\n")
    return own(folder, body)


def right(check, text: str) -> bool:
    return check(text, ask("5"))


@pytest.mark.parametrize(
    "body",
    [
        "from helpers import value\n" + EASY.format("value()"),
        "import helpers\n" + EASY.format("helpers.value()"),
        "def check(question, completion):\n    import helpers\n    return helpers.value() == completion\n",
        "def check(question, completion):\n    from helpers import value\n    return value() == completion\n",
        "from package.deep import value\n" + EASY.format("value()"),
        "import package.deep\n" + EASY.format("package.deep.value()"),
        "def check(question, completion):\n    import plain.deep as d\n    return d.value() == completion\n",
    ],
)
def test_a_helper_beside_it_is_found_and_nobody_else_sees_it(body: str, tmp_path: Path) -> None:
    spec = helped(tmp_path / "one", "a", body)
    for name, more in (("package", "from package.deep import value\n"), ("plain", None)):
        (tmp_path / "one" / name).mkdir()
        (tmp_path / "one" / name / "deep.py").write_text("from helpers import value\n")
        if more:
            (tmp_path / "one" / name / "__init__.py").write_text(more)
    before = (list(sys.path), set(sys.modules), sys.dont_write_bytecode)
    check = load_verifier(spec)
    for _ in range(2):
        assert (right(check, "a"), right(check, "b")) == (True, False)
    after = (list(sys.path), {name for name in sys.modules if not name.startswith("sbtiny_verifier_")}, sys.dont_write_bytecode)
    assert after == (before[0], {name for name in before[1] if not name.startswith("sbtiny_verifier_")}, before[2])
    assert not list(tmp_path.rglob("__pycache__"))


def test_two_verifiers_have_helpers_of_one_name(tmp_path: Path) -> None:
    late = "def check(question, completion):\n    import helpers\n    return helpers.value() == completion\n"
    one, two = load_verifier(helped(tmp_path / "one", "a", late)), load_verifier(helped(tmp_path / "two", "b", late))
    for _ in range(2):
        assert (right(one, "a"), right(two, "b")) == (True, True)
        assert (right(one, "b"), right(two, "a")) == (False, False)


def test_after_an_edit_a_verifier_that_is_loaded_again_is_the_new_one(tmp_path: Path) -> None:
    old = load_verifier(helped(tmp_path, "a"))
    new = load_verifier(helped(tmp_path, "b"))  # as long, and within the second
    assert (right(old, "a"), right(new, "b")) == (True, True)
    assert right(load_verifier(own(tmp_path, EASY.format("'c'"))), "c")


def test_a_helper_takes_the_place_of_nothing_that_is_there(tmp_path: Path) -> None:
    names = ("random", "colorsys", "sbtiny", "numpy")  # one loaded long ago, one of the library that is not, ours, another's
    for name in names:
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('the wrong one')\n")
    sys.modules.pop("colorsys", None)
    lines = "".join(f"    import {name}\n" for name in (*names, "sbtiny.errors"))
    check = load_verifier(own(tmp_path, f"def check(question, completion):\n{lines}    return bool(colorsys.rgb_to_hsv)\n"))
    assert right(check, "5")
    assert "colorsys" in sys.modules  # the library's is anybody's


def test_packages_of_an_environment_in_the_folder_stay_everybodys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / ".venv" / "site-packages"
    site.mkdir(parents=True)
    (site / "of_all.py").write_text("count = 0\n")
    monkeypatch.syspath_prepend(str(site))
    body = "def check(question, completion):\n    import of_all\n    of_all.count += 1\n    return True\n"
    check = load_verifier(own(tmp_path, body))
    assert right(check, "5")
    assert right(check, "5")
    assert sys.modules.pop("of_all").count == 2


def test_a_failure_in_a_helper_is_told_with_the_line_that_called_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = own(tmp_path, "import helpers\ndef check(question, completion):\n    return helpers.value()\n")
    (tmp_path / "helpers.py").write_text("def value():\n    return 1 / 0\n")
    assert not right(load_verifier(spec), "5")
    assert "ZeroDivisionError: division by zero (my.py, line 3)" in capsys.readouterr().err
    (tmp_path / "helpers.py").write_text("import nowhere_to_be\n")
    with pytest.raises(InputError, match=r"No module named 'nowhere_to_be' \(my\.py, line 1\)"):
        load_verifier(spec)

"""Rows of several lengths from a question's right answers, by examples/gsm8k_0.5b/rows.py, and the commands of its README."""

import argparse
import random
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from sbtiny.rollout.policy import Policy
from sbtiny.tasks.sources import Question

FOLDER = Path(__file__).parents[2] / "examples" / "gsm8k_0.5b"
COMMANDS = re.findall(r"^    python examples/gsm8k_0.5b/(.*)$", (FOLDER / "README.md").read_text(), re.MULTILINE)
LONG = """To find the sum we follow these steps.

1. Add the first two:
\\[ 2 + 3 = 5 \\]

2. Add the third:
\\[ 5 + 4
= 9 \\]

So the answer is \\boxed{9}."""
SHORT = "We add.\n\n\\[ 2 + 3 + 4 = \\boxed{9} \\]"


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(FOLDER / "rows.py"))


def test_a_preamble_is_what_stands_before_the_first_sum(script: dict[str, Any]) -> None:
    assert script["without_preamble"](LONG) == LONG[LONG.index("1. Add") :]
    assert script["without_preamble"]("Seven.\n\nIt is so.") == "Seven.\n\nIt is so."


def test_sums_alone_keep_formulas_and_the_answer(script: dict[str, Any]) -> None:
    assert script["by_sums"](LONG) == "\\[ 2 + 3 = 5 \\]\n\n\\[ 5 + 4 = 9 \\]\n\n\\[ \\boxed{9} \\]"
    assert script["by_sums"](LONG, 1).startswith("1. Add the first two:\n\\[ 2 + 3 = 5 \\]\n\n\\[ 5 + 4 = 9 \\]")
    assert script["by_sums"](SHORT) == "\\[ 2 + 3 + 4 = \\boxed{9} \\]"


def test_the_middle_answer_is_stated_and_the_others_are_given(script: dict[str, Any], policy: Policy) -> None:
    rows = script["rows_of"](policy, Question("q", "2 + 3 + 4?", "9"), [LONG, SHORT, LONG + " "], random.Random(0))
    stated = [row for row in rows if not row.get("given")]
    assert [row["response"] for row in stated] == [script["without_preamble"](LONG)]
    assert rows[1]["response"] == LONG + " "  # the longest, whole
    assert script["by_sums"](SHORT) in [row["response"] for row in rows]
    assert len({row["budget"] for row in rows}) == len(rows)
    assert all("\\boxed{9}" in row["response"] and row["budget"] == len(policy.encode(row["response"])) for row in rows)


class Parsed(Exception):
    """The arguments were right; nothing else shall run."""


@pytest.mark.parametrize("line", COMMANDS)
def test_the_scripts_take_the_arguments_of_the_readme(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def parse_and_stop(parser: argparse.ArgumentParser, of: Any = argparse.ArgumentParser.parse_args) -> None:
        of(parser)
        raise Parsed

    name, *arguments = shlex.split(line, comments=True)
    monkeypatch.syspath_prepend(FOLDER)  # as python does for a script
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with pytest.raises(Parsed):
        runpy.run_path(str(FOLDER / name), run_name="__main__")

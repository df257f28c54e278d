"""The examples are what their texts say: files that can be read, a verifier that decides rightly, commands that exist."""

import ast
import importlib
import inspect
import json
import os
import re
import runpy
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from support import parse

from sbtiny.load_settings import load_settings
from sbtiny.models.device import CARDS
from sbtiny.models.fingerprint import policy_fingerprint
from sbtiny.models.shapes import shape_of
from sbtiny.planning.memory_plan import plan_memory
from sbtiny.planning.probe import estimate_hours
from sbtiny.tasks.leaks import hash_question
from sbtiny.tasks.sources import Question, read_questions
from sbtiny.tasks.verify import Verifier, load_verifier

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
OWN = EXAMPLES / "own_data"
COMMANDS = re.findall(r"^    sbtiny (.+)$", (OWN / "README.md").read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def check() -> Verifier:
    return load_verifier(f"{OWN / 'verifier.py'}:check")


def test_the_verifier_takes_every_reference_answer(check: Verifier) -> None:
    questions = read_questions(str(OWN / "questions.jsonl"))
    assert len({hash_question(question.question) for question in questions}) == 30
    assert not any(re.search(r"\d", question.answer) for question in questions)  # no mathematics
    for question in questions:
        for right in question.answer.split("|"):
            assert check(f"so \\boxed{{{right.strip(' {}')}}}", question), question
        assert not check("\\boxed{none}", question), question


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        ("It is a \\boxed{\\text{Hive}}.", "hive | beehive", True),
        ("The answer is **a beehive**.", "hive | beehive", True),
        ("\\boxed{nest}", "hive | beehive", False),
        ("Let me see.\nfriday", "Friday", True),
        ("Not Friday", "Friday", False),
        ("\\boxed{room, house, city and country}", "room, house, city, country", True),
        ("The answer is: room; house; city; country.", "room, house, city, country", True),
        ("\\boxed{house, room, city, country}", "room, house, city, country", False),
        ("\\boxed{dolphin, the bat}", "{bat, dolphin}", True),
        ("\\boxed{dolphin}", "{bat, dolphin}", False),
        ("\\boxed{bat, bat, dolphin}", "{bat, dolphin}", False),
        ("", "Friday", False),
    ],
)
def test_the_verifier_reads_words_and_lists(response: str, answer: str, right: bool, check: Verifier) -> None:
    assert check(response, Question("q", "Which?", answer)) is right


def test_the_settings_name_the_verifier_for_every_stage() -> None:
    settings = load_settings(OWN / "settings.yaml", "rtx4090")
    assert {settings.data.verifier, settings.grpo.verifier, settings.eval.verifier} == {"verifier.py:check"}


@pytest.mark.parametrize("line", COMMANDS)
def test_the_commands_of_the_walk_through_exist(line: str) -> None:
    parse(line)


SCRIPTS = [file for folder in ("examples", "data", "dev", "docs", "tests/gpu") for file in sorted((ROOT / folder).rglob("*.py"))]


def imported(tree: ast.Module) -> dict[str, Any]:
    """What a script takes from the package, by the name it has there."""
    found: dict[str, Any] = {}
    for node in (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sbtiny")):
        module = importlib.import_module(node.module)
        for alias in node.names:
            inner = getattr(module, alias.name, None) or importlib.import_module(f"{node.module}.{alias.name}")
            found[alias.asname or alias.name] = inner
    return found


def called(function: ast.expr, names: dict[str, Any]) -> Any:
    """What a call of `name` or `module.name` calls; None where the package has no part in it."""
    if isinstance(function, ast.Name):
        return names.get(function.id)
    if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
        module = names.get(function.value.id)
        return getattr(module, function.attr) if inspect.ismodule(module) else None
    return None


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_scripts_call_the_package_as_its_signatures_are(file: Path) -> None:
    """No fast test runs all that these scripts do, so that a changed signature would be met hours into one."""
    tree = ast.parse(file.read_text())
    names = imported(tree)
    for node in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        target = called(node.func, names)
        if callable(target) and not (isinstance(target, type) and issubclass(target, Exception)):
            given = [a for a in node.args if not isinstance(a, ast.Starred)]
            named = {k.arg: k.value for k in node.keywords if k.arg}
            whole = len(given) == len(node.args) and len(named) == len(node.keywords)
            signature = inspect.signature(target)
            try:
                (signature.bind if whole else signature.bind_partial)(*given, **named)
            except TypeError as error:
                pytest.fail(f"{file.name}:{node.lineno}: {ast.unparse(node)}: {error}")


SBTINY = """#!/usr/bin/env bash
echo "$*" >> "$LOG"
[[ "$*" == *"$FAILS"* ]] && exit 1
exit 0
"""


def speedrun(folder: Path, *arguments: str, fails: str = "nothing") -> tuple[int, list[str]]:
    """Exit code and the commands given, with a sbtiny that only notes them down."""
    for place in ("examples", ".venv/bin", "out"):
        (folder / place).mkdir(parents=True, exist_ok=True)
    shutil.copy(EXAMPLES / "speedrun.sh", folder / "examples")
    (folder / ".venv/bin/sbtiny").write_text(SBTINY)
    (folder / ".venv/bin/sbtiny").chmod(0o755)
    log = folder / "log"
    log.unlink(missing_ok=True)
    script = ["bash", str(folder / "examples/speedrun.sh"), *arguments]
    code = subprocess.run(script, env={**os.environ, "LOG": str(log), "FAILS": fails}, cwd=folder).returncode
    return code, log.read_text().splitlines()


def test_the_speedrun_gives_commands_that_exist_in_their_order(tmp_path: Path) -> None:
    code, commands = speedrun(tmp_path)
    assert code == 0
    assert [line.split()[0] for line in commands] == ["data", "sft", "grpo", "eval", "eval", "eval", "report"]
    assert all("--preset rtx4090" in line for line in commands[:-1])
    for line in commands:
        parse(line)


def test_the_speedrun_stops_where_a_stage_fails_and_goes_on_from_there(tmp_path: Path) -> None:
    code, commands = speedrun(tmp_path, "out", "--preset", "t4", fails="grpo --run")
    assert code == 1
    assert [line.split()[0] for line in commands] == ["data", "sft", "grpo"]
    assert all("--preset t4" in line for line in commands)
    for made in ("rows.jsonl", "sft/adapter", "grpo/checkpoint-25"):
        (tmp_path / "out" / made).mkdir(parents=True)
    code, commands = speedrun(tmp_path, "out", "--preset", "t4")
    assert code == 0
    assert commands[0].startswith("grpo --run out/sft")
    assert commands[0].endswith("--output out/grpo --resume")


def test_the_speedruns_hours_are_marked_as_the_estimates_of_the_plan() -> None:
    """165 TFLOPS in 16 bits and 1,008 GB/s are what NVIDIA's data sheet says of an RTX 4090."""
    told = re.findall(r"\*estimated\*: ([\d.]+) h for (\w+)", (EXAMPLES / "speedrun.sh").read_text())
    settings, shape = load_settings(preset="rtx4090", overrides=[("sft.rows", "rows.jsonl")]), shape_of("qwen-1.5b")
    for said, stage in told:
        found = estimate_hours(plan_memory(stage, settings, shape, CARDS["rtx4090"], "rtx4090"), shape, {"flops": 165e12, "bytes": 1008e9})
        assert float(said) == round(found, 1), stage
    assert [stage for _, stage in told] == ["data", "sft", "grpo", "eval"]


@pytest.mark.parametrize(
    ("solution", "answer", "told"),
    [
        (
            "Natalia sold 48/2 = 24 clips in May.\nShe sold 48+24 = 72 clips in all.",
            "72",
            [
                "48/2=24\n48+24=72",
                "Natalia sold 48/2 = 24 clips in May.\n48+24=72",
                "Natalia sold 48/2 = 24 clips in May.\nShe sold 48+24 = 72 clips in all.",
            ],
        ),
        ("He earns $12 x 3 = $36.\nSo he is glad.", "36", ["12*3=36", "He earns $12 x 3 = $36."]),
        ("That is (1,000 + 200) * 20% = 240.", "240", ["(1000+200)*20%=240", "That is (1,000 + 200) * 20% = 240."]),
        ("Half of 10 is 5.", "5", []),  # no sum is written out
        ("There are 4 + 5 = 9 left, so 8 were sold.", "8", []),  # its sums lead elsewhere
    ],
)
def test_gsm8k_answers_are_told_with_more_and_less_of_them_in_words(solution: str, answer: str, told: list[str]) -> None:
    example = runpy.run_path(str(EXAMPLES / "gsm8k_traces.py"))
    row = {"id": "g1", "question": "How many?", "solution": solution, "answer": answer}
    assert example["answers"](row) == [f"{body}\n\\boxed{{{answer}}}" for body in told]
    drawn = [trace["response"] for trace in example["traces"](row)]
    assert len(set(drawn)) == len(drawn) == min(2, len(told))
    assert set(drawn) <= set(example["answers"](row))


def test_the_released_calibration_is_of_the_released_adapter() -> None:
    """Else chat refuses it: an adapter of other weights, or one whose config was written again, has another fingerprint."""
    folder = ROOT / "examples" / "gsm8k_0.5b"
    about, calibration = json.loads((folder / "run.json").read_text()), json.loads((folder / "calibration.json").read_text())
    assert calibration["model_fingerprint"] == policy_fingerprint(about["base"], about["four_bit"], folder / "adapter")

"""What holds for every file of the package: its imports are declared, importing it does no work, the verbs it names exist."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import parse

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "sbtiny").rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGES = {  # where the module has another name
    "yaml": "pyyaml",
    "llama_cpp": "llama-cpp-python",
    "math_verify": "math-verify",
    "sse_starlette": "sse-starlette",
    "prometheus_client": "prometheus-client",
}
UNDECLARED = {"vllm"}  # the user's own: no extra, for it pins its own torch
PROSE = {"again", "against", "from", "knows", "plans", "to"}  # words after a `sbtiny` that is no command


def names(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w-]+", each)[0] for each in requirements}


def imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module


def test_every_import_is_declared_and_every_dependency_imported() -> None:
    modules = {name.partition(".")[0] for file in FILES for name in imports(ast.parse(file.read_text()))}
    used = {PACKAGES.get(name, name) for name in modules - sys.stdlib_module_names - {"sbtiny"}}
    extras = {name: names(packages) for name, packages in PROJECT["optional-dependencies"].items() if name != "dev"}
    declared = names(PROJECT["dependencies"]).union(*extras.values())
    assert used - declared == UNDECLARED
    assert declared - used == {"unsloth_zoo"}  # unsloth's other half


def test_every_dependency_is_in_the_tested_set() -> None:
    pinned = set(re.findall(r"^([\w-]+)==", (ROOT / "sbtiny" / "constraints.txt").read_text(), re.MULTILINE))
    extras = PROJECT["optional-dependencies"]
    assert pinned == names([*PROJECT["dependencies"], *(each for name in extras if name != "dev" for each in extras[name])])


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_an_import_does_no_work(file: Path) -> None:
    calls = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)]
    found = {ast.unparse(node.value.func) for node in calls}
    assert found <= ({"main"} if file.name == "__main__.py" else {"app.add_typer"})


def texts(file: Path) -> Iterator[str]:
    """Every string of a file; what an f-string puts in is `X`."""
    tree = ast.parse(file.read_text())
    inner = {part for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "X" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in inner:
            yield node.value


def test_verbs_that_the_package_names_exist() -> None:
    named = {line for file in FILES for text in texts(file) for line in re.findall(r"\bsbtiny((?: [a-z][a-z']*)+)", text)}
    assert len(named) > 10
    for line in sorted(named):
        if line.split()[0] not in PROSE:
            parse(line, mentioned=True)

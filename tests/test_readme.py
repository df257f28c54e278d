"""What the README says to do with `runs/demo` works as it stands there, with a run of seconds in that place."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
COMMANDS = re.findall(r"^    (sbtiny (?:chat|calibrate|export) runs/demo.*)$", README, re.MULTILINE)
(PYTHON,) = (block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "sbtiny.load" in block)


@pytest.fixture(scope="module")
def home(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    shutil.copytree(whole, folder / "runs" / "demo")
    return folder


def test_the_commands_are_found() -> None:
    assert {line.split()[1] for line in COMMANDS} == {"chat", "calibrate", "export"}


@pytest.mark.parametrize("line", COMMANDS)
def test_its_commands_run(line: str, home: Path) -> None:
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", line], cwd=home, env=env, input="What is 1 + 2?\n", capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout


def test_its_python_runs(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(home)
    exec(compile(PYTHON, "README.md", "exec"), {})
    assert {"end", "interrupted", "ceiling", "length"} & set(capsys.readouterr().out.split())

"""examples/colab.ipynb: every command exists, and its cells run from top to bottom on a processor with the bundled model."""

import json
import os
import shlex
import sys
import types
from pathlib import Path

import pytest
from support import parse

from sbtiny.cli import main as cli

NOTEBOOK = Path(__file__).parents[2] / "examples" / "colab.ipynb"
CELLS = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
SETUP = [cell for cell in CELLS if "setup" in cell["metadata"].get("tags", [])]
RUN = ["".join(cell["source"]) for cell in CELLS if cell not in SETUP]
SMALL = {
    "MODEL": "tiny",
    "PRESET": "cpu",
    "OPTIONS": "--set data.limit=24 --set sft.steps=100 --set grpo.steps=2 --set grpo.prompts_per_step=1 --set grpo.num_generations=4 "
    "--set grpo.micro_batch=4 --set grpo.max_tokens=300 --set eval.limit=6 --set eval.max_tokens=200",
}


def commands() -> list[str]:
    lines = [line for source in RUN for line in source.splitlines()]
    return [line.removeprefix("!sbtiny ") for line in lines if line.startswith("!sbtiny ")]


def test_a_setup_cell_comes_first_and_no_output_is_kept() -> None:
    assert CELLS[:1] == SETUP
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in CELLS)


@pytest.mark.parametrize("line", commands())
def test_the_commands_of_the_notebook_exist(line: str) -> None:
    for name, value in {"MODEL": "qwen-1.5b", "PRESET": "t4", "OPTIONS": "--set eval.limit=50"}.items():
        line = line.replace(f"${name}", value)
    parse(line)


def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    display = types.SimpleNamespace(Image=str, display=shown.append)
    monkeypatch.chdir(tmp_path)
    for name, value in SMALL.items():
        monkeypatch.setenv(name, value)
    for source in RUN:
        run_commands(source, monkeypatch)
        with monkeypatch.context() as patched:
            patched.setitem(sys.modules, "IPython", types.SimpleNamespace(display=display))
            patched.setitem(sys.modules, "IPython.display", display)
            exec("\n".join(line for line in source.splitlines() if not line.startswith("!")), {})
    assert {Path(path).parent.as_posix() for path in shown} == {"runs/grpo/plots"}
    assert json.loads(Path("runs/grpo/eval.json").read_text())["questions"] == 6


def run_commands(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lines that Jupyter would give to the shell; in this process, which spares their imports."""
    for line in source.splitlines():
        if line.startswith("!"):
            monkeypatch.setattr(sys, "argv", shlex.split(os.path.expandvars(line[1:])))
            with pytest.raises(SystemExit) as stop:
                cli.main()
            assert stop.value.code == 0, line

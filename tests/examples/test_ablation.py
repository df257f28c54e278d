"""The ablation: what each cell's reward pays, the table, and two cells run for real, stopped and gone on with."""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from safetensors.torch import load_file

from sbtiny import runs
from sbtiny.config import Settings
from sbtiny.errors import InputError
from sbtiny.grpo.group_reward import RewardInput
from sbtiny.load_settings import load_settings

SCRIPT = Path(__file__).parents[2] / "examples" / "ablation.py"
GROUP = [RewardInput(100, 90, True), RewardInput(100, 30, True), RewardInput(100, 90, False), RewardInput(None, 90, True)]


@pytest.fixture(scope="module")
def ablation() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ablation", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["ablation"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


SIGMOID = 1 / (1 + math.exp(-1))
PAID = {  # of GROUP at alpha 0.1; b_max 50, so that a budget of 100 is over it
    "format": (0, 0, 0),
    "correct": (1, 1, 0),
    "preb": (1.0, 0.5, -0.5),
    "penalty": (0.6, 0.6, -0.4),
    "l1_exact": (1 - 0.01875, 1 - 0.13125, -0.01875),
    "l1_max": (0.51875, 0.63125, 0),
    "arora": (1 - 0.1 * SIGMOID, 1 - 0.1 * (1 - SIGMOID), 0),
    "kimi": (0.5, 1.5, -0.5),
    "cap": (0, 1, 0),
}


@pytest.mark.parametrize("name", PAID)
def test_what_a_cell_pays(name: str, ablation: ModuleType) -> None:
    kind = "user" if name.startswith("l1") else "self"
    rewards = ablation.CELLS[name].reward(kind, GROUP, 50.0, 0.1)
    assert [r.total for r in rewards] == pytest.approx([*PAID[name], -1])


def test_every_cell_of_the_issue_is_there_and_its_settings_exist(ablation: ModuleType) -> None:
    others = {"sft", "paper", "cosine", "fixed", "full", "cold"}
    assert set(ablation.CELLS) == PAID.keys() | others
    assert all(cell.grpo.keys() <= set(Settings().grpo.__dataclass_fields__) for cell in ablation.CELLS.values())
    assert all(ablation.CELLS[name].reward is None for name in others)


def result(accuracy: float, tokens: float, points: list, **more: object) -> dict:
    fixed = {"mean_budget": 30.0, "within": {"0.5": 0.9}, "format_rate": 1.0, "spearman_budget_level": 0.9}
    return {"accuracy": accuracy, "mean_tokens": tokens, "points": points} | fixed | more


def shown(page: str) -> dict[str, list[str]]:
    """Cell -> the rest of its row."""
    rows = ([part.strip() for part in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| `"))
    return {name.strip("`"): rest for name, *rest in rows}


def test_the_table_compares_at_the_tokens_of_full_and_shows_each_seed(ablation: ModuleType) -> None:
    found = {
        ("full", 0): result(0.99, 30.0, [[30, 0.99]]),
        ("full", 1): result(0.97, 50.0, [[50, 0.97]]),
        ("kimi", 0): result(0.9, 40.0, [[20, 0.5], [40, 0.9]]),
        ("kimi", 1): result(0.9, 40.0, [[20, 0.5], [40, 0.9]], spearman_budget_level=None),
        ("cap", 0): result(0.9, 60.0, [[60, 0.9]]),
    }
    text = ablation.table(found, [0, 1, 2], "COMMAND", Settings())
    rows = shown(text)
    assert list(rows) == ["full", "kimi", "cap"]
    assert rows["full"][2:4] == ["98.0 (99.0, 97.0)", "40.0 (30.0, 50.0)"]
    assert rows["kimi"][-1] == "80.0 (70.0, 90.0)"  # half way up at 30 tokens, all of it at 50
    assert rows["kimi"][-2] == "0.90 (0.90, -)"
    assert rows["cap"][1:3] == ["0", "90.0"]
    assert rows["cap"][-1] == "-"  # it takes more in every setting
    assert "    COMMAND\n" in text


def test_the_section_is_replaced_and_the_rest_of_the_page_stays(ablation: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "results.md"
    file.write_text("# Results\n\nOurs.\n")
    for words in ("first", "second"):
        ablation.write_results(file, f"{ablation.BEGIN}\n{words}\n{ablation.END}\n")
        file.write_text(file.read_text() + "\nTheirs.\n" if words == "first" else file.read_text())
    assert file.read_text() == f"# Results\n\nOurs.\n\n{ablation.BEGIN}\nsecond\n{ablation.END}\n\nTheirs.\n"


def test_other_settings_are_not_mixed_in(ablation: ModuleType, tmp_path: Path) -> None:
    for _ in range(2):
        ablation.keep_settings(tmp_path / "settings.yaml", Settings())
    with pytest.raises(InputError, match="another --output"):
        ablation.keep_settings(tmp_path / "settings.yaml", Settings(model="other"))


TINY = {
    "data.limit": 24, "data.max_tokens": 300, "sft.steps": 20, "grpo.prompts_per_step": 2, "grpo.num_generations": 4, "grpo.micro_batch": 4,
    "grpo.limit": 12, "grpo.max_tokens": 80, "eval.limit": 4, "eval.max_tokens": 100, "eval.task": "arithmetic",
}  # fmt: skip


def test_cell_without_a_cold_start_begins_from_an_adapter_that_changes_nothing(ablation: ModuleType, tmp_path: Path) -> None:
    settings = load_settings(preset="cpu")
    folder = ablation.start_of(ablation.CELLS["cold"], settings, tmp_path)
    assert runs.read_run(folder)["model"] == "tiny"
    weights = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert not any(weight.any() for name, weight in weights.items() if "lora_B" in name)
    assert ablation.start_of(ablation.CELLS["cold"], settings, tmp_path) == folder  # is there, and not made again


@pytest.mark.slow
def test_two_cells_for_real_and_a_third_later(tmp_path: Path) -> None:
    changed = [word for key, value in TINY.items() for word in ("--set", f"{key}={value}")]

    def run(only: str) -> str:
        command = [sys.executable, str(SCRIPT), "--only", only, "--seeds", "0", "--steps", "3", "--results", "results.md", *changed]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
        return (tmp_path / "results.md").read_text()

    first = run("full,kimi")
    root = tmp_path / "runs" / "ablation" / "seed0"
    kept = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    assert json.loads((root / "kimi" / "run.json").read_text())["parent"].endswith("seed0/start")
    assert len(json.loads((root / "full" / "eval.json").read_text())["points"]) == 11
    steps = [json.loads(line)["step"] for line in (root / "kimi" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 3]
    second = run("kimi,l1_max,sft,cold")
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())  # nothing of what was finished was touched
    assert list(shown(first)) == ["full", "kimi"]
    assert list(shown(second)) == ["sft", "full", "cold", "l1_max", "kimi"]

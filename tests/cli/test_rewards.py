import json
from pathlib import Path

import pytest
from rich.console import Console

from sbtiny.cli.rewards import reward_rows, reward_table
from sbtiny.errors import InputError


def write(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def row(**more: object) -> dict:
    return {"budget": 100, "length": 90, "correct": True} | more


@pytest.mark.parametrize(
    ("given", "alpha", "total", "inside"),
    [
        (row(), 0.1, 1.0, True),  # the golden values of the paper's reward
        (row(length=110), 1.0, 0.7109, True),
        (row(length=150), 0.1, 0.5, False),
        (row(correct=False), 1.0, -0.2891, True),
        (row(b_max=99), 0.1, 0.6, True),
        (row(b_max=100), 0.1, 1.0, True),
        (row(b_max=None), 0.1, 1.0, True),
        (row(budget=None), 0.1, -1.0, False),
    ],
)
def test_a_row_gets_its_reward_and_keeps_its_own_keys(given: dict, alpha: float, total: float, inside: bool, tmp_path: Path) -> None:
    found = reward_rows(write(tmp_path / "r.jsonl", given | {"id": "a"}), alpha)[0]
    assert found["total"] == pytest.approx(total, abs=1e-4)
    assert found["inside"] is inside
    assert found["total"] == pytest.approx(found["format"] + found["budget_penalty"] + found["adherence"])
    assert {key: found[key] for key in given} == given
    assert found["id"] == "a"


@pytest.mark.parametrize(
    "broken",
    [
        row(budget="100"),
        row(budget=0),
        row(budget=1.5),
        row(budget=True),
        row(length=None),
        row(length=-1),
        row(length=10**400),
        row(length=float("nan")),
        row(correct=1),
        row(correct="true"),
        row(b_max="many"),
        row(b_max=0),
        row(b_max=float("nan")),
        {"length": 3, "correct": True},
        {"budget": 3, "correct": True},
        {"budget": 3, "length": 3},
    ],
)
def test_a_wrong_row_is_named_by_its_line_in_the_file(broken: dict, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(row()) + "\n\n" + json.dumps(broken) + "\n", encoding="utf-8")
    with pytest.raises(InputError, match="line 3") as caught:
        reward_rows(str(path), 0.1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_a_window_without_width_is_refused(alpha: float, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="alpha"):
        reward_rows(write(tmp_path / "r.jsonl", row()), alpha)


def test_the_table_shows_every_row_and_the_means(tmp_path: Path) -> None:
    rows = reward_rows(write(tmp_path / "r.jsonl", row(), row(budget=None)), 0.1)
    console = Console(width=100)
    with console.capture() as captured:
        console.print(reward_table(rows))
    lines = [line.split() for line in captured.get().splitlines() if line.strip()]
    assert lines[1] == ["100", "90", "yes", "–", "yes", "0.0000", "0.0000", "1.0000", "1.0000"]
    assert lines[2] == ["–", "90", "yes", "–", "no", "-1.0000", "0.0000", "0.0000", "-1.0000"]
    assert lines[3] == ["mean", "-0.5000", "0.0000", "0.5000", "0.0000"]

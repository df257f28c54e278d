"""Named sets: read with `datasets` from local folders, as they would be from the hub; offline in one line."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from sbtiny.errors import InputError
from sbtiny.tasks import hub
from sbtiny.tasks.hub import HUBS, to_questions
from sbtiny.tasks.load import load_questions
from sbtiny.tasks.sources import HUB_TASKS, Question

ROWS = {
    "gsm8k": [{"question": f"{n}?", "answer": f"work\n#### {n}"} for n in range(40)],
    "math": [{"problem": "2+2?", "solution": "It is \\boxed{4}.", "answer": "4", "level": 2, "subject": "Algebra"}] * 40,
    "math500": [{"problem": "1/2?", "solution": "...", "answer": "\\frac{1}{2}", "level": 5, "unique_id": "a"}],
    "aime25": [{"problem": "How many?", "answer": "70", "id": "0"}],
    "still3": [{"question": f"{n}+1?", "answer": f"${n + 1}$"} for n in range(40)],
    "s1k": [{"question": "Prove.", "solution": "long " * 90}, {"question": "1?", "solution": "12"},
            {"question": "2?", "solution": "words " * 50 + "so \\boxed{9}."}],
}  # fmt: skip


@pytest.fixture(params=HUB_TASKS)
def local(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A set whose hub path is a folder here: `datasets` reads both alike."""
    task = request.param
    folder = tmp_path / "set"
    folder.mkdir()
    for split in HUBS[task].splits:
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[task]))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(HUBS, task, replace(HUBS[task], path=str(folder), name=None, revision=None))
    return task


def test_a_named_set_is_read_by_datasets(local: str) -> None:
    split = "test" if "test" in HUBS[local].splits else "train"
    found = load_questions(local, split)
    assert found
    assert {q.source for q in found} == {local}
    assert all(q.question and q.answer and "$" not in q.answer and len(q.answer) < 200 for q in found)


def test_a_set_is_at_hand_where_datasets_has_kept_it(local: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The name of its folder is that of `datasets`, which a builder for the hub's name tells."""
    from datasets.packaged_modules.json.json import Json

    monkeypatch.undo()  # the hub's own name
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    path, split = HUBS[local].path, HUBS[local].splits[-1]
    assert not hub.is_cached(local, split)
    builder = Json(cache_dir=str(tmp_path / "cache"), repo_id=path, dataset_name=path.split("/")[1], data_files=__file__)
    Path(builder.cache_dir).mkdir(parents=True)
    assert hub.is_cached(local, split)
    assert hub.is_cached(local, "test") == ("test" in HUBS[local].splits)


def test_a_split_that_a_set_lacks_is_told_with_sets_that_have_it(local: str) -> None:
    for split in {"train", "test"} - set(HUBS[local].splits):
        with pytest.raises(InputError, match=rf"{local} has no questions to .*gsm8k"):
            load_questions(local, split)


def test_train_val_and_test_share_no_row() -> None:
    train, val, test = (to_questions("gsm8k", ROWS["gsm8k"], split) for split in ("train", "val", "test"))
    assert (len(train), len(val), len(test)) == (38, 2, 40)
    assert not {q.id for q in train} & {q.id for q in val}
    assert test[39] == Question("gsm8k-test-00039", "39?", "39", None, "gsm8k")
    assert to_questions("math", ROWS["math"][:1], "test") == [Question("math-test-00000", "2+2?", "4", 2, "math")]


def test_a_solution_counts_by_the_answer_it_gives_and_without_one_is_left_out() -> None:
    assert [(q.question, q.answer) for q in to_questions("s1k", ROWS["s1k"] * 2, "train")] == [
        ("1?", "12"),
        ("2?", "9"),
        ("1?", "12"),
        ("2?", "9"),
    ]


def test_a_set_that_changed_its_columns_is_told() -> None:
    with pytest.raises(InputError, match=r"math-ai/aime25, row 0 has no 'problem' and 'answer'"):
        to_questions("aime25", [{"question": "1?", "answer": "1"}], "test")


def test_the_revision_goes_to_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {}
    monkeypatch.setattr("datasets.load_dataset", lambda *a, **k: given.update(k) or ROWS["gsm8k"])
    assert len(hub.load_hub_questions("gsm8k", "test")) == 40
    assert given == {"split": "test", "revision": HUBS["gsm8k"].revision}


@pytest.mark.parametrize("task", ["gsm8k", "s1k"])
def test_offline_the_hub_is_an_input_error(task: str, tmp_path: Path) -> None:
    code = f"""
from sbtiny.errors import InputError
from sbtiny.tasks.load import load_questions
try:
    load_questions({task!r}, "train", 5, 0)
except InputError as error:
    print(error)
"""
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    told = subprocess.run([sys.executable, "-c", code], env=offline, capture_output=True, text=True, check=True).stdout
    assert "cannot get" in told
    assert "JSON Lines file" in told
    assert told.count("\n") == 1

"""The run folder: whole files or none, earlier runs never mixed or lost. A full disk is a real failed write (RLIMIT_FSIZE)."""

import json
import os
import time
from pathlib import Path

import pytest
from support import ROOM, full_disk, listing

from sbtiny import runs
from sbtiny.config import Settings
from sbtiny.errors import InputError
from sbtiny.load_settings import load_settings

SETTINGS = Settings(seed=5)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def finished(folder: Path, kind: str = "sft", age: int = 0) -> Path:
    """A run as training leaves it, begun `age` seconds ago."""
    runs.create_run(kind, folder, SETTINGS)
    begin(folder, time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time.time() - age)))
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
    return folder


def begin(folder: Path, started: str) -> None:
    """Say in run.json when the run began."""
    runs.write_json(folder / "run.json", runs.read_run(folder) | {"started": started})


def complaint(call, *arguments: object) -> str:
    with pytest.raises(InputError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- writing ---------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_back_and_nothing_lies_beside(tmp_path: Path) -> None:
    file = tmp_path / "a" / "b" / "x.json"
    runs.write_json(file, {"text": "naïve ✓", "n": 1})
    runs.write_json(file, {"text": "newer"})
    assert runs.read_json(file) == {"text": "newer"}
    assert [path.name for path in file.parent.iterdir()] == ["x.json"]


def test_rows_are_one_a_line(tmp_path: Path) -> None:
    file, rows = tmp_path / "rows.jsonl", [{"a": "two\nlines"}, {"b": None}]
    runs.write_jsonl(file, rows[:1])
    runs.append_jsonl(file, rows[1])
    runs.append_jsonl(tmp_path / "new.jsonl", rows[0])
    assert [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] == rows
    assert (tmp_path / "new.jsonl").read_text(encoding="utf-8").count("\n") == 1


def test_a_full_disk_leaves_the_earlier_version_and_no_temporary_file(tmp_path: Path) -> None:
    file = tmp_path / "eval.json"
    runs.write_text(file, "earlier\n")
    with full_disk():
        said = complaint(runs.write_text, file, "x" * 5000)
    assert said.startswith(f"cannot write {file}: ")
    assert "free space" in said
    assert listing(tmp_path) == {"eval.json": b"earlier\n"}


def test_a_full_disk_leaves_no_new_file_at_all(tmp_path: Path) -> None:
    with full_disk():
        complaint(runs.write_jsonl, tmp_path / "rows.jsonl", [{"a": "x" * 5000}])
    assert listing(tmp_path) == {}


@pytest.mark.parametrize("before", [0, 60, ROOM])  # no room for all of the line, for some of it, for none
def test_a_line_is_appended_whole_or_not_at_all(before: int, tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    earlier = b"x" * (before - 1) + b"\n" if before else b""
    file.write_bytes(earlier)
    with full_disk():
        assert "cannot write" in complaint(runs.append_jsonl, file, {"loss": "1" * 200})
    assert file.read_bytes() == earlier
    runs.append_jsonl(file, {"loss": 1})
    assert file.read_bytes() == earlier + b'{"loss": 1}\n'


@pytest.mark.parametrize("write", [runs.write_text, lambda path, text: runs.append_jsonl(path, {"text": text})])
def test_what_cannot_be_written_is_told_in_one_line(write, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file" / "x.json", Path("/proc/sbtiny/x.json"), Path("/proc/x.json")):
        assert complaint(write, path, "text").startswith(f"cannot write {path}: ")
    assert listing(tmp_path) == {"file": b"mine"}


def test_text_that_cannot_be_encoded_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UnicodeEncodeError):
        runs.write_text(tmp_path / "x", "\ud800")
    assert listing(tmp_path) == {}


def test_a_file_that_is_read_is_not_written_over(tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text("mine")
    runs.check_writable(file, None, tmp_path / "gone.jsonl", "arithmetic")
    for read in (str(file), f"{file}#100"):
        with pytest.raises(InputError, match="is what is read"):
            runs.check_writable(tmp_path / "." / "questions.jsonl", None, read)


def test_looking_whether_a_file_can_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    runs.check_writable(tmp_path / "a" / "b" / "c.json")
    runs.check_writable(tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"
    assert "it is a folder" in complaint(runs.check_writable, tmp_path)
    for path in (tmp_path / "file" / "c.json", Path("/proc/sbtiny/c.json"), Path("/proc/c.json")):
        assert complaint(runs.check_writable, path).startswith(f"cannot write {path}: ")
    with full_disk():
        assert "cannot write" in complaint(runs.check_writable, tmp_path / "c.json")


# ---- reading ---------------------------------------------------------------------------------------------------------


def test_what_cannot_be_read_is_told_with_its_path(tmp_path: Path) -> None:
    assert "was the run finished?" in complaint(runs.read_json, tmp_path / "eval.json")
    for content in (b'{"a": ', b"", b"\xff\xfe"):
        (tmp_path / "broken.json").write_bytes(content)
        assert "broken.json is not valid JSON" in complaint(runs.read_json, tmp_path / "broken.json")
    (tmp_path / "folder.json").mkdir()
    assert "cannot read" in complaint(runs.read_json, tmp_path / "folder.json")


@pytest.mark.parametrize("content", ["{}", "[]", '"sft"', '{"kind": "sft"}', '{"kind": "sft", "model": "tiny"}'])
def test_a_run_json_of_something_else_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(content)
    assert "it is no run of sbtiny" in complaint(runs.read_run, tmp_path)


# ---- new -------------------------------------------------------------------------------------------------------------


def test_a_new_run_remembers_what_it_was_made_with(here: Path) -> None:
    folder = runs.create_run("grpo", here / "deep" / "mine", SETTINGS, parent="runs/sft-1")
    assert folder == here / "deep" / "mine"
    assert load_settings(folder / "config.yaml") == SETTINGS
    about = runs.read_run(folder)
    assert (about["kind"], about["model"], about["parent"]) == ("grpo", "tiny", "runs/sft-1")
    assert sorted(listing(folder)) == ["config.yaml", "run.json"]


def test_runs_of_the_same_second_get_folders_of_their_own(here: Path) -> None:
    made = {runs.make_run_folder("sft") for _ in range(4)}
    assert len(made) == 4
    assert all(folder.parent == runs.ROOT and folder.name.startswith("sft-") for folder in made)


def test_a_finished_run_is_never_written_over(here: Path) -> None:
    before = listing(finished(here / "run"))
    assert "already holds a finished run" in complaint(runs.create_run, "sft", here / "run", SETTINGS)
    assert listing(here / "run") == before


def test_a_finished_run_of_another_name_is_in_nobodys_way(here: Path) -> None:
    (runs.ROOT / "sft" / "adapter").mkdir(parents=True)
    runs.check_can_begin(None)
    with pytest.raises(InputError, match="already holds a finished run"):
        runs.check_can_begin(runs.ROOT / "sft")


def test_a_run_with_checkpoints_is_for_resuming(here: Path) -> None:
    runs.create_run("sft", here / "run", SETTINGS)
    (here / "run" / "checkpoint-5").mkdir()
    before = listing(here)
    assert "--resume" in complaint(runs.create_run, "sft", here / "run", SETTINGS)
    assert listing(here) == before


def test_leftovers_before_the_first_checkpoint_are_set_aside_not_mixed_in(here: Path) -> None:
    runs.create_run("grpo", here / "run", SETTINGS)
    runs.append_jsonl(here / "run" / "metrics.jsonl", {"step": 1})
    runs.write_json(here / "run" / "b_max.json", {"old": "12"})
    runs.create_run("grpo", here / "run", SETTINGS)
    assert sorted(listing(here / "run")) == ["config.yaml", "run.json"]
    (aside,) = [path for path in here.iterdir() if path.name != "run"]
    assert sorted(listing(aside)) == ["b_max.json", "config.yaml", "metrics.jsonl", "run.json"]


def test_other_files_in_the_folder_stay(here: Path) -> None:
    (here / "run" / "base").mkdir(parents=True)
    (here / "run" / "base" / "eval.json").write_text("{}")
    runs.create_run("grpo", here / "run", SETTINGS)
    assert sorted(listing(here / "run")) == ["base/eval.json", "config.yaml", "run.json"]


def test_a_disk_that_fills_up_leaves_no_folder(here: Path) -> None:
    with full_disk(room=4096):  # room to look whether it can be written, not for the settings
        complaint(runs.create_run, "sft", here / "run", Settings(model="m" * 5000))
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("output", ["file/run", "/proc/sbtiny", "file"])
def test_a_folder_that_cannot_be_made(output: str, here: Path) -> None:
    (here / "file").write_text("mine")
    assert "cannot write" in complaint(runs.create_run, "sft", Path(output), SETTINGS)
    assert listing(here) == {"file": b"mine"}


# ---- set aside -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mark", runs.RUN_FILES)
def test_an_earlier_run_gets_another_name_and_keeps_everything(mark: str, here: Path) -> None:
    for _ in range(3):  # within one second
        runs.write_text(Path("runs/demo") / mark, "{}")
        before = listing(Path("runs/demo"))
        runs.archive_run(Path("runs/demo"))
    asides = list(Path("runs").iterdir())
    assert len(asides) == 3
    assert all(listing(aside) == before and aside.name.startswith("demo-before-") for aside in asides)


def test_what_is_no_run_is_not_moved(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "home").mkdir()
    (here / "home" / "letters.txt").write_text("dear")
    (here / "file").write_text("mine")
    for path in (here / "home", here / "file", Path()):
        assert "choose another --output" in complaint(runs.archive_run, path)
    run = runs.create_run("sft", here / "run", SETTINGS)
    monkeypatch.chdir(run)
    assert "choose another --output" in complaint(runs.archive_run, Path())  # it would move the user's feet away
    assert sorted(path.name for path in here.iterdir()) == ["file", "home", "run"]


def test_nothing_to_set_aside(here: Path) -> None:
    (here / "empty").mkdir()
    runs.archive_run(here / "empty")
    runs.archive_run(here / "none")
    assert [path.name for path in here.iterdir()] == ["empty"]


def test_locks_that_a_kill_left_are_no_run_to_set_aside(here: Path) -> None:
    (here / "demo" / "base").mkdir(parents=True)
    for folder in (here / "demo", here / "demo" / "base"):
        (folder / runs.LOCK).write_text("of a process that was killed")
    with runs.claim("demo", here / "demo"):
        runs.archive_run(here / "demo")
    (here / "demo" / "base" / "letters.txt").write_text("dear")
    assert "choose another --output" in complaint(runs.archive_run, here / "demo")
    assert [path.name for path in here.iterdir()] == ["demo"]


# ---- find and newest -------------------------------------------------------------------------------------------------


def test_a_run_is_found_by_path_and_by_name(here: Path) -> None:
    inside, outside = finished(runs.ROOT / "first"), finished(here / "elsewhere")
    assert runs.find_run("first") == runs.find_run("runs/first") == inside
    assert runs.find_run(str(outside)) == outside
    both = finished(here / "first")
    assert runs.find_run("first") == both.relative_to(here)  # a path goes before a name


@pytest.mark.parametrize("name", ["none", "", "file", "empty", "x" * 300, "nul\0"])
def test_what_is_no_run_is_not_found(name: str, here: Path) -> None:
    (here / "file").write_text("mine")
    (here / "empty").mkdir()
    assert runs.find_run(name) is None


def test_the_newest_finished_run_of_its_kind(here: Path) -> None:
    old, new = finished(runs.ROOT / "z-old", age=60), finished(runs.ROOT / "a-new", age=30)
    finished(runs.ROOT / "grpo", "grpo")
    runs.create_run("sft", runs.ROOT / "unfinished", SETTINGS)
    assert runs.newest_run("sft") == new != old
    assert runs.newest_run("grpo") == runs.ROOT / "grpo"


def test_newest_is_the_run_begun_last_whatever_the_time_of_its_file(here: Path) -> None:
    old, new = finished(runs.ROOT / "old", age=60), finished(runs.ROOT / "new", age=30)
    os.utime(new / "run.json", (1000, 1000))  # the older one was copied, or evaluated, or its run.json mended, since
    assert runs.newest_run("sft") == new
    for folder in (old, new):
        (folder / "adapter").rename(folder / "gone")
        (folder / "gone" / "adapter_model.safetensors").unlink()
    assert runs.newest_unfinished("sft") == new


def test_of_runs_of_one_second_the_file_decides(here: Path) -> None:
    for name, when in (("b", 2000), ("a", 3000), ("c", 3000)):
        begin(finished(runs.ROOT / name), "2026-01-01 10:00:00")
        os.utime(runs.ROOT / name / "run.json", (when, when))
    assert runs.newest_run("sft") == runs.ROOT / "c"  # as new as a, and the later name


def test_no_finished_run_says_what_to_do_first(here: Path) -> None:
    runs.create_run("sft", runs.ROOT / "unfinished", SETTINGS)
    assert "run `sbtiny sft` first" in complaint(runs.newest_run, "sft")

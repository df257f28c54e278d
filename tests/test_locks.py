"""Two processes, one place: the second is refused in one line, and a lock dies with its process. Real processes, the bundled model."""

import errno
import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import listing

from sbtiny import locks, runs
from sbtiny.cli.main import run as call
from sbtiny.config import Settings
from sbtiny.errors import InputError

Start = Callable[..., subprocess.Popen]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts `sbtiny` in the test's folder; what still runs at the end is killed."""
    begun: list[subprocess.Popen] = []

    def call(*arguments: object) -> subprocess.Popen:
        command = [sys.executable, "-m", "sbtiny", *map(str, arguments)]
        begun.append(subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return begun[-1]

    yield call
    for process in begun:
        process.kill()
        process.communicate()


def until(there: Callable[[], bool], process: subprocess.Popen) -> None:
    ends = time.monotonic() + 120
    while not there():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < ends
        time.sleep(0.05)


def refused(process: subprocess.Popen, what: object, pid: int) -> None:
    """It ended with code 2 and one line that names the process which was there first."""
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (2, ""), err
    lines = err.strip().splitlines()
    who = f"process {pid} on {socket.gethostname()}"
    assert re.fullmatch(rf"error: {re.escape(f'{what} is in use by {who}')} since 20[-\d]+ [:\d]+: .+", lines[-1])
    assert len(lines) == 1


@pytest.fixture(scope="module")
def labelled(tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from sbtiny.coldstart.sample_correct import make_row
    from sbtiny.rollout.load_policy import build_policy
    from sbtiny.tasks import arithmetic

    policy, file = build_policy(*tiny, slots=2), tmp_path_factory.mktemp("rows") / "rows.jsonl"
    runs.write_jsonl(file, [make_row(policy, q, f"\\boxed{{{q.answer}}}") for q in arithmetic.generate_questions("train", 8, seed=5)])
    return file


def test_a_second_run_into_a_folder_is_refused_and_the_first_keeps_its_training(start: Start, labelled: Path, tmp_path: Path) -> None:
    folder = tmp_path / "same"
    first = start("sft", "--data", labelled, "--steps", 60, "--seed", 1, "-o", "same")
    until((folder / "metrics.jsonl").exists, first)
    first.send_signal(signal.SIGSTOP)  # it still trains, and cannot end before we have looked
    before = listing(tmp_path)
    for verb in (("sft", "--data", labelled), ("sft", "--resume"), ("demo",)):
        refused(start(*verb, "-o", "same"), "same", first.pid)
    refused(start("eval", "tiny", "--limit", 1, "-o", "same"), "same", first.pid)
    for verb in (("eval", "same"), ("export", "same")):
        out, err = start(*verb).communicate(timeout=120)
        assert (out, err.count("\n")) == ("", 1)
        assert f"same holds no adapter: it still trains, in process {first.pid} on" in err
    assert listing(tmp_path) == before
    first.send_signal(signal.SIGCONT)
    _, err = first.communicate(timeout=120)
    assert first.returncode == 0, err
    assert [path.name for path in tmp_path.iterdir()] == ["same"]
    assert (folder / "adapter").is_dir()
    assert not (folder / ".lock").exists()
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)


def test_a_killed_run_leaves_its_folder_free(start: Start, labelled: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = start("sft", "--data", labelled, "--steps", 500, "-o", "run")
    until((folder / "metrics.jsonl").exists, first)
    first.kill()
    first.communicate()
    assert (folder / ".lock").is_file()
    again = start("sft", "--data", labelled, "--steps", 2, "-o", "run")
    _, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    (aside,) = [path for path in tmp_path.iterdir() if path.name != "run"]
    assert (aside / "metrics.jsonl").is_file()
    assert (folder / "adapter").is_dir()
    assert not list(tmp_path.rglob(".lock"))


def test_a_killed_run_is_resumed_by_one_process(start: Start, labelled: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "run"
    told = ("sft", "--data", labelled, "--steps", 40, "--save-steps", 5)
    first = start(*told, "-o", folder)
    until((folder / "checkpoint-5" / "sbtiny.json").exists, first)
    first.kill()
    first.communicate()
    second = start("sft", "--resume")
    until(lambda: locks.holder(folder / runs.LOCK) is not None, second)
    second.send_signal(signal.SIGSTOP)
    refused(start("sft", "--resume", "-o", folder), folder, second.pid)
    refused(start(*told, "-o", folder), folder, second.pid)
    _, err = start("sft", "--resume").communicate(timeout=120)
    assert "has no unfinished sft run" in err  # nobody goes on with one that trains
    second.send_signal(signal.SIGCONT)
    _, err = second.communicate(timeout=120)
    assert second.returncode == 0, err


def test_two_builds_of_one_file(start: Start, tmp_path: Path) -> None:
    first = start("data", "build", "rows.jsonl", "--limit", 200)
    until((tmp_path / "rows.jsonl.part").exists, first)
    first.send_signal(signal.SIGSTOP)
    before = listing(tmp_path)
    refused(start("data", "build", "rows.jsonl", "--limit", 200), "rows.jsonl", first.pid)
    assert listing(tmp_path) == before
    first.kill()
    first.communicate()
    with locks.hold(locks.lock_path(tmp_path / "rows.jsonl"), tmp_path / "rows.jsonl"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl.part"]


def reserve_many(folder: str, count: int) -> list[str]:
    os.chdir(folder)
    return [str(runs.make_run_folder("sft")) for _ in range(count)]


def test_runs_of_the_same_moment_get_folders_of_their_own(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        found = pool.starmap(reserve_many, [(str(tmp_path), 50)] * 4)
    names = [name for each in found for name in each]
    assert len(set(names)) == len(names) == 200


def wins(path: Path, _: int) -> bool:
    try:
        with locks.hold(path, path):
            time.sleep(0.5)
            return True
    except InputError:
        return False


def test_of_many_at_once_one_has_it_and_all_can_have_it_in_turn(tmp_path: Path) -> None:
    path = tmp_path / "deep" / ".lock"
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        pool.starmap(wins, [(tmp_path / "warm", n) for n in range(8)])
        assert sum(pool.starmap(wins, [(path, n) for n in range(4)], chunksize=1)) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_process_has_it_more_than_once_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / ".lock"
    with locks.hold(path, path), locks.hold(path, path):
        assert locks.holder(path) is None
        locks.raise_if_locked(path, path)
        inode = path.stat().st_ino
    with pytest.raises(InputError, match="wrong"), locks.hold(path, path):
        raise InputError("wrong")
    assert inode
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [".", "", "/"])
def test_what_has_no_name_is_a_folder_and_no_file_to_write(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["data", "build", name], False) == 2
    said = f"error: cannot write {Path(name)}: it is a folder; give the name of a file"
    assert capsys.readouterr().err.strip() == said


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_without_locks_a_run_goes_on_and_says_so(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import fcntl

    def flock(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    with runs.claim("sft", tmp_path / "run") as folder:
        runs.create_run("sft", folder, Settings())
        assert locks.holder(folder / runs.LOCK) is None
    assert sorted(listing(tmp_path)) == ["run/config.yaml", "run/run.json"]
    err = capsys.readouterr().err
    assert err == f"no lock on {tmp_path / 'run'} ({os.strerror(code)}): make sure that nothing else writes there\n"


def test_a_fresh_folder_is_gone_where_something_was_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for output in (None, Path("a/b")):
        with pytest.raises(InputError, match="wrong"), runs.claim("sft", output):
            raise InputError("wrong")
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_set_aside_under_its_lock(tmp_path: Path) -> None:
    with runs.claim("sft", tmp_path / "run") as folder:
        runs.create_run("sft", folder, Settings())
        runs.append_jsonl(folder / "metrics.jsonl", {"step": 1})
        runs.create_run("sft", folder, Settings())
        assert (folder / runs.LOCK).is_file()
    (aside,) = [path for path in tmp_path.iterdir() if path.name != "run"]
    assert sorted(listing(aside)) == ["config.yaml", "metrics.jsonl", "run.json"]
    assert sorted(listing(folder)) == ["config.yaml", "run.json"]

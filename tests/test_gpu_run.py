"""dev/gpu_run.py: killed in the middle, its next call leaves out what had ended, goes on with the rest, and loses no figure."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

DEV = Path(__file__).parents[1] / "dev"
THREE_STEPS = """
import sys
from pathlib import Path
sys.path.insert(0, {dev!r})
from gpu_run import Figures, Place, run_stages

def step_of(name):
    code = f"import os, time; open('starts', 'a').write('{{name}} %d\\\\n' % os.getpid()); "
    code += f"time.sleep(600 if os.path.exists('wait-{{name}}') else 0); assert not os.path.exists('break-{{name}}'), 'broken'; print(7)"
    def step(place):
        yield "value", place.read("-c", code), "tokens"
    return step

folder = Path.cwd()
Path("logs").mkdir(exist_ok=True)
stages = {{"first": {{"a": step_of("a"), "b": step_of("b")}}, "second": {{"c": step_of("c")}}}}
for line in run_stages(stages, Place(folder, False, True), Figures(folder, {{"card": "none"}}), float(sys.argv[1])):
    print(line)
"""


def wait_for(holds: Callable[[], bool], process: subprocess.Popen | None = None, seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come"
        assert process is None or process.poll() is None, "it ended before"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that is dead and not yet collected does not."""
    status = Path(f"/proc/{pid}/stat")
    return status.is_file() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "figures.jsonl").read_text().splitlines()]


@pytest.fixture
def run_three(tmp_path: Path) -> Callable[..., subprocess.Popen]:
    """Start the three steps in `tmp_path`; a file `wait-b` lets step b take long, `break-b` lets it fail."""

    def start(minutes: float = 5) -> subprocess.Popen:
        command = [sys.executable, "-c", THREE_STEPS.format(dev=str(DEV)), str(minutes)]
        return subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)

    return start


def starts_of(folder: Path) -> list[list[str]]:
    file = folder / "starts"
    return [line.split() for line in file.read_text().splitlines()] if file.is_file() else []


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_run_that_was_killed_goes_on_where_it_stopped(run_three, tmp_path: Path) -> None:
    (tmp_path / "wait-b").touch()
    first = run_three()
    wait_for(lambda: len(starts_of(tmp_path)) == 2, first)
    first.kill()
    first.communicate()
    wait_for(lambda: not is_alive(int(starts_of(tmp_path)[1][1])), seconds=60)  # the command of step b dies with it
    before = rows_of(tmp_path)
    with (tmp_path / "figures.jsonl").open("a") as file:
        file.write('{"stage": "fi')  # killed while it wrote
    (tmp_path / "wait-b").unlink()
    said, _ = run_three().communicate()
    assert [name for name, _ in starts_of(tmp_path)] == ["a", "b", "b", "c"]
    found = rows_of(tmp_path)
    assert found[: len(before)] == before
    assert [(r["step"], r["value"], r["unit"], r["card"]) for r in found if r["name"] == "value"] == [
        (s, 7, "tokens", "none") for s in "abc"
    ]
    assert Counter(r["step"] for r in found if r["name"] == "seconds") == {"a": 1, "b": 1, "c": 1}
    assert [json.loads(line) for line in said.splitlines()] == found[len(before) :]
    run_three().communicate()
    assert len(starts_of(tmp_path)) == 4


def test_a_stage_that_is_out_of_time_or_fails_is_left_for_the_next_call(run_three, tmp_path: Path) -> None:
    (tmp_path / "wait-b").touch()
    (tmp_path / "break-c").touch()
    said, _ = run_three(minutes=0.05).communicate()
    *_, stopped, failed = said.splitlines()
    assert stopped == "first b: out of time"
    assert failed.startswith("second c: failed, see ")
    assert "AssertionError: broken" in next(row["value"] for row in rows_of(tmp_path) if row["name"] == "failed")
    (tmp_path / "wait-b").unlink()
    (tmp_path / "break-c").unlink()
    run_three().communicate()
    assert Counter(row["step"] for row in rows_of(tmp_path) if row["name"] == "seconds") == {"a": 1, "b": 1, "c": 1}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="kills a tree of processes")
def test_all_stages_run_on_a_cpu_killed_once_and_resumed(tmp_path: Path) -> None:
    """From start to end on small shapes; SIGKILL falls into the cold start of the demo."""
    command = [sys.executable, str(DEV / "gpu_run.py"), str(tmp_path), "--device=cpu", "--small", "--minutes=60"]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    wait_for(lambda: any((tmp_path / "demo" / "sft").glob("checkpoint-*")), first, 3000)
    first.send_signal(signal.SIGKILL)
    first.wait()
    before = rows_of(tmp_path)
    assert {(row["stage"], row["step"]) for row in before} >= {("doctor", "plan"), ("graphs", "graphs"), ("demo", "base")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    found = rows_of(tmp_path)
    assert found[: len(before)] == before
    ended = Counter((row["stage"], row["step"]) for row in found if row["name"] == "seconds")
    assert set(ended.values()) == {1}
    assert {stage for stage, _ in ended} >= {"demo", "presets", "float16", "bench", "real", "resume", "engines", "serving"}
    logs = {file.stem: sum(line.startswith("$ ") for line in file.open(errors="replace")) for file in (tmp_path / "logs").iterdir()}
    assert (logs["doctor-plan"], logs["demo-base"], logs["demo-sft"]) == (1, 1, 2)
    assert all(row.keys() == {"stage", "step", "name", "value", "unit", "card", "versions"} for row in found)
    updates = {row["step"]: row["value"] for row in found if (row["stage"], row["name"]) == ("demo", "updates")}
    assert updates == {"sft": 8, "grpo": 2}

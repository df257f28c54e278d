"""Streams of every encoding, pipes that nobody reads, and a home that the shell left alone."""

import io
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sbtiny import runs
from sbtiny.cli import main as cli
from sbtiny.cli.main import expand_tilde
from sbtiny.errors import InputError
from sbtiny.load_settings import load_settings

SAMPLES = '{"budget": 100, "length": 90, "correct": true}\n'
ROW = '{"id": "é", "question": "Zoë hat 1 – 1? 😀", "response": "2", "budget": 1}\n'
PLAIN = ("models", "models --json", "plan", "plan --json", "doctor", "--help", "data build --help", "bench rollout --help", "--version")
FILES = (
    *("reward s.jsonl", "reward s.jsonl --json", "data show é.jsonl"),
    *("sft --data é.jsonl --dry-run", "sft --data é.jsonl --dry-run --json"),
)
RUN = ("eval tiny -o run --limit 2 --set eval.max_tokens=8 --cuts", "eval run/é --limit 2", "report run", "report run --json")


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("s.jsonl").write_text(SAMPLES)
    Path("é.jsonl").write_text(ROW, encoding="utf-8")


def printed(line: str, encoding: str, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str, str]:
    """Code, stdout and stderr of a command whose streams have this encoding, as Python opens them."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    for name, stream in zip(("stdout", "stderr"), streams, strict=True):
        monkeypatch.setattr(sys, name, stream)
    monkeypatch.setattr(sys, "argv", ["sbtiny", *shlex.split(line)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = (stream.buffer.getvalue().decode(encoding) for stream in streams)
    return stop.value.code, out, err


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
@pytest.mark.parametrize("line", [*PLAIN, *FILES])
def test_every_verb_prints_on_a_stream_that_is_not_utf_8(line: str, encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = printed(line, encoding, monkeypatch)
    assert (code, err) == (0, "")
    if line.endswith("--json"):
        json.loads(out)
    if line.startswith("sft"):
        named = json.loads(out)["sft"]["rows"] if "--json" in line else out
        assert ("é.jsonl" if encoding != "ascii" or "--json" in line else r"\xe9.jsonl") in named
    if "show" in line:
        assert out.startswith("<|im_start|>|user|")
        assert "\\u258f" not in out


@pytest.mark.usefixtures("files")
def test_an_evaluation_and_its_report_on_a_stream_of_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    for line in RUN:
        if line.startswith("report"):
            runs.write_json(Path("run/run.json"), {"kind": "grpo", "model": "tiny", "format": "solution"})
            runs.write_text(Path("run/config.yaml"), load_settings().as_yaml())
        code, out, err = printed(line, "ascii", monkeypatch)
        assert code == (2 if "é" in line else 0), err
        assert "Traceback" not in err
        assert out if code == 0 else r"run/\xe9" in err
        if line.endswith("--json"):
            json.loads(out)


def test_a_real_stream_of_ascii_and_an_error_beyond_it(tmp_path: Path) -> None:
    plain = {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for more in (plain, {"PYTHONIOENCODING": "ascii"}):
        for line, code in (("models", 0), ("--help", 0), ("reward é.jsonl", 2)):
            command = [sys.executable, "-m", "sbtiny", *line.split()]
            done = subprocess.run(command, cwd=tmp_path, env=os.environ | more, capture_output=True, check=False)
            assert done.returncode == code, done.stderr
            assert "Traceback" not in done.stderr.decode("ascii")
            done.stdout.decode("ascii")


@pytest.mark.parametrize("more", [{}, {"PYTHONUNBUFFERED": "1"}])
@pytest.mark.parametrize("line", ["--help", "models", "models --json", "plan", "doctor", "--version", "reward s.jsonl", "sft --dry-run"])
@pytest.mark.usefixtures("files")
def test_nobody_reads_on(line: str, more: dict[str, str]) -> None:
    """Codes and silence of `yes | head -n 0`, which SIGPIPE ends."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "sbtiny", *line.split()]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, env=os.environ | more, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_nobody_reads_the_error(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "sbtiny", "nosuch"], cwd=tmp_path, stderr=write, stdout=subprocess.PIPE, check=False)
    os.close(write)
    assert (done.returncode, done.stdout) == (128 + signal.SIGPIPE, b"")


def test_a_broken_pipe_of_another_kind_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from sbtiny.models import aliases

    def fail() -> None:
        raise BrokenPipeError(32, "the worker is gone")

    monkeypatch.setattr(aliases, "resolve", lambda _: fail())
    with (tmp_path / "read").open("w") as read:  # the test's own may be the null device, which counts as unread
        monkeypatch.setattr(sys, "__stdout__", read)
        monkeypatch.setattr(sys, "__stderr__", read)
        code, out, err = printed("sft --dry-run", "utf-8", monkeypatch)
    assert (code, out) == (1, "")
    assert err == "error: BrokenPipeError: [Errno 32] the worker is gone (--debug shows where)\n"


HOMES = {
    "~": "{}",
    "~/x": "{}/x",
    "--output=~/x": "--output={}/x",
    "-o~/x y": "-o{}/x y",
    "sft.rows=~/x": "sft.rows={}/x",
    "--set=sft.rows=~/x": "--set=sft.rows={}/x",
    "--output=~nobody-of-this-name/x": "--output=~nobody-of-this-name/x",
    "old~": "old~",
    "a~/x": "a~/x",
    "./~/x": "./~/x",
    "--output=./~/x": "--output=./~/x",
    "about=a ~ b": "about=a ~ b",
    "": "",
}


@pytest.mark.parametrize("given", HOMES)
def test_a_home_is_expanded_wherever_a_path_may_begin(given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand_tilde(given) == HOMES[given].format(tmp_path)


def test_no_folder_is_ever_called_after_the_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    for folder in (home, here):
        folder.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    row = {"question": "Tom has 1 coin. How many?", "answer": 1, "response": "\\boxed{1}"}
    (home / "traces.jsonl").write_text(json.dumps(row) + "\n")
    (home / "s.yaml").write_text("sft: {rows: ~/rows.jsonl, steps: 1}\ndata: {verifier: ~/my.py:check}\n")
    (home / "my.py").write_text("def check(question, completion):\n    return True\n")
    for line in (
        "data build ~/rows.jsonl --traces=~/traces.jsonl --verifier=~/my.py",
        "sft -c ~/s.yaml --output=~/run",
        "eval ~/run --task=~/traces.jsonl --limit 1 --set eval.max_tokens=4 -o~/out",
        "sft --dry-run --config=~/s.yaml --data=~/rows.jsonl",
    ):
        code, _, err = printed(line, "utf-8", monkeypatch)
        assert code == 0, err
    assert list(here.iterdir()) == []
    assert {"rows.jsonl", "run", "out"} <= {path.name for path in home.iterdir()}
    settings = load_settings(home / "run" / "config.yaml")
    assert (settings.sft.rows, settings.data.verifier) == (f"{home}/rows.jsonl", f"{home}/my.py:check")


def test_settings_files_may_begin_a_path_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "s.yaml").write_text("model: ~/model\ngrpo: {questions: ~/q.jsonl}\neval: {wrap_up: 'a ~ b'}\n")
    settings = load_settings(tmp_path / "s.yaml", overrides=[("sft.rows", "~/rows.jsonl")])
    assert (settings.model, settings.grpo.questions, settings.sft.rows) == tuple(
        f"{tmp_path}/{x}" for x in ("model", "q.jsonl", "rows.jsonl")
    )
    assert settings.eval.wrap_up == "a ~ b"
    with pytest.raises(InputError, match="must be text or null"):
        load_settings(overrides=[("sft.rows", True)])

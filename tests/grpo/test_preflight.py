"""The preflight names the obstacles, and lets a run that will learn pass."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from sbtiny.cli import main as cli
from sbtiny.config import GrpoSettings, Settings
from sbtiny.errors import Failed, InputError
from sbtiny.grpo import run
from sbtiny.grpo.preflight import PreflightStats, find_obstacles, preflight_record, preflight_stats, raise_if_hopeless
from sbtiny.grpo.run import run_preflight
from sbtiny.rollout.load_policy import load_policy
from sbtiny.rollout.policy import Policy
from sbtiny.tasks.sources import Question
from sbtiny.tasks.verify import regex

GOOD = PreflightStats(
    questions=100, answers=64, cut=0.0, malformed=0.02, unended=0.0, accuracy=0.8, reward_mean=0.6, reward_std=0.3,
    frac_reward_zero_std=0.1, budget=150.0, length=140.0, reference_right=1.0, nonsense_right=0.0, hours=0.2,
)  # fmt: skip

BROKEN = {
    "raise grpo.max_tokens": {"cut": 0.9, "malformed": 0.9, "frac_reward_zero_std": 1.0},
    "the verifier refuses the reference answers": {"reference_right": 0.0, "accuracy": 0.0},
    "the verifier accepts": {"nonsense_right": 1.0, "accuracy": 1.0, "frac_reward_zero_std": 1.0},
    "raise grpo.temperature": {"frac_reward_zero_std": 1.0},
    "no end token": {"cut": 1.0, "unended": 1.0, "malformed": 1.0},
    "there are no questions": {"questions": 0},
    "there is one question": {"questions": 1},
    "lengthen the cold start": {"malformed": 0.95, "frac_reward_zero_std": 0.95},
}


@pytest.mark.parametrize("cause", BROKEN)
def test_the_cause_is_named_and_its_effects_are_not(cause: str) -> None:
    obstacles = find_obstacles(replace(GOOD, **BROKEN[cause]), temperature=0.05)
    assert [cause in obstacle for obstacle in obstacles] == [True]


def test_a_healthy_run_passes() -> None:
    record = preflight_record(GOOD, 1.0)
    assert (record["verdict"], record["notes"]) == ("will learn", [])


def test_a_slow_start_passes_with_a_word() -> None:
    record = preflight_record(replace(GOOD, frac_reward_zero_std=0.6, cut=0.2, accuracy=0.02), 1.0)
    assert (record["verdict"], len(record["notes"])) == ("will learn", 3)


# ---- end to end ------------------------------------------------------------------------------------------------------

TERSE = GrpoSettings(steps=2, prompts_per_step=8, num_generations=4, micro_batch=8, max_tokens=40, limit=40, max_num_seqs=16)


def look(started: Path, monkeypatch: pytest.MonkeyPatch, **changed: object) -> dict:
    monkeypatch.chdir(started.parent)
    record = run_preflight(Settings(grpo=replace(TERSE, **changed)), started)
    raise_if_hopeless(record, force=False)
    return record


def test_a_healthy_set_up(started: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(started.parent.rglob("*"))
    assert look(started, monkeypatch)["verdict"] == "will learn"
    assert sorted(started.parent.rglob("*")) == before


SET_UPS = {
    "raise grpo.max_tokens": {"max_tokens": 6},
    "the verifier refuses the reference answers": {"verifier": "never.py:check"},
    "the verifier accepts": {"verifier": "always.py:check"},
    "raise grpo.temperature": {"temperature": 0.001},
    "there is one question": {"limit": 1},
}


@pytest.mark.parametrize("cause", SET_UPS)
def test_a_broken_set_up(cause: str, started: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = dict(SET_UPS[cause])
    if "verifier" in changed:
        file = tmp_path / changed["verifier"].partition(":")[0]
        file.write_text(f"def check(question, completion):\n    return {file.stem == 'always'}\n")
        changed["verifier"] = f"{file}:check"
    with pytest.raises(Failed, match=cause):
        look(started, monkeypatch, **changed)


def test_a_pattern_need_not_match_itself() -> None:
    assert preflight_stats([], [Question("a", "Which?", "colou?r")], regex, 1.0).reference_right == 1.0


def test_a_model_that_does_not_end(started: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a template whose end token was never trained: no token stops it."""

    def endless(*arguments: object, **named: object) -> Policy:
        policy = load_policy(*arguments, **named)
        policy.engine.stops[:] = False
        return policy

    monkeypatch.setattr(run, "load_policy", endless)
    with pytest.raises(Failed, match="no end token"):
        look(started, monkeypatch)


def test_temperature_0_and_no_questions_are_refused_before(started: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"grpo\.temperature"):
        Settings(grpo=replace(TERSE, temperature=0.0))
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(InputError, match="is empty"):
        look(started, monkeypatch, questions=str(empty))


# ---- from the command line -------------------------------------------------------------------------------------------

SMALL = "--set grpo.prompts_per_step=8 --set grpo.num_generations=4 --set grpo.micro_batch=8 --limit 40 --steps 1 --no-4bit"


@pytest.fixture
def call(
    started: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[str], tuple[int, str, str]]:
    """Exit code, stdout and stderr of `sbtiny grpo` on the cold start, with more options."""
    monkeypatch.chdir(tmp_path)

    def run(more: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sbtiny", "grpo", "--run", str(started), *SMALL.split(), *more.split()])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code, *capsys.readouterr()

    return run


def test_preflight_alone_passes_a_healthy_set_up_and_writes_nothing(call, tmp_path: Path) -> None:
    code, out, err = call("--preflight --set grpo.max_tokens=40 --json")
    record = json.loads(out)
    assert (code, record["verdict"]) == (0, "will learn")
    assert record["figures"]["answers"] == 32
    assert "preflight: will learn" in err
    assert list(tmp_path.iterdir()) == []


def test_preflight_alone_of_a_hopeless_one_is_code_1_with_the_cause_and_the_figures(call, tmp_path: Path) -> None:
    code, out, err = call("--preflight --set grpo.max_tokens=6 --json")
    assert (code, json.loads(out)["figures"]["cut"]) == (1, 1.0)
    assert "error: will not learn, because 100% of the answers are cut" in err
    assert "raise grpo.max_tokens" in err.splitlines()[-1]
    assert call("--preflight --set grpo.max_tokens=6 --force")[0] == 0
    assert list(tmp_path.iterdir()) == []


def test_a_hopeless_run_is_code_1_unless_forced(call, tmp_path: Path) -> None:
    code, out, err = call("--set grpo.max_tokens=6 --output run")
    assert (code, out) == (1, "")
    assert "--force trains all the same" in err
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.yaml", "preflight.json", "run.json"]
    code, out, _ = call("--set grpo.max_tokens=6 --output forced --force --json")
    assert (code, json.loads(out)["run"]) == (0, "forced")
    assert (tmp_path / "forced" / "adapter").is_dir()

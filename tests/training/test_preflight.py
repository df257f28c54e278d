"""The preflight names what stands in the way, and lets a run that will learn pass."""

from dataclasses import replace
from pathlib import Path

import pytest

from sbtiny import stages
from sbtiny.config import GrpoSettings, Settings
from sbtiny.errors import Failed, InputError
from sbtiny.rollout.policy import Policy
from sbtiny.training.preflight import Figures, judge, verdict

GOOD = Figures(
    questions=100, answers=64, cut=0.0, malformed=0.02, unended=0.0, accuracy=0.8, reward_mean=0.6, reward_std=0.3, zero_spread=0.1,
    budget=150.0, length=140.0, reference_right=1.0, nonsense_right=0.0, hours=0.2,
)  # fmt: skip

BROKEN = {
    "raise grpo.max_tokens": {"cut": 0.9, "malformed": 0.9, "zero_spread": 1.0},
    "the verifier refuses the reference answers": {"reference_right": 0.0, "accuracy": 0.0},
    "the verifier accepts": {"nonsense_right": 1.0, "accuracy": 1.0, "zero_spread": 1.0},
    "raise grpo.temperature": {"zero_spread": 1.0},
    "no end token": {"cut": 1.0, "unended": 1.0, "malformed": 1.0},
    "there are no questions": {"questions": 0},
    "there is one question": {"questions": 1},
    "lengthen the cold start": {"malformed": 0.95, "zero_spread": 0.95},
}


@pytest.mark.parametrize("said", BROKEN)
def test_the_cause_is_named_and_its_effects_are_not(said: str) -> None:
    found = judge(replace(GOOD, **BROKEN[said]), temperature=0.05)
    assert [said in finding.cause for finding in found] == [True]
    assert verdict(found).startswith("will not learn, because")


def test_a_healthy_run_passes() -> None:
    assert judge(GOOD, 1.0) == []
    assert verdict([]) == "will learn"


def test_a_slow_start_passes_with_a_word() -> None:
    found = judge(replace(GOOD, zero_spread=0.6, cut=0.2, accuracy=0.02), 1.0)
    assert len(found) == 3
    assert verdict(found) == "will learn"


# ---- end to end ------------------------------------------------------------------------------------------------------

TERSE = GrpoSettings(steps=2, prompts=8, group=4, micro_batch=8, max_tokens=40, limit=40, slots=16)


def look(started: Path, monkeypatch: pytest.MonkeyPatch, **changed: object) -> dict:
    monkeypatch.chdir(started.parent)
    return stages.run_preflight(Settings(grpo=replace(TERSE, **changed)), started)


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


@pytest.mark.parametrize("said", SET_UPS)
def test_a_broken_set_up(said: str, started: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = dict(SET_UPS[said])
    if "verifier" in changed:
        file = tmp_path / changed["verifier"].partition(":")[0]
        file.write_text(f"def check(question, completion):\n    return {file.stem == 'always'}\n")
        changed["verifier"] = f"{file}:check"
    with pytest.raises(Failed, match=said):
        look(started, monkeypatch, **changed)


def test_a_model_that_does_not_end(started: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a template whose end token was never trained: no token stops it."""
    opened = stages.open_policy

    def endless(*arguments: object, **named: object) -> Policy:
        policy = opened(*arguments, **named)
        policy.engine.stops[:] = False
        return policy

    monkeypatch.setattr(stages, "open_policy", endless)
    with pytest.raises(Failed, match="no end token"):
        look(started, monkeypatch)


def test_temperature_0_and_no_questions_are_refused_before(started: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"grpo\.temperature"):
        Settings(grpo=replace(TERSE, temperature=0.0))
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(InputError, match="is empty"):
        look(started, monkeypatch, data=str(empty))


def test_a_hopeless_run_stops_before_its_first_step_unless_forced(started: Path, tmp_path: Path) -> None:
    settings = Settings(grpo=replace(TERSE, max_tokens=6, steps=1))
    with pytest.raises(Failed, match="--force"):
        stages.run_grpo(settings, started, tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.yaml", "preflight.json", "run.json"]
    stages.run_grpo(settings, started, tmp_path / "forced", force=True)
    assert (tmp_path / "forced" / "adapter").is_dir()



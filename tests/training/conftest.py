"""A cold start of seconds: the bundled model answers with a number and a bare box, so that a few tokens make a whole answer."""

import json
from pathlib import Path

import pytest

from sbtiny import stages
from sbtiny.config import DataSettings, Settings, SftSettings
from sbtiny.rollout.policy import Policy
from sbtiny.tasks import arithmetic
from sbtiny.training.coldstart import label


@pytest.fixture(scope="session")
def started(tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished sft run folder; tests must not write into it."""
    folder = tmp_path_factory.mktemp("start")
    policy = Policy(*tiny, slots=2)
    asked = [q for q in arithmetic.questions("train", 400, seed=5) if q.level <= 2][:64]
    rows = [label(policy, q, f"\\boxed{{{q.answer}}}") for q in asked]
    data = folder / "terse.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = Settings(sft=SftSettings(data=str(data), steps=120, lr=4e-3), data=DataSettings(slots=8))
    return stages.run_sft(settings, folder / "sft")

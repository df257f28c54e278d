"""The bundled model is the test double: small enough that the real thing takes a second."""

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from support import settings_of, skip_without_llama_cpp, write_gguf

from sbtiny.config import DataSettings, Settings, SftSettings
from sbtiny.models.aliases import BUNDLED
from sbtiny.models.load import load_model
from sbtiny.rollout.load_policy import build_policy
from sbtiny.rollout.policy import Policy
from sbtiny.tasks import arithmetic


def pytest_configure(config: pytest.Config) -> None:
    """No test but `make gpu-check`'s needs a GPU, or is another one where there is one: the rest sees none."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


torch.set_num_threads(1)
settings.register_profile("sbtiny", deadline=None)  # a busy machine is no failure
settings.load_profile("sbtiny")


@pytest.fixture(scope="session")
def tiny():
    """(model, tokenizer) of the bundled model; tests must not train it."""
    return load_model("tiny")


@pytest.fixture
def policy(tiny) -> Policy:
    model, tokenizer = tiny
    return build_policy(model, tokenizer, slots=12)


@pytest.fixture(scope="session")
def started(tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished cold start of seconds: the bundled model answers with a number and a bare box, so that a few tokens make a whole answer.

    A run folder; tests must not write into it.
    """
    from sbtiny.coldstart.run import run_sft
    from sbtiny.coldstart.sample_correct import make_row

    folder = tmp_path_factory.mktemp("start")
    policy = build_policy(*tiny, slots=2)
    asked = [q for q in arithmetic.generate_questions("train", 400, seed=5) if q.level <= 2][:64]
    rows = [make_row(policy, q, f"\\boxed{{{q.answer}}}") for q in asked]
    data = folder / "terse.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    chosen = Settings(sft=SftSettings(rows=str(data), steps=100, learning_rate=3e-3), data=DataSettings(max_num_seqs=8))
    return run_sft(chosen, folder / "sft")


@pytest.fixture(scope="session")
def plain_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model as a GGUF file that llama.cpp decodes; skips where it is not installed."""
    skip_without_llama_cpp()
    return write_gguf(BUNDLED, "f32", tmp_path_factory.mktemp("gguf") / "plain.gguf")


@pytest.fixture(scope="session")
def started_gguf(started: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run `started` as a GGUF file; skips where llama.cpp is not installed."""
    skip_without_llama_cpp()
    return write_gguf(BUNDLED, "f32", tmp_path_factory.mktemp("gguf") / "started.gguf", started / "adapter")


@pytest.fixture(scope="session")
def whole(started: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of GRPO by `support.GRPO` from `started`, never interrupted; tests must not write into it."""
    from sbtiny.grpo.run import run_grpo

    return run_grpo(settings_of(), started, tmp_path_factory.mktemp("whole") / "run")

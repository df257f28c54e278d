"""The bundled model is the test double: small enough that the real thing takes a second."""

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from support import easy_questions, settings_of, skip_without_llama_cpp, train_briefly, write_gguf

from sbtiny.models.aliases import BUNDLED
from sbtiny.models.load import load_model
from sbtiny.rollout.load_policy import build_policy
from sbtiny.rollout.policy import Policy


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
    from sbtiny.coldstart.sample_correct import make_row

    folder = tmp_path_factory.mktemp("start")
    policy = build_policy(*tiny, slots=2)
    rows = [make_row(policy, q, f"\\boxed{{{q.answer}}}") for q in easy_questions(64)]
    data = folder / "terse.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return train_briefly(data, folder / "sft")


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

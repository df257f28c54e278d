"""The bundled model is the test double: small enough that the real thing takes a second."""

import pytest
import torch
from hypothesis import settings

from sbtiny.models.load import load
from sbtiny.rollout.policy import Policy

torch.set_num_threads(1)
settings.register_profile("sbtiny", deadline=None)  # a busy machine is no failure
settings.load_profile("sbtiny")


@pytest.fixture(scope="session")
def tiny():
    """(model, tokenizer) of the bundled model; tests must not train it."""
    return load("tiny")


@pytest.fixture
def policy(tiny) -> Policy:
    model, tokenizer = tiny
    return Policy(model, tokenizer, slots=12)

"""Servers that several test files ask."""

from collections.abc import Callable, Iterator

import pytest
from serve_support import Served

import sbtiny
from sbtiny.budget.protocol import SOLUTION, THINK
from sbtiny.config import ServeSettings, Settings
from sbtiny.models.load import load_model
from sbtiny.rollout.load_policy import build_policy
from sbtiny.serving.assistant import Assistant
from sbtiny.serving.heads_first import HEAD_ROWS

SLOTS = 3


def load_tiny(**settings: object) -> Callable[[], Assistant]:
    """Of the bundled model, which states no budget and reckons at length."""
    chosen = ServeSettings(**{"temperature": 0.0, "context": 512, "max_num_seqs": SLOTS} | settings)
    return lambda: Assistant(build_policy(*load_model("tiny"), slots=SLOTS + HEAD_ROWS, form=SOLUTION, states_budget=False), chosen)


def load_thinking(**settings: object) -> Callable[[], Assistant]:
    """Of the bundled model in the other format: it takes a given budget, and what it writes is thoughts until it is cut."""
    chosen = ServeSettings(**{"temperature": 0.0, "context": 1024, "max_num_seqs": SLOTS, "reserve": 60} | settings)
    return lambda: Assistant(build_policy(*load_model("tiny"), slots=SLOTS + HEAD_ROWS, form=THINK), chosen)


@pytest.fixture(scope="session")
def served(started) -> Iterator[Served]:
    """Of a run that states a budget and answers with a bare box, greedy."""
    settings = Settings(four_bit=False, serve=ServeSettings(temperature=0.0, max_num_seqs=SLOTS + HEAD_ROWS))
    server = Served(lambda: sbtiny.load(str(started), settings=settings)).wait_ready()
    yield server
    server.close()


@pytest.fixture(scope="session")
def plain() -> Iterator[Served]:
    server = Served(load_tiny()).wait_ready()
    yield server
    server.close()


@pytest.fixture(scope="session")
def thinking() -> Iterator[Served]:
    server = Served(load_thinking()).wait_ready()
    yield server
    server.close()

"""Servers that several test files ask."""

from collections.abc import Iterator

import pytest
from serve_support import SLOTS, Served, load_thinking, load_tiny

import sbtiny
from sbtiny.config import ServeSettings, Settings
from sbtiny.serving.heads_first import HEAD_ROWS


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

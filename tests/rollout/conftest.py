"""Memory that was never written or is freed, made visible."""

import math

import pytest

from sbtiny.rollout import engine as engine_module
from sbtiny.rollout import scheduler
from sbtiny.rollout.engine import Engine


@pytest.fixture
def poisoned(monkeypatch):
    """Freed and never-written cache memory holds NaN: one stray read spoils every later token. Blocks have two slots, so there are some."""
    reserve, vacate = Engine._reserve, engine_module.Scheduler._compact

    def reserve_poisoned(self, *given):
        before = self.capacity
        reserve(self, *given)
        if self.capacity != before:
            self.cache.fill_(math.nan)

    def vacate_poisoned(self, slot):
        vacate(self, slot)
        self.cache[:, :, len(self.slots)] = math.nan

    monkeypatch.setattr(scheduler, "CPU_BLOCK", 2)
    monkeypatch.setattr(Engine, "_reserve", reserve_poisoned)
    monkeypatch.setattr(engine_module.Scheduler, "_compact", vacate_poisoned)

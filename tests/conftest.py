"""Settings for every test."""

from __future__ import annotations

import os
import sys

import numpy as np
import pytest
from hypothesis import settings

from pytracker.history import ParameterInfo

# Machines that run the suite are shared, so no example has a deadline. CI draws the same examples each time. To look
# for more: pytest -m hypothesis --hypothesis-profile thorough
settings.register_profile("shared", deadline=None)
settings.register_profile("ci", parent=settings.get_profile("shared"), derandomize=True)
settings.register_profile("thorough", parent=settings.get_profile("shared"), max_examples=2000)
settings.load_profile("ci" if os.environ.get("CI") else "shared")

NAMES = ("conv.weight", "conv.bias", "head.weight")


@pytest.fixture(autouse=True)
def _drains_come_by_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a tracker drain by ``every`` alone where a test gives no ``seconds``: a slow machine drains no sooner."""
    if "pytracker.tracker" in sys.modules:  # else there is no torch, or it has not been asked for
        monkeypatch.setitem(sys.modules["pytracker.tracker"].Tracker.__init__.__kwdefaults__, "seconds", 3600.0)


@pytest.fixture
def infos() -> list[ParameterInfo]:
    """Three parameters of a small network."""
    shapes = ((8, 1, 3, 3), (8,), (10, 8))
    return [
        ParameterInfo(name, shape, "float32", "0", int(np.prod(shape)))
        for name, shape in zip(NAMES, shapes, strict=True)
    ]

"""What the tests of the rules share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pytracker.diagnostics import RULES


@pytest.fixture
def scratch_rule() -> Iterator[None]:
    """Let a test register rules, and forget them."""
    before = dict(RULES)
    yield
    RULES.clear()
    RULES.update(before)

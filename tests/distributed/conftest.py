"""The ranks that the tests share end with the last test."""

from __future__ import annotations

from collections.abc import Iterator

import launch
import pytest


@pytest.fixture(scope="session", autouse=True)
def ranks() -> Iterator[None]:
    yield
    launch.end_pools()

"""The ranks that the tests share end with the last test of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import launch
import pytest


@pytest.fixture(scope="package", autouse=True)
def ranks() -> Iterator[None]:
    yield
    launch.end_pools()

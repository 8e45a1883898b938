"""What tests ask of a tracker's ranks: that none is waited for, and when collectives have ended."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from pytracker.collectives.ranks import Ranks
from pytracker.distributed.team import Team


@contextmanager
def waits_forbidden() -> Iterator[None]:
    """Fail where another rank is waited for."""

    def wait_for_nobody(ranks: Ranks, is_done: Any, failure: str, meanwhile: Any = None) -> None:
        assert is_done(), f"other ranks are waited for: {failure}"

    with mock.patch.object(Ranks, "wait", wait_for_nobody):
        yield


def until_merged(tracker: Any) -> None:
    """Wait until the collectives of this rank's earlier drains have ended, well or not. Nothing is handed on."""
    if not isinstance(tracker._team, Team):
        return
    told, merger = tracker._team._intervals._told, tracker._team._merger
    while told is not None and not told[1].work.is_completed():
        time.sleep(0.001)
    for merge in merger._merges if merger is not None else ():
        while merge.reduction is not None and not all(work.is_completed() for work in merge.reduction.works):
            time.sleep(0.001)

"""What the cases need to know of collectives: which are called, that none is waited for, that all have ended."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from torch.utils._python_dispatch import TorchDispatchMode

import pytracker
from pytracker.distributed.ranks import Ranks


class Collectives(TorchDispatchMode):
    """Notes every call of torch's collectives, and every wait for one."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().partition("::")[0] in ("c10d", "_c10d_functional"):
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@contextmanager
def waits_forbidden() -> Iterator[None]:
    """Fail where another rank is waited for."""

    wait = Ranks.wait

    def wait_for_nobody(ranks, works, failure, meanwhile=None):
        assert all(work.is_completed() for work in works), f"other ranks are waited for: {failure}"
        return wait(ranks, works, failure)

    with mock.patch.object(Ranks, "wait", wait_for_nobody):
        yield


def until_merged(tracker: pytracker.Tracker) -> None:
    """Wait until the collectives of this rank's earlier drains have ended."""
    for merge in tracker._team._merger._merges:
        while not all(work.is_completed() for work in merge.works):
            time.sleep(0.001)


def train_two_more_steps(tracker: pytracker.Tracker) -> None:
    """Take a step that drains and one after its collectives; either may say what they have found."""
    tracker.step()
    until_merged(tracker)
    tracker.step()

"""Times contenders in turn, round by round, so that a machine whose speed drifts does so for all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

Call = Callable[[], Any]


def nothing() -> None:
    """Do nothing."""


def in_turn(
    calls: Mapping[str, Call], rounds: int, number: int, *, wait: Call = nothing, before: Call = nothing
) -> dict[str, list[float]]:
    """Return the seconds of a call of each contender, a figure each round after a first one that warms up.

    Args:
        calls: the contenders by name.
        rounds: how often each has its turn.
        number: calls in a turn.
        wait: waits for what a call leaves to a device.
        before: prepares a turn, and is not timed; where it prepares for one call alone, ``number`` is 1.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            before()
            wait()
            begin = time.perf_counter()
            for _ in range(number):
                call()
            wait()
            if turn:
                times[name].append((time.perf_counter() - begin) / number)
    return times

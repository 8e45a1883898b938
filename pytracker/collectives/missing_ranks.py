"""Finds the missing ranks: those that leave no sign in the shared store after a fault.

gloo's errors name a neighbour at best, and a rank that waits for a missing one fails as that one does. So each rank
that notices leaves a sign, and after some seconds those without one are the missing.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")

PATIENCE = 5.0  # seconds in which a rank that is still there notices too
ANSWER = 5.0  # seconds for the store to answer
_PAUSE = 0.05  # seconds between two looks
_NOTICE = 0.2  # seconds that a rank which leaves spends on saying so
SHOWN = 20  # ranks that a message names


def in_few_words(ranks: Sequence[int]) -> str:
    """Return ranks in words, the first twenty by number.

    Example:
        >>> in_few_words([2]), in_few_words(range(25))[-12:]
        ('ranks [2]', 'and 5 others')
    """
    named = f"ranks {list(ranks[:SHOWN])}"
    return named if len(ranks) <= SHOWN else f"{named} and {len(ranks) - SHOWN} others"


def absent(store: Any, sign: str, ranks: Sequence[int]) -> list[int]:
    """Return which ranks have left no sign: few requests where few have not, by halves."""
    if not ranks or store.check([f"{sign}/{rank}" for rank in ranks]):
        return []
    if len(ranks) == 1:
        return list(ranks)
    half = len(ranks) // 2
    return [*absent(store, sign, ranks[:half]), *absent(store, sign, ranks[half:])]


class RollCall:
    """What some ranks tell each other, in a store, of being here and of leaving."""

    def __init__(self, store: Any, members: Sequence[int]) -> None:
        self._store, self._members, self._is_silent = store, tuple(members), False

    def leave(self, reason: str, *, at_once: bool) -> None:
        """Say that this rank leaves, and why. Unless ``at_once`` waits a moment: a process that ends says no more."""

        def say() -> None:
            with contextlib.suppress(Exception):  # the store went with the process that held it
                self._store.compare_set("left", "", f"{dist.get_rank()} {reason}")  # the first one says most
                self._store.set(f"left/{dist.get_rank()}", "")

        saying = threading.Thread(target=say, daemon=True)
        saying.start()
        saying.join(0.0 if at_once else _NOTICE)

    def left(self) -> tuple[int, str] | None:
        """Return the rank that was the first to say that it left, and why; None where none has, or nothing answers."""

        def ask() -> tuple[int, str] | None:
            if not self._store.check(["left"]):
                return None
            rank, _, reason = self._store.get("left").decode().partition(" ")
            return int(rank), reason

        return None if self._is_silent else self._in_time(ask, ANSWER, None)

    def who(self, patience: float) -> str:
        """Say that this rank has noticed, and return in words which have not. Waits for those that have not left."""

        def ask() -> str:
            self._store.set(f"here/{dist.get_rank()}", "")
            missing = [rank for rank in self._members if rank != dist.get_rank()]
            end = time.monotonic() + patience
            while missing := absent(self._store, "here", missing):
                if time.monotonic() > end or not absent(self._store, "left", missing):
                    break
                time.sleep(_PAUSE)
            return f"no answer from {in_few_words(missing)}" if missing else "every rank is there and noticed it too"

        gone = "their store does not answer either, so the rank that held it, or the network, is gone"
        return self._in_time(ask, patience + ANSWER, gone)

    def _in_time(self, ask: Callable[[], T], seconds: float, otherwise: T) -> T:
        """Return what the store answers, or ``otherwise``: over a network that fails, torch would wait for minutes."""
        answers: list[T] = []

        def note() -> None:
            with contextlib.suppress(Exception):  # the store went with the process that held it
                answers.append(ask())

        asking = threading.Thread(target=note, daemon=True)
        asking.start()
        asking.join(seconds)
        self._is_silent = asking.is_alive()
        return answers[0] if answers else otherwise

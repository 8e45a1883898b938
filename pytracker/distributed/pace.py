"""Chooses intervals that are the same on every rank, by how fast the steps are.

Ranks merge rows of the same steps, and none may wait for another on a step. So how many steps an interval has is known
before it begins, or told while it is under way: as each is cut, the first rank tells the others, by a broadcast of one
number, how many the next has: at most as many as take ``seconds`` by its clock, at most ``every``, and at most twice as
many as the last, since a few fast steps say little. A rank that hears of it late cuts late, and at the same step.
"""

from __future__ import annotations

import math
from collections import deque
from time import monotonic

import torch

from ..collectives import Announcement, Ranks
from ..core import Rows, joined

WAITING = 8  # times `every` rows wait for a rank that has stopped, at most
FIRST = 1  # steps of the first interval, of which it isn't known how long they take


class Intervals:
    """This rank's rows, on their way to be cut into intervals. Never waits.

    Args:
        ranks: all that cut alike.
        every: steps of an interval at most; on all ranks the same.
        seconds: that an interval should take at most; infinite: each one has ``every`` steps. It counts on the first.
    """

    def __init__(self, ranks: Ranks, *, every: int, seconds: float) -> None:
        self._is_first, self._every, self._seconds = ranks.is_first, every, seconds
        self._levels = ranks.levels("pace", ranks.members) if seconds < math.inf else None
        self._length = every if self._levels is None else min(FIRST, every)
        self._told: tuple[torch.Tensor, Announcement] | None = None  # how long the next one is, while it travels
        self._rows: deque[Rows] = deque()
        self._begin: int | None = None  # the first step of the next interval, where it has one
        self._asked: int | None = None  # the interval that was said to be due
        self._cut_at = monotonic()

    @property
    def count(self) -> int:
        """How many rows wait to be cut."""
        return sum(len(rows.steps) for rows in self._rows)

    @property
    def is_full(self) -> bool:
        """Whether more wait than is good: the first rank has not told for long how to cut them."""
        return self.count >= WAITING * self._every

    def add(self, rows: Rows) -> None:
        """Take rows; the same again, as after an interruption, are passed over."""
        if not (self._rows and self._rows[-1] is rows):
            self._rows.append(rows)

    def is_known(self) -> bool:
        """Tell whether it has been told how long the next interval is.

        Raises:
            RuntimeError: another rank is gone.
        """
        if self._told is not None and self._told[1].has_come():
            self._length = int(self._told[0])
            self._told = None
        return self._told is None

    def is_due(self, step: int) -> bool:
        """Tell, once for each interval, that ``step`` is its last, so that the rows should be brought to the host."""
        if self._begin is None:
            self._begin = step
        if self._asked == self._begin or not self.is_known() or step + 1 < self._begin + self._length:
            return False
        self._asked = self._begin
        return True

    def next(self, *, to_the_end: bool = False) -> Rows | None:
        """Return the rows of the next interval, where all are here; with ``to_the_end``, as many as are left.

        Raises:
            RuntimeError: another rank is gone.
        """
        if not self._rows or not self.is_known():
            return None
        begin = int(self._rows[0].steps[0])
        parts, rest = [], deque(self._rows)
        while rest and int(rest[0].steps[-1]) < begin + self._length:
            parts.append(rest.popleft())
        is_whole = bool(rest) or int(parts[-1].steps[-1]) + 1 >= begin + self._length
        if not (is_whole or to_the_end):
            return None
        if rest and int(rest[0].steps[0]) < begin + self._length:  # one that was told late ends among them
            rows = rest.popleft()
            end = int(rows.steps.searchsorted(begin + self._length))
            parts.append(rows.part(0, end))
            rest.appendleft(rows.part(end, len(rows.steps)))
        cut = joined(parts)
        self._rows, self._begin = rest, (int(cut.steps[-1]) + 1 if is_whole else None)
        self._tell_next(len(cut.steps))
        return cut

    def _tell_next(self, steps: int) -> None:
        if self._levels is None:
            return
        now = monotonic()
        lasted, self._cut_at = now - self._cut_at, now
        fitting = min(2 * steps, self._every, int(self._seconds * steps / max(lasted, 1e-9)))
        message = torch.tensor(max(1, fitting) if self._is_first else 0, dtype=torch.int64, device="cpu")
        self._told = message, self._levels.announce(message)

    def abandon(self) -> list[Rows]:
        """Give up, and return the rows that were not cut."""
        rows = list(self._rows)
        self._rows.clear()
        return rows

"""Merges the rows of all ranks, interval by interval, and delivers them in order on the first rank.

Nothing happens on a step. When an interval's rows have reached the host, they are packed, and asynchronous collectives
reduce them, level by level, to the first rank, which unpacks them; of many megabytes, threads do that. A later step
that finds them ready hands them on. What is merged, and how, is said by a kind of ``RowMerger``.
"""

from __future__ import annotations

import threading
import time
import zlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._warn import warn_user
from ..collectives import Levels, Ranks, Reduction
from ..core import Rows
from ..errors import RankMismatchError
from ..history import ParameterInfo
from .pace import WAITING

HEADER = 5  # numbers at the head of a sum: what `stamp` says of the rows
_UNDER_WAY = 2  # intervals whose collectives have begun, at most
_LARGE = 2**17  # moments of an interval that are a megabyte: less is packed sooner than a thread begins


class DisagreementError(RankMismatchError):
    """The first rank has seen, from what was merged, that the ranks do not record the same."""


@dataclass(frozen=True)
class Receive:
    """Takes rows that are ready, and before that, on any thread, works out what it will want of them."""

    take: Callable[[Rows], None]
    prepare: Callable[[Rows], None]
    weights: Callable[[int], NDArray[np.float64] | None]  # measured of this rank's parameters before a step, [2, T, 6]


def stamp(steps: NDArray[np.int64], dropped: bool = False) -> tuple[float, ...]:
    """Return numbers whose sums over the ranks tell ``check_stamps`` whether all have rows of the same steps."""
    digest = zlib.crc32(steps.tobytes()) % 4093  # small, so that sums of squares over 10,000 ranks are exact
    return len(steps), len(steps) ** 2, digest, digest**2, dropped


def check_stamps(summed: NDArray[np.float64], ranks: int, steps: NDArray[np.int64], drain: int) -> int:
    """Make sure that all ranks have rows of the same steps; return how many had to drop them.

    Raises:
        DisagreementError: they have not.
    """
    count, squares, digest, digests, dropped = summed
    if ranks * squares != count**2:
        differ = f"different numbers of steps: {count / ranks:.1f} on average and {len(steps)} on this one"
    elif ranks * digests != digest**2:
        differ = f"different steps, {span(steps)} on this one"
    else:
        return int(dropped)
    raise DisagreementError(
        f"at drain {drain} the ranks have recorded {differ}; every rank must call step, flush and close alike"
    )


def span(steps: NDArray[np.int64]) -> str:
    """Return steps in words."""
    return f"{steps[0]} to {steps[-1]}" if len(steps) else "none"


@dataclass
class PendingMerge:
    """Rows of one interval that are being merged, or will be."""

    rows: Rows
    drain: int
    weights: NDArray[np.float64] | None = None  # of this rank's parameters, see Receive
    dropped: bool = False  # this rank had no room for them
    packing: Future[Any] | None = None  # None: it has not begun, as of the next two
    reduction: Reduction | None = None
    packed: Any = None  # what the collectives reduce
    unpacking: Future[Rows] | None = None  # on the first rank


class RowMerger:
    """Intervals of rows on their way through the other ranks.

    Args:
        ranks: all that take part in the tracker.
        members: those that hold rows to merge, the first of all among them.
        infos: what the parameters of merged rows are.
        every: rows of an interval.
    """

    def __init__(self, ranks: Ranks, members: list[int], infos: list[ParameterInfo], every: int) -> None:
        self.infos = infos
        self.lost = 0  # steps whose rows this rank has dropped
        self._ranks = ranks
        self._members = members
        self._every = every
        self._levels: Levels | None = ranks.levels("rows", members) if ranks.rank in members else None
        self._merges: deque[PendingMerge] = deque()
        self._drains = 0

    def pack(self, merge: PendingMerge) -> tuple[Any, list[Any]]:
        """Return an interval packed, and the tensors to reduce with their operations: of one size on every rank."""
        raise NotImplementedError

    def unpack(self, merge: PendingMerge) -> Rows:
        """Return the merged rows, of a reduction that is over; only on the first rank."""
        raise NotImplementedError

    def scalars(self) -> dict[str, Any]:
        """Return what to record on this step besides what the user gives."""
        return {}

    def without_others(self, rows: Rows) -> Rows:
        """Return what this rank's rows say by themselves."""
        return rows.without_gradients()

    def pending(self) -> str:
        """Say which rows have not been merged yet; empty where all have."""
        merges = self._merges
        return f"drain {merges[0].drain}, steps {span(merges[0].rows.steps)}, is not merged; " if merges else ""

    def start(self, rows: Rows, receive: Receive) -> None:
        """Begin to merge an interval's rows, without waiting."""
        self._drains += 1
        if self._levels is None:  # this rank holds copies only
            receive.take(self.without_others(rows))
            return
        if sum(len(merge.rows.steps) for merge in self._merges) >= WAITING * self._every:
            rows = self.leave_out(rows)
        weights = receive.weights(int(rows.steps[-1])) if len(rows.steps) else None
        self._merges.append(PendingMerge(rows, self._drains, weights, dropped=not rows.has_gradients))
        self._begin()

    def leave_out(self, rows: Rows) -> Rows:
        """Return the rows without their gradients, for want of room, and say so the first time."""
        if not self.lost:
            warn_user(
                f"{WAITING * self._every} steps wait for a rank that is behind, so the gradients of steps "
                f"{span(rows.steps)}, and of those to come, are left out until it goes on; the scalars are kept"
            )
        self.lost += len(rows.steps)
        return self.without_others(rows)

    def _begin(self) -> None:
        """Begin the collectives of the intervals that are next, in their order, as far as they are packed."""
        assert self._levels is not None
        in_order = True
        for merge in list(self._merges)[:_UNDER_WAY]:
            merge.packing = merge.packing or _beside(partial(self.pack, merge), merge.rows)
            if in_order and merge.reduction is None and merge.packing.done():
                merge.packed, tensors = merge.packing.result()
                merge.reduction = self._levels.reduce(tensors)
            in_order = merge.reduction is not None

    def abandon(self) -> list[Rows]:
        """Give up what has not been merged, without waiting, and return this rank's rows of it."""
        rows = [merge.rows for merge in self._merges]
        self._merges.clear()
        return rows

    def poll(self, receive: Receive) -> None:
        """Hand on what has been merged. Never waits.

        Raises:
            RuntimeError: a collective has failed.
            RankMismatchError: the ranks have recorded different steps.
        """
        while self._merges and self._is_done(self._merges[0], receive):
            self._next(receive)
        for merge in list(self._merges)[1:_UNDER_WAY]:
            if merge.reduction is not None:
                merge.reduction.is_done()  # takes it to its next level

    def _is_done(self, merge: PendingMerge, receive: Receive) -> bool:
        self._begin()
        if merge.reduction is None or not merge.reduction.is_done():
            return False
        if merge.unpacking is None and self._ranks.is_first:
            merge.unpacking = _beside(partial(self._unpacked, merge, receive), merge.rows)
        return merge.unpacking is None or merge.unpacking.done()

    def _unpacked(self, merge: PendingMerge, receive: Receive) -> Rows:
        rows = self.unpack(merge)
        receive.prepare(rows)
        return rows

    def rescue(self, receive: Receive, seconds: float) -> None:
        """Hand on what all ranks have begun to merge before they disagreed, and wait for it so long at most."""
        end = time.monotonic() + seconds
        while self._merges and time.monotonic() < end:
            self.poll(receive)
            time.sleep(0.01)

    def flush(self, receive: Receive) -> None:
        """Hand on everything. Waits for the other ranks, at most as long as the timeout for each interval.

        Raises:
            RankMismatchError: a rank did not come, or the ranks have recorded different steps.
        """
        while self._merges:
            merge = self._merges[0]
            failure = f"drain {merge.drain}, steps {span(merge.rows.steps)}, was not merged"
            self._ranks.wait(lambda merge=merge: self._is_done(merge, receive), failure)  # type: ignore[misc]
            self._next(receive)

    def _next(self, receive: Receive) -> None:
        merge = self._merges[0]
        rows = self.without_others(merge.rows) if merge.unpacking is None else merge.unpacking.result()
        self._merges.popleft()
        self._begin()
        receive.take(rows)


def _beside(act: Callable[[], Any], rows: Rows) -> Future[Any]:
    """Do something with rows: with many on a thread of its own, so that the training goes on meanwhile."""
    result: Future[Any] = Future()

    def run() -> None:
        try:
            result.set_result(act())
        except Exception as error:
            result.set_exception(error)  # raised where the result is asked for

    if rows.tensors.size < _LARGE:
        result.set_result(act())
    else:
        threading.Thread(target=run, daemon=True).start()
    return result

"""Many ranks: how the rows of all ranks become one.

Nothing happens on a step. When an interval's rows have reached the host, two asynchronous collectives merge them, a sum
and a maximum over raw moments; the merged rows go on at a later step that finds them done. They have a gloo group of
their own, so that they neither mix with the training's collectives nor touch the device.

What is merged how:

* Sharded parameters (DTensors of FSDP2, HSDP and tensor parallel; FSDP1): each rank adds its local piece, once for each
  shard: of the ranks that hold copies of a piece only the first adds it.
* Plain parameters, where a group is given or others are sharded: ranks that have a gradient under one name are
  replicas and count as one; a name that only some ranks have (pipeline stages) belongs to those.
* Plain parameters alone, and no group given (a single process, DDP): every rank has the whole gradient, so nothing is
  merged and no collective runs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from ._pieces import Held
from ._ranks import Ranks
from .columns import ABS_MAX, COLUMNS, NANS, SUM_SQ, TOTALS, ZEROS
from .device_log import Rows
from .errors import RankMismatchError
from .parameters import ParameterInfo

_PRESENT = ABS_MAX  # in the sums, in place of what is no sum: how many pieces have a gradient
_HEADER = 3  # at the head of each sum: number of ranks, of rows, of rows squared

_abandoned: list[Any] = []


@dataclass
class Merge:
    """Rows of one interval that are being merged."""

    rows: Rows
    tensors: list[Tensor]  # that the collectives reduce
    works: list[Any]


class Merging:
    """Intervals of rows on their way through the other ranks: merged one after the other, handed on in order."""

    def __init__(self, ranks: Ranks, infos: list[ParameterInfo]) -> None:
        """Begin with none. ``infos`` says what the parameters of merged rows are."""
        self.infos = infos
        self._ranks = ranks
        self._merges: deque[Merge] = deque()
        self._drains = 0

    def begin(self, rows: Rows) -> Merge:
        """Enqueue the collectives of an interval. Their number and size are the same on every rank and drain."""
        raise NotImplementedError

    def finish(self, merge: Merge, drain: int) -> Rows:
        """Return the merged rows, of collectives that are over."""
        raise NotImplementedError

    def merge_now(self, moments: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return moments of one row, float64 [T, 6], merged over the ranks: [all T, 6]."""
        return moments

    def scalars(self) -> dict[str, Any]:
        """Return what to record on this step besides."""
        return {}

    def start(self, rows: Rows) -> None:
        """Begin to merge an interval's rows, without waiting."""
        self._drains += 1
        self._merges.append(self.begin(rows))

    def abandon(self) -> None:
        """Give up what has not been merged, without waiting. Its memory stays with the threads that may yet use it."""
        _abandoned.extend(self._merges)
        self._merges.clear()

    def poll(self, receive: Callable[[Rows], None]) -> None:
        """Hand on what has been merged. Never waits.

        Raises:
            RankMismatchError: a collective has failed, or the ranks have recorded different numbers of steps.
        """
        while self._merges and all(work.is_completed() for work in self._merges[0].works):
            self._next(receive)

    def flush(self, receive: Callable[[Rows], None]) -> None:
        """Hand on everything. Waits for the other ranks, at most as long as the timeout for each interval.

        Raises:
            RankMismatchError: a rank did not come, or the ranks have recorded different numbers of steps.
        """
        while self._merges:
            self._next(receive)

    def _next(self, receive: Callable[[Rows], None]) -> None:
        merge = self._merges.popleft()
        drain = self._drains - len(self._merges)
        try:
            self._ranks.wait(merge.works, f"drain {drain}, steps {_span(merge.rows)}, was not merged")
        except RankMismatchError:
            self._merges.clear()  # the group is broken: nothing after this will arrive either
            raise
        receive(self.finish(merge, drain))


@dataclass(frozen=True)
class _Told:
    """What a rank tells the others of a parameter."""

    info: ParameterInfo
    replicated: bool
    holders: int  # which of the sets of ranks that this rank knows shares it; -1: none


class Merger(Merging):
    """Merges the rows of all ranks, two collectives an interval, and hands them on in order.

    Making one is a collective of its own, and waits: the ranks tell each other what they hold. A description that many
    ranks share, as those of one pipeline stage do, travels once.

    Args:
        ranks: those among which the parameters are spread.
        held: the parameters as this rank holds them.
        infos: what each is.
        every: rows of an interval; the same on all ranks.

    Raises:
        RankMismatchError: the ranks have different intervals, or a name stands for different parameters.
    """

    def __init__(self, ranks: Ranks, held: list[Held], infos: list[ParameterInfo], *, every: int) -> None:
        """Agree with the other ranks on what there is."""
        self._every = every
        sets = list(dict.fromkeys(each.piece.ranks for each in held if each.piece.ranks))
        mine = [
            _Told(info, each.piece.replicated, sets.index(each.piece.ranks) if each.piece.ranks else -1)
            for info, each in zip(infos, held, strict=True)
        ]
        # Sets of ranks that hold the same parameter don't overlap, so that the first of a set stands for it.
        gathered: list[tuple[int, list[int]]] = ranks.gather((every, [min(each) for each in sets]))
        intervals = {rank: theirs for rank, (theirs, _) in zip(ranks.members, gathered, strict=True)}
        if len(set(intervals.values())) > 1:
            raise RankMismatchError(
                f"the ranks have different intervals, `every` by rank: {intervals}; give all the same"
            )
        sets_of = {rank: theirs for rank, (_, theirs) in zip(ranks.members, gathered, strict=True)}
        described: list[tuple[list[_Told], list[int]]] = ranks.exchange(mine)
        super().__init__(ranks, _agreed(described))
        place = {info.name: index for index, info in enumerate(self.infos)}
        places = np.array([place[info.name] for info in infos], np.intp)
        self._places: Any = slice(None) if np.array_equal(places, np.arange(len(self.infos))) else places
        # A parameter that several sets of ranks hold is a copy in all but the first.
        self._replicated = np.zeros(len(self.infos), bool)
        holders: dict[str, int] = {}
        for all_told, givers in described:
            for told in all_told:
                self._replicated[place[told.info.name]] |= told.replicated
                lowest = min(sets_of[rank][told.holders] for rank in givers) if told.holders >= 0 else -1
                holders[told.info.name] = min(holders.get(told.info.name, lowest), lowest)
        self._counting = np.array(
            [each.piece.counts and min(each.piece.ranks, default=-1) == holders[each.name] for each in held],
            bool,
        )

    def begin(self, rows: Rows) -> Merge:
        """Enqueue a sum and a maximum over the raw moments."""
        return self._begin(rows.tensors, rows)

    def _begin(self, tensors: NDArray[np.float64], rows: Rows) -> Merge:
        """Enqueue the two collectives over [n, T, 6] of this rank. Their size is the same on every rank and drain."""
        count, length = len(tensors), max(self._every, len(tensors))
        present = ~np.isnan(tensors[:, :, ZEROS]) & self._counting
        packed = np.zeros(_HEADER + length * len(self.infos) * len(COLUMNS))
        packed[:_HEADER] = 1.0, count, count**2
        maxima = np.zeros((length, len(self.infos)))
        if count:  # copied once: an interval of a large model has tens of megabytes
            maxima[:count, self._places] = np.nan_to_num(np.where(present, tensors[:, :, ABS_MAX], 0.0), posinf=np.inf)
            sums = packed[_HEADER:].reshape(length, len(self.infos), len(COLUMNS))[:count]
            sums[:, self._places] = tensors if present.all() else np.where(present[:, :, None], tensors, 0.0)
            sums[:, self._places, _PRESENT] = present
        summed, largest = torch.from_numpy(packed), torch.from_numpy(maxima)
        works = [
            dist.all_reduce(summed, dist.ReduceOp.SUM, group=self._ranks.group, async_op=True),
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=self._ranks.group, async_op=True),
        ]
        return Merge(rows, [summed, largest], works)

    def finish(self, merge: Merge, drain: int) -> Rows:
        """Return the rows of the whole model."""
        packed, maxima = (tensor.numpy() for tensor in merge.tensors)
        ranks, count, squares = packed[:_HEADER]
        if ranks * squares != count**2:
            raise RankMismatchError(
                f"at drain {drain} the ranks have recorded different numbers of steps: {count / ranks:.1f} on average "
                f"and {len(merge.rows.steps)} on this one; every rank must call step, flush and close alike"
            )
        tensors = self._derive(packed[_HEADER:], maxima)[: len(merge.rows.steps)]
        return Rows(merge.rows.steps, totals_of(tensors), tensors, merge.rows.scalars)

    def _derive(self, packed: NDArray[np.float64], maxima: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return merged moments, float64 [rows, T, 6], of the sums and maxima over all ranks, in place of the sums."""
        tensors = packed.reshape(*maxima.shape, len(COLUMNS))
        present = tensors[:, :, _PRESENT].copy()
        if self._replicated.any():
            tensors /= np.where(self._replicated, np.maximum(present, 1), 1)[:, :, None]
        tensors[:, :, ABS_MAX] = np.where(tensors[:, :, NANS] > 0, np.nan, maxima)
        if not present.all():
            tensors[present == 0] = np.nan
        return tensors

    def merge_now(self, tensors: NDArray[np.float64]) -> NDArray[np.float64]:
        """Merge moments of one row, float64 [T, 6], and return those of all ranks, [all T, 6]. A collective; waits."""
        nothing = np.empty((0, 0))
        merge = self._begin(tensors[None], Rows(np.zeros(0, np.int64), nothing, nothing, {}))
        self._ranks.wait(merge.works, "the norms of the parameters were not merged")
        sums, maxima = (tensor.numpy() for tensor in merge.tensors)
        merged: NDArray[np.float64] = self._derive(sums[_HEADER:], maxima)[0]
        return merged


def _agreed(described: list[tuple[list[_Told], list[int]]]) -> list[ParameterInfo]:
    """Return every parameter that some rank has, once.

    Raises:
        RankMismatchError: a name stands for different parameters.
    """
    known: dict[str, tuple[int, ParameterInfo]] = {}
    for all_told, ranks in described:
        for info in (told.info for told in all_told):
            first, other = known.setdefault(info.name, (ranks[0], info))
            if (info.shape, info.dtype) != (other.shape, other.dtype):
                raise RankMismatchError(
                    f"parameter {info.name!r} is {other.dtype} {list(other.shape)} on rank {first} and "
                    f"{info.dtype} {list(info.shape)} on rank {ranks[0]}; the ranks must train one model"
                )
    return [info for _, info in known.values()]


def _span(rows: Rows) -> str:
    return f"{rows.steps[0]} to {rows.steps[-1]}" if len(rows.steps) else "none"


def totals_of(tensors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the totals [n, 7] of rows [n, T, 6]; missing parameters are left out."""
    totals = np.zeros((len(tensors), TOTALS))
    if tensors.shape[1] == 0:
        return totals
    missing = np.isnan(tensors[:, :, ZEROS])
    kept = np.where(missing[:, :, None], 0.0, tensors) if missing.any() else tensors
    totals[:, : len(COLUMNS)] = kept.sum(axis=1)
    totals[:, ABS_MAX] = kept[:, :, ABS_MAX].max(axis=1)
    totals[:, -1] = kept[:, :, SUM_SQ].max(axis=1)
    return totals

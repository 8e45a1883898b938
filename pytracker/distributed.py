"""Many ranks: which rank holds which piece of a parameter, and how the rows of all ranks become one.

Nothing happens on a step. When an interval's rows have reached the host, two asynchronous collectives merge them, a sum
and a maximum over raw moments; the merged rows go on at a later step that finds them done. They have a gloo group of
their own, so that they neither mix with the training's collectives nor touch the device.

What is merged how:

* DTensor parameters (FSDP2, HSDP, tensor parallel): each rank adds its local piece, once for each shard: a rank whose
  coordinate on a replicating mesh dimension is not 0 adds nothing.
* Plain parameters, where a group is given or others are DTensors: ranks that have a gradient under one name are
  replicas and count as one; a name that only some ranks have (pipeline stages) belongs to those.
* Plain parameters alone, and no group given (a single process, DDP): every rank has the whole gradient, so nothing is
  merged and no collective runs.
"""

from __future__ import annotations

import datetime
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from ._pieces import is_sharded, piece_of
from .columns import ABS_MAX, COLUMNS, NANS, TOTALS, ZEROS
from .device_log import Rows
from .errors import LayoutError, RankMismatchError
from .parameters import ParameterInfo

_SUMMED = [index for index, name in enumerate(COLUMNS) if name != "abs_max"]
_PRESENT = len(_SUMMED)  # behind the summed columns: how many pieces have a gradient
_HEADER = 3  # at the head of each sum: number of ranks, of rows, of rows squared


@dataclass
class _Merge:
    """Rows of one interval that are being merged."""

    rows: Rows
    sums: Tensor
    maxima: Tensor
    works: list[Any]


class Merger:
    """Merges the rows of all ranks of a group, two collectives an interval, and hands them on in order.

    Making one is a collective of its own, and waits: the ranks tell each other what they hold.

    Args:
        names: the parameters' names on this rank.
        parameters: the parameters.
        infos: what each is.
        every: rows of an interval; the same on all ranks.
        group: the ranks among which the parameters are spread; all of them by default.
        timeout: seconds that ``flush`` waits for a rank that does not come.

    Raises:
        RankMismatchError: the ranks have different intervals, or a name stands for different parameters.
        LayoutError: a parameter's layout cannot be told.
    """

    def __init__(
        self,
        names: list[str],
        parameters: list[Tensor],
        infos: list[ParameterInfo],
        *,
        every: int,
        group: dist.ProcessGroup | None = None,
        timeout: float,
    ) -> None:
        """Agree with the other ranks on what there is."""
        self._limit = datetime.timedelta(seconds=timeout)
        ranks = dist.get_process_group_ranks(group) if group is not None else None
        self._group = dist.new_group(
            ranks, timeout=self._limit, backend="gloo", use_local_synchronization=ranks is not None
        )
        self._size = dist.get_world_size(self._group)
        self.is_first = dist.get_rank(self._group) == 0
        self._every = every
        self._pieces = [piece_of(name, parameter) for name, parameter in zip(names, parameters, strict=True)]
        gathered: list[Any] = [None] * self._size
        mine = (every, [(info, piece) for info, piece in zip(infos, self._pieces, strict=True)])
        dist.all_gather_object(gathered, mine, group=self._group)
        self.infos = self._agree(gathered)
        place = {info.name: index for index, info in enumerate(self.infos)}
        self._places = np.array([place[name] for name in names], np.intp)
        # A parameter that is sharded over one dimension of a mesh has copies along the others: the first counts.
        self._replicated = np.zeros(len(self.infos), bool)
        holders: dict[str, tuple[int, ...]] = {}
        for _every, held in gathered:
            for info, piece in held:
                self._replicated[place[info.name]] |= piece.replicated
                holders[info.name] = min(holders.get(info.name, piece.ranks), piece.ranks)
        pieces = zip(names, self._pieces, strict=True)
        self._counting = np.array([p.counts and p.ranks == holders[name] for name, p in pieces], bool)
        self._merges: deque[_Merge] = deque()
        self._drains = 0

    def _agree(self, gathered: list[Any]) -> list[ParameterInfo]:
        intervals = {rank: every for rank, (every, _) in enumerate(gathered)}
        if len(set(intervals.values())) > 1:
            raise RankMismatchError(
                f"the ranks have different intervals, `every` by rank: {intervals}; give all the same"
            )
        known: dict[str, tuple[int, ParameterInfo]] = {}
        for rank, (_, held) in enumerate(gathered):
            for info, _piece in held:
                first, other = known.setdefault(info.name, (rank, info))
                if (info.shape, info.dtype) != (other.shape, other.dtype):
                    raise RankMismatchError(
                        f"parameter {info.name!r} is {other.dtype} {list(other.shape)} on rank {first} and "
                        f"{info.dtype} {list(info.shape)} on rank {rank}; the ranks must train one model"
                    )
        return [info for _, info in known.values()]

    def start(self, rows: Rows) -> None:
        """Begin to merge an interval's rows, without waiting."""
        self._drains += 1
        self._merges.append(self._begin(rows.tensors, rows))

    def _begin(self, tensors: NDArray[np.float64], rows: Rows) -> _Merge:
        """Enqueue the two collectives over [n, T, 6] of this rank. Their size is the same on every rank and drain."""
        count, length = len(tensors), max(self._every, len(tensors))
        present = ~np.isnan(tensors[:, :, ZEROS]) & self._counting
        sums = np.zeros((length, len(self.infos), len(_SUMMED) + 1))
        maxima = np.zeros((length, len(self.infos)))
        if count:
            kept = np.where(present[:, :, None], tensors, 0.0)
            sums[:count, self._places, :_PRESENT] = kept[:, :, _SUMMED]
            sums[:count, self._places, _PRESENT] = present
            maxima[:count, self._places] = np.nan_to_num(kept[:, :, ABS_MAX], nan=0.0, posinf=np.inf)
        packed = torch.from_numpy(np.concatenate([[1.0, count, count**2], sums.ravel()]))
        largest = torch.from_numpy(maxima)
        works = [
            dist.all_reduce(packed, dist.ReduceOp.SUM, group=self._group, async_op=True),
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=self._group, async_op=True),
        ]
        return _Merge(rows, packed, largest, works)

    def check(self, steps: int) -> None:
        """Make sure that every rank is here and has recorded as many steps. A collective; waits.

        Raises:
            RankMismatchError: a rank does not come within the timeout, or has recorded another number of steps.
        """
        counts: list[Any] = [None] * self._size
        try:
            dist.all_gather_object(counts, steps, group=self._group)
        except RuntimeError as error:
            raise RankMismatchError(
                f"not all of {self._size} ranks came to flush or close within {self._limit.total_seconds():.0f} s; "
                f"what was merged before is recorded. torch says: {error}"
            ) from error
        if len(set(counts)) > 1:
            by_rank = dict(enumerate(counts))
            raise RankMismatchError(f"the ranks have recorded different numbers of steps, by rank: {by_rank}")

    def abandon(self) -> int:
        """Give up what has not been merged, without waiting; return how many intervals that were."""
        lost = len(self._merges)
        self._merges.clear()
        return lost

    def poll(self, receive: Callable[[Rows], None]) -> None:
        """Hand on what has been merged. Never waits."""
        while self._merges and all(work.is_completed() for work in self._merges[0].works):
            self._finish(receive)

    def flush(self, receive: Callable[[Rows], None]) -> None:
        """Hand on everything. Waits for the other ranks, at most as long as the timeout for each interval.

        Raises:
            RankMismatchError: a rank did not come, or the ranks have recorded different numbers of steps.
        """
        while self._merges:
            self._finish(receive)

    def _finish(self, receive: Callable[[Rows], None]) -> None:
        merge = self._merges.popleft()
        drain = self._drains - len(self._merges)
        self._wait(merge, drain)
        receive(self._unpack(merge, drain))

    def _wait(self, merge: _Merge, drain: int) -> None:
        try:
            for work in merge.works:
                work.wait(self._limit)
        except RuntimeError as error:
            self._merges.clear()  # the group is broken: nothing after this will arrive either
            raise RankMismatchError(
                f"drain {drain} (steps {merge.rows.steps[:1]} and on) was not merged within "
                f"{self._limit.total_seconds():.0f} s: a rank of {self._size} stopped, or did not call step, flush or "
                f"close as often as the others. Everything before is recorded. torch says: {error}"
            ) from error

    def _unpack(self, merge: _Merge, drain: int) -> Rows:
        packed, maxima = merge.sums.numpy(), merge.maxima.numpy()
        ranks, count, squares = packed[:_HEADER]
        if ranks * squares != count**2:
            raise RankMismatchError(
                f"at drain {drain} the ranks have recorded different numbers of steps: {count / ranks:.1f} on average "
                f"and {len(merge.rows.steps)} on this one; every rank must call step, flush and close alike"
            )
        tensors = self._derive(packed[_HEADER:], maxima)[: len(merge.rows.steps)]
        return Rows(merge.rows.steps, totals_of(tensors), tensors, merge.rows.scalars)

    def _derive(self, packed: NDArray[np.float64], maxima: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return merged moments, float64 [rows, T, 6], of the sums and maxima over all ranks."""
        sums = packed.reshape(len(maxima), len(self.infos), len(_SUMMED) + 1)
        present = sums[:, :, _PRESENT]
        copies = np.where(self._replicated, np.maximum(present, 1), 1)
        tensors = np.empty((*maxima.shape, len(COLUMNS)))
        tensors[:, :, _SUMMED] = sums[:, :, :_PRESENT] / copies[:, :, None]
        tensors[:, :, ABS_MAX] = np.where(tensors[:, :, NANS] > 0, np.nan, maxima)
        tensors[present == 0] = np.nan
        return tensors

    def merge_now(self, tensors: NDArray[np.float64]) -> NDArray[np.float64]:
        """Merge moments of one row, float64 [T, 6], and return those of all ranks, [all T, 6]. A collective; waits."""
        nothing = np.empty((0, 0))
        merge = self._begin(tensors[None], Rows(np.zeros(1, np.int64), nothing, nothing, {}))
        self._wait(merge, self._drains)
        merged: NDArray[np.float64] = self._derive(merge.sums.numpy()[_HEADER:], merge.maxima.numpy())[0]
        return merged


def totals_of(tensors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the totals [n, 7] of rows [n, T, 6]; missing parameters are left out."""
    totals = np.zeros((len(tensors), TOTALS))
    if tensors.shape[1] == 0:
        return totals
    kept = np.where(np.isnan(tensors[:, :, ZEROS])[:, :, None], 0.0, tensors)
    totals[:, : len(COLUMNS)] = kept.sum(axis=1)
    totals[:, ABS_MAX] = kept[:, :, ABS_MAX].max(axis=1)
    totals[:, -1] = kept[:, :, COLUMNS.index("sum_sq")].max(axis=1)
    return totals


def is_first_rank() -> bool:
    """Tell whether this process is rank 0, or the only one."""
    return not dist.is_available() or not dist.is_initialized() or dist.get_rank() == 0


def merger_for(
    plan: Any, infos: list[ParameterInfo], *, every: int, group: dist.ProcessGroup | None, timeout: float
) -> Merger | None:
    """Return a merger where the parameters are spread over ranks, None where each rank has all of them.

    Raises:
        LayoutError: a group was given and torch.distributed is not initialized.
        RankMismatchError: see ``Merger``.
    """
    if group is None and not is_sharded(plan):
        return None
    if not dist.is_available() or not dist.is_initialized():
        raise LayoutError(
            "process_group was given, but torch.distributed is not initialized; call init_process_group first"
        )
    return Merger(plan.names, plan.parameters, infos, every=every, group=group, timeout=timeout)

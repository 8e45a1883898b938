"""Many ranks: how the rows of all ranks become one.

Nothing happens on a step. When an interval's rows have reached the host, two asynchronous collectives merge them, a sum
and a maximum over raw moments; the merged rows go on at a later step that finds them done. They have a gloo group of
their own, so that they neither mix with the training's collectives nor touch the device.

What is merged how:

* Sharded parameters (DTensors of FSDP2, HSDP and tensor parallel; FSDP1): each rank adds its local piece, once for each
  shard: of the ranks that hold copies of a piece only the first adds it.
* Plain parameters, where a group is given or others are sharded: ranks that have a gradient under one name are
  replicas and count as one; a name that only some ranks have (pipeline stages) belongs to those.
* Plain parameters in a DDP of all ranks, and no group given: every rank has the whole gradient, so nothing is merged
  and no collective runs.

Copies are taken at no rank's word: ``_copies`` tells from their moments whether they are any.
"""

from __future__ import annotations

import time
import warnings
import zlib
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from ..columns import ABS_MAX, COLUMNS, NANS, ZEROS, selection
from ..core import LocalParameter, Rows
from ..errors import RankMismatchError
from ..history import ParameterInfo
from ..moments import totals
from .copy_check import copies_of
from .ranks import Ranks, abandon

_PRESENT = ABS_MAX  # in the sums, in place of what is no sum: how many pieces have a gradient
HEADER = 4  # at the head of each sum: what `stamp` says of the rows


def stamp(steps: NDArray[np.int64]) -> tuple[float, ...]:
    """Return four numbers whose sums over the ranks tell ``check_stamps`` whether all have rows of the same steps."""
    digest = zlib.crc32(steps.tobytes()) % 4093  # small, so that sums of squares over 10,000 ranks are exact
    return len(steps), len(steps) ** 2, digest, digest**2


def check_stamps(summed: NDArray[np.float64], ranks: int, steps: NDArray[np.int64], drain: int) -> None:
    """Make sure that all ranks have rows of the same steps.

    Raises:
        RankMismatchError: they have not.
    """
    count, squares, digest, digests = summed
    if ranks * squares != count**2:
        told = f"different numbers of steps: {count / ranks:.1f} on average and {len(steps)} on this one"
    elif ranks * digests != digest**2:
        told = f"different steps, {span(steps)} on this one"
    else:
        return
    raise RankMismatchError(
        f"at drain {drain} the ranks have recorded {told}; every rank must call step, flush and close alike"
    )


@dataclass
class PendingMerge:
    """Rows of one interval that are being merged."""

    rows: Rows
    tensors: list[Tensor]  # that the collectives reduce
    works: list[Any]


class RowMerger:
    """Intervals of rows on their way through the other ranks: merged one after the other, handed on in order."""

    def __init__(self, ranks: Ranks, infos: list[ParameterInfo]) -> None:
        """Begin with none. ``infos`` says what the parameters of merged rows are."""
        self.infos = infos
        self._ranks = ranks
        self._merges: deque[PendingMerge] = deque()
        self._drains = 0

    def begin(self, rows: Rows) -> PendingMerge:
        """Enqueue the collectives of an interval. Their number and size are the same on every rank and drain."""
        raise NotImplementedError

    def finish(self, merge: PendingMerge, drain: int) -> Rows:
        """Return the merged rows, of collectives that are over."""
        raise NotImplementedError

    def merge_now(self, moments: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return moments of one row, float64 [T, 6], merged over the ranks: [all T, 6]."""
        return moments

    def scalars(self) -> dict[str, Any]:
        """Return what to record on this step besides."""
        return {}

    def without_others(self, rows: Rows) -> Rows | None:
        """Return what this rank's rows say by themselves; None where they are pieces."""
        return None

    def pending(self) -> str:
        """Say which rows have not been merged yet; empty where all have."""
        first = self._drains - len(self._merges) + 1
        return f"drain {first}, steps {span(self._merges[0].rows.steps)}, is not merged; " if self._merges else ""

    def start(self, rows: Rows) -> None:
        """Begin to merge an interval's rows, without waiting."""
        self._drains += 1
        self._merges.append(self.begin(rows))

    def abandon(self) -> list[Rows]:
        """Give up what has not been merged, without waiting, and return this rank's rows of it.

        The memory of the collectives stays with the threads that may yet use it.
        """
        abandon(list(self._merges), [work for merge in self._merges for work in merge.works])
        rows = [merge.rows for merge in self._merges]
        self._merges.clear()
        return rows

    def poll(self, receive: Callable[[Rows], None]) -> None:
        """Hand on what has been merged. Never waits.

        Raises:
            RankMismatchError: a collective has failed, or the ranks have recorded different numbers of steps.
        """
        while self._merges and all(work.is_completed() for work in self._merges[0].works):
            self._next(receive)

    def rescue(self, receive: Callable[[Rows], None], seconds: float) -> None:
        """Hand on what all ranks have begun to merge before they disagreed, and wait for it so long at most.

        Raises:
            RankMismatchError: as ``poll`` does.
        """
        end = time.monotonic() + seconds
        while self._merges and time.monotonic() < end:
            self.poll(receive)
            time.sleep(0.01)

    def flush(self, receive: Callable[[Rows], None]) -> None:
        """Hand on everything. Waits for the other ranks, at most as long as the timeout for each interval.

        Raises:
            RankMismatchError: a rank did not come, or the ranks have recorded different numbers of steps.
        """
        while self._merges:
            self._next(receive)

    def _next(self, receive: Callable[[Rows], None]) -> None:
        merge, drain = self._merges[0], self._drains - len(self._merges) + 1
        self._ranks.wait(merge.works, f"drain {drain}, steps {span(merge.rows.steps)}, was not merged")
        try:
            rows = self.finish(merge, drain)
        except RankMismatchError:  # on all ranks, but perhaps while some of them meet already
            self._ranks.discard()
            raise
        self._merges.popleft()
        receive(rows)


@dataclass(frozen=True)
class _Set:
    """Ranks that share a parameter. Those of one parameter don't overlap, so that the first stands for the set."""

    first: int
    size: int
    member: bool  # the rank that tells it is one of them


@dataclass(frozen=True)
class ParameterClaim:
    """What a rank tells the others of a parameter."""

    info: ParameterInfo
    replicated: bool
    holders: int  # which of the sets of ranks that this rank knows shares it; -1: none


class MomentMerger(RowMerger):
    """Merges the rows of all ranks, two collectives an interval, and hands them on in order.

    Making one is a collective of its own, and waits: the ranks tell each other what they hold. A description that many
    ranks share, as those of one pipeline stage do, travels once.

    Args:
        ranks: those among which the parameters are spread.
        parameters: the parameters as this rank holds them.
        infos: what each is.
        every: rows of an interval; the same on all ranks.
        watched: copies are compared elsewhere, so they are not here.

    Raises:
        RankMismatchError: a name stands for different parameters, or a rank lacks one that it shares with others.
    """

    def __init__(
        self,
        ranks: Ranks,
        parameters: list[LocalParameter],
        infos: list[ParameterInfo],
        *,
        every: int,
        watched: bool = False,
    ) -> None:
        """Agree with the other ranks on what there is."""
        self._every = every
        self._any_merged = self._warned = False
        sets = list(dict.fromkeys(each.shard.shard_ranks for each in parameters if each.shard.shard_ranks))
        mine = [
            ParameterClaim(
                info, each.shard.replicated, sets.index(each.shard.shard_ranks) if each.shard.shard_ranks else -1
            )
            for info, each in zip(infos, parameters, strict=True)
        ]
        own = [_Set(min(each), len(each), dist.get_rank() in each) for each in sets]
        sets_of: dict[int, list[_Set]] = dict(zip(ranks.members, ranks.gather(own), strict=True))
        described: list[tuple[list[ParameterClaim], list[int]]] = ranks.exchange(mine)
        super().__init__(ranks, _agreed(described))
        place = {info.name: index for index, info in enumerate(self.infos)}
        places = np.array([place[info.name] for info in infos], np.intp)
        self._places: Any = selection(places)
        plain: Counter[str] = Counter()
        for all_told, givers in described:
            plain.update({told.info.name: len(givers) for told in all_told if told.replicated})
        firsts = _firsts_of_sets(described, sets_of)
        self._replicated = np.array([info.name in plain for info in self.infos], bool)
        self._pieces = np.array([each.shard.is_counted for each in parameters], bool)
        # A parameter that several sets of ranks share is a copy in all but the first.
        self._counting = self._pieces & [
            each.shard.replicated or min(each.shard.shard_ranks) == firsts[each.name][0] for each in parameters
        ]
        shared = {
            each.name: (firsts[each.name], min(each.shard.shard_ranks))
            for each in parameters
            if not each.shard.replicated
        }
        shared |= {name: (all_firsts, -1) for name, all_firsts in firsts.items() if name not in shared}
        self._copies = copies_of(place, [each.name for each in parameters], *(({}, {}) if watched else (plain, shared)))

    def begin(self, rows: Rows) -> PendingMerge:
        """Enqueue a sum and a maximum over the raw moments."""
        return self._begin(rows.tensors, rows)

    def _begin(self, tensors: NDArray[np.float64], rows: Rows) -> PendingMerge:
        """Enqueue the two collectives over [n, T, 6] of this rank. Their size is the same on every rank and drain."""
        count, length, width = len(tensors), max(self._every, len(tensors)), len(self.infos)
        having = ~np.isnan(tensors[:, :, ZEROS])
        present = having & self._counting
        end = HEADER + length * width * len(COLUMNS)
        packed = np.zeros(end + length * len(self._copies) * 2)
        packed[:HEADER] = stamp(rows.steps)
        maxima = np.zeros((length, width))
        if count:  # copied once: an interval of a large model has tens of megabytes
            all_present = bool(present.all())
            largest = np.fmax(tensors[:, :, ABS_MAX], 0.0)  # NaNs are counted, and come back when all have merged
            maxima[:count, self._places] = largest if all_present else np.where(present, largest, 0.0)
            sums = packed[HEADER:end].reshape(length, width, len(COLUMNS))[:count]
            sums[:, self._places] = tensors if all_present else np.where(present[:, :, None], tensors, 0.0)
            sums[:, self._places, _PRESENT] = present
            told = packed[end:].reshape(length, len(self._copies), 2)[:count]
            self._copies.tell(told, tensors, having & self._pieces)
        reduced = [torch.from_numpy(packed), torch.from_numpy(maxima)]
        works = [
            dist.all_reduce(tensor, operation, group=self._ranks.group, async_op=True)
            for tensor, operation in zip(reduced, (dist.ReduceOp.SUM, dist.ReduceOp.MAX), strict=True)
        ]
        return PendingMerge(rows, reduced, works)

    def finish(self, merge: PendingMerge, drain: int) -> Rows:
        """Return the rows of the whole model."""
        steps = merge.rows.steps
        check_stamps(merge.tensors[0][:HEADER].numpy(), len(self._ranks.members), steps, drain)
        tensors = self._derive(merge, len(steps), "the gradient of")
        elements = np.broadcast_to(np.array([info.numel for info in self.infos], np.float64), tensors.shape[:2])
        return Rows(steps, totals(tensors), tensors, elements, merge.rows.scalars)

    def _derive(self, merge: PendingMerge, count: int, what: str) -> NDArray[np.float64]:
        """Return merged moments, float64 [rows, T, 6], of the sums and maxima over all ranks, in place of the sums."""
        packed, maxima = (tensor.numpy() for tensor in merge.tensors)
        end = HEADER + maxima.size * len(COLUMNS)
        tensors = packed[HEADER:end].reshape(*maxima.shape, len(COLUMNS))[:count]
        present = tensors[:, :, _PRESENT].copy()
        if self._replicated.any():
            tensors /= np.where(self._replicated, np.maximum(present, 1), 1)[:, :, None]
        tensors[:, :, ABS_MAX] = np.where(tensors[:, :, NANS] > 0, np.nan, maxima[:count])
        if not present.all():
            tensors[present == 0] = np.nan
        if len(self._copies):
            told = packed[end:].reshape(len(maxima), -1, 2)[:count]
            apart = self._copies.first_apart(told, tensors, present)
            if apart is not None:
                self._tell_apart(what, self.infos[apart[1]].name, merge.rows.steps[apart[0] : apart[0] + 1])
        self._any_merged |= len(merge.rows.steps) > 0
        return tensors

    def _tell_apart(self, what: str, name: str, at: NDArray[np.int64]) -> None:
        """Refuse what never were copies; of what no longer are, warn once: that is no reason to end a training."""
        message = (
            f"{what} {name!r} differs between the ranks that have one of that name"
            f"{f', at step {at[0]}' if len(at) else ''}: they hold no copies, and which pieces of it they hold cannot "
            "be told"
        )
        if not self._any_merged:
            raise RankMismatchError(
                f"{message}. Give other names to other parameters, and to pieces of one, e.g. "
                'Tracker([(f"stage{rank}.{name}", p) for name, p in model.named_parameters()], process_group=...), or '
                "make the pieces DTensors; call step after the ranks have averaged their gradients; or say with "
                "check_replicas=True that they are copies, and be told which rank has left the others"
            )
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{message} any more. Their mean is recorded; check_replicas=True tells which rank it is",
                RuntimeWarning,
                stacklevel=2,
            )

    def merge_now(self, tensors: NDArray[np.float64]) -> NDArray[np.float64]:
        """Merge moments of one row, float64 [T, 6], and return those of all ranks, [all T, 6]. A collective; waits."""
        nothing = np.empty((0, 0))
        merge = self._begin(tensors[None], Rows(np.zeros(0, np.int64), nothing, nothing, nothing, {}))
        self._ranks.wait(merge.works, "the norms of the parameters were not merged")
        merged: NDArray[np.float64] = self._derive(merge, 1, "parameter")[0]
        return merged


def _agreed(described: list[tuple[list[ParameterClaim], list[int]]]) -> list[ParameterInfo]:
    """Return every parameter that some rank has, once.

    Raises:
        RankMismatchError: a name stands for different parameters.
    """
    known: dict[str, tuple[int, ParameterClaim]] = {}
    for all_told, ranks in described:
        for told in all_told:
            first, other = known.setdefault(told.info.name, (ranks[0], told))
            if _looks(told) != _looks(other):
                raise RankMismatchError(
                    f"parameter {told.info.name!r} is {_looks(other)} on rank {first} and {_looks(told)} on rank "
                    f"{ranks[0]}; the ranks must train one model. Different parameters need different names"
                )
    return [told.info for _, told in known.values()]


def _looks(told: ParameterClaim) -> str:
    return f"{told.info.dtype} {list(told.info.shape)}{'' if told.replicated else ', spread over ranks,'}"


def _firsts_of_sets(
    described: list[tuple[list[ParameterClaim], list[int]]], sets_of: dict[int, list[_Set]]
) -> dict[str, list[int]]:
    """Return the first ranks of the sets that share each parameter, in order.

    Raises:
        RankMismatchError: a rank does not have a parameter that it shares.
    """
    tellers: dict[str, Counter[tuple[int, int]]] = {}
    for all_told, givers in described:
        for told in all_told:
            if told.holders >= 0:
                sets = [sets_of[rank][told.holders] for rank in givers]
                counts = tellers.setdefault(told.info.name, Counter())
                counts.update({(each.first, each.size): 0 for each in sets})
                counts.update((each.first, each.size) for each in sets if each.member)
    for name, counts in tellers.items():
        for (first, size), count in counts.items():
            if count != size:
                raise RankMismatchError(
                    f"parameter {name!r} is spread over {size} ranks, rank {first} the first of them, and {count} of "
                    "these track it; every rank must make its tracker of the same parameters"
                )
    return {name: sorted(first for first, _ in counts) for name, counts in tellers.items()}


def span(steps: NDArray[np.int64]) -> str:
    """Return steps in words."""
    return f"{steps[0]} to {steps[-1]}" if len(steps) else "none"

"""Merges moments of spread parameters: a sum and a maximum over the ranks, derived into rows of the whole model.

What is merged how:

* Sharded parameters (DTensors of FSDP2, HSDP and tensor parallel; FSDP1): each shard is counted once, by the first rank
  that holds it. A rank that holds copies only takes no part.
* Plain parameters, where a group is given or others are sharded: ranks that have a gradient under one name are
  replicas and count as one; a name that only some ranks have (pipeline stages) belongs to those.
* Plain parameters in a DDP of all ranks, and no group given: every rank has the whole gradient, so nothing is merged
  and no collective runs.

That ranks hold copies is not taken on trust: ``copy_check`` tells it from their moments.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .. import moments
from ..collectives import MAX, SUM, Ranks
from ..columns import ABS_MAX, COLUMNS, EXTRAS
from ..core import LocalParameter, Rows
from .agreement import agree
from .row_merger import HEADER, DisagreementError, PendingMerge, RowMerger, check_stamps, stamp

_SHOWN = 3  # names in a message
_WEIGHTS = 2  # rows of weights beside those of gradients: of what a step has added to them, and of them


class PackedRows:
    """What the two collectives reduce of an interval, zeros at first: named sections of two buffers."""

    def __init__(self, length: int, parameters: int, copies: int, weights: int = 0, extras: int = 0) -> None:
        end = HEADER + (length + weights) * parameters * len(COLUMNS)
        whole = end + length * copies * 2
        self.sums = np.zeros(whole + length * parameters * extras)
        self.header = self.sums[:HEADER]
        moments = self.sums[HEADER:end].reshape(length + weights, parameters, len(COLUMNS))
        self.moments, self.weights = moments[:length], moments[length:]
        self.copies = self.sums[end:whole].reshape(length, copies, 2)
        self.extras = self.sums[whole:].reshape(length, parameters, extras)
        self.maxima = np.zeros((length + weights, parameters))

    def tensors(self) -> list[tuple[torch.Tensor, str]]:
        """Return the buffers as tensors that share their memory, each with its operation."""
        return [(torch.from_numpy(self.sums), SUM), (torch.from_numpy(self.maxima), MAX)]


class MomentMerger(RowMerger):
    """Merges the rows of all ranks, two collectives an interval and level. Making one is a few meetings, and waits.

    Args:
        ranks: those among which the parameters are spread.
        parameters: the parameters as this rank holds them.
        infos: what each is.
        every: rows of an interval; the same on all ranks.
        watched: copies are compared elsewhere, so they are not here.
        weights: what single steps add to the parameters is measured, and merged with the rows.
        extras: rows have the further columns.

    Raises:
        RankMismatchError: a name stands for different parameters, or a rank lacks one that it shares with others.
    """

    def __init__(
        self,
        ranks: Ranks,
        parameters: list[LocalParameter],
        infos: Any,
        *,
        every: int,
        watched: bool = False,
        weights: bool = False,
        extras: bool = False,
    ) -> None:
        self._agreed = agree(ranks, parameters, infos, watched=watched)
        super().__init__(ranks, self._agreed.members, self._agreed.infos if ranks.is_first else [], every)
        self._has_elements = np.array([_has_elements(each) for each in parameters], bool)
        self._whole = np.zeros(len(self._agreed.infos))  # how many pieces make up each sharded parameter; 0: unknown
        self._weights = _WEIGHTS if weights else 0
        self._extras = len(EXTRAS) if extras else 0
        self._any_merged = False
        self._warned: set[str] = set()

    def pack(self, merge: PendingMerge) -> tuple[Any, list[Any]]:
        packed = self._pack(merge.rows.tensors, self._weights, self._extras)
        if merge.rows.extras is not None:
            present = ~moments.is_missing(merge.rows.tensors) & self._agreed.counted
            own = packed.extras[: len(present)]
            own[:, self._agreed.places] = np.where(present[:, :, None], merge.rows.extras, 0.0)
        if self._weights and merge.weights is not None:
            having = ~moments.is_missing(merge.weights)
            self._add(packed.weights, packed.maxima[-self._weights :], merge.weights, having)
        packed.header[:] = stamp(merge.rows.steps, merge.dropped)
        return packed, packed.tensors()

    def _pack(self, tensors: NDArray[np.float64], weights: int = 0, extras: int = 0) -> PackedRows:
        """Return moments [n, L, 6] of this rank packed; rows that were dropped have no parameters, and add nothing."""
        agreed, count = self._agreed, len(tensors)
        packed = PackedRows(max(self._every, count), len(agreed.infos), len(agreed.copies), weights, extras)
        if not tensors.shape[1] or not count:
            return packed
        having = ~moments.is_missing(tensors)
        self._add(packed.moments[:count], packed.maxima[:count], tensors, having)
        agreed.copies.tell(packed.copies[:count], tensors, having & agreed.pieces)
        return packed

    def _add(self, sums: Any, maxima: Any, tensors: NDArray[np.float64], having: NDArray[np.bool_]) -> None:
        """Add moments [n, L, 6] of this rank to what is reduced, as far as it has and counts them."""
        places, present = self._agreed.places, having & self._agreed.counted
        everything = bool(present.all())  # copied once: an interval of a large model has tens of megabytes
        largest = np.fmax(tensors[:, :, ABS_MAX], 0.0)  # NaNs are counted, and come back when all have merged
        maxima[:, places] = largest if everything else np.where(present, largest, 0.0)
        sums[:, places] = tensors if everything else np.where(present[:, :, None], tensors, 0.0)
        sums[:, places, moments.PRESENT] = present & self._has_elements

    def unpack(self, merge: PendingMerge) -> Rows:
        steps = merge.rows.steps
        if check_stamps(merge.packed.header, len(self._members), steps, merge.drain):
            return merge.rows.without_gradients()
        tensors, present = self._derive(merge.packed, len(steps), "the gradient of", steps)
        self._mark_partial(tensors, present, steps)
        self._any_merged = True
        elements = np.broadcast_to(np.array([info.numel for info in self.infos], np.float64), tensors.shape[:2])
        extras, weights = self._merged_extras(merge.packed, tensors, present), self._merged_weights(merge.packed)
        return Rows(steps, moments.totals(tensors), tensors, elements, merge.rows.scalars, extras, weights)

    def _merged_extras(
        self, packed: PackedRows, tensors: NDArray[np.float64], present: NDArray[np.float64]
    ) -> NDArray[np.float64] | None:
        """Return the further columns of merged moments [n, T, 6], missing where these are; None without any."""
        if not self._extras:
            return None
        copies = np.where(self._agreed.replicated, np.maximum(present, 1), 1)
        extras: NDArray[np.float64] = packed.extras[: len(tensors)] / copies[:, :, None]
        extras[moments.is_missing(tensors)] = np.nan
        return extras

    def _merged_weights(self, packed: PackedRows) -> NDArray[np.float64] | None:
        """Return what was measured of the whole parameters, NaN where some rank lacks a piece; None without any."""
        if not self._weights:
            return None
        tensors, present = moments.join(packed.weights, packed.maxima[-self._weights :])
        if not present.any():
            return None
        tensors = self._once(tensors, present)
        tensors[self._is_partial(present)] = np.nan
        return tensors

    def _once(self, tensors: NDArray[np.float64], present: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return moments [n, T, 6] of which those of replicas count as one, in the same memory."""
        if self._agreed.replicated.any():
            replicas = np.where(self._agreed.replicated, np.maximum(present, 1), 1)[:, :, None]
            largest = tensors[:, :, ABS_MAX].copy()
            tensors /= replicas
            tensors[:, :, ABS_MAX] = largest
        return tensors

    def _derive(self, packed: PackedRows, count: int, what: str, steps: Any) -> tuple[Any, Any]:
        """Return merged moments [n, T, 6], and how many pieces were present [n, T], in the memory of the sums."""
        tensors, present = moments.join(packed.moments[:count], packed.maxima[:count])
        tensors = self._once(tensors, present)
        if len(self._agreed.copies):
            apart = self._agreed.copies.first_apart(packed.copies[:count], tensors, present)
            if apart is not None:
                self._tell_apart(what, self.infos[apart[1]].name, steps[apart[0] : apart[0] + 1])
        return tensors, present

    def merge_now(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return moments of the weights, [L, 6], merged over the ranks: [T, 6] on the first, none elsewhere. Waits."""
        if self._levels is None:
            return np.empty((0, len(COLUMNS)))
        packed = self._pack(weights[None])
        reduction = self._levels.reduce(packed.tensors())
        self._ranks.wait(reduction.is_done, "the norms of the parameters were not merged")
        if not self._ranks.is_first:
            return np.empty((0, len(COLUMNS)))
        tensors, present = self._derive(packed, 1, "parameter", np.zeros(0, np.int64))
        self._whole = present[0]
        merged: NDArray[np.float64] = tensors[0]
        return merged

    def _mark_partial(self, tensors: NDArray[np.float64], present: NDArray[np.float64], steps: Any) -> None:
        """Make missing what only some shards have: their norm would be too small without a word."""
        partial = self._is_partial(present)
        if not partial.any():
            return
        tensors[partial] = np.nan
        names = [self.infos[index].name for index in np.flatnonzero(partial.any(axis=0))]
        shown, step = ", ".join(map(repr, names[:_SHOWN])), steps[int(partial.any(axis=1).argmax())]
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        self._warn_once(
            "partial",
            f"at step {step} the gradient of {shown}{more} is there on some of the ranks that share it, and None on "
            "others; it is recorded as missing. Clear gradients, and step, on all ranks alike",
        )

    def _is_partial(self, present: NDArray[np.float64]) -> NDArray[np.bool_]:
        return (present > 0) & (present < self._whole) & ~self._agreed.replicated

    def _tell_apart(self, what: str, name: str, at: NDArray[np.int64]) -> None:
        """Refuse what never were copies; of what no longer are, warn once: that is no reason to end a training."""
        message = (
            f"{what} {name!r} differs between the ranks that have one of that name"
            f"{f', at step {at[0]}' if len(at) else ''}: they hold no copies, and which pieces of it they hold cannot "
            "be told"
        )
        if not self._any_merged:
            raise DisagreementError(
                f"{message}. Give other names to other parameters, and to pieces of one, e.g. "
                'Tracker([(f"stage{rank}.{name}", p) for name, p in model.named_parameters()], process_group=...), or '
                "make the pieces DTensors; call step after the ranks have averaged their gradients; or say with "
                "check_replicas=True that they are copies, and be told which rank has left the others"
            )
        self._warn_once(
            "apart", f"{message} any more. Their mean is recorded; check_replicas=True tells which rank it is"
        )

    def _warn_once(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(message, RuntimeWarning, stacklevel=2)


def _has_elements(each: LocalParameter) -> bool:
    """Tell whether this rank's piece has any element, or the parameter has none anywhere: empty pieces may lack one."""
    if 0 in each.shape:
        return True
    length = each.window[1]
    piece: Any = getattr(each.parameter, "_local_tensor", each.parameter)
    return bool(length > 0 if length >= 0 else piece.numel() > 0)

"""Decodes the device's rows on the host: moments, scalars and learning rates by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from ..columns import COLUMNS, EXTRAS, TOTALS
from ..moments import merge
from . import native

if TYPE_CHECKING:
    from .device_log import PendingCopy

Scalars: TypeAlias = tuple[NDArray[np.intp], NDArray[np.float64]]
"""The values of one name: indices of the rows that have it, ascending, and the values."""


@dataclass(frozen=True)
class Rows:
    """Exact rows of a few steps, on the host, in the order in which they were recorded."""

    steps: NDArray[np.int64]  # [n]
    totals: NDArray[np.float64]  # [n, 7], columns.TOTAL_COLUMNS
    tensors: NDArray[np.float64]  # [n, T, 6], columns.COLUMNS; NaN in all six where a parameter had no gradient
    elements: NDArray[np.float64]  # [n, T], of each gradient; of no meaning where a parameter had none
    scalars: dict[str, Scalars]
    extras: NDArray[np.float64] | None = None  # [n, T, 7], columns.EXTRAS, NaN as above; None: they weren't asked for
    weights: NDArray[np.float64] | None = None  # [2, T, 6], of what a step added to the parameters, and of them

    @property
    def has_gradients(self) -> bool:
        """Whether the rows say anything of the gradients: merged ones do so on the first rank alone."""
        return bool(self.totals.shape[1])

    def part(self, begin: int, end: int) -> Rows:
        """Return the rows from ``begin`` to before ``end``."""
        scalars = {}
        for name, (where, values) in self.scalars.items():
            inside = (where >= begin) & (where < end)
            if inside.any():
                scalars[name] = where[inside] - begin, values[inside]
        here = slice(begin, end)
        extras = None if self.extras is None else self.extras[here]
        return Rows(self.steps[here], self.totals[here], self.tensors[here], self.elements[here], scalars, extras)

    def without_gradients(self) -> Rows:
        """Return what rows say where the gradients are elsewhere, or were left out: the scalars that were given."""
        nothing = np.empty((len(self.steps), 0))
        return Rows(self.steps, nothing, np.empty((*nothing.shape, len(COLUMNS))), nothing, self.scalars)


def joined(parts: list[Rows]) -> Rows:
    """Return rows as one, in their order, without gradients where some have none; a single part as it is."""
    if len(parts) == 1:
        return parts[0]
    if not all(part.has_gradients for part in parts):
        parts = [part.without_gradients() for part in parts]
    scalars: dict[str, Scalars] = {}
    begin = 0
    for part in parts:
        for name, (where, values) in part.scalars.items():
            _extend(scalars, name, where + begin, values)
        begin += len(part.steps)
    extras = [part.extras for part in parts if part.extras is not None]
    return Rows(
        np.concatenate([part.steps for part in parts]),
        np.concatenate([part.totals for part in parts]),
        np.concatenate([part.tensors for part in parts]),
        np.concatenate([part.elements for part in parts]),
        scalars,
        np.concatenate(extras) if len(extras) == len(parts) else None,
    )


def unpack(copy: PendingCopy, members: list[list[int]]) -> Rows:
    """Copy rows out of the pinned buffers, merging the devices, on each of which are some ``members`` of the model."""
    parts = [part.astype(np.float64, copy=bool(copy.events)) for part in arrays(copy.parts)]  # else they are a copy
    given = np.array(copy.given, np.uint64)  # [rows, devices]
    moments: list[NDArray[np.float64]] = []
    extras: list[NDArray[np.float64]] = []
    scalars: dict[str, Scalars] = {}
    for device, (part, of_device) in enumerate(zip(parts, members, strict=True)):
        end = TOTALS + len(of_device) * len(COLUMNS)
        moments.append(part[:, TOTALS:end].reshape(len(part), len(of_device), len(COLUMNS)))
        behind = end + copy.slots
        count = len(of_device) if copy.extras else 0
        extras.append(part[:, behind : behind + count * len(EXTRAS)].reshape(len(part), count, len(EXTRAS)))
        for slot, name in enumerate(copy.names):
            having = np.flatnonzero(given[:, device] >> np.uint64(slot) & np.uint64(1))
            if len(having):
                before = scalars.get(name, (having[:0], part[:0, 0]))
                scalars[name] = _in_order(*before, having, part[having, end + slot])
    totals = merge([part[:, :TOTALS] for part in parts])
    tensors, of_extras = _in_one(moments, members), _in_one(extras, members) if copy.extras else None
    elements, scalars = _unpack_contexts(copy, scalars)
    return Rows(np.array(copy.steps, np.int64), totals, tensors, elements, scalars, of_extras)


def _in_one(parts: list[NDArray[np.float64]], members: list[list[int]]) -> NDArray[np.float64]:
    """Return what each device has of its parameters, [n, its, columns], for all in their order."""
    if len(parts) == 1:  # every parameter, in order
        return parts[0]
    whole = np.empty((len(parts[0]), sum(map(len, members)), parts[0].shape[2]))
    for of_device, part in zip(members, parts, strict=True):
        whole[:, of_device] = part
    return whole


def arrays(tensors: list[torch.Tensor]) -> list[NDArray[Any]]:
    """Return tensors on the host as arrays, whatever transform of torch.func this is called in."""
    with native.outside_of_transforms():
        return [tensor.numpy() for tensor in tensors]


def _unpack_contexts(copy: PendingCopy, scalars: dict[str, Scalars]) -> tuple[NDArray[np.float64], dict[str, Scalars]]:
    """Return the elements of each gradient, [n, T], and the scalars with the learning rates before them.

    ``lr`` is the rate of the first group that has one, whatever each group's series is called, so it goes on where
    groups are added and where their rates part.
    """
    which = np.array(copy.context_of)
    counts = np.array(arrays([elements for elements, _ in copy.contexts]))
    same = (counts == counts[0]).all()
    elements = np.broadcast_to(counts[0], (len(which), counts.shape[1])) if same else counts[which]
    rates: dict[str, Scalars] = {}
    begin = 0
    while begin < len(which):  # the rows that have the same groups
        names = [name for name, _, _ in copy.contexts[which[begin]][1]]
        end = begin + 1
        while end < len(which) and [name for name, _, _ in copy.contexts[which[end]][1]] == names:
            end += 1
        rows = np.arange(begin, end)
        _add_rates(rates, names, rows, [copy.contexts[i][1] for i in which[rows]], copy.names, scalars)
        begin = end
    on_devices = {copy.names[slot] for _, groups in copy.contexts for _, _, slot in groups if slot >= 0}
    return elements, {**rates, **{name: each for name, each in scalars.items() if name not in on_devices}}


def _add_rates(
    rates: dict[str, Scalars],
    names: list[str],
    rows: NDArray[np.intp],
    contexts: list[list[tuple[str, float | None, int]]],
    slot_names: list[str],
    scalars: dict[str, Scalars],
) -> None:
    """Add the learning rates of some rows, all of which have the groups ``names``."""
    if not names:
        return
    given = np.array([[number is not None for _, number, _ in context] for context in contexts])
    values = np.array([[0.0 if number is None else number for _, number, _ in context] for context in contexts])
    for row, context in enumerate(contexts):
        for group, (_, _, slot) in enumerate(context):
            if slot >= 0:
                where, on_device = scalars[slot_names[slot]]
                values[row, group] = on_device[np.searchsorted(where, rows[row])]
                given[row, group] = True
    for group, name in enumerate(names):
        here = given[:, group]
        if here.any():
            _extend(rates, name, rows[here], values[here, group])
    some = given.any(axis=1)
    if "lr" not in names and some.any():
        first = given[some].argmax(axis=1)
        _extend(rates, "lr", rows[some], values[some, first])


def _extend(series: dict[str, Scalars], name: str, rows: NDArray[np.intp], values: NDArray[np.float64]) -> None:
    before, values_before = series.get(name, (rows[:0], values[:0]))
    series[name] = np.concatenate([before, rows]), np.concatenate([values_before, values])


def _in_order(
    left: NDArray[np.intp], left_values: NDArray[np.float64], right: NDArray[np.intp], right_values: NDArray[np.float64]
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Merge what two devices recorded under one name, in the order of the rows."""
    if not len(left):
        return right, right_values
    indices = np.concatenate([left, right])
    order = np.argsort(indices, kind="stable")
    return indices[order], np.concatenate([left_values, right_values])[order]

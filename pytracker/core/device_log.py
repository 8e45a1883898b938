"""The log that stays on the device: rows are appended without waiting and arrive on the host some steps later.

A drain happens when ``every`` rows are there, or some seconds have passed. On a CUDA device it is one asynchronous copy
to pinned memory, on a side stream, followed by an event; the rows are read at the first later step that finds the event
done. What orders what:

* the side stream waits for the rows to be written (``side.wait_stream(main)``);
* the training stream waits, on the device, for the copy before the last one, whose rows are written over next;
* the host reads a pinned buffer only after its event, and hands it to a new copy only after having read it. There are
  two, so the host waits only when the device is more than a whole interval behind: that is counted, and warned of once;
* rows that lie on the host arrive at once where all do, and are copied at the drain where those of a device come later.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from .._checks import whole_number
from .._warn import warn_user
from ..columns import COLUMNS, MAX_SCALARS, TOTALS
from ..errors import InvalidValueError
from ..moments import merge
from . import native
from .contract import Context, Plan
from .reference import CAPTURED, RENEW

FIRST_SLOTS = 16  # scalars that a row has room for at first; the log is made anew with twice as many when they run out


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
        return Rows(self.steps[here], self.totals[here], self.tensors[here], self.elements[here], scalars)

    def without_gradients(self) -> Rows:
        """Return what rows say where the gradients are elsewhere, or were left out: the scalars that were given."""
        count = len(self.steps)
        nothing = np.empty((count, 0))
        return Rows(self.steps, nothing, np.empty((count, 0, len(COLUMNS))), nothing, self.scalars)


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
    return Rows(
        np.concatenate([part.steps for part in parts]),
        np.concatenate([part.totals for part in parts]),
        np.concatenate([part.tensors for part in parts]),
        np.concatenate([part.elements for part in parts]),
        scalars,
    )


@dataclass
class PendingCopy:
    """Rows on their way to the host."""

    end: int  # the row after the last one
    turn: int  # which of the two pinned buffers they are in
    steps: list[int]
    given: list[list[int]]  # for each row and device, which scalars are in that device's row: a bit for each slot
    names: list[str]
    contexts: list[Context]  # of one or more rows each
    context_of: list[int]  # for each row, which of these
    parts: list[torch.Tensor]  # for each device, [n, width] in host memory
    events: list[torch.cuda.Event]
    rows: Rows | None = None  # unpacked

    @property
    def has_arrived(self) -> bool:
        """Whether the copy is over. Never waits."""
        return all(map(_is_done, self.events))


class CopyStream:
    """The way of one CUDA device's rows to the host: a side stream, and two pinned buffers taken in turn."""

    def __init__(self, rows: torch.Tensor, every: int) -> None:
        self.device = rows.device
        self.stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        shape = (every, rows.shape[1])
        self.buffers = [torch.empty(shape, dtype=rows.dtype, device="cpu", pin_memory=True) for _ in range(2)]
        self.events = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]

    def copy(self, pieces: list[torch.Tensor], turn: int) -> tuple[torch.Tensor, torch.cuda.Event]:
        """Enqueue the copy of a few pieces of the ring into the buffer whose turn it is."""
        main = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(main)
        begin = 0
        with torch.cuda.stream(self.stream):
            for piece in pieces:
                self.buffers[turn][begin : begin + len(piece)].copy_(piece, non_blocking=True)
                begin += len(piece)
            self.events[turn].record(self.stream)
        main.wait_event(self.events[1 - turn])  # the rows of the copy before this one are written over next
        return self.buffers[turn][:begin], self.events[turn]


def name_rates(groups: list[dict[str, Any]]) -> list[str]:
    """Return the series that records the learning rate of each parameter group: by index where names are no names.

    >>> name_rates([{}]), name_rates([{"name": "head"}, {}])
    (['lr'], ['lr/head', 'lr/1'])
    >>> name_rates([{"name": "head"}, {"name": "head"}])
    ['lr/0', 'lr/1']
    """
    if len(groups) == 1 and "name" not in groups[0]:
        return ["lr"]
    names = [f"lr/{group.get('name', index)}" for index, group in enumerate(groups)]
    if len(set(names)) < len(names) or not all(map(str.isprintable, names)):
        return [f"lr/{index}" for index in range(len(groups))]
    return names


class _Ring:
    """The rows on the devices, and which of them are on their way to the host; replaced whole where they move."""

    def __init__(self, plan: Plan, every: int, slots: int) -> None:
        self.log = native.make_step_log(plan, 2 * every, slots)
        self.generation = plan.generation
        self.members = plan.members  # of the rows in this log, wherever the parameters move to
        self.streams = [CopyStream(rows, every) if rows.is_cuda else None for rows in self.log.rows]
        self.on_host = not any(self.streams)
        self.pending: deque[PendingCopy] = deque()
        self.delivered = 0

    @property
    def sent(self) -> int:
        """The first row that is not on its way to the host."""
        return self.pending[-1].end if self.pending else self.delivered

    def copies(self, first: int, count: int, turn: int) -> tuple[list[torch.Tensor], list[torch.cuda.Event]]:
        """Return rows in host memory, of each device, and the events after which they are there."""
        parts, events = [], []
        with native.outside_of_transforms():
            for rows, stream in zip(self.log.rows, self.streams, strict=True):
                pieces = ring_pieces(rows, first, count)
                if stream is not None:
                    part, event = stream.copy(pieces, turn)
                    events.append(event)
                elif len(pieces) == 1 and self.on_host:
                    part = pieces[0].cpu()  # unpacked at once
                else:  # a copy: the ring is written over while the rows of other devices are on their way
                    part = torch.cat(pieces).cpu()
                parts.append(part)
        return parts, events


class DeviceLog:
    """Appends a row for each step and calls ``on_rows`` with every row, exact and in order.

    An exception can strike at any line (Ctrl-C). What it interrupts is done again by the next call: rows leave the
    queue after they were delivered, so ``on_rows`` may get the same ``Rows`` once more.

    ``waits`` counts how often the host had to wait because the device was more than an interval behind.
    """

    def __init__(
        self,
        plan: Plan,
        every: int,
        on_rows: Callable[[Rows], None],
        *,
        seconds: float = math.inf,
        optimizer: torch.optim.Optimizer | None = None,
        reserved: set[str] | None = None,
        slots: int = FIRST_SLOTS,
    ) -> None:
        """Allocate everything that the log will need. A scalar may not have a ``reserved`` name; the set may grow.

        Rows are drained after ``every`` of them or ``seconds``, whichever is first. There is room for so many scalars
        (``slots``) before rows must be delivered to make more, MAX_SCALARS at most.
        """
        self._plan = plan
        self._every = whole_number("every", every, low=1)
        self._seconds = seconds
        self._due = time.monotonic() + seconds
        self._on_rows = on_rows
        reserved = set() if reserved is None else reserved
        self._reader = native.make_reader(plan, optimizer, name_rates, reserved)
        self._captured = False
        self._undrained = 0  # rows that were not sent when last looked at
        self.waits = 0
        self._ring = _Ring(plan, self._every, slots)

    @property
    def every(self) -> int:
        """Rows from one drain to the next; setting it delivers what is pending, and waits for that."""
        return self._every

    @every.setter
    def every(self, every: int) -> None:
        every = whole_number("every", every, low=1)
        if every != self._every:
            self.flush()
            self._renew(every, self._ring.log.slots)

    @property
    def names(self) -> list[str]:
        """The scalars recorded so far, learning rates included."""
        return list(dict.fromkeys([*self._reader.rate_names, *self._ring.log.scalar_names]))

    def append(self, step: int, scalars: dict[str, Any]) -> None:
        """Record one step: reduce all gradients, with the scalars beside them, in one launch. Never waits.

        Raises:
            InvalidTypeError, InvalidValueError: a scalar is nothing that can be recorded; no row is written.
            ParameterError: a gradient cannot be read; no row is written.
        """
        if self._undrained >= self._every:  # drains were interrupted, and no row may be written over
            self._drain()
        self._undrained = undrained = self._ring.log.append(self._reader, step, scalars)
        if undrained >= self._every:
            self._drain()
        elif undrained == RENEW:
            self._append_to_new(step, scalars)
        elif undrained == CAPTURED:
            self._captured = True
        else:
            self._drain_if_due()

    def _append_to_new(self, step: int, scalars: dict[str, Any]) -> None:
        """Append after making the log anew: with more slots, or where the parameters are now."""
        self.flush()
        slots = self._ring.log.slots
        if self._ring.generation == self._plan.generation:  # nothing moved: there are more scalars than slots
            if slots == MAX_SCALARS:
                raise InvalidValueError(
                    f"more than {slots} different scalars were recorded, the last ones being {sorted(scalars)}; "
                    "names should be few and the same on each step"
                )
            slots = min(2 * slots, MAX_SCALARS)
        self._renew(self._every, slots)
        self.append(step, scalars)

    def _renew(self, every: int, slots: int) -> None:
        """Replace the ring, all of whose rows were delivered."""
        ring = _Ring(self._plan, every, slots)
        for name in self._ring.log.scalar_names:
            ring.log.slot_of(name)
        self._reader.reset()
        self._every, self._ring = every, ring

    def replayed(self, step: int) -> None:
        """Note that a CUDA graph in which ``append`` was captured has been replayed: the device wrote a row."""
        log = self._ring.log
        log.replayed(self._reader, step)
        if log.written - log.drained >= self._every:
            self._drain()
        else:
            self._drain_if_due()

    def drain_soon(self) -> None:
        """Drain now, or at the first later step that finds a buffer free."""
        self._due = -math.inf
        self._drain_if_due()

    def check_captured(self) -> None:
        """Make sure that there is something to replay.

        Raises:
            InvalidValueError: no step was captured in a CUDA graph.
        """
        if not self._captured:
            raise InvalidValueError(
                "replayed() was called, and step() has not been captured in a CUDA graph; call step() on each step, or "
                "capture it together with the backward"
            )

    def flush(self) -> None:
        """Deliver every row. Waits for the device."""
        for stream in self._ring.streams:
            if stream is not None:  # rows may have been written on a stream that is no longer the current one
                torch.cuda.synchronize(stream.device)
        while self._ring.pending:  # first, so that the drain below finds a free buffer and counts no wait
            self._land(wait=True)
        while True:
            self._drain()
            while self._ring.pending:
                self._land(wait=True)
            if self._ring.sent >= self._ring.log.written:  # after interrupted drains there is more than an interval
                break

    def _drain_if_due(self) -> None:
        """Deliver what has arrived; drain where that is due by the clock and a buffer is free."""
        if self._ring.pending:
            self._land()
        if time.monotonic() >= self._due and len(self._ring.pending) < 2:
            self._drain()

    def _drain(self) -> None:
        """Send what is there on its way to the host, and deliver what has arrived.

        Rows are sent by the append to ``pending`` and by nothing else: an interruption before it leaves them to the
        next drain, and one after it leaves only their places to be released by that.
        """
        self._due = time.monotonic() + self._seconds
        self._land()
        ring = self._ring
        if len(ring.pending) > 1:
            self._wait_and_warn()
        first = ring.sent
        steps, given, contexts, context_of = ring.log.notes(first, self._every)
        if steps:
            turn = 1 - ring.pending[-1].turn if ring.pending else 0
            parts, events = ring.copies(first, len(steps), turn)
            names = list(ring.log.scalar_names)
            end = first + len(steps)
            copy = PendingCopy(end, turn, steps, given, names, contexts, context_of, parts, events)
            if ring.on_host:
                copy.rows = self._unpack(copy)
            ring.pending.append(copy)
        ring.log.release(ring.sent)
        self._undrained = ring.log.written - ring.sent
        if ring.on_host:
            self._land()

    def _wait_and_warn(self) -> None:
        self.waits += 1
        if self.waits == 1:
            warn_user(
                f"the device is more than {self._every} steps behind, so pytracker waited for it to deliver its log; "
                "a larger `every` gives it more room"
            )
        self._land(wait=True)

    def _land(self, wait: bool = False) -> None:
        """Deliver the copies that have arrived; with ``wait``, the next one in any case."""
        pending = self._ring.pending
        while pending and (wait or pending[0].has_arrived):
            copy = pending[0]
            if wait:
                for event in copy.events:
                    event.synchronize()
            wait = False
            if copy.rows is None:
                copy.rows = self._unpack(copy)
            self._on_rows(copy.rows)
            if pending and pending[0] is copy:  # it is gone where on_rows has flushed
                self._ring.delivered = copy.end
                pending.popleft()

    def _unpack(self, copy: PendingCopy) -> Rows:
        """Copy rows out of the pinned buffers, merging the devices."""
        parts = [part.astype(np.float64) for part in _arrays(copy.parts)]  # always a copy
        given = np.array(copy.given, np.uint64)  # [rows, devices]
        members = self._ring.members
        moments: list[NDArray[np.float64]] = []
        scalars: dict[str, Scalars] = {}
        for device, (part, of_device) in enumerate(zip(parts, members, strict=True)):
            end = TOTALS + len(of_device) * len(COLUMNS)
            moments.append(part[:, TOTALS:end].reshape(len(part), len(of_device), len(COLUMNS)))
            for slot, name in enumerate(copy.names):
                having = np.flatnonzero(given[:, device] >> np.uint64(slot) & np.uint64(1))
                if len(having):
                    before = scalars.get(name, (having[:0], part[:0, 0]))
                    scalars[name] = _in_order(*before, having, part[having, end + slot])
        totals = merge([part[:, :TOTALS] for part in parts])
        tensors = moments[0]  # of a single device: every parameter, in order
        if len(moments) > 1:
            tensors = np.empty((len(copy.steps), sum(map(len, members)), len(COLUMNS)))
            for of_device, its_moments in zip(members, moments, strict=True):
                tensors[:, of_device] = its_moments
        elements, scalars = _unpack_contexts(copy, scalars)
        return Rows(np.array(copy.steps, np.int64), totals, tensors, elements, scalars)


def _is_done(event: torch.cuda.Event) -> bool:
    return bool(event.query())  # type: ignore[no-untyped-call]


def _arrays(tensors: list[torch.Tensor]) -> list[NDArray[Any]]:
    with native.outside_of_transforms():
        return [tensor.numpy() for tensor in tensors]


def _unpack_contexts(copy: PendingCopy, scalars: dict[str, Scalars]) -> tuple[NDArray[np.float64], dict[str, Scalars]]:
    """Return the elements of each gradient, [n, T], and the scalars with the learning rates before them.

    ``lr`` is the rate of the first group that has one, whatever each group's series is called, so it goes on where
    groups are added and where their rates part.
    """
    which = np.array(copy.context_of)
    counts = np.array(_arrays([elements for elements, _ in copy.contexts]))
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


def ring_pieces(rows: torch.Tensor, first: int, count: int) -> list[torch.Tensor]:
    """Return the ``count`` rows from row ``first`` on, as views: one, or two where the ring's end lies between."""
    begin = first % len(rows)
    before_end = rows[begin : begin + count]
    return [before_end] if len(before_end) == count else [before_end, rows[: count - len(before_end)]]

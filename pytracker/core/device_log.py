"""The log that stays on the device: rows are appended without waiting and arrive on the host some steps later.

A drain happens when ``every`` rows are there. On a CUDA device it is one asynchronous copy to pinned memory, on a side
stream, followed by an event; the rows are read at the first later step that finds the event done. What orders what:

* the side stream waits for the rows to be written (``side.wait_stream(main)``);
* the training stream waits, on the device, for the copy before the last one, whose rows are written over next;
* the host reads a pinned buffer only after its event, and hands it to a new copy only after having read it. There are
  two, so the host waits only when the device is more than a whole interval behind: that wait is counted and told;
* rows that lie on the host arrive at once where all do, and are copied at the drain where those of a device come later.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .._checks import whole_number
from ..columns import COLUMNS, MAX_SCALARS, TOTALS, merge_totals
from ..errors import InvalidValueError
from . import native

FIRST_SLOTS = 16  # scalars that a row has room for at first; the log is made anew with twice as many when they run out


@dataclass(frozen=True)
class Rows:
    """Exact rows of a few steps, on the host, in the order in which they were recorded."""

    steps: NDArray[np.int64]  # [n]
    totals: NDArray[np.float64]  # [n, 7], columns.TOTAL_COLUMNS
    tensors: NDArray[np.float64]  # [n, T, 6], columns.COLUMNS; NaN in all six where a parameter had no gradient
    scalars: dict[str, tuple[NDArray[np.intp], NDArray[np.float64]]]  # name -> indices of the rows that have it, values


@dataclass
class PendingCopy:
    """Rows on their way to the host."""

    steps: list[int]
    given: list[list[int]]  # for each row and device, which scalars are in that device's row: a bit for each slot
    names: list[str]
    parts: list[torch.Tensor]  # for each device, [n, width] in host memory
    events: list[torch.cuda.Event]


class CopyStream:
    """The way of one CUDA device's rows to the host: a side stream, and two pinned buffers taken in turn."""

    def __init__(self, rows: torch.Tensor, every: int) -> None:
        self.device = rows.device
        self.stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self.buffers = [torch.empty((every, rows.shape[1]), dtype=rows.dtype, pin_memory=True) for _ in range(2)]
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


class DeviceLog:
    """Appends a row for each step and calls ``on_rows`` with every row, exact and in order.

    ``waits`` counts how often the host had to wait because the device was more than an interval behind.
    """

    def __init__(
        self,
        plan: Any,
        every: int,
        on_rows: Callable[[Rows], None],
        *,
        optimizer: torch.optim.Optimizer | None = None,
        reserved: Iterable[str] = (),
        slots: int = FIRST_SLOTS,
    ) -> None:
        """Allocate everything that the log will need. A scalar may not have a ``reserved`` name.

        There is room for so many scalars (``slots``) before rows must be delivered to make more, MAX_SCALARS at most.
        """
        self._plan = plan
        self._every = whole_number("every", every, low=1)
        self._on_rows = on_rows
        self._reader = native.make_reader(plan, optimizer, name_rates, set(reserved))
        self._pending: deque[PendingCopy] = deque()
        self._turn = 0
        self._captured = False
        self.waits = 0
        self._allocate(slots)

    def _allocate(self, slots: int) -> None:
        self._log = native.make_step_log(self._plan, 2 * self._every, slots)
        self._generation = self._plan.generation
        self._members = self._plan.members  # of the rows in this log, wherever the parameters move to
        self._reader.reset()
        self._streams = [CopyStream(rows, self._every) if rows.is_cuda else None for rows in self._log.rows]
        self._mixed = len(self._streams) > 1

    @property
    def every(self) -> int:
        """Rows from one drain to the next; setting it delivers what is pending, and waits for that."""
        return self._every

    @every.setter
    def every(self, every: int) -> None:
        every = whole_number("every", every, low=1)
        if every != self._every:
            self.flush()
            self._every = every
            self._renew(self._log.slots)

    @property
    def names(self) -> list[str]:
        """The scalars recorded so far."""
        return list(self._log.scalar_names)

    def append(self, step: int, scalars: dict[str, Any]) -> None:
        """Record one step: reduce all gradients, with the scalars beside them, in one launch. Never waits.

        Raises:
            InvalidTypeError, InvalidValueError: a scalar is nothing that can be recorded; no row is written.
            ParameterError: a gradient cannot be read; no row is written.
        """
        pending = self._log.append(self._plan, self._reader, step, scalars)
        if pending >= self._every:
            self._drain()
        elif pending == native.RENEW:
            self._append_anew(step, scalars)
        elif pending == native.CAPTURED:
            self._captured = True
        elif self._pending:
            self._land()

    def _append_anew(self, step: int, scalars: dict[str, Any]) -> None:
        """Append after making the log anew: with more slots, or where the parameters are now."""
        self.flush()
        slots = self._log.slots
        if self._generation == self._plan.generation:  # nothing moved: there are more scalars than slots
            if slots == MAX_SCALARS:
                raise InvalidValueError(
                    f"more than {slots} different scalars were recorded, the last ones being {sorted(scalars)}; "
                    "names should be few and the same on each step"
                )
            slots = min(2 * slots, MAX_SCALARS)
        self._renew(slots)
        self.append(step, scalars)

    def _renew(self, slots: int) -> None:
        names = self._log.scalar_names
        self._allocate(slots)
        for name in names:
            self._log.slot_of(name)

    def replayed(self, step: int) -> None:
        """Note that a CUDA graph in which ``append`` was captured has been replayed: the device wrote a row."""
        self._log.replayed(step)
        if self._log.written - self._log.drained >= self._every:
            self._drain()
        else:
            self._land()

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
        for lane in self._streams:
            if lane is not None:  # rows may have been written on a stream that is no longer the current one
                torch.cuda.synchronize(lane.device)
        while self._pending:  # first, so that the drain below finds a free buffer and counts no wait
            self._land(wait=True)
        self._drain()
        while self._pending:
            self._land(wait=True)

    def _drain(self) -> None:
        """Send what is pending on its way to the host, and deliver what has arrived."""
        self._land()
        if len(self._pending) > 1:
            self._wait_and_tell()
        first = self._log.drained
        steps, given = self._log.take(self._every)
        if not steps:
            return
        parts, events = [], []
        for rows, lane in zip(self._log.rows, self._streams, strict=True):
            pieces = ring_pieces(rows, first, len(steps))
            if lane is not None:
                part, event = lane.copy(pieces, self._turn)
                events.append(event)
            elif len(pieces) == 1 and not self._mixed:
                part = pieces[0].cpu()  # read at once, below
            else:  # a copy: the ring is written over while the rows of other devices are on their way
                part = torch.cat(pieces).cpu()
            parts.append(part)
        self._turn = 1 - self._turn
        self._pending.append(PendingCopy(steps, given, list(self._log.scalar_names), parts, events))
        if not events:
            self._land()

    def _wait_and_tell(self) -> None:
        self.waits += 1
        if self.waits == 1:
            warnings.warn(
                f"the device is more than {self._every} steps behind, so pytracker waited for it to deliver its log; "
                "a larger `every` gives it more room",
                RuntimeWarning,
                stacklevel=5,
            )
        self._land(wait=True)

    def _land(self, wait: bool = False) -> None:
        """Deliver the flights that have arrived; with ``wait``, the next one in any case."""
        while self._pending and (wait or all(map(_is_done, self._pending[0].events))):
            flight = self._pending.popleft()
            if wait:
                for event in flight.events:
                    event.synchronize()
            wait = False
            self._on_rows(self._unpack(flight))

    def _unpack(self, flight: PendingCopy) -> Rows:
        """Copy a flight's rows out of the pinned buffers, merging the devices."""
        parts = [part.numpy().astype(np.float64) for part in flight.parts]  # always a copy
        given = np.array(flight.given, np.uint64)  # [rows, devices]
        members = self._members
        moments: list[NDArray[np.float64]] = []
        scalars: dict[str, tuple[NDArray[np.intp], NDArray[np.float64]]] = {}
        for device, (part, of_device) in enumerate(zip(parts, members, strict=True)):
            end = TOTALS + len(of_device) * len(COLUMNS)
            moments.append(part[:, TOTALS:end].reshape(len(part), len(of_device), len(COLUMNS)))
            for slot, name in enumerate(flight.names):
                having = np.flatnonzero(given[:, device] >> np.uint64(slot) & np.uint64(1))
                if len(having):
                    before = scalars.get(name, (having[:0], part[:0, 0]))
                    scalars[name] = _in_order(*before, having, part[having, end + slot])
        totals = merge_totals([part[:, :TOTALS] for part in parts])
        tensors = moments[0]  # of a single device: every parameter, in order
        if len(moments) > 1:
            tensors = np.empty((len(flight.steps), sum(map(len, members)), len(COLUMNS)))
            for of_device, its_moments in zip(members, moments, strict=True):
                tensors[:, of_device] = its_moments
        return Rows(np.array(flight.steps, np.int64), totals, tensors, scalars)


def _is_done(event: torch.cuda.Event) -> bool:
    return bool(event.query())  # type: ignore[no-untyped-call]


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

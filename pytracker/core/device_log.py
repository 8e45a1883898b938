"""The log that stays on the device: rows are appended without waiting and arrive on the host some steps later.

A drain happens when ``every`` rows are there, or some seconds have passed. On a CUDA device it is one asynchronous copy
to pinned memory, on a side stream, followed by an event; the rows are read at the first later step that finds the event
done. What orders what:

* the side stream waits for the kernels that write the rows, replays of CUDA graphs included (``log.await_rows``);
* the training stream waits, on the device, for the copy before the last one, whose rows are written over next;
* the host reads a pinned buffer only after its event, and hands it to a new copy only after having read it. There are
  two, so the host waits only when the device is more than a whole interval behind: that is counted, and warned of once;
* where replays of graphs write rows, each is checked to be that of its step (``replays.py``);
* rows that lie on the host arrive at once where all do, and are copied at the drain where those of a device come later.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .._checks import whole_number
from .._warn import warn_user
from ..columns import MAX_SCALARS
from ..contract import Clip, Context, Plan
from ..errors import InvalidValueError
from ..reference import CAPTURED, RENEW
from ..replays import ASKED_BY, Note, are_in_order, complaints, marked, match
from . import native
from .rows import Rows, arrays, unpack

FIRST_SLOTS = 16  # scalars that a row has room for at first; the log is rebuilt with twice as many when they run out


@dataclass
class PendingCopy:
    """Rows on their way to the host."""

    end: int  # the number of the note after the last one
    row: int  # the number of the first row, as the device counts them
    turn: int  # which of the two pinned buffers they are in
    steps: list[int]
    given: list[list[int]]  # as contract.Notes has it
    names: list[str]
    contexts: list[Context]  # of one or more rows each
    context_of: list[int]  # for each row, which of these
    parts: list[torch.Tensor]  # for each device, [n, width] in host memory
    slots: int  # scalars that a row has room for
    extras: bool  # whether the further columns lie behind them
    noted: torch.Tensor | None  # [n], StepLog.announced of each; None: nothing has been captured
    events: list[torch.cuda.Event]
    next_row: int | None = None  # the number of the row after the last one, once that has been looked at
    rows: Rows | None = None  # unpacked

    @property
    def has_arrived(self) -> bool:
        """Whether the copy is over. Never waits."""
        return all(event.query() for event in self.events)  # type: ignore[no-untyped-call]

    @property
    def notes(self) -> list[Note]:
        first = self.end - len(self.steps)
        noted = [None] * len(self.steps) if self.noted is None else arrays([self.noted])[0].tolist()
        pairs = zip(self.given, noted, strict=True)
        return [(first + index, None if given else there) for index, (given, there) in enumerate(pairs)]


class CopyStream:
    """The way of one CUDA device's rows to the host: a side stream, and two pinned buffers taken in turn."""

    def __init__(self, rows: torch.Tensor, every: int) -> None:
        self.device = rows.device
        self.stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        shape = (every, rows.shape[1])
        self.buffers = [torch.empty(shape, dtype=rows.dtype, device="cpu", pin_memory=True) for _ in range(2)]
        self.noted = [torch.empty(every, dtype=torch.int64, device="cpu", pin_memory=True) for _ in range(2)]
        self.events = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]

    def copy(
        self, log: Any, group: int, pieces: list[torch.Tensor], noted: list[torch.Tensor], turn: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Enqueue the copy of a few pieces of the ring, and of the notes, into the buffers whose turn it is."""
        main = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self.stream):
            log.await_rows(group)
            rows, notes = _gathered(pieces, self.buffers[turn]), _gathered(noted, self.noted[turn])
            self.events[turn].record(self.stream)
        main.wait_event(self.events[1 - turn])  # the rows of the copy before this one are written over next
        return rows, notes


def _gathered(pieces: list[torch.Tensor], buffer: torch.Tensor) -> torch.Tensor:
    begin = 0
    for piece in pieces:
        buffer[begin : begin + len(piece)].copy_(piece, non_blocking=True)
        begin += len(piece)
    return buffer[:begin]


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

    def __init__(self, plan: Plan, every: int, slots: int, extras: bool) -> None:
        self.log = native.make_step_log(plan, 2 * every, slots, extras=extras)
        self.extras = extras
        self.generation = plan.generation
        self.members = plan.members  # of the rows in this log, wherever the parameters move to
        self.streams = [CopyStream(rows, every) if rows.is_cuda else None for rows in self.log.rows]
        self.on_host = not any(self.streams)
        self.pending: deque[PendingCopy] = deque()
        self.read = 0, 0  # the first note that is not delivered, and the first row that may be its

    @property
    def sent(self) -> int:
        """The first note whose row is not on its way to the host."""
        return self.pending[-1].end if self.pending else self.read[0]

    @property
    def ahead(self) -> int:
        """By how many the number of a row is larger than that of its note, as far as is known."""
        known = [copy.next_row - copy.end for copy in self.pending if copy.next_row is not None]
        return known[-1] if known else self.read[1] - self.read[0]

    def copies(
        self, first: int, count: int, turn: int
    ) -> tuple[list[torch.Tensor], torch.Tensor | None, list[torch.cuda.Event]]:
        """Return rows in host memory, of each device, what replays noted, and the events after which they are there."""
        parts: list[torch.Tensor] = []
        noted, events = None, []
        captured = bool(self.log.captures)
        with native.outside_of_transforms():
            for group, (rows, stream) in enumerate(zip(self.log.rows, self.streams, strict=True)):
                pieces = ring_pieces(rows, first + self.ahead, count)
                if stream is not None:
                    announced = ring_pieces(self.log.announced, first, count) if captured else []
                    part, copied = stream.copy(self.log, group, pieces, announced, turn)
                    noted = copied if captured else None
                    events.append(stream.events[turn])
                else:  # a copy, since the ring is written over; NumPy's, since its memory is there sooner than torch's
                    part = torch.from_numpy(np.concatenate([piece.cpu().numpy() for piece in pieces]))
                parts.append(part)
        return parts, noted, events


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
        optimizer: Any = None,
        rates: Callable[[list[dict[str, Any]]], list[str]] = name_rates,
        reserved: set[str] | None = None,
        slots: int = FIRST_SLOTS,
        extras: bool = False,
    ) -> None:
        """Allocate everything that the log will need. A scalar may not have a ``reserved`` name; the set may grow.

        Rows are drained after ``every`` of them or ``seconds``. For more scalars than ``slots`` all are delivered. With
        ``extras`` they have the further columns.
        """
        self._plan = plan
        self._every = whole_number("every", every, low=1)
        self._seconds = seconds
        self._due = time.monotonic() + seconds
        self._on_rows = on_rows
        self._reader = native.make_reader(plan, optimizer, rates, set() if reserved is None else reserved)
        self._is_open = False  # the last row, for what is decided late
        self._decides_late = False
        self._undrained = 0  # rows that were not sent when last looked at
        self.waits = 0
        self._ring = _Ring(plan, self._every, slots, extras)

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

    def append(self, step: int, scalars: dict[str, Any], clip: Any = None, *, hold: bool = False) -> None:
        """Record one step: reduce all gradients, with the scalars beside them, in one launch. Never waits.

        Args:
            step: its number.
            scalars: by name.
            clip: what is decided by the row's norm, in the same launch; only of a plan with one device.
            hold: something is to be added to the row; it is not sent before ``settle``, or the next append.

        Raises:
            InvalidTypeError, InvalidValueError: a scalar is nothing that can be recorded; no row is written.
            ParameterError: a gradient cannot be read; no row is written.
        """
        if (self._undrained >= self._every or self._is_open) and not self._ring.log.capturing:
            self.settle()  # drains were interrupted, and no row may be written over
        self._undrained = undrained = self._ring.log.append(self._reader, step, scalars, clip)
        if undrained == RENEW:
            self._append_to_new(step, scalars, clip, hold)
        elif undrained != CAPTURED:
            self._is_open = hold or self._decides_late
            if not self._is_open:
                self.settle()

    def settle(self) -> None:
        """Let the last row go: drain where that is due, and deliver what has arrived."""
        self._is_open = False
        if self._undrained >= self._every:
            self._drain()
        else:
            self._drain_if_due()

    def decide(self, clip: Clip, norm: torch.Tensor | None = None) -> bool:
        """Decide on a clip by the last row, or by a norm that is given, and let the row go.

        Where the row was not held, each row from now on waits for its decision until the next append.

        Returns:
            Whether the row has the results; it hasn't where it was on its way to the host already.
        """
        capturing = self._ring.log.capturing
        self._decides_late = self._decides_late or not (self._is_open or capturing)
        records = self._ring.log.decide(clip, norm)
        if not capturing:
            self.settle()
        return records

    def fill(self, parts: list[torch.Tensor]) -> None:
        """Write moments, of each device [7 + 6 T], over those of the last row, which is held."""
        for rows, part in zip(self._ring.log.rows, parts, strict=True):
            rows[(self._ring.log.written - 1) % len(rows), : len(part)].copy_(part)

    def latest(self) -> list[torch.Tensor]:
        """Return a copy of the row that was appended last, on each device. Never waits."""
        return self._ring.log.latest()

    def _append_to_new(self, step: int, scalars: dict[str, Any], clip: Any, hold: bool) -> None:
        """Append after rebuilding the log: with more slots, or where the parameters are now."""
        slots = self._ring.log.slots
        if self._ring.log.capturing:
            raise InvalidValueError(
                f"step() is captured in a CUDA graph with {len(scalars)} scalars, {sorted(scalars)}, and the log has "
                f"room for {slots} different ones, or the parameters have moved to another device; take a step with "
                "the same scalars before the capture, which rebuilds the log"
            )
        self.flush()
        if self._ring.generation == self._plan.generation:  # nothing moved: there are more scalars than slots
            if slots == MAX_SCALARS:
                raise InvalidValueError(
                    f"more than {slots} different scalars were recorded, the last ones being {sorted(scalars)}; "
                    "names should be few and the same on each step"
                )
            slots = min(2 * slots, MAX_SCALARS)
        self._renew(self._every, slots)
        self.append(step, scalars, clip, hold=hold)

    def _renew(self, every: int, slots: int) -> None:
        """Replace the ring, all of whose rows were delivered."""
        ring = _Ring(self._plan, every, slots, self._ring.extras)
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
        """Drain now, or as soon as a buffer is free; a row that is held goes when it is settled."""
        self._due = -math.inf
        if not self._is_open:
            self._drain_if_due()

    def check_captured(self) -> None:
        """Make sure that there is something to replay.

        Raises:
            InvalidValueError: no step was captured in a CUDA graph, or one is being captured.
        """
        log = self._ring.log
        if not log.captures:
            raise InvalidValueError(
                "replayed() was called, and step() has not been captured in a CUDA graph since the tracker's log was "
                "made (with the tracker, or again where `every` changes, where there are more scalars than it has room "
                "for, and where the parameters move); call step() on each step, or capture it with the backward"
            )
        if log.capturing:
            raise InvalidValueError("replayed() was called while a CUDA graph is captured; call it after each replay")

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
        self._complain_of_the_rest()

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
            parts, noted, events = ring.copies(first, len(steps), turn)
            names = list(ring.log.scalar_names)
            end, row = first + len(steps), first + ring.ahead
            parts_of = parts, ring.log.slots, ring.extras
            copy = PendingCopy(end, row, turn, steps, given, names, contexts, context_of, *parts_of, noted, events)
            if ring.on_host:
                copy.rows = unpack(copy, self._ring.members)
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
            if copy.rows is None and copy.steps:
                if self._ring.log.captures and copy.next_row is None:
                    copy = pending[0] = self._sorted_out(copy)
                copy.rows = unpack(copy, self._ring.members) if copy.steps else None
            if copy.rows is not None:
                self._on_rows(copy.rows)
            if pending and pending[0] is copy:  # it is gone where on_rows has flushed
                self._ring.read = copy.end, copy.end + self._ring.ahead
                pending.popleft()

    def _sorted_out(self, copy: PendingCopy) -> PendingCopy:
        """Return the copy with the row of each of its steps, where replays write rows too: mostly as it is.

        Where it is not, this waits for the device, looks at all rows that there are, and says what was wrong.
        """
        ring, notes = self._ring, copy.notes
        first = ring.read[1]
        rows = marked(arrays(copy.parts)[0], copy.row)
        found: list[int | None] = [*range(first, first + len(notes))]
        if not are_in_order(rows, first, notes):
            rows, later = self._all_rows(first)
            everywhere = match(rows, [*notes, *later])
            found = everywhere[: len(notes)]
            end = max((number + 1 for number in found if number is not None), default=first)
            strangers = len([n for n in rows if n < end and n not in everywhere])
            lost = [step for step, number in zip(copy.steps, found, strict=True) if number is None]
            for complaint in complaints(strangers, f"before step {copy.steps[-1]}", lost):
                warn_user(complaint)
        kept = [(index, number) for index, number in enumerate(found) if number is not None]
        who = [int(rows[number][ASKED_BY]) for _, number in kept]
        captures = ring.log.captures
        return replace(
            copy,
            steps=[copy.steps[index] for index, _ in kept],
            given=[[captures[-1 - w]] if w < 0 else copy.given[i] for (i, _), w in zip(kept, who, strict=True)],
            context_of=[copy.context_of[index] for index, _ in kept],
            parts=[torch.from_numpy(np.array([rows[number] for _, number in kept]))],
            next_row=max((number + 1 for _, number in kept), default=first),
        )

    def _all_rows(self, first: int) -> tuple[dict[int, NDArray[np.float64]], list[Note]]:
        """Return the rows from number ``first`` on, by number, and what is known of those not yet asked for."""
        ring, log = self._ring, self._ring.log
        torch.cuda.synchronize(log.rows[0].device)
        with native.outside_of_transforms():
            written, of_ring = int(log.cursor), log.rows[0].cpu().numpy()
            announced = log.announced.tolist()
        rows = {n: of_ring[n % len(of_ring)] for n in range(max(first, written - len(of_ring)), written)}
        for copy in ring.pending:
            rows.update(marked(arrays(copy.parts)[0], copy.row))
        _, given, _, _ = log.notes(ring.sent, log.capacity)
        unsent = [(n, None if bits else announced[n % log.capacity]) for n, bits in enumerate(given, ring.sent)]
        later = [note for copy in list(ring.pending)[1:] for note in copy.notes] + unsent
        return {n: row for n, row in rows.items() if n >= first}, later

    def _complain_of_the_rest(self) -> None:
        """Pass over the rows behind the last note, all of which were delivered: of replays that nobody announced."""
        ring = self._ring
        note, row = ring.read
        if ring.log.captures and (written := int(ring.log.cursor)) > row:
            ring.read = note, written
            warn_user(*complaints(written - row, "after the last step", []))


def ring_pieces(rows: torch.Tensor, first: int, count: int) -> list[torch.Tensor]:
    """Return the ``count`` rows from row ``first`` on, as views: one, or two where the ring's end lies between."""
    begin = first % len(rows)
    before_end = rows[begin : begin + count]
    return [before_end] if len(before_end) == count else [before_end, rows[: count - len(before_end)]]

"""The queue of a sink and the thread that delivers it."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import in_words

logger = logging.getLogger("pytracker")


_MAY_GO = ("write", "late", "parameters")
"""What may be given up where too much waits."""


@dataclass(frozen=True, eq=False)
class Event:
    """One call of a sink's method. ``values``: how many are lost with it."""

    method: str
    arguments: tuple[Any, ...]
    values: int = 0
    steps: tuple[int, int] = (0, 0)
    done: Callable[[Any], None] | None = None  # called with what the method returned


@dataclass
class Lost:
    """What a sink could not be given."""

    values: int = 0
    first_step: int = 0
    last_step: int = 0
    error: str = "it was too slow"

    def add(self, event: Event) -> None:
        if not event.values:
            return
        first, last = event.steps
        self.first_step = min(first, self.first_step) if self.values else first
        self.last_step = max(last, self.last_step) if self.values else last
        self.values += event.values


class Outbox:
    """Delivers events to one sink, in order, on a thread of its own: one that hangs stops neither training nor others.

    A call that raises is repeated after a pause, which doubles each time. After ``tries`` an event is given up, so that
    one which the tool refuses does not hold up the rest; ``open`` is not, for nothing could follow it.

    Args:
        sink: whose methods are called. Events for a method that it lacks are dropped.
        label: what the messages call it.
        limit: values that may wait; beyond it the oldest are given up, and counted.
        pause: seconds before the second try.
        longest_pause: seconds between tries at most.
        tries: after how many an event is given up.
    """

    def __init__(
        self,
        sink: Any,
        label: str,
        *,
        limit: int = 2_000_000,
        pause: float = 0.5,
        longest_pause: float = 60.0,
        tries: int = 10,
    ) -> None:
        self.label = label
        self.lost = Lost()
        self._sink = sink
        self._limit, self._pause, self._longest_pause, self._tries = limit, pause, longest_pause, tries
        self._events: deque[Event] = deque()
        self._waiting = 0  # values in the queue
        self._changed = threading.Condition()
        self._deadline: float | None = None  # set when it ends
        self._error: str | None = None
        self._away = False  # the last call failed
        self._thread = threading.Thread(target=self._run, name=f"pytracker-sink-{label}", daemon=True)
        self._thread.start()

    def put(self, event: Event) -> None:
        """Queue an event. Never waits for the sink."""
        if not hasattr(self._sink, event.method):
            return
        with self._changed:
            self._events.append(event)
            self._waiting += event.values
            while self._waiting > self._limit and (oldest := self._oldest_values()) is not None:
                self._events.remove(oldest)
                self._waiting -= oldest.values
                self.lost.add(oldest)
            self._changed.notify_all()

    def begin_close(self, error: str | None, deadline: float) -> None:
        """Have the sink closed when it has taken what waits, or at ``deadline`` (of ``time.monotonic``)."""
        with self._changed:
            self._error, self._deadline = error, deadline
            self._changed.notify_all()

    def join(self) -> bool:
        """Wait for the end, a little longer than the deadline; return whether it came."""
        assert self._deadline is not None
        self._thread.join(max(0.0, self._deadline - time.monotonic()) + 1.0)
        if self._thread.is_alive():
            with self._changed:
                for event in self._events:
                    self.lost.add(event)
                self.lost.error = "it did not return from a call"
            return False
        return True

    def _oldest_values(self) -> Event | None:
        """Return the oldest event that can be given up: not the first, which may be on its way, nor the latest."""
        return next((event for event in list(self._events)[1:-1] if event.method in _MAY_GO), None)

    def _run(self) -> None:
        while (event := self._next()) is not None:
            delivered = self._deliver(event)
            with self._changed:
                if not delivered and event.method == "open":
                    break  # nothing can follow
                self._events.popleft()
                self._waiting -= event.values
                if not delivered:
                    self.lost.add(event)
        with self._changed:
            while self._events:
                self.lost.add(self._events.popleft())
        if hasattr(self._sink, "close"):
            try:
                self._sink.close(self._error)
            except BaseException as problem:
                logger.warning("the sink %s could not be closed: %s", self.label, in_words(problem))

    def _next(self) -> Event | None:
        """Wait for an event; None at the end, or at the deadline."""
        with self._changed:
            self._changed.wait_for(lambda: self._events or self._deadline is not None)
            is_over = self._deadline is not None and time.monotonic() > self._deadline
            return self._events[0] if self._events and not is_over else None

    def _deliver(self, event: Event) -> bool:
        """Call the sink until it takes the event, and return whether it did."""
        pause, tries = self._pause, 0
        while True:
            try:
                result = getattr(self._sink, event.method)(*event.arguments)
                if event.done is not None:
                    event.done(result)
            except BaseException as problem:  # a sink may even exit; the thread must go on
                tries += 1
                self.lost.error = in_words(problem)
                if not self._away:
                    self._away = True
                    logger.warning(
                        "the sink %s failed in %s, and is tried again: %s", self.label, event.method, self.lost.error
                    )
            else:
                if self._away:
                    self._away = False
                    logger.info("the sink %s takes values again", self.label)
                return True
            may_be_given_up = event.method != "open"
            if (may_be_given_up and tries >= self._tries) or not self._wait(pause):
                return False
            pause = min(2 * pause, self._longest_pause)

    def _wait(self, pause: float) -> bool:
        """Wait before the next try, and return whether there is time for one. A close that begins cuts it short."""
        with self._changed:
            if self._deadline is None:
                self._changed.wait_for(lambda: self._deadline is not None, pause)
                return True
        left = self._deadline - time.monotonic()
        time.sleep(max(0.0, min(pause, left)))
        return left > pause

"""The thread that writes a run, so that the training's thread never waits for a disk."""

from __future__ import annotations

import contextlib
import sqlite3
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from ..errors import StoreError
from .facts import collect, torch_facts
from .file import RunFile
from .pending import Batch, Pending

_LONGEST_PAUSE: Final = 30.0  # between two tries on a disk that fails


class _Order:
    """Something the writer is to do between two batches, and what came of it."""

    def __init__(self, action: Callable[[], None]) -> None:
        self.action = action
        self.done = threading.Event()
        self.error: Exception | None = None


class Writer:
    """Writes what ``pending`` holds into ``file``, at least every ``flush_seconds``, and tries again where that fails.

    Every value logged is committed within ``flush_seconds``: a pass begins every half of that, and has the other half.
    """

    def __init__(self, file: RunFile, pending: Pending, *, flush_seconds: float, working_directory: str) -> None:
        """Make it; ``start`` begins."""
        self._file = file
        self._pending = pending
        self._pause = flush_seconds / 2
        self._working_directory = working_directory
        self._orders: deque[_Order] = deque()
        self._wake = threading.Event()
        self._stopping = False
        self._facts: dict[str, Any] = {}
        self._failures = 0
        self._next_try = 0.0
        self._warned = False
        self.last_error: Exception | None = None
        self._thread = threading.Thread(target=self._loop, name=f"pytracker {file.name}", daemon=True)

    def start(self) -> None:
        """Begin to write."""
        self._thread.start()

    def order(self, action: Callable[[], None], timeout: float) -> Exception | None:
        """Have ``action`` done on the writer's thread after everything logged before is on disk, and wait for it.

        Returns what went wrong, None where nothing did.
        """
        order = _Order(action)
        self._orders.append(order)
        self._next_try = 0.0
        self._wake.set()
        if not order.done.wait(timeout):
            return self.last_error or StoreError(f"the disk didn't answer in {timeout:g} s")
        return order.error

    def stop(self, timeout: float) -> None:
        """End the thread; what waits stays in ``pending``."""
        self._stopping = True
        self._wake.set()
        self._thread.join(timeout)

    def fail(self, error: Exception) -> None:
        """Note that the disk failed, and warn about it the first time."""
        with contextlib.suppress(sqlite3.Error):
            self._file.close()  # a lost mount needs a new file handle
        self.last_error = error
        self._failures += 1
        self._next_try = time.monotonic() + min(self._pause * 2**self._failures, _LONGEST_PAUSE)
        if self._warned:
            return
        self._warned = True
        message = (
            f"run {self._file.name!r} can't be written to {self._file.folder} now ({error}). The training goes on, "
            f"what it logs waits in memory (at most {self._pending.max_bytes / 2**20:.0f} MiB) until it works again"
        )
        try:
            warnings.warn(message, RuntimeWarning, stacklevel=2)
        except RuntimeWarning:  # warnings are errors here: the writer lives on all the same
            with contextlib.suppress(OSError, ValueError):  # there may be no standard error any more
                print(f"pytracker: {message}", file=sys.stderr)

    def _loop(self) -> None:
        while not self._stopping:
            self._wake.wait(self._pause)
            self._wake.clear()
            if time.monotonic() >= self._next_try:
                self._pass()

    def _pass(self) -> None:
        orders = [self._orders.popleft() for _ in range(len(self._orders))]
        error = self._write()
        for order in orders:
            if error is None:
                error = self._attempt(order.action)
            order.error = error
            order.done.set()

    def _write(self) -> Exception | None:
        batch = self._pending.take()
        error = self._attempt(lambda: self._put(batch)) if batch else None
        if error is not None:
            self._pending.give_back(batch)
        elif self._facts != self._facts | torch_facts() or not self._facts:
            error = self._attempt(self._put_facts)  # anew where torch has been imported or CUDA started since
        return error

    def _put(self, batch: Batch) -> None:
        self._file.write(batch, self._pending.dropped_points, self._pending.dropped_blobs)

    def _put_facts(self) -> None:
        facts = self._facts or {**collect(self._working_directory), "journal_mode": self._file.journal_mode}
        facts = facts | torch_facts()
        self._file.set_facts(facts)
        self._facts = facts

    def _attempt(self, action: Callable[[], None]) -> Exception | None:
        try:
            if not self._file.is_open:
                self._file.open()
            action()
        except Exception as error:  # whatever it is, the training goes on and the writer lives
            self.fail(error)
            return error
        self._failures = 0
        self.last_error = None
        return None

"""The thread that writes a run, so that the training's thread never waits for a disk."""

from __future__ import annotations

import contextlib
import functools
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
_NAMED: Final = 5  # of the things that were set aside, in a warning


class _Order:
    """Something the writer is to do between two batches, and what came of it."""

    def __init__(self, action: Callable[[], None]) -> None:
        self.action = action
        self.done = threading.Event()
        self.error: Exception | None = None


class Writer:
    """Writes what ``pending`` holds into ``file``, at least every ``flush_seconds``, and tries again where that fails.

    Every value logged is committed within ``flush_seconds``: a pass begins every half of that, and has the other half.
    ``everything`` returns all that is in memory, for a file that is begun again because the first one was lost.
    """

    def __init__(
        self,
        file: RunFile,
        pending: Pending,
        everything: Callable[[], Batch],
        *,
        flush_seconds: float,
        working_directory: str,
        snapshot: bool = False,
    ) -> None:
        """Make it; its thread starts with the first order, or with ``start``."""
        self._file = file
        self._pending = pending
        self._everything = everything
        self._pause = flush_seconds / 2
        self._collect = functools.partial(collect, working_directory, snapshot=snapshot)
        self._orders: deque[_Order] = deque()
        self._wake = threading.Event()
        self._stopping = False
        self._facts: dict[str, Any] = {}
        self._failures = 0
        self._next_try = 0.0
        self._warned = False
        self.last_error: Exception | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to write, where it doesn't yet."""
        if self._thread is None or not self._thread.is_alive():
            self._stopping = False
            self._thread = threading.Thread(target=self._loop, name=f"pytracker {self._file.name}", daemon=True)
            self._thread.start()

    def order(self, action: Callable[[], None], timeout: float) -> Exception | None:
        """Have ``action`` done on the writer's thread after everything logged before is on disk, and wait for it.

        Returns what went wrong, None where nothing did.
        """
        order = _Order(action)
        self._orders.append(order)
        self._next_try = 0.0
        try:
            self.start()
        except RuntimeError:  # the interpreter ends, and starts no thread any more
            self._pass()
        self._wake.set()
        if not order.done.wait(timeout):
            return self.last_error or StoreError(f"the disk didn't answer in {timeout:g} s")
        return order.error

    def stop(self, timeout: float) -> None:
        """End the thread; what waits stays in ``pending``."""
        self._stopping = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout)

    def fail(self, error: Exception) -> None:
        """Note that the disk failed, and warn about it the first time."""
        with contextlib.suppress(sqlite3.Error):
            self._file.close()  # a lost mount needs a new file handle
        self.last_error = error
        self._failures += 1
        self._next_try = time.monotonic() + min(self._pause * 2**self._failures, _LONGEST_PAUSE)
        if not self._warned:
            self._warned = True
            _warn(
                f"run {self._file.name!r} can't be written to {self._file.folder} now ({error}). The training goes on, "
                f"what it logs waits in memory (at most {self._pending.max_bytes / 2**20:.0f} MiB) until it works again"
            )

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
        error = self._attempt(self._write_what_waits)
        if error is None and (self._facts != self._facts | torch_facts() or not self._facts):
            error = self._attempt(self._put_facts)  # again where torch has been imported or CUDA started since
        return error

    def _make_ready(self) -> None:
        if self._file.is_lost:
            self._file.abandon()
            self._facts = {}
            _warn(
                f"run {self._file.name!r}: its file was deleted or replaced while it was written; it is begun again in "
                f"{self._file.folder} with what is in memory"
            )
        if not self._file.is_open:
            self._file.open()
        if self._file.is_empty_again:
            self._file.begin_again(self._everything())
            self._say_what_was_set_aside()

    def _write_what_waits(self) -> None:
        batch = self._pending.take()
        if not batch:
            return
        try:
            self._file.write(batch, self._pending.dropped_points, self._pending.dropped_blobs)
        except BaseException:
            self._pending.give_back(batch)
            raise
        self._pending.done(batch)
        self._say_what_was_set_aside()

    def _say_what_was_set_aside(self) -> None:
        reasons, self._file.reasons = self._file.reasons, []
        if reasons:
            more = f" and {len(reasons) - _NAMED} more" if len(reasons) > _NAMED else ""
            named = ", ".join(reasons[:_NAMED]) + more
            _warn(f"run {self._file.name!r}: SQLite can't take {named}; that is left out, the rest is written")

    def _put_facts(self) -> None:
        facts = self._facts or {**self._collect(), "journal_mode": self._file.journal_mode}
        facts = facts | torch_facts()
        self._file.set_facts(facts)
        self._facts = facts

    def _attempt(self, action: Callable[[], None]) -> Exception | None:
        try:
            self._make_ready()
            action()
        except Exception as error:  # whatever it is, the training goes on and the writer lives
            self.fail(error)
            return error
        self._failures = 0
        self.last_error = None
        return None


def _warn(message: str) -> None:
    try:
        warnings.warn(message, RuntimeWarning, stacklevel=3)
    except RuntimeWarning:  # warnings are errors here: the writer lives on all the same
        with contextlib.suppress(OSError, ValueError):  # there may be no standard error any more
            print(f"pytracker: {message}", file=sys.stderr)

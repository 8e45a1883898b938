"""Closes runs and trackers at interpreter exit, or at a signal, if the user did not."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import weakref
from typing import Any, Protocol

from .errors import in_words

_signalled: list[int] = []
"""Signals that have ended the program."""


class Closable(Protocol):
    """Something that ends well, or with an error in words."""

    def close(self, *, error: str | None = None) -> None:
        """End."""


def uncaught() -> str | None:
    """Return in words the exception with which the interpreter ends; None where it ends as it should."""
    if _signalled:
        return f"ended by {signal.Signals(_signalled[-1]).name}"
    error = getattr(sys, "last_value", None)
    at_a_prompt = hasattr(sys, "ps1")  # where an old error says nothing about the end
    return None if error is None or at_a_prompt else in_words(error)


class CloseAtExit:
    """Closes something when the run that it writes or the interpreter ends, if it is there still.

    What is registered later ends first: a tracker before its run. A fork leaves it to its parent.
    """

    def __init__(self, closable: Closable) -> None:
        self._reference, self._owner, self._is_forgotten = weakref.ref(closable), os.getpid(), False
        atexit.register(self._at_exit)

    def close_before(self, run: Any) -> None:
        """Close it before a run finishes."""
        if hasattr(run, "before_finish"):
            run.before_finish(self._close)

    @property
    def is_ours(self) -> bool:
        """Whether this is the process that it belongs to, and no fork."""
        return os.getpid() == self._owner

    @property
    def closed(self) -> bool:
        """Whether there is nothing to close any more."""
        return self._is_forgotten or self._reference() is None

    def forget(self) -> None:
        """Leave it as it is."""
        self._is_forgotten = True
        atexit.unregister(self._at_exit)

    def _at_exit(self) -> None:
        self._close(uncaught())

    def _close(self, error: str | None) -> None:
        there = self._reference()
        if there is not None and self.is_ours:
            there.close(error=error)


_guarded: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
"""What a signal is to close, and the process that it belongs to."""


def exit_on_signals(*closables: Any) -> None:
    """Make SIGTERM and SIGHUP end the program by SystemExit (128 + the signal), as Ctrl-C ends it by an exception.

    Their default kills the process where it stands: so they do again where all of these are ``closed``, and in a fork.
    A signal that the program handles or ignores is left as it is; from another thread than the main one, nothing can be
    set.
    """
    ours = [each for each in closables if hasattr(each, "closed")]  # a run of the user's may lack it
    _guarded.update((each, os.getpid()) for each in ours)
    if threading.current_thread() is not threading.main_thread():
        return
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _exit)


def _exit(number: int, frame: Any) -> None:
    if not any(owner == os.getpid() and not each.closed for each, owner in list(_guarded.items())):
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        return
    _signalled.append(number)
    raise SystemExit(128 + number)

"""One writer for each run: a lock that the kernel drops when its process dies, however it dies."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import sys
import time
import weakref
from pathlib import Path

from ..errors import RunLockedError

if sys.platform != "win32":
    import fcntl

LOCK_NAME = "run.lock"
_PATIENCE_SECONDS = 0.3  # a reader that asks `is_locked` holds a shared lock for some microseconds

_held: weakref.WeakSet[RunLock] = weakref.WeakSet()


class RunLock:
    """An exclusive lock on a run's folder, from construction to ``release``.

    ``flock`` and not ``lockf``: closing any file of the process would drop the latter, and one process could take it
    twice. A fork shares a flock with its parent, so children drop their share of it (``_drop_after_fork``): a worker
    that outlives a killed training doesn't keep the run locked.
    """

    def __init__(self, folder: Path, name: str) -> None:
        """Take the lock.

        Raises:
            RunLockedError: another writer has it; the message says which.
            OSError: the lock file cannot be made.
        """
        self._file = open(folder / LOCK_NAME, "ab+", buffering=0)  # noqa: SIM115 - it is closed by `release`
        try:
            self._take(name)
            self._file.truncate(0)
            holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
            self._file.write(json.dumps(holder).encode())
        except BaseException:
            self._file.close()
            raise
        _held.add(self)

    def _take(self, name: str) -> None:
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not _try_lock(self._file.fileno(), exclusive=True):
            if time.monotonic() > deadline:
                raise RunLockedError(
                    f"run {name!r} is being written by {self._holder()}: wait for it, stop it, or choose another name"
                )
            time.sleep(0.02)

    def _holder(self) -> str:
        try:
            holder = json.loads(os.pread(self._file.fileno(), 4096, 0))
            return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
        except (ValueError, KeyError, OSError):
            return "another process"

    @property
    def is_unlinked(self) -> bool:
        """Whether the lock's file was deleted, as a folder's that is removed."""
        return os.fstat(self._file.fileno()).st_nlink == 0

    def release(self) -> None:
        """Give the lock up; more than once is fine."""
        self._file.close()


def _try_lock(descriptor: int, *, exclusive: bool) -> bool:
    """Try to lock. True where locks don't exist (some network mounts; Windows): nothing can be refused there."""
    if sys.platform == "win32":
        return True
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL):
            raise
    return True


def is_locked(folder: Path) -> bool:
    """Tell whether a process is writing the run in ``folder`` now."""
    try:
        descriptor = os.open(folder / LOCK_NAME, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return not _try_lock(descriptor, exclusive=False)
    finally:
        os.close(descriptor)


def _drop_after_fork() -> None:
    for lock in list(_held):
        with contextlib.suppress(OSError):
            lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_drop_after_fork)

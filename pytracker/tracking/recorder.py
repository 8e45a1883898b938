"""Where a tracker records: a run on disk, or what stands in for it in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .._checks import path, wrong_type
from .._warn import warn_user
from ..history import Recorder
from ..store import Run


def opened(run: Any) -> Any:
    """Return the run to write: the one given, a new one in the directory given, or one in memory.

    Raises:
        InvalidTypeError: ``run`` is none of these.
    """
    if run is None:
        return InMemoryRun()
    if isinstance(run, (str, Path)):
        return Run(path("run", run))
    if not hasattr(run, "log_many"):
        raise wrong_type("run", run, "a Run or a directory")
    if not isinstance(run, Run):
        return run
    run.open()
    if run.hand_over():
        warn_user(
            f"run {run.name!r} had a tracker, as where a notebook's cell runs again: that one is closed, and what it "
            "recorded moves into the run's archive"
        )
    return run


class InMemoryRun(Recorder):
    """Stands in for a run where there is none: keeps what a ``Run`` would, in memory only."""

    closed = True  # as far as the disk goes

    def flush(self, timeout: float = 30.0) -> None:
        return None

    def finish(self, state: str = "finished", *, error: str | None = None) -> None:
        return None

"""Where a tracker records: a run on disk, or what stands in for it in memory."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._checks import path, wrong_type
from ..history import History, Interval, ParameterHistory, ParameterInfo
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
    return run


class InMemoryRun:
    """Stands in for a run where there is none: keeps what a ``Run`` would, in memory only."""

    every_step = False

    def __init__(self) -> None:
        self.history = History()

    def log_many(self, steps: NDArray[np.int64], metrics: dict[str, NDArray[np.float64]]) -> None:
        for name, values in metrics.items():
            self.history[name].extend(values, steps)

    def set_parameters(self, infos: Iterable[ParameterInfo]) -> None:
        self.history.parameters = ParameterHistory(infos)

    def log_interval(self, interval: Interval) -> None:
        self.history.parameters.append(interval)

    def log_rows(self, steps: NDArray[np.int64], rows: NDArray[np.float64]) -> None:
        self.history.parameters.append_rows(steps, rows)

    def log_finding(self, finding: dict[str, Any]) -> None:
        known = self.history.findings
        place = next((i for i, other in enumerate(known) if other["key"] == finding["key"]), len(known))
        known[place : place + 1] = [finding]

    def set_meta(self, **facts: Any) -> None:
        self.history.meta.update(facts)

    def flush(self) -> None:
        return None

    def truncate(self, step: int) -> None:
        self.history.truncate(step)

    def finish(self, state: str = "finished", *, error: str | None = None) -> None:
        return None

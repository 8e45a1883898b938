"""All sinks of a tracker: what is recorded goes to each."""

from __future__ import annotations

import json
import logging
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import in_words
from .outbox import Event, Outbox
from .sink import RunInfo, SinkRows, check_made

if TYPE_CHECKING:
    from ..diagnostics import Finding
    from ..history import Interval

logger = logging.getLogger("pytracker")

CLOSE_TIMEOUT = 30.0
"""Seconds that the end of a training waits for its sinks."""

_MEMORY_LOCK = threading.Lock()
_MEMORY = "sinks.json"
"""The file in a run's folder that keeps what sinks want to know when it is resumed."""


class NoSinks:
    """Stands in where there is nothing to mirror: a tracker without sinks, and every rank but the first."""

    def begin(self, run: Any) -> None:
        return None

    def stamp(self, step: int) -> None:
        return None

    def truncate(self, step: int) -> None:
        return None

    def write(self, steps: NDArray[np.int64], series: Any, moments: NDArray[np.float64]) -> None:
        return None

    def late(self, step: int, values: Mapping[str, float]) -> None:
        return None

    def parameters(self, interval: Interval) -> None:
        return None

    def finding(self, finding: Finding) -> None:
        return None

    def flush(self) -> None:
        return None

    def close(self, error: str | None = None) -> None:
        return None


class Sinks(NoSinks):
    """Gives every sink what is recorded, each on a thread of its own. Nothing here waits but ``close``.

    Args:
        sinks: sinks, or functions that make one. One that cannot be made is left out, with a warning.
        options: of each ``Outbox``.
    """

    def __init__(self, sinks: Iterable[Any], **options: Any) -> None:
        self._sinks: dict[str, Any] = {}
        for given in sinks:
            try:
                sink = given if hasattr(given, "write") and not isinstance(given, type) else given()
                check_made(sink, given)
            except Exception as problem:  # noqa: PERF203 - on this rank alone: to raise would leave the others waiting
                warnings.warn(
                    f"a sink could not be made, and is left out: {in_words(problem)}", RuntimeWarning, stacklevel=4
                )
            else:
                self._sinks[_label(sink, self._sinks)] = sink
        self._options = options
        self._outboxes: dict[str, Outbox] = {}
        self._times: dict[int, float] = {}  # of steps that have not arrived yet
        self._run: Any = None
        self._first_step = self._recorded = 0
        self._opened = False
        self._early: list[Finding] = []  # of a resumed run, which may go back to an earlier step before it goes on

    def begin(self, run: Any) -> None:
        """Say which run is mirrored. The sinks are opened when there is something for them."""
        self._run, self._recorded = run, run.history.last_step + 1
        self._outboxes = {label: Outbox(sink, label, **self._options) for label, sink in self._sinks.items()}

    def stamp(self, step: int) -> None:
        """Note that ``step`` is recorded now."""
        self._times[step] = time.time()

    def truncate(self, step: int) -> None:
        """The next step will be ``step``."""
        self._times.clear()
        if self._opened:
            self._put("truncate", step)
        else:
            self._first_step = step

    def write(self, steps: NDArray[np.int64], series: Any, moments: NDArray[np.float64]) -> None:
        """Give the values of consecutive steps; see ``SinkRows``."""
        times = np.array([self._times.pop(step, 0.0) or time.time() for step in steps.tolist()], np.float64)
        values = sum(len(places) for places, _ in series.values()) + moments.size
        self._put("write", SinkRows(steps, times, series, moments), values=values, steps=(steps[0], steps[-1]))

    def late(self, step: int, values: Mapping[str, float]) -> None:
        """Give values for a step that has been written, or will be soon."""
        self._put("late", step, time.time(), dict(values), values=len(values), steps=(step, step))

    def parameters(self, interval: Interval) -> None:
        """Give what a drain says of every parameter."""
        span = (interval.first_step, interval.last_step)
        self._put("parameters", interval, values=len(interval.norm_last), steps=span)

    def finding(self, finding: Finding) -> None:
        """Give a finding that is new or has grown."""
        if self._opened:
            self._put("finding", finding, values=1, steps=(finding.first_step, finding.last_step))
        else:
            self._early.append(finding)

    def flush(self) -> None:
        """Say that now is a good moment to write what is buffered."""
        if self._opened:
            self._put("flush")

    def close(self, error: str | None = None) -> None:
        """Wait until the sinks have taken what waits, but not for ever, and close them; a warning says what is lost."""
        self._open()
        deadline = time.monotonic() + CLOSE_TIMEOUT
        for outbox in self._outboxes.values():
            outbox.begin_close(error, deadline)
        for outbox in self._outboxes.values():
            closed, lost = outbox.join(), outbox.lost
            if lost.values or not closed:
                warnings.warn(
                    f"the sink {outbox.label} lost {lost.values} values of steps {lost.first_step} to "
                    f"{lost.last_step}: {lost.error}; the tracker's own history and run have them",
                    RuntimeWarning,
                    stacklevel=3,
                )

    def _put(self, method: str, *arguments: Any, values: int = 0, steps: tuple[int, int] = (0, 0)) -> None:
        self._open()
        event = Event(method, arguments, values, (int(steps[0]), int(steps[1])))
        for outbox in self._outboxes.values():
            outbox.put(event)

    def _open(self) -> None:
        if self._opened:
            return
        self._opened = True
        run, directory = self._run, getattr(self._run, "path", None)
        memory = _Memory(directory)
        for label, outbox in self._outboxes.items():
            info = RunInfo(
                name=getattr(run, "name", None),
                directory=directory,
                config=getattr(run, "config", {}),
                meta=dict(run.history.meta),
                parameters=tuple(run.history.parameters.infos),
                first_step=self._first_step,
                recorded=self._recorded,
                remembered=memory.of(label) if self._recorded else {},
            )
            outbox.put(Event("open", (info,), done=memory.keeper(label)))
        for finding in self._early:
            self.finding(finding)


class _Memory:
    """What the sinks of a run want to know when it is resumed: a file in its folder."""

    def __init__(self, directory: Path | None) -> None:
        self._path = None if directory is None else directory / _MEMORY

    def of(self, label: str) -> dict[str, Any]:
        """Return what the sink ``label`` wanted to be remembered."""
        try:
            kept = json.loads(self._path.read_text(encoding="utf-8")) if self._path is not None else {}
        except (OSError, ValueError):
            kept = {}
        found = kept.get(label) if isinstance(kept, dict) else None
        return found if isinstance(found, dict) else {}

    def keeper(self, label: str) -> Callable[[Any], None]:
        """Return what keeps the result of ``open`` of the sink ``label``."""
        return lambda result: self._keep(label, result)

    def _keep(self, label: str, result: Any) -> None:
        if self._path is None or not isinstance(result, dict):
            return
        try:
            with _MEMORY_LOCK:
                kept = json.loads(self._path.read_text(encoding="utf-8")) if self._path.exists() else {}
                self._path.write_text(json.dumps({**kept, label: result}), encoding="utf-8")
        except (OSError, ValueError, TypeError) as problem:
            logger.warning("the sink %s cannot be continued if the run is resumed: %s", label, in_words(problem))


def _label(sink: Any, taken: Iterable[str]) -> str:
    """Return what messages call a sink: its class, and a number where there are several of it."""
    kind, number = type(sink).__name__, 1
    label = kind
    while label in taken:
        number += 1
        label = f"{kind}-{number}"
    return label

"""Run: what a training writes while it runs."""

from __future__ import annotations

import atexit
import operator
import os
import sqlite3
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, SupportsFloat

import numpy as np
from numpy.typing import ArrayLike

from .._atexit import uncaught
from .._checks import real_number
from ..errors import ClosedError, InvalidTypeError, InvalidValueError, StoreError, in_words
from ..history import DEFAULT_INTERVAL_BYTES, History, Interval, ParameterHistory, ParameterInfo
from .encoding import decode, encode
from .file import RunFile, check_same_parameters
from .names import checked_name, readable_name
from .pending import ExactRows, Pending, Points
from .reading import load_run
from .schema import FILE_NAME
from .writer import Writer

STATES: Final = ("finished", "failed")
_NAME_TRIES: Final = 20


class Run:
    """One training on disk: a folder with one SQLite file in it, written by a thread of its own.

    ``log`` never waits for the disk. Where the disk fails, the training goes on, one warning says so, and what was
    logged waits in memory until it works again.

    Args:
        directory: the folder that holds the runs.
        name: the run's name and the name of its folder; a readable one that is free by default.
        config: what the training was started with: a mapping, a dataclass or an ``argparse.Namespace``.
        resume: go on with the run ``name`` where it exists. What it holds at the first step logged now, and later,
            moves into the file's archive tables, so that no curve is doubled.
        every_step: write the exact moments of every parameter at every step too (``log_rows``): 48 bytes for each
            parameter and step.
        flush_seconds: what is older than this is on disk, also when the process is killed.
        max_pending_bytes: how much may wait in memory while the disk fails. Beyond it the oldest per-parameter blobs go
            first, then the oldest metrics; both are counted in the file.

    Raises:
        InvalidValueError: the name can't be a folder's name, or a number is out of range.
        StoreError: the run exists and ``resume`` is False.
        RunLockedError: another process is writing it.
        RunFormatError: the file in its folder is not a run.

    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> with Run(folder, name="first", config={"lr": 0.1}) as run:
    ...     for step in range(3):
    ...         run.log(step, loss=1.0 / (step + 1))
    >>> load_run(run.path).history["loss"]
    Series([1.0, 0.5, 0.3333333333333333])
    """

    def __init__(
        self,
        directory: str | os.PathLike[str] = "runs",
        *,
        name: str | None = None,
        config: Any = None,
        resume: bool = False,
        every_step: bool = False,
        flush_seconds: float = 2.0,
        max_pending_bytes: int = 256 * 2**20,
    ) -> None:
        """Open the run and start its writer."""
        if not flush_seconds > 0:
            raise InvalidValueError(f"flush_seconds: expected a number above 0, got {flush_seconds!r}")
        if max_pending_bytes < 0:
            raise InvalidValueError(f"max_pending_bytes: expected 0 or more, got {max_pending_bytes!r}")
        if resume and name is None:
            raise InvalidValueError("resume: say which run to go on with: Run(name=..., resume=True)")
        self.directory = Path(directory)
        self.config: Any = {} if config is None else config
        self.every_step = every_step
        self.state = "running"
        self.history = History()
        self._owner = os.getpid()
        self._pending = Pending(max_pending_bytes)
        self.name = readable_name() if name is None else checked_name(name)
        resumed = name is not None and (self.path / FILE_NAME).exists()
        if resumed and not resume:
            raise StoreError(
                f"run {self.name!r} exists in {self.directory}: resume=True goes on with it; or choose another name"
            )
        file, problem = self._open_file(named=name is not None)
        self._seconds_before = 0.0
        self._truncate_at_first = resumed
        if resumed:
            try:
                self._load()
            except BaseException:
                file.close()
                file.release()
                raise
        self._started = time.monotonic()
        self._file = file
        self._writer = Writer(file, self._pending, flush_seconds=flush_seconds, working_directory=os.getcwd())
        if problem is not None:
            self._writer.fail(problem)
        self._writer.start()
        self._ends: list[Callable[[str | None], None]] = []
        atexit.register(self._at_exit)

    def _open_file(self, *, named: bool) -> tuple[RunFile, Exception | None]:
        """Open the file; a folder that can't be written now is the writer's to try again."""
        for _ in range(_NAME_TRIES):
            try:
                self.path.mkdir(parents=True, exist_ok=named)
                break
            except FileExistsError:
                self.name = readable_name()
            except OSError:
                break  # `open` below meets it again, and says what it is
        file = RunFile(self.path, name=self.name, config=self.config)
        try:
            file.open()
        except StoreError:
            file.close()
            file.release()
            raise
        except (OSError, sqlite3.Error) as error:
            return file, error
        return file, None

    def _load(self) -> None:
        stored = load_run(self.path)
        self.history = stored.load_history(parameters=True)
        self.history.parameters.max_interval_bytes = DEFAULT_INTERVAL_BYTES
        self._seconds_before = stored.seconds
        if not self.config:
            self.config = stored.config

    @property
    def path(self) -> Path:
        """The run's folder."""
        return self.directory / self.name

    @property
    def dropped_points(self) -> int:
        """Metric values that were given up because the disk failed for too long."""
        return self._pending.dropped_points

    @property
    def dropped_blobs(self) -> int:
        """Per-parameter records that were given up because the disk failed for too long."""
        return self._pending.dropped_blobs

    def log(self, step: int, /, **metrics: SupportsFloat) -> None:
        """Record one value of each metric at ``step``. Never waits for the disk; a tensor's device may be waited for.

        Raises:
            InvalidTypeError: the step is not an integer, or a value not a number. Nothing of the call is recorded.
            InvalidValueError: the step comes before the last one of a metric.
            ClosedError: the run is finished, or this is a fork of the process that writes it.
        """
        at = self._begin(step)
        history = self.history
        values: dict[str, float] = {}
        for name, value in metrics.items():
            values[name] = value if type(value) is float else real_number(f"metric {name!r}", value)
            history[name].check_step(at)
        for name, number in values.items():
            history[name].append(number, at)
        self._pending.add_points(Points(at, self._seconds(), values))

    def log_many(self, steps: ArrayLike, metrics: Mapping[str, ArrayLike]) -> None:
        """Record a value of each metric at each of ``steps``: int64 [n] and float64 [n] for each name.

        Raises:
            InvalidValueError: an array has another length, or the steps descend. Nothing of the call is recorded.
            ClosedError: as ``log``.
        """
        where = np.array(steps, np.int64)
        if not where.size:
            return
        self._begin(int(where[0]))
        arrays = {name: np.array(values, np.float64) for name, values in metrics.items()}
        for name, array in arrays.items():
            self.history[name].check_steps(where, len(array))
        for name, array in arrays.items():
            self.history[name].extend(array, where)
        self._pending.add_points(Points(where, self._seconds(), arrays))

    def set_parameters(self, infos: Iterable[ParameterInfo]) -> None:
        """Say which parameters the intervals and rows are about; call it once, before them.

        Raises:
            InvalidValueError: a resumed run was recorded with other parameters.
        """
        self._check_open()
        given = ParameterHistory(infos)
        if self.history.parameters.infos:
            check_same_parameters(self.name, self.history.parameters.infos, given.infos)
            return
        self.history.parameters = given
        rows = [
            (index, info.name, encode(info.shape), info.dtype, info.group, info.numel)
            for index, info in enumerate(given.infos)
        ]
        self._pending.add_document("parameters", "", rows)

    def log_interval(self, interval: Interval) -> None:
        """Record what an interval of steps says of every parameter."""
        self._begin(interval.first_step)
        self.history.parameters.append(interval)
        self._pending.add_blob(interval)

    def log_rows(self, steps: ArrayLike, rows: ArrayLike) -> None:
        """Keep the exact moments of single steps, int64 [n] and float64 [n, T, 6]; on disk only with ``every_step``."""
        where = np.array(steps, np.int64)
        if not where.size:
            return
        self._begin(int(where[0]))
        moments = np.asarray(rows, np.float64)
        self.history.parameters.append_rows(where, moments)
        if self.every_step:
            self._pending.add_blob(ExactRows(where, moments.copy()))

    def log_finding(self, finding: Mapping[str, Any]) -> None:
        """Record a finding; one with the same key (its "key", or rule, first step and parameters) is replaced."""
        self._check_open()
        document = dict(finding)
        key, text = finding_key(document), encode(document)
        known = self.history.findings
        place = next((index for index, other in enumerate(known) if finding_key(other) == key), len(known))
        known[place : place + 1] = [document]
        kept = decode(text)
        columns = [kept.get(name) for name in ("rule", "severity", "first_step", "last_step")]
        plain = [value if isinstance(value, (str, int, float)) else None for value in columns]
        self._pending.add_document("findings", key, [(key, *plain, text)])

    def set_meta(self, **facts: Any) -> None:
        """Record facts about the training: "optimizer", "clip_threshold", "scheduler", "every", ..."""
        self._check_open()
        rows = {key: [(key, encode(value))] for key, value in facts.items()}
        self.history.meta.update(facts)
        for key, row in rows.items():
            self._pending.add_document("meta", key, row)

    def truncate(self, step: int) -> None:
        """Go back to ``step``: what is recorded at it and later moves into the archive tables. Waits for the disk.

        A resumed run does this by itself at the first step logged.

        Raises:
            StoreError: the disk can't be written now.
        """
        self._check_open()
        step = operator.index(step)
        self._truncate_at_first = False
        self._order(lambda: self._file.truncate(step), "truncated")
        self.history.truncate(step)

    def flush(self, timeout: float = 30.0) -> None:
        """Wait until everything logged is on disk.

        Raises:
            StoreError: it can't be written now.
        """
        self._check_open()
        self._order(lambda: None, "flushed", timeout)

    def _order(self, action: Callable[[], None], done: str, timeout: float = 30.0) -> None:
        error = self._writer.order(action, timeout)
        if error is not None:
            raise StoreError(f"run {self.name!r} could not be {done}: {error}") from error

    def before_finish(self, end: Callable[[str | None], None]) -> None:
        """Have ``end`` called before the run finishes, with the error that it ends with or None: it may still write."""
        self._ends.append(end)

    def finish(self, state: str = "finished", *, error: str | None = None, timeout: float = 10.0) -> None:
        """Write what waits, note how it ended, and close. More than once is fine; so is a disk that fails.

        Where the disk fails for ``timeout`` seconds, a warning says how much could not be written.

        Raises:
            InvalidValueError: the state is neither "finished" nor "failed".
        """
        if state not in STATES:
            raise InvalidValueError(f"state: expected one of {', '.join(STATES)}, got {state!r}")
        if self.state != "running" or os.getpid() != self._owner:
            return
        for end in self._ends:  # what is still to be written, by a tracker for one
            end(error or (state if state == "failed" else None))
        if self.state != "running":
            return
        self.state = state
        atexit.unregister(self._at_exit)
        deadline = time.monotonic() + timeout
        problem = self._writer.order(lambda: self._file.finish(state, error), timeout)
        while problem is not None and time.monotonic() < deadline:
            time.sleep(0.25)
            problem = self._writer.order(lambda: self._file.finish(state, error), deadline - time.monotonic())
        self._writer.stop(max(1.0, deadline - time.monotonic()))
        if problem is None:
            self._file.close()
        else:
            message = f"run {self.name!r}: {len(self._pending)} values could not be written: {problem}"
            warnings.warn(message, RuntimeWarning, stacklevel=2)
        self._file.release()

    def __enter__(self) -> Run:
        """Return the run itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Finish: "failed" where an exception leaves the block, with its text."""
        if error is None:
            self.finish()
        else:
            self.finish("failed", error=in_words(error))

    def __repr__(self) -> str:
        """Say which run it is and how it stands."""
        return f"Run({str(self.path)!r}, {self.state}, last step {self.history.last_step})"

    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._started

    def _begin(self, step: int) -> int:
        """Check that ``step`` can be recorded now; the first one of a resumed run takes it back to there."""
        self._check_open()
        try:
            step = operator.index(step)
        except TypeError:
            raise InvalidTypeError(f"step: expected an int, got {type(step).__name__} {step!r}") from None
        if not 0 <= step < 2**63:
            raise InvalidValueError(f"step: expected 0 or more, got {step}")
        if self._truncate_at_first:
            if step <= self._last_recorded():
                self.truncate(step)
            self._truncate_at_first = False
        return step

    def _last_recorded(self) -> int:
        intervals = self.history.parameters.last_step
        return max(self.history.last_step, int(intervals[-1]) if len(intervals) else -1)

    def _check_open(self) -> None:
        if self.state != "running":
            raise ClosedError(
                f"run {self.name!r} is {self.state}: Run(name={self.name!r}, resume=True) goes on with it"
            )
        if os.getpid() != self._owner:
            raise ClosedError(f"run {self.name!r} belongs to process {self._owner}, and this is a fork of it")

    def _at_exit(self) -> None:
        error = uncaught()
        self.finish("finished" if error is None else "failed", error=error)


def finding_key(finding: Mapping[str, Any]) -> str:
    """Return what makes two findings the same: the "key" they give, or rule, first step and parameters."""
    given = finding.get("key")
    if given is not None:
        return str(given)
    return f"{finding.get('rule')}@{finding.get('first_step')}:{','.join(finding.get('parameters') or ())}"

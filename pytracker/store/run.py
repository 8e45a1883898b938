"""Run: what a training writes while it runs."""

from __future__ import annotations

import atexit
import os
import sqlite3
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from .._atexit import uncaught
from .._checks import by_name, flag, function, seconds, whole_number, wrong_type, wrong_value
from .._checks import path as checked_path
from .._json import decode, encode
from .._warn import warn_user
from ..errors import ClosedError, InvalidTypeError, InvalidValueError, StoreError, in_words
from ..history import (
    DEFAULT_INTERVAL_BYTES,
    Document,
    Entry,
    ExactRows,
    Interval,
    Points,
    Recorder,
    Truncation,
    finding_key,
)
from ..runfile import FILE_NAME
from .cell import running_cell
from .file import RunFile
from .names import checked_name, readable_name
from .pending import Batch, Pending
from .rank import rank_here
from .reading import read_run
from .writer import Writer

STATES: Final = ("finished", "failed")
DEFAULT_ROW_BYTES: Final = 256 * 2**20
_NAME_TRIES: Final = 20

_open: weakref.WeakValueDictionary[Path, Run] = weakref.WeakValueDictionary()
"""The runs that this process has opened, by folder: a notebook cell that runs again opens its run again."""


class Run(Recorder):
    """One training on disk: a folder with one SQLite file in it, written by a thread of its own.

    ``log`` never waits for the disk. Where the disk fails, the training goes on, one warning says so, and what was
    logged waits in memory until it works again.

    Where a cell of a notebook runs again and makes a run in the same directory, the one that it made before is
    finished, with its tracker, and a warning says so: it would stay open until the kernel ends, and grow no more.

    Every rank of a job may make the same run: one is written, by the rank whose tracker records, which is the first. On
    the other ranks it is not opened.

    Args:
        directory: the folder that holds the runs.
        name: the run's name and the name of its folder; a readable one that is free by default.
        config: what the training was started with: a mapping, a dataclass or an ``argparse.Namespace``.
        resume: go on with the run ``name`` where it exists. What it holds at the first step logged now, and later,
            moves into the file's archive tables, so that no curve is doubled.
        every_step: write the moments of every parameter at every step exactly, in float64, and all of them. By default
            they are written in float32, and the oldest go where they take more than ``max_row_bytes``.
        max_row_bytes: how much of the disk they may take then; 0 for none.
        flush_seconds: what is older than this is on disk, also when the process is killed.
        max_pending_bytes: how much may wait in memory while the disk fails. Beyond it the oldest per-parameter blobs go
            first, then the oldest metrics; both are counted in the file.
        snapshot: keep with each session's facts what differs from the commit in git (``git_diff``, of tracked files,
            at most a million characters), and the versions of all installed packages (``packages``).
        every_rank: open it whatever rank this is; for runs of single ranks, with names of their own.

    Raises:
        InvalidTypeError: an argument is of the wrong type.
        InvalidValueError: the name can't be a folder's name, a number is out of range, or the config can't be written.
        StoreError: the run exists and ``resume`` is False.
        RunLockedError: another process is writing it.
        RunFormatError: the file in its folder is not a run.

    >>> import tempfile
    >>> from pytracker import load_run
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
        *unnamed: Any,
        name: str | None = None,
        config: Any = None,
        resume: bool = False,
        every_step: bool = False,
        max_row_bytes: int = DEFAULT_ROW_BYTES,
        flush_seconds: float = 2.0,
        max_pending_bytes: int = 256 * 2**20,
        snapshot: bool = False,
        every_rank: bool = False,
    ) -> None:
        """Keep what the run is to be, and open it where this is the first rank."""
        super().__init__()
        by_name("Run", unnamed, 'directory, name="first"')
        resume, self.every_step = flag("resume", resume), flag("every_step", every_step)
        self._snapshot, every_rank = flag("snapshot", snapshot), flag("every_rank", every_rank)
        self._flush_seconds = seconds("flush_seconds", flush_seconds)
        max_pending_bytes = whole_number("max_pending_bytes", max_pending_bytes)
        if resume and name is None:
            raise InvalidValueError("resume: say which run to go on with: Run(name=..., resume=True)")
        self.directory = checked_path("directory", directory).absolute()  # wherever the program goes from here
        self.config: Any = {} if config is None else config
        self.state = "running"
        self._owner = os.getpid()
        self._pending = Pending(max_pending_bytes)
        self._is_named, self._resume = name is not None, resume
        self.name = readable_name() if name is None else checked_name(name)
        self._encoded_config = encode(self.config, "config")
        self._max_row_bytes = whole_number("max_row_bytes", max_row_bytes)
        self._cell = running_cell()
        self._ending = self._is_handed_over = self._truncate_at_first = False
        self._ends: list[Callable[[str | None], None]] = []
        self._seconds_before, self._started = 0.0, time.monotonic()
        self._is_open = self._has_warned = False
        self._file: RunFile
        self._writer: Writer
        if every_rank or rank_here() == 0:
            self.open()

    def open(self) -> None:
        """Open the file and start its writer, where that isn't done: on a later rank that writes all the same.

        Raises:
            ClosedError: the run is finished.
            StoreError: the run exists, or can't be opened.
        """
        if self._is_open:
            return
        self._check_open()
        self._close_stale()
        resumed = self._is_named and (self.path / FILE_NAME).exists()
        if resumed and not self._resume:
            raise StoreError(
                f"run {self.name!r} exists in {self.directory}: resume=True goes on with it; or choose another name"
            )
        if resumed and (earlier := _open.get(self.path)) is not None and earlier.state == "running":
            warn_user(f"run {self.name!r} was still open in this process; that Run and its tracker are closed now")
            earlier.finish()
        self._truncate_at_first = resumed
        file, problem = self._open_file()
        try:
            if resumed:
                self._load()
                file.config = encode(self.config, "config")  # for a file that has to be begun again
            self._started = time.monotonic()
            self._file = file
            self._writer = Writer(
                file,
                self._pending,
                self._everything,
                flush_seconds=self._flush_seconds,
                working_directory=os.getcwd(),
                snapshot=self._snapshot,
            )
            if problem is not None:
                self._writer.fail(problem)
            self._writer.start()
            atexit.register(self._at_exit)
            _open[self.path] = self
            self._is_open = True
        except BaseException:
            file.close()
            file.release()
            raise

    def _close_stale(self) -> None:
        """Close the runs that an earlier execution of this notebook's cell made in this directory and left open."""
        for run in list(_open.values()):
            is_stale = run.state == "running" and self._cell is not None and self._cell.is_again(run._cell)
            if is_stale and run.directory == self.directory:
                warn_user(
                    f"run {run.name!r} was made by this cell when it ran before, and was still open; that Run and its "
                    "tracker are closed now"
                )
                run.finish()

    def _open_file(self) -> tuple[RunFile, Exception | None]:
        """Open the file; a folder that can't be written now is the writer's to try again."""
        for _ in range(_NAME_TRIES):
            try:
                self.path.mkdir(parents=True, exist_ok=self._is_named)
                break
            except FileExistsError:
                self.name = readable_name()
            except OSError:
                break  # `open` below meets it again, and says what it is
        file = RunFile(
            self.path,
            name=self.name,
            config=self._encoded_config,
            exact=self.every_step,
            max_row_bytes=self._max_row_bytes,
        )
        try:
            file.open()
        except (OSError, sqlite3.Error) as error:
            if not isinstance(error, StoreError):
                return file, error
            file.close()
            file.release()
            raise
        except BaseException:
            file.close()
            file.release()
            raise
        return file, None

    def _load(self) -> None:
        stored = read_run(self.path)
        self._history = stored.load_history(parameters=True)
        self._history.parameters.max_interval_bytes = DEFAULT_INTERVAL_BYTES
        self._seconds_before = stored.seconds
        if not self.config:
            self.config = stored.config

    @property
    def path(self) -> Path:
        """The run's folder."""
        return self.directory / self.name

    @property
    def closed(self) -> bool:
        """Whether it has finished."""
        return self.state != "running"

    @property
    def dropped_points(self) -> int:
        """Metric values that were given up: the disk failed for too long, or SQLite can't take them."""
        return self._pending.dropped_points + (self._file.points_set_aside if self._is_open else 0)

    @property
    def dropped_blobs(self) -> int:
        """Per-parameter records and documents that were given up, likewise."""
        return self._pending.dropped_blobs + (self._file.blobs_set_aside if self._is_open else 0)

    def flush(self, timeout: float = 30.0) -> None:
        """Wait until everything logged is on disk.

        Raises:
            InvalidTypeError, InvalidValueError: ``timeout`` is not a number of seconds.
            StoreError: it can't be written now.
        """
        timeout = seconds("timeout", timeout, zero=True)
        with self._lock:
            self._check_open()
            self._carry_out()
        self._order(lambda: None, "flushed", timeout)

    def _order(self, action: Callable[[], None], done: str, timeout: float = 30.0) -> None:
        error = self._writer.order(action, timeout) if self._is_open else None
        if error is not None:
            raise StoreError(f"run {self.name!r} could not be {done}: {error}") from error

    def before_finish(self, end: Callable[[str | None], None]) -> None:
        """Have ``end`` called before the run finishes, with the error that it ends with or None: it may still write.

        One that raises is reported by a warning, and the run finishes.
        """
        self._ends.append(function("end", end))

    def finish(self, state: str = "finished", *, error: str | None = None, timeout: float = 10.0) -> None:
        """Write what waits, note how it ended, and close. More than once is fine; so is a disk that fails.

        Where the disk fails for ``timeout`` seconds, a warning says how much could not be written. Where an exception
        such as ^C interrupts it, the run goes on running, and can be finished again.

        Raises:
            InvalidTypeError, InvalidValueError: the state is neither "finished" nor "failed", ``error`` is no text, or
                ``timeout`` is not a number of seconds. Nothing has changed then.
        """
        timeout = seconds("timeout", timeout, zero=True)
        if not isinstance(state, str) or state not in STATES:
            raise wrong_value("state", state, f"one of {', '.join(STATES)}")
        if error is not None and not isinstance(error, str):
            raise wrong_type("error", error, "a str")
        if self.state != "running" or os.getpid() != self._owner or self._is_handed_over:
            return
        self._call_ends(error or (state if state == "failed" else None))
        if self.state != "running":
            return
        with self._lock:
            self._carry_out()
            self._ending = True
        problem = self._note_end(state, error, time.monotonic() + timeout) if self._is_open else None
        atexit.unregister(self._at_exit)
        self.state = state
        if problem is not None:
            message = f"run {self.name!r}: {len(self._pending)} values could not be written: {problem}"
            warnings.warn(message, RuntimeWarning, stacklevel=2)

    def hand_over(self) -> bool:
        """Close the tracker that writes, if there was one, and go back to step 0: another takes its place.

        What has been recorded moves into the archive tables. Waits for the disk.

        Raises:
            StoreError: the disk can't be written now.
        """
        self._check_open()
        if not self._ends:
            return False
        self._is_handed_over = True  # so that the tracker leaves the run open
        try:
            self._call_ends(None)
        finally:
            self._is_handed_over = False
        self._ends.clear()
        self.truncate(0)
        return True

    def _call_ends(self, error: str | None) -> None:
        """Let those who still have something to write do so, a tracker for one."""
        for end in self._ends:
            try:
                end(error)
            except Exception as problem:  # noqa: PERF203 - each fails for itself
                message = f"run {self.name!r}: what was to be called before its end failed: {in_words(problem)}"
                warnings.warn(message, RuntimeWarning, stacklevel=3)

    def _note_end(self, state: str, error: str | None, deadline: float) -> Exception | None:
        """Write the end, close the file and give up the lock; all of it may be done again."""

        def left() -> float:
            return max(0.0, deadline - time.monotonic())

        problem = self._writer.order(lambda: self._file.finish(state, error), left())
        while problem is not None and left():
            time.sleep(min(0.25, left()))
            problem = self._writer.order(lambda: self._file.finish(state, error), left())
        self._writer.stop(max(1.0, left()))
        if problem is None:
            self._file.close()
        self._file.release()
        return problem

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
        state = self.state if self._is_open else f"not opened on rank {rank_here()}"
        return f"Run({str(self.path)!r}, {state}, last step {self.history.last_step})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Refuse to be pickled or copied: a run has one writer.

        Raises:
            InvalidTypeError: always.
        """
        raise InvalidTypeError(
            f"run {self.name!r} can't be pickled or copied, since one process writes it: pickle or copy its history, "
            f"or read it elsewhere with load_run({str(self.path)!r})"
        )

    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._started

    def _begin(self, step: Any, expected: str = "a whole number") -> int:
        """Check that ``step`` can be recorded now. The first step after a resume truncates the run to that step."""
        at = super()._begin(step, expected)
        if self._truncate_at_first:
            intervals = self._history.parameters.last_step
            if at <= max(self._history.last_step, int(intervals[-1]) if len(intervals) else -1):
                self.truncate(at)
            self._truncate_at_first = False
        return at

    def _check_open(self) -> None:
        if self.state != "running" or self._ending:
            state = "finishing" if self.state == "running" else self.state
            raise ClosedError(f"run {self.name!r} is {state}: Run(name={self.name!r}, resume=True) goes on with it")
        if os.getpid() != self._owner:
            raise ClosedError(f"run {self.name!r} belongs to process {self._owner}, and this is a fork of it")

    def _encoded(self, document: Document) -> Document:
        """Return the document with its rows, as SQL takes them.

        Raises:
            InvalidValueError: its value can't be written.
        """
        if document.table == "parameters":
            rows = [
                (index, info.name, encode(list(info.shape)), info.dtype, info.group, info.numel)
                for index, info in enumerate(document.value)
            ]
            return replace(document, rows=tuple(rows))
        encoded = encode(document.value, f"{document.table} {document.key!r}")
        if document.table == "meta":
            return replace(document, rows=((document.key, encoded),))
        kept = decode(encoded)
        columns = [kept.get(name) for name in ("rule", "severity", "first_step", "last_step")]
        return replace(document, rows=((document.key, *map(_plain, columns), encoded),))

    def _pass_on(self, entry: Entry) -> None:
        if not self._is_open:
            self._say_unopened()
        elif isinstance(entry, Truncation):
            self._order(lambda: self._file.truncate(entry.step), "truncated")
            self._truncate_at_first = False
        elif not isinstance(entry, ExactRows) or self.every_step or self._max_row_bytes:
            self._pending.add(entry)

    def _say_unopened(self) -> None:
        if not self._has_warned:
            self._has_warned = True
            warn_user(
                f"run {self.name!r} is written by the first rank alone, and this is rank {rank_here()}: what is logged "
                "to it here is not kept. For a run of each rank: Run(..., every_rank=True), with names of their own"
            )

    def _everything(self) -> Batch:
        """Return all that is in memory, and forget what waits, which is a part of it. The writer asks for it."""
        entered = self._lock.acquire(timeout=1.0)  # unless a thread waits in it for the writer, which changes nothing
        try:
            self._pending.done(self._pending.take())
            history = self._history
            points = []
            for name, series in list(history.items()):
                steps = series.steps
                if len(steps):
                    values = series.values[: len(steps)]
                    points.append(Points(steps, {name: values}, {name: 0}, self._seconds()))
            known = history.parameters
            documents = [Document("parameters", "", known.infos)] if known.infos else []
            documents += [Document("meta", key, value) for key, value in list(history.meta.items())]
            documents += [Document("findings", finding_key(each), each) for each in list(history.findings)]
            blobs: deque[Interval | ExactRows] = deque(known.intervals())
            if self.every_step or self._max_row_bytes:
                blobs.extend(ExactRows(steps, rows) for steps, rows in known.blocks())
            encoded = {(each.table, each.key): self._encoded(each) for each in documents}
            return Batch(deque(points), blobs, encoded)
        finally:
            if entered:
                self._lock.release()

    def _at_exit(self) -> None:
        error = uncaught()
        self.finish("finished" if error is None else "failed", error=error)


def _plain(value: Any) -> Any:
    """Return what a column of SQLite can hold; anything else stays in the document alone."""
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return None
    return value if isinstance(value, (str, int, float)) else None

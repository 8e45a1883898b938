"""One run's file, as its only writer sees it: open, write a batch, truncate, finish. All SQL that writes is here."""

from __future__ import annotations

import contextlib
import math
import sqlite3
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import repeat
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidValueError
from ..history import FIELDS, Interval, ParameterInfo, says_nothing
from .encoding import encode
from .lock import RunLock
from .pending import Batch, ExactRows, Points
from .schema import FORMAT, open_for_writing

CLOCK_SECONDS: Final = 0.1  # a clock row at most this often

_INTERVAL_SQL: Final = (
    f"INSERT OR REPLACE INTO intervals (first_step, last_step, {', '.join(FIELDS)}) "
    f"VALUES (?, ?, {', '.join('?' * len(FIELDS))})"
)
_DOCUMENT_SQL: Final = {
    "meta": "INSERT OR REPLACE INTO meta (key, value) VALUES (?, ?)",
    "findings": "INSERT OR REPLACE INTO findings (key, rule, severity, first_step, last_step, document) "
    "VALUES (?, ?, ?, ?, ?, ?)",
    "parameters": "INSERT OR REPLACE INTO parameters (id, name, shape, dtype, group_name, numel) "
    "VALUES (?, ?, ?, ?, ?, ?)",
}
_UPDATE_SERIES: Final = """
UPDATE series SET count = count + :count, last_step = :last_step, last = :last,
    minimum_step = CASE WHEN minimum IS NULL OR :minimum < minimum THEN :minimum_step ELSE minimum_step END,
    minimum = CASE WHEN minimum IS NULL OR :minimum < minimum THEN :minimum ELSE minimum END,
    maximum_step = CASE WHEN maximum IS NULL OR :maximum > maximum THEN :maximum_step ELSE maximum_step END,
    maximum = CASE WHEN maximum IS NULL OR :maximum > maximum THEN :maximum ELSE maximum END
WHERE id = :id
"""


class RunFile:
    """The file of one run, and the lock that makes this its only writer. Used by one thread at a time."""

    def __init__(self, folder: Path, *, name: str, config: Any) -> None:
        """Remember what to open; nothing is touched yet."""
        self.folder = folder
        self.name = name
        self.journal_mode = ""
        self._config = config
        self._lock: RunLock | None = None
        self._connection: sqlite3.Connection | None = None
        self._session: int | None = None
        self._series: dict[str, int] = {}
        self._next_clock = -math.inf

    @property
    def is_open(self) -> bool:
        """Whether the file is open."""
        return self._connection is not None

    def open(self) -> None:
        """Take the lock, open or create the file, and begin a session; goes on where an earlier try stopped.

        Raises:
            RunLockedError: another process writes it.
            RunFormatError: the file is not a run.
            OSError, sqlite3.Error: the folder or the file can't be used now.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._lock is None:
            self._lock = RunLock(self.folder, self.name)
        self._connection, self.journal_mode = open_for_writing(self.folder)
        with self._transaction() as connection:
            if connection.execute("SELECT count(*) FROM run").fetchone()[0] == 0:
                connection.execute(
                    "INSERT INTO run (name, created, config, readable_by) VALUES (?, ?, ?, ?)",
                    (self.name, time.time(), encode(self._config), FORMAT),
                )
            if self._session is None:
                now = time.time()
                sql = "INSERT INTO sessions (started, last_written, state) VALUES (?, ?, 'running')"
                self._session = connection.execute(sql, (now, now)).lastrowid
            self._series = dict(connection.execute("SELECT name, id FROM series"))

    def write(self, batch: Batch, dropped_points: int, dropped_blobs: int) -> None:
        """Write a batch in one transaction: all of it, or nothing and an exception."""
        with self._transaction() as connection:
            self._write_points(connection, batch.points)
            intervals = [blob for blob in batch.blobs if isinstance(blob, Interval)]
            connection.executemany(_INTERVAL_SQL, map(_interval_row, intervals))
            for blob in batch.blobs:
                if isinstance(blob, ExactRows):
                    moments = (np.ascontiguousarray(row, "<f8").tobytes() for row in blob.rows)
                    sql = "INSERT OR REPLACE INTO exact_rows (step, moments) VALUES (?, ?)"
                    connection.executemany(sql, zip(blob.steps.tolist(), moments, strict=True))
            for (table, _), rows in batch.documents.items():
                connection.executemany(_DOCUMENT_SQL[table], rows)
            connection.execute("UPDATE run SET dropped_points = ?, dropped_blobs = ?", (dropped_points, dropped_blobs))
            connection.execute("UPDATE sessions SET last_written = ? WHERE id = ?", (time.time(), self._session))

    def set_facts(self, facts: dict[str, Any]) -> None:
        """Note what is known of the process that writes."""
        with self._transaction() as connection:
            connection.execute("UPDATE sessions SET facts = ? WHERE id = ?", (encode(facts), self._session))

    def truncate(self, step: int) -> None:
        """Move everything at ``step`` and later into the archive tables; an interval that reaches it goes whole."""
        with self._transaction() as connection:
            sql = "INSERT INTO archives (created, from_step) VALUES (?, ?)"
            archive = connection.execute(sql, (time.time(), step)).lastrowid
            for table, column in _TRUNCATED.items():
                connection.execute(
                    f"INSERT INTO archived_{table} SELECT {archive}, * FROM {table} WHERE {column} >= ?", (step,)
                )
                connection.execute(f"DELETE FROM {table} WHERE {column} >= ?", (step,))
            connection.execute("DELETE FROM clock WHERE step >= ?", (step,))
            _summarize_again(connection)

    def finish(self, state: str, error: str | None) -> None:
        """Note how the session ended, and leave one file that can be copied."""
        with self._transaction() as connection:
            connection.execute(
                "UPDATE sessions SET state = ?, error = ?, ended = ? WHERE id = ?",
                (state, error, time.time(), self._session),
            )
        assert self._connection is not None
        with contextlib.suppress(sqlite3.OperationalError):  # someone reads it now: -wal and -shm stay, which is fine
            self._connection.execute("PRAGMA busy_timeout = 200")
            self._connection.execute("PRAGMA journal_mode = DELETE")

    def close(self) -> None:
        """Close the connection. The lock stays."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def release(self) -> None:
        """Give up the lock."""
        lock, self._lock = self._lock, None
        if lock is not None:
            lock.release()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        assert self._connection is not None, "the writer opens the file first"
        connection = self._connection
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield connection
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise

    def _write_points(self, connection: sqlite3.Connection, entries: Iterable[Points]) -> None:
        steps: defaultdict[str, list[int]] = defaultdict(list)
        values: defaultdict[str, list[float]] = defaultdict(list)
        clock: list[tuple[int, float]] = []
        for entry in entries:
            at = entry.steps
            if isinstance(at, int):
                last = at
                for name, value in entry.metrics.items():
                    steps[name].append(at)
                    values[name].append(value)
            else:
                last = int(at[-1])
                for name, array in entry.metrics.items():
                    steps[name].extend(at.tolist())
                    values[name].extend(array.tolist())
            if entry.seconds >= self._next_clock:
                clock.append((last, entry.seconds))
                self._next_clock = entry.seconds + CLOCK_SECONDS
        for name, series_values in values.items():
            series = self._series_id(connection, name)
            rows = zip(repeat(series), steps[name], series_values)
            connection.executemany("INSERT INTO points (series, step, value) VALUES (?, ?, ?)", rows)
            connection.execute(_UPDATE_SERIES, {"id": series, **_extremes(steps[name], series_values)})
        connection.executemany("INSERT OR REPLACE INTO clock (step, seconds) VALUES (?, ?)", clock)

    def _series_id(self, connection: sqlite3.Connection, name: str) -> int:
        known = self._series.get(name)
        if known is None:
            known = connection.execute("INSERT INTO series (name) VALUES (?)", (name,)).lastrowid
            assert known is not None
            self._series[name] = known
        return known


_TRUNCATED: Final = {
    "points": "step",
    "intervals": "last_step",
    "exact_rows": "step",
    "findings": "ifnull(last_step, first_step)",
}
"""What of each table rests on steps at which a truncation begins or later."""


def _extremes(steps: list[int], values: list[float]) -> dict[str, Any]:
    """What ``_UPDATE_SERIES`` needs of a batch; NaN is neither a minimum nor a maximum."""
    array = np.array(values)
    known = array[~np.isnan(array)]
    lowest = int(np.nanargmin(array)) if len(known) else 0
    highest = int(np.nanargmax(array)) if len(known) else 0
    return {
        "count": len(values),
        "last_step": steps[-1],
        "last": values[-1],
        "minimum": values[lowest],
        "minimum_step": steps[lowest],
        "maximum": values[highest],
        "maximum_step": steps[highest],
    }


def _summarize_again(connection: sqlite3.Connection) -> None:
    connection.execute(
        "DELETE FROM series WHERE id NOT IN (SELECT series FROM points UNION SELECT series FROM archived_points)"
    )
    for (series,) in connection.execute("SELECT id FROM series").fetchall():
        rows = connection.execute(
            "SELECT step, value FROM points WHERE series = ? ORDER BY rowid", (series,)
        ).fetchall()
        nothing = dict.fromkeys(("count", "last_step", "last", "minimum", "minimum_step", "maximum", "maximum_step"))
        connection.execute(
            "UPDATE series SET count = 0, last_step = :last_step, last = :last, minimum = :minimum, "
            "minimum_step = :minimum_step, maximum = :maximum, maximum_step = :maximum_step WHERE id = :id",
            {**nothing, "id": series},
        )
        if rows:
            steps = [step for step, _ in rows]
            values = [math.nan if value is None else value for _, value in rows]
            connection.execute(_UPDATE_SERIES, {"id": series, **_extremes(steps, values)})


def _interval_row(interval: Interval) -> tuple[Any, ...]:
    blobs = (_blob(field, np.asarray(getattr(interval, field))) for field in FIELDS)
    return (int(interval.first_step), int(interval.last_step), *blobs)


def _blob(field: str, array: NDArray[Any]) -> bytes | None:
    if says_nothing(field, array):
        return None
    return array.astype("<i8" if field == "first_nonfinite" else "<f4").tobytes()


def check_same_parameters(name: str, known: list[ParameterInfo], given: list[ParameterInfo]) -> None:
    """Raise ``InvalidValueError`` where a resumed run gets other parameters than it was recorded with."""
    for before, now in zip(known, given, strict=False):
        if (before.name, before.numel) != (now.name, now.numel):
            raise InvalidValueError(
                f"run {name!r} was recorded with parameter {before.name!r} of shape {list(before.shape)}, and now "
                f"{now.name!r} of shape {list(now.shape)} is in its place: record another model in another run"
            )
    if len(known) != len(given):
        raise InvalidValueError(
            f"run {name!r} was recorded with {len(known)} parameters, and now there are {len(given)}: "
            "record another model in another run"
        )

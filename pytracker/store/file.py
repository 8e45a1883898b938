"""One run's file, as its only writer sees it: open, write a batch, truncate, finish. All SQL that writes is here."""

from __future__ import annotations

import contextlib
import math
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .._checks import shown, writable
from .._json import decode, encode
from ..errors import StoreError
from ..history import Document, ExactRows, Interval, Points, says_nothing
from ..runfile import (
    FILE_NAME,
    FORMAT,
    MOST_POINTS,
    MOST_ROW_BYTES,
    RunLock,
    checksum,
    interval_fields,
    open_for_writing,
    pack_points,
    pack_rows,
    summary_of,
    unpack_points,
    unpack_rows,
)
from .pending import Batch

CLOCK_SECONDS: Final = 0.1  # a clock row at most this often, and for the last value of a batch

_BATCH_SQL: Final = (
    "INSERT INTO batches (series, first_step, last_step, count, points, checksum) VALUES (?, ?, ?, ?, ?, ?)"
)
_ROWS_SQL: Final = "INSERT OR REPLACE INTO exact_rows VALUES (?, ?, ?, ?, ?, ?, ?)"
_DOCUMENT_SQL: Final = {
    "meta": "INSERT OR REPLACE INTO meta VALUES (?, ?, ?)",
    "findings": "INSERT OR REPLACE INTO findings VALUES (?, ?, ?, ?, ?, ?, ?)",
    "parameters": "INSERT OR REPLACE INTO parameters VALUES (?, ?, ?, ?, ?, ?, ?)",
}
_NOT_THE_DISK: Final = (
    sqlite3.DataError,
    sqlite3.IntegrityError,
    sqlite3.InterfaceError,
    sqlite3.ProgrammingError,
    ArithmeticError,
    LookupError,
    TypeError,
    ValueError,
)
"""What a value that can't be written raises: trying again won't help."""

_UPDATE_SERIES: Final = """
UPDATE series SET count = count + :count, last_step = :last_step, last = :last,
    minimum_step = CASE WHEN minimum IS NULL OR :minimum < minimum THEN :minimum_step ELSE minimum_step END,
    minimum = CASE WHEN minimum IS NULL OR :minimum < minimum THEN :minimum ELSE minimum END,
    maximum_step = CASE WHEN maximum IS NULL OR :maximum > maximum THEN :maximum_step ELSE maximum_step END,
    maximum = CASE WHEN maximum IS NULL OR :maximum > maximum THEN :maximum ELSE maximum END
WHERE id = :id
"""
_FORGET_SERIES: Final = """
UPDATE series SET count = 0, last_step = NULL, last = NULL, minimum = NULL, minimum_step = NULL, maximum = NULL,
    maximum_step = NULL WHERE id = ?
"""


class RunFile:
    """The file of one run, and the lock that makes this its only writer. Used by one thread at a time."""

    def __init__(self, folder: Path, *, name: str, config: str, exact: bool, max_row_bytes: int) -> None:
        """Remember what to open; nothing is touched yet."""
        self.folder = folder
        self.name = name
        self.journal_mode = ""
        self.is_empty_again = False  # another file is open than the one that was written: it needs everything
        self.points_set_aside = 0
        self.blobs_set_aside = 0
        self.reasons: list[str] = []  # what was set aside since the writer last looked, and why
        self.config = config
        self._row_format = "float64" if exact else "float32"
        self._max_row_bytes = math.inf if exact else max_row_bytes
        self._row_bytes = 0
        self._created = time.time()
        self._lock: RunLock | None = None
        self._connection: sqlite3.Connection | None = None
        self._identity: tuple[int, int] | None = None  # of the file that was written: its device and inode
        self._session: int | None = None
        self._series: dict[str, int] = {}
        self._previous: Points | None = None
        self._next_clock = -math.inf

    @property
    def is_open(self) -> bool:
        """Whether the file is open."""
        return self._connection is not None

    @property
    def is_lost(self) -> bool:
        """Whether the file that was written was deleted, or another one is at its path.

        A folder that was moved, or whose mount is away, is not lost: what was written is still somewhere.
        """
        if self._identity is None:
            return False
        try:
            return _identity(self.folder / FILE_NAME) != self._identity
        except OSError:
            return self.folder.is_dir() or (self._lock is not None and self._lock.is_unlinked)

    def open(self) -> None:
        """Take the lock, open or create the file, and begin a session; goes on where an earlier try stopped.

        Raises:
            RunLockedError: another process writes it.
            RunFormatError: the file is not a run.
            StoreError: it is another run's file, in the place of this one.
            OSError, sqlite3.Error: the folder or the file can't be used now.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._lock is None:
            self._lock = RunLock(self.folder, self.name)
        self._connection, self.journal_mode = open_for_writing(self.folder)
        with self._transaction() as connection:
            found = connection.execute("SELECT created FROM run").fetchone()
            if found is None:
                connection.execute(
                    "INSERT INTO run (name, created, config, readable_by) VALUES (?, ?, ?, ?)",
                    (self.name, self._created, self.config, FORMAT),
                )
            elif self._identity is None:
                self._created = found[0]
            elif self._created != found[0]:
                raise StoreError(f"{self.folder / FILE_NAME} is another run's: it was put in the place of this one's")
            if self._session is None:
                now = time.time()
                sql = "INSERT INTO sessions (started, last_written, state) VALUES (?, ?, 'running')"
                self._session = connection.execute(sql, (now, now)).lastrowid
            self._read_again(connection)
        identity = _identity(self.folder / FILE_NAME)
        self._identity = self._identity or identity
        self.is_empty_again = self.is_empty_again or self._identity != identity

    def abandon(self) -> None:
        """Let go of a file that is lost, with its lock, so that ``open`` begins another."""
        self.is_empty_again = True  # whichever file comes next: it may have the inode of this one
        self.close()
        self.release()
        self._session = None

    def begin_again(self, everything: Batch) -> None:
        """Write all that is in memory to a file that holds none of it, or what an earlier one held."""
        with self._transaction() as connection:
            connection.execute("DELETE FROM batches")
            for series in self._series.values():
                connection.execute(_FORGET_SERIES, (series,))
        self._previous = None
        self.write(everything, 0, 0)
        self._identity = _identity(self.folder / FILE_NAME)
        self.is_empty_again = False

    def write(self, batch: Batch, dropped_points: int, dropped_blobs: int) -> None:
        """Write a batch in one transaction: all of it, or nothing and an exception.

        What SQLite can't take is set aside alone, and named in ``reasons``; the rest is written.
        """
        try:
            self._write(batch, dropped_points, dropped_blobs, carefully=False)
        except _NOT_THE_DISK:
            assert self._connection is not None
            self._read_again(self._connection)
            self._write(batch, dropped_points, dropped_blobs, carefully=True)

    def _write(self, batch: Batch, dropped_points: int, dropped_blobs: int, *, carefully: bool) -> None:
        clock, next_clock = self._clock_rows(batch)
        with self._transaction() as connection:
            for part in self._parts(batch):
                if carefully:
                    self._attempt(connection, *part)
                else:
                    part[0](connection)
            connection.executemany("INSERT OR REPLACE INTO clock (step, seconds) VALUES (?, ?)", clock)
            connection.execute(
                "UPDATE run SET dropped_points = ?, dropped_blobs = ?",
                (dropped_points + self.points_set_aside, dropped_blobs + self.blobs_set_aside),
            )
            connection.execute("UPDATE sessions SET last_written = ? WHERE id = ?", (time.time(), self._session))
        self._next_clock = next_clock
        if batch.points:
            self._previous = batch.points[-1]

    def set_facts(self, facts: dict[str, Any]) -> None:
        """Note what is known of the process that writes."""
        with self._transaction() as connection:
            connection.execute("UPDATE sessions SET facts = ? WHERE id = ?", (encode(facts, "facts"), self._session))

    def truncate(self, step: int) -> None:
        """Move everything at ``step`` and later into the archive tables; an interval that reaches it goes whole."""
        with self._transaction() as connection:
            sql = "INSERT INTO archives (created, from_step) VALUES (?, ?)"
            archive = connection.execute(sql, (time.time(), step)).lastrowid
            assert archive is not None
            moved = _archive_points(connection, archive, step)
            connection.execute("UPDATE archives SET points = ? WHERE id = ?", (moved, archive))
            _split_rows(connection, step)
            for table, column in _MOVED_WHOLE.items():
                chosen = f"FROM {table} WHERE {column} >= ?"
                moved += connection.execute(f"SELECT count(*) {chosen}", (step,)).fetchone()[0]
                connection.execute(f"INSERT INTO archived_{table} SELECT {archive}, * {chosen}", (step,))
                connection.execute(f"DELETE {chosen}", (step,))
            connection.execute("DELETE FROM clock WHERE step >= ?", (step,))
            if not moved:
                connection.execute("DELETE FROM archives WHERE id = ?", (archive,))
        self._next_clock = -math.inf

    def finish(self, state: str, error: str | None) -> None:
        """Note how the session ended, and leave one file that can be copied."""
        with self._transaction() as connection:
            connection.execute(
                "UPDATE sessions SET state = ?, error = ?, ended = ? WHERE id = ?",
                (state, None if error is None else writable(error), time.time(), self._session),
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
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _read_again(self, connection: sqlite3.Connection) -> None:
        """Learn what the file holds, of which a transaction that failed may have left a wrong picture."""
        self._series = dict(connection.execute("SELECT name, id FROM series"))
        self._row_bytes = connection.execute("SELECT ifnull(sum(length(moments)), 0) FROM exact_rows").fetchone()[0]

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

    def _attempt(self, connection: sqlite3.Connection, part: _Part, name: str, points: int) -> None:
        connection.execute("SAVEPOINT part")
        try:
            part(connection)
        except _NOT_THE_DISK as error:
            connection.execute("ROLLBACK TO part")
            self.points_set_aside += points
            self.blobs_set_aside += not points
            self.reasons.append(f"{name} ({shown(error)})")
        connection.execute("RELEASE part")

    def _parts(self, batch: Batch) -> Iterator[tuple[_Part, str, int]]:
        """Return what writes each part of a batch, its name, and how many points it has."""
        for name, (steps, values) in self._points_by_series(batch).items():
            yield partial(self._write_points, name, steps, values), f"series {name!r}", len(steps)
        for blob in batch.blobs:
            if isinstance(blob, Interval):
                yield partial(_write_interval, blob), f"the interval from step {blob.first_step}", 0
            else:
                yield partial(self._write_rows, blob), f"the rows from step {blob.steps[0]}", 0
        for document in batch.documents.values():
            yield partial(_write_document, document), f"{document.table} {document.key!r}", 0

    def _points_by_series(self, batch: Batch) -> dict[str, tuple[list[int], list[float]]]:
        found: dict[str, tuple[list[int], list[float]]] = {}
        previous = self._previous
        for entry in batch.points:
            if entry is previous:  # it was left twice, by a thread that was interrupted
                continue
            previous = entry
            one = isinstance(entry.steps, int)
            steps = [entry.steps] if isinstance(entry.steps, int) else entry.steps.tolist()
            for name, values in entry.values.items():
                known = found.setdefault(name, ([], []))
                known[0].extend(steps)
                known[1].extend([values] if one else values.tolist())
        return found

    def _clock_rows(self, batch: Batch) -> tuple[list[tuple[int, float]], float]:
        rows, following = [], self._next_clock
        for entry in batch.points:
            if entry.seconds >= following or entry is batch.points[-1]:
                rows.append((entry.steps if isinstance(entry.steps, int) else int(entry.steps[-1]), entry.seconds))
                following = entry.seconds + CLOCK_SECONDS
        return rows, following

    def _write_points(self, name: str, steps: list[int], values: list[float], connection: sqlite3.Connection) -> None:
        known = self._series.get(name)
        if known is None:
            known = connection.execute("INSERT INTO series (name) VALUES (?)", (name,)).lastrowid
            assert known is not None
        for start in range(0, len(steps), MOST_POINTS):
            end = start + MOST_POINTS
            connection.execute(_BATCH_SQL, _batch_row(known, steps[start:end], values[start:end]))
        connection.execute(_UPDATE_SERIES, {"id": known, **vars(summary_of(steps, values))})
        self._series[name] = known

    def _write_rows(self, blob: ExactRows, connection: sqlite3.Connection) -> None:
        width = max(1, blob.rows[0].nbytes)
        count = max(1, MOST_ROW_BYTES // width)
        for start in range(0, len(blob.steps), count):
            end = start + count
            packed = pack_rows(blob.rows[start:end], self._row_format)
            connection.execute(_ROWS_SQL, _rows_row(blob.steps[start:end].tolist(), self._row_format, packed))
            self._row_bytes += len(packed)
        while self._row_bytes > self._max_row_bytes:
            oldest = "SELECT first_step, count, length(moments) FROM exact_rows ORDER BY first_step LIMIT 1"
            first, rows, size = connection.execute(oldest).fetchone()
            connection.execute("DELETE FROM exact_rows WHERE first_step = ?", (first,))
            connection.execute("UPDATE run SET dropped_rows = dropped_rows + ?", (rows,))
            self._row_bytes -= size


_Part: TypeAlias = Callable[[sqlite3.Connection], None]

_MOVED_WHOLE: Final = {
    "intervals": "last_step",
    "exact_rows": "first_step",
    "findings": "ifnull(last_step, first_step)",
}
"""What of each table rests on steps at which a truncation begins or later."""


def _identity(path: Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _batch_row(series: int, steps: Sequence[int], values: Sequence[float]) -> tuple[Any, ...]:
    row = (series, steps[0], steps[-1], len(steps), pack_points(steps, values))
    return (*row, checksum(*row))


def _rows_row(steps: list[int], format: str, packed: bytes) -> tuple[Any, ...]:
    row = (steps[0], steps[-1], len(steps), format, encode(steps), packed)
    return (*row, checksum(*row))


def _write_interval(interval: Interval, connection: sqlite3.Connection) -> None:
    blobs = (_blob(field, np.asarray(getattr(interval, field))) for field in interval_fields(connection))
    row = (int(interval.first_step), int(interval.last_step), *blobs)
    places = ", ".join("?" * (len(row) + 1))
    connection.execute(f"INSERT OR REPLACE INTO intervals VALUES ({places})", (*row, checksum(*row)))


def _write_document(document: Document, connection: sqlite3.Connection) -> None:
    rows = [(*row, checksum(*row)) for row in document.rows]
    connection.executemany(_DOCUMENT_SQL[document.table], rows)


def _blob(field: str, array: NDArray[Any]) -> bytes | None:
    if says_nothing(field, array):
        return None
    return array.astype("<i8" if field == "first_nonfinite" else "<f4").tobytes()


def _archive_points(connection: sqlite3.Connection, archive: int, step: int) -> int:
    """Move points into the archive, and return how many; a batch that reaches over ``step`` is cut in two."""
    moved, changed = 0, set()
    reached = connection.execute("SELECT id, series, points FROM batches WHERE last_step >= ?", (step,)).fetchall()
    for batch, series, points in reached:
        steps, values = unpack_points([points])
        cut = int(np.searchsorted(steps, step))
        connection.execute("DELETE FROM batches WHERE id = ?", (batch,))
        if cut:
            row = _batch_row(series, steps[:cut].tolist(), values[:cut].tolist())
            connection.execute("INSERT INTO batches VALUES (?, ?, ?, ?, ?, ?, ?)", (batch, *row))
        gone = _batch_row(series, steps[cut:].tolist(), values[cut:].tolist())
        connection.execute("INSERT INTO archived_batches VALUES (?, ?, ?, ?, ?, ?, ?)", (archive, *gone))
        moved += len(steps) - cut
        changed.add(series)
    for series in changed:
        connection.execute(_FORGET_SERIES, (series,))
        texts = connection.execute("SELECT points FROM batches WHERE series = ? ORDER BY id", (series,)).fetchall()
        steps, values = unpack_points([text for (text,) in texts])
        if len(steps):
            connection.execute(_UPDATE_SERIES, {"id": series, **vars(summary_of(steps.tolist(), values.tolist()))})
    return moved


def _split_rows(connection: sqlite3.Connection, step: int) -> None:
    """Cut the rows that reach over ``step`` in two."""
    width = connection.execute("SELECT count(*) FROM parameters").fetchone()[0]
    over = "SELECT format, steps, moments FROM exact_rows WHERE first_step < ? AND last_step >= ?"
    for format, text, moments in connection.execute(over, (step, step)).fetchall():
        steps = decode(text)
        rows = unpack_rows(moments, format, len(steps), width)
        cut = int(np.searchsorted(steps, step))
        for part in (slice(cut), slice(cut, None)):
            row = _rows_row(steps[part], format, pack_rows(rows[part], format))
            connection.execute(_ROWS_SQL, row)

"""Reading runs: one, or all in a folder; while they are written, after they were killed, on a laptop without torch."""

from __future__ import annotations

import math
import os
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from .._checks import path as checked_path
from ..errors import RunFormatError, RunNotFoundError, StoreError
from ..history import (
    COLUMNS,
    DEFAULT_ROW_BYTES,
    FIELDS,
    Float64Array,
    History,
    Int64Array,
    ParameterHistory,
    ParameterInfo,
    Series,
    html_table,
)
from .encoding import decode
from .lock import is_locked
from .schema import FILE_NAME, open_for_reading

if TYPE_CHECKING:
    import pandas as pd

UNREADABLE: Final = "unreadable"
_BLOB_TYPES: Final = {name: "<i8" if name == "first_nonfinite" else "<f4" for name in FIELDS}


@dataclass(frozen=True)
class SeriesSummary:
    """A series in a few numbers, kept by the writer: reading them costs the same for any length."""

    count: int
    last_step: int
    last: float
    minimum: float
    minimum_step: int
    maximum: float
    maximum_step: int


@dataclass(frozen=True)
class Session:
    """One process that wrote the run: the first, and one more for each resume. Times are Unix seconds."""

    started: float
    last_written: float
    ended: float | None
    state: str
    error: str | None
    facts: dict[str, Any]


@dataclass
class StoredRun:
    """A run as it is on disk, without its curves; ``history`` reads those when first asked for.

    ``state`` is "running" (a process writes it now), "finished", "failed" (an exception left the training),
    "interrupted" (it was killed, or its machine stopped), or "unreadable"; ``error`` then says why.
    """

    path: Path
    name: str
    state: str
    error: str | None = None
    created: float = math.nan
    config: Any = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
    sessions: list[Session] = field(default_factory=list)
    summaries: dict[str, SeriesSummary] = field(default_factory=dict)
    findings: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0  # of training, over all sessions, up to the last step kept
    dropped_points: int = 0
    dropped_blobs: int = 0
    archived_points: int = 0

    @property
    def last_step(self) -> int:
        """The last step of any series, -1 where there is none."""
        return max((summary.last_step for summary in self.summaries.values()), default=-1)

    @property
    def ended(self) -> float | None:
        """When the last session ended or last wrote (Unix seconds); None while it runs."""
        if self.state == "running" or not self.sessions:
            return None
        return self.sessions[-1].ended or self.sessions[-1].last_written

    @property
    def facts(self) -> dict[str, Any]:
        """Facts of the last session: command, host, versions, git commit, ..."""
        return self.sessions[-1].facts if self.sessions else {}

    @cached_property
    def parameters(self) -> list[ParameterInfo]:
        """The parameters, read when first asked for."""
        with self._open() as connection:
            return read_infos(connection)

    @cached_property
    def history(self) -> History:
        """Everything recorded, read once; ``load_run`` again for what a running training has written since."""
        return self.load_history(parameters=True)

    def load_history(self, *, parameters: bool) -> History:
        """Read the series, and the per-parameter intervals and rows only where ``parameters`` is True.

        Raises:
            RunFormatError: the run is unreadable.
        """
        with self._open() as connection:
            history = History()
            for name, series in read_points(connection)[0].items():
                history[name] = series
            history.meta = dict(self.meta)
            history.findings = list(self.findings)
            if parameters:
                history.parameters = read_intervals(connection, read_infos(connection))
                read_exact_rows(connection, history.parameters)
        return history

    def to_pandas(self) -> pd.DataFrame:
        """Return the series as a DataFrame, one row a step: ``history.to_pandas()``, without the parameters.

        Raises:
            MissingExtraError: pandas is not installed.
            RunFormatError: the run is unreadable.
        """
        return self.load_history(parameters=False).to_pandas()

    def _repr_html_(self) -> str:
        """Show the run in a notebook: its state, and each series in its last value and its range."""
        rows = [[name, each.last, each.minimum, each.maximum, each.count] for name, each in self.summaries.items()]
        title = f"{self.name}: {self.state}, {self.last_step + 1} steps, {len(self.findings)} findings"
        return html_table(title, ("series", "last", "lowest", "highest", "values"), rows, self.error or "")

    def latest_intervals(self, count: int) -> ParameterHistory:
        """Read the last ``count`` per-parameter intervals, without the rest of the history."""
        with self._open() as connection:
            return read_intervals(connection, read_infos(connection), latest=count)

    def interval_parts(self, cells: int) -> Iterator[ParameterHistory]:
        """Read the per-parameter intervals in parts of about ``cells`` intervals times parameters, in their order.

        So a run of any length can be passed on within a bounded memory.
        """
        with self._open() as connection:
            infos = read_infos(connection)
            after = -1
            while len(
                part := read_intervals(connection, infos, after=after, limit=max(1, cells // max(1, len(infos))))
            ):
                yield part
                after = int(part.first_step[-1])

    def clock(self) -> tuple[Int64Array, Float64Array]:
        """Return steps and the training seconds at which they were logged, ascending; a few rows a second at most."""
        with self._open() as connection:
            rows = connection.execute("SELECT step, seconds FROM clock ORDER BY step").fetchall()
        return _clock_arrays(rows)

    def _open(self) -> Any:
        if self.state == UNREADABLE:
            raise RunFormatError(self.error)
        return open_for_reading(self.path)


def load_run(path: str | os.PathLike[str]) -> StoredRun:
    """Read the run at ``path``: its folder, or the file in it.

    Raises:
        RunNotFoundError: there is none.
        RunFormatError: the file is damaged, made by another program, or written by a newer version.
        StoreError: it cannot be read now.
    """
    path = checked_path("path", path)
    with open_for_reading(path) as connection:
        connection.execute("BEGIN")  # one view of the file for all that follows
        return _read_header(connection, path)


def list_runs(directory: str | os.PathLike[str] = "runs") -> list[StoredRun]:
    """Read every run in ``directory``, the newest first. What cannot be read is in the list too, as "unreadable".

    Raises:
        RunNotFoundError: there is no such folder.
    """
    folder = checked_path("directory", directory)
    if not folder.is_dir():
        raise RunNotFoundError(f"there is no folder {folder}; runs are written to 'runs' unless told otherwise")
    runs = [_load_or_explain(child) for child in sorted(folder.iterdir()) if (child / FILE_NAME).exists()]
    return sorted(runs, key=lambda run: -run.created if math.isfinite(run.created) else math.inf)


def find_run(text: str, directory: str | os.PathLike[str] = "runs") -> StoredRun:
    """Read the run that ``text`` means: a path, a name in ``directory``, or a part of one name there; "" is the newest.

    Raises:
        RunNotFoundError: there is none, or several.
    """
    folder = Path(directory)
    if not text:
        return load_run(_written_last(folder))
    for path in (Path(text), folder / text):
        if (path / FILE_NAME).exists() or path.is_file():
            return load_run(path)
    names = sorted(child.name for child in folder.iterdir() if (child / FILE_NAME).exists()) if folder.is_dir() else []
    matches = [name for name in names if text in name]
    if len(matches) == 1:
        return load_run(folder / matches[0])
    if matches:
        raise RunNotFoundError(f"{text!r} could be any of {', '.join(matches[:5])}: say more of the name")
    hint = f"runs there: {', '.join(names[-5:])}" if names else "no runs there"
    raise RunNotFoundError(f"there is no run {text!r}, neither as a path nor in {folder}; {hint}")


def _written_last(folder: Path) -> Path:
    runs = [child for child in folder.iterdir() if (child / FILE_NAME).exists()] if folder.is_dir() else []
    if not runs:
        raise RunNotFoundError(f"there is no run in {folder}; say which with a path, or where with --dir")

    def last_written(run: Path) -> float:
        files = (run / FILE_NAME, run / f"{FILE_NAME}-wal")
        return max(file.stat().st_mtime for file in files if file.exists())

    return max(runs, key=last_written)


def _load_or_explain(path: Path) -> StoredRun:
    try:
        return load_run(path)
    except StoreError as error:
        return StoredRun(path, path.name, UNREADABLE, str(error))


def _read_header(connection: sqlite3.Connection, path: Path) -> StoredRun:
    run = connection.execute("SELECT name, created, config, dropped_points, dropped_blobs FROM run").fetchone()
    if run is None:  # killed between making the file and naming it
        return StoredRun(path, path.name, "interrupted")
    name, created, config, dropped_points, dropped_blobs = run
    sessions = [
        Session(started, last_written, ended, state, error, decode(facts))
        for started, last_written, ended, state, error, facts in connection.execute(
            "SELECT started, last_written, ended, state, error, facts FROM sessions ORDER BY id"
        )
    ]
    last_clock_row = "(SELECT seconds FROM clock ORDER BY step DESC LIMIT 1)"
    return StoredRun(
        path=path,
        name=path.name if path.is_dir() else name,
        state=_state(path, sessions),
        error=sessions[-1].error if sessions else None,
        created=created,
        config=decode(config),
        meta={key: decode(value) for key, value in connection.execute("SELECT key, value FROM meta")},
        sessions=sessions,
        summaries=_read_summaries(connection),
        findings=[
            decode(row[0]) for row in connection.execute("SELECT document FROM findings ORDER BY first_step, rowid")
        ],
        seconds=connection.execute("SELECT ifnull(sum(seconds), 0) FROM " + last_clock_row).fetchone()[0],
        dropped_points=dropped_points,
        dropped_blobs=dropped_blobs,
        archived_points=connection.execute("SELECT count(*) FROM archived_points").fetchone()[0],
    )


def _state(path: Path, sessions: list[Session]) -> str:
    state = sessions[-1].state if sessions else "running"
    if state == "running" and not is_locked(path if path.is_dir() else path.parent):
        return "interrupted"
    return state


def _read_summaries(connection: sqlite3.Connection) -> dict[str, SeriesSummary]:
    rows = connection.execute(
        "SELECT name, count, last_step, ifnull(last, 'nan'), ifnull(minimum, 'nan'), minimum_step, "
        "ifnull(maximum, 'nan'), maximum_step FROM series WHERE count > 0 ORDER BY id"
    )
    return {
        name: SeriesSummary(count, last_step, float(last), float(low), low_step, float(high), high_step)
        for name, count, last_step, last, low, low_step, high, high_step in rows
    }


def read_points(connection: sqlite3.Connection, after: int = 0) -> tuple[dict[str, Series], int]:
    """Read the points with a rowid above ``after`` as series, and the last rowid seen. SQL's NULL is NaN."""
    names = dict(connection.execute("SELECT id, name FROM series ORDER BY id"))
    last = connection.execute("SELECT ifnull(max(rowid), 0) FROM points").fetchone()[0]
    rows = connection.execute(
        "SELECT series, step, ifnull(value, 'nan') FROM points WHERE rowid > ? AND rowid <= ? ORDER BY rowid",
        (after, last),
    )
    # No faster way from SQLite to numpy was found: no tuple is kept, no list is made.
    table = np.fromiter(chain.from_iterable(rows), np.float64).reshape(-1, 3)
    if not len(table):
        return {}, last
    series = table[:, 0].astype(np.int64)
    order = np.argsort(series, kind="stable")
    series, steps, values = series[order], table[order, 1].astype(np.int64), table[order, 2]
    bounds = np.flatnonzero(np.diff(series)) + 1
    starts, ends = [0, *bounds.tolist()], [*bounds.tolist(), len(series)]
    found = {}
    for start, end in zip(starts, ends, strict=True):
        name = names[int(series[start])]
        found[name] = Series(values[start:end], steps[start:end], name=name)
    return found, last


def read_infos(connection: sqlite3.Connection) -> list[ParameterInfo]:
    """Read the parameters, in the order of every blob."""
    rows = connection.execute("SELECT name, shape, dtype, group_name, numel FROM parameters ORDER BY id")
    return [ParameterInfo(name, tuple(decode(shape)), *rest) for name, shape, *rest in rows]


def read_intervals(
    connection: sqlite3.Connection,
    infos: list[ParameterInfo],
    *,
    latest: int | None = None,
    after: int = -1,
    limit: int = -1,
) -> ParameterHistory:
    """Read the per-parameter intervals; only the ``latest`` few, or at most ``limit`` that begin ``after`` a step."""
    width = len(infos)
    newest = "first_step IN (SELECT first_step FROM intervals ORDER BY first_step DESC LIMIT ?)"
    chosen = f"FROM intervals WHERE {newest} AND first_step > ? ORDER BY first_step LIMIT ?"
    which = (-1 if latest is None else latest, after, limit)
    steps = connection.execute(f"SELECT first_step, last_step {chosen}", which).fetchall()
    rows = connection.execute(f"SELECT {', '.join(FIELDS)} {chosen}", which)
    fields: dict[str, NDArray[Any]] = {}
    for index, row in enumerate(rows):
        for name, blob in zip(FIELDS, row, strict=True):
            if blob is None:
                continue
            if name not in fields:  # it has had nothing to tell up to here
                fields[name] = np.full((len(steps), width), FIELDS[name], _BLOB_TYPES[name])
            values = np.frombuffer(blob, _BLOB_TYPES[name])
            if len(values) != width:
                raise RunFormatError(
                    f"intervals.{name}: {len(values)} values in a blob, and there are {width} parameters"
                )
            fields[name][index] = values
    first, last = np.array(steps, np.int64).reshape(-1, 2).T
    return ParameterHistory.from_fields(infos, first, last, fields)


def read_exact_rows(connection: sqlite3.Connection, parameters: ParameterHistory) -> None:
    """Read the latest exact rows into ``parameters``, as many as fit the memory for them."""
    shape = (len(parameters.infos), len(COLUMNS))
    fit = DEFAULT_ROW_BYTES // max(8, 8 * shape[0] * shape[1] + 8)
    rows = connection.execute("SELECT step, moments FROM exact_rows ORDER BY step DESC LIMIT ?", (fit,)).fetchall()
    if rows:
        steps = [step for step, _ in reversed(rows)]
        moments = np.frombuffer(b"".join(blob for _, blob in reversed(rows)), "<f8")
        parameters.append_rows(steps, moments.reshape(len(rows), *shape))


class Tail:
    """A run that is read again and again while it grows: each time only what is new.

    ``run``, ``history`` and ``clock`` hold what the last ``read`` knew. Of the intervals, only the last few are kept.
    """

    def __init__(self, path: Path, *, intervals: int = 100) -> None:
        """Remember what to read."""
        self.path = path
        self.history = History()
        self.run: StoredRun
        self._intervals = intervals
        self._last_row = 0
        self._archives = -1
        self._infos: list[ParameterInfo] = []
        self.clock: tuple[Int64Array, Float64Array] = _clock_arrays([])  # the latest steps, and their training seconds

    def read(self) -> None:
        """Look at the file again."""
        with open_for_reading(self.path) as connection:
            connection.execute("BEGIN")
            self.run = _read_header(connection, self.path)
            archives = connection.execute("SELECT count(*) FROM archives").fetchone()[0]
            if archives != self._archives:  # a resume took rows away: begin again
                self.history, self._last_row, self._archives = History(), 0, archives
            found, self._last_row = read_points(connection, self._last_row)
            for name, series in found.items():
                self.history[name].extend(series.values, series.steps)
            self.history.findings = self.run.findings
            if not self._infos:
                self._infos = read_infos(connection)
            self.history.parameters = read_intervals(connection, self._infos, latest=self._intervals)
            rows = connection.execute("SELECT step, seconds FROM clock ORDER BY step DESC LIMIT 1000").fetchall()
        self.clock = _clock_arrays(rows[::-1])


def _clock_arrays(rows: list[tuple[int, float]]) -> tuple[Int64Array, Float64Array]:
    table = np.array(rows, np.float64).reshape(-1, 2)
    return table[:, 0].astype(np.int64), table[:, 1]

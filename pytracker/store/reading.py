"""Reading runs: one, or all in a folder; while they are written, after they were killed, on a laptop without torch.

A file may be damaged, or made by a stranger. Every value is checked as it is read, so that a bad run is refused by
``RunFormatError`` and the others are shown.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from .._checks import flag
from .._checks import path as checked_path
from ..errors import RunFormatError, RunNotFoundError, StoreError
from ..history import Float64Array, History, Int64Array, ParameterHistory, ParameterInfo, html_table
from ..runfile import (
    FILE_NAME,
    Cells,
    Connection,
    SeriesSummary,
    is_locked,
    open_for_reading,
    read_clock,
    read_documents,
    read_exact_rows,
    read_findings,
    read_infos,
    read_intervals,
    read_points,
    what_is_damaged,
)

if TYPE_CHECKING:
    import pandas as pd

UNREADABLE: Final = "unreadable"
DEFAULT_DIRECTORY: Final = "runs"
_FACTS: Final[dict[str, type]] = {
    **dict.fromkeys(("command", "working_directory", "host", "platform", "python", "torch", "pytracker"), str),
    **dict.fromkeys(("git_commit", "git_diff", "journal_mode"), str),
    **{"pid": int, "cpus": int, "devices": list, "packages": dict, "git_dirty": bool},
}
_HEADER: Final = """
SELECT name, created, config, dropped_points, dropped_blobs, dropped_rows,
    ifnull((SELECT seconds FROM clock ORDER BY step DESC LIMIT 1), 0.0), ifnull((SELECT sum(points) FROM archives), 0)
FROM run LIMIT 1
"""
_STATES: Final = ("running", "finished", "failed")


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
    dropped_rows: int = 0
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

        A batch whose checksum is wrong is left out, with a warning.

        Raises:
            RunFormatError: the run is unreadable.
        """
        parameters = flag("parameters", parameters)
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
            return read_clock(connection)

    def _open(self) -> Any:
        if self.state == UNREADABLE:
            raise RunFormatError(self.error)
        return open_for_reading(self.path)


def load_run(run: str | os.PathLike[str], directory: str | os.PathLike[str] = DEFAULT_DIRECTORY) -> StoredRun:
    """Read the run that ``run`` means: a path (its folder, or the file in it), or its name in ``directory``.

    A part of a name is enough where only one run there has it.

    Raises:
        InvalidTypeError: ``run`` or ``directory`` is neither a str nor a path.
        RunNotFoundError: there is no such run, or there are several.
        RunFormatError: the file is damaged, made by another program, or written by a newer version.
        StoreError: it cannot be read now.
    """
    return read_run(_place_of(run, directory))


def _place_of(run: str | os.PathLike[str], directory: str | os.PathLike[str]) -> Path:
    path, folder = checked_path("run", run), checked_path("directory", directory)
    if not str(run):
        raise RunNotFoundError("run is ''; expected a path or a name")
    for place in (path, folder / path):
        if _is_run(place) or os.path.isfile(place):
            return place
    if len(path.parts) > 1 or os.path.isdir(path):
        raise RunNotFoundError(f"there is no run at {path}: {path / FILE_NAME} does not exist")
    text, names = str(run), sorted(child.name for child in _runs_in(folder))
    matches = [name for name in names if text in name]
    if len(matches) == 1:
        return folder / matches[0]
    if matches:
        raise RunNotFoundError(f"{text!r} could be any of {', '.join(matches[:5])}: say more of the name")
    hint = f"runs there: {', '.join(names[-5:])}" if names else "no runs there"
    raise RunNotFoundError(f"there is no run {text!r}, neither as a path nor in {folder}; {hint}")


def find_run(run: str, directory: str | os.PathLike[str] = DEFAULT_DIRECTORY) -> StoredRun:
    """Read a run as ``load_run`` does; "" is the one that was written last.

    Raises:
        RunNotFoundError: there is no such run, or there are several.
    """
    return load_run(run, directory) if run else read_run(newest_run(directory))


def newest_run(directory: str | os.PathLike[str] = DEFAULT_DIRECTORY) -> Path:
    """Return where the run is that was written last.

    Raises:
        RunNotFoundError: there is none.
    """
    runs = _runs_in(checked_path("directory", directory))
    if not runs:
        raise RunNotFoundError(f"there is no run in {directory}; say which with a path, or where with --dir")
    return max(runs, key=_last_written)


def _last_written(run: Path) -> float:
    times = []
    for file in (run / FILE_NAME, run / f"{FILE_NAME}-wal"):
        with contextlib.suppress(OSError):
            times.append(file.stat().st_mtime)
    return max(times, default=0.0)


def list_runs(directory: str | os.PathLike[str] = DEFAULT_DIRECTORY) -> list[StoredRun]:
    """Read every run in ``directory``, the newest first. What cannot be read is in the list too, as "unreadable".

    Raises:
        InvalidTypeError: ``directory`` is neither a str nor a path.
        RunNotFoundError: there is no such folder.
        StoreError: it cannot be read.
    """
    folder = checked_path("directory", directory)
    if not os.path.isdir(folder):
        raise RunNotFoundError(f"there is no folder {folder}; a Run writes to {DEFAULT_DIRECTORY!r} by default")
    try:
        runs = [_read_or_explain(child) for child in _runs_in(folder)]
    except OSError as error:
        raise StoreError(f"{folder} cannot be read: {error}") from error
    return sorted(runs, key=lambda run: -run.created if math.isfinite(run.created) else math.inf)


def read_run(path: Path) -> StoredRun:
    """Read the run at ``path``, its folder or its file."""
    with open_for_reading(path) as connection:
        connection.execute("BEGIN")  # one view of the file for all that follows
        return read_header(connection, path)


def _runs_in(folder: Path) -> list[Path]:
    return sorted(child for child in folder.iterdir() if _is_run(child)) if os.path.isdir(folder) else []


def _is_run(folder: Path) -> bool:
    try:
        os.stat(folder / FILE_NAME)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError):  # another user's, or a link that leads in a circle: reading it says why
        return True
    return True


def _read_or_explain(path: Path) -> StoredRun:
    try:
        return read_run(path)
    except StoreError as error:
        return StoredRun(path, path.name, UNREADABLE, str(error))


def read_header(connection: Connection, path: Path) -> StoredRun:
    """Read all but the series and the per-parameter data."""
    run = connection.execute(_HEADER).fetchone()
    if run is None:  # killed between making the file and naming it
        return StoredRun(path, path.name, "interrupted")
    cells = Cells("run", run)
    name, created, config = cells.text(), cells.time(), cells.document()
    rows = connection.execute("SELECT started, last_written, ended, state, error, facts FROM sessions ORDER BY id")
    sessions = [_session(Cells("sessions", row)) for row in rows]
    return StoredRun(
        path=path,
        name=path.name if path.is_dir() else name,
        state=_state(path, sessions),
        error=sessions[-1].error if sessions else None,
        created=created,
        config=config,
        meta=read_documents(connection),
        sessions=sessions,
        summaries=_read_summaries(connection),
        findings=read_findings(connection),
        dropped_points=cells.whole(),
        dropped_blobs=cells.whole(),
        dropped_rows=cells.whole(),
        seconds=cells.number(),
        archived_points=cells.whole(),
    )


def _session(cells: Cells) -> Session:
    started, last_written, ended = cells.time(), cells.time(), cells.time_or_none()
    state, error, facts = cells.text(), cells.text_or_none(), cells.document()
    if state not in _STATES:
        raise RunFormatError(f"a session has the state {state!r:.80}")
    if not isinstance(facts, dict):
        raise RunFormatError(f"a session has {facts!r:.80} as its facts")
    return Session(started, last_written, ended, state, error, _checked_facts(facts))


def _checked_facts(facts: dict[str, Any]) -> dict[str, Any]:
    """Return facts of which each that is known is of its type, or None; what another version knows stays."""
    checked = {name: value if isinstance(value, _FACTS.get(name, object)) else None for name, value in facts.items()}
    devices = checked.get("devices")
    if isinstance(devices, list) and not all(isinstance(device, str) for device in devices):
        checked["devices"] = None
    return checked


def _state(path: Path, sessions: list[Session]) -> str:
    state = sessions[-1].state if sessions else "running"
    if state == "running" and not is_locked(path if path.is_dir() else path.parent):
        return "interrupted"
    return state


def _read_summaries(connection: Connection) -> dict[str, SeriesSummary]:
    rows = connection.execute(
        "SELECT name, count, last_step, last, minimum, ifnull(minimum_step, 0), maximum, ifnull(maximum_step, 0) "
        "FROM series WHERE count > 0 ORDER BY id"
    )
    return {cells.text(): _summary(cells) for cells in (Cells("series", row) for row in rows)}


def _summary(cells: Cells) -> SeriesSummary:
    count, last_step, last = cells.whole(), cells.whole(), cells.number()
    minimum, minimum_step = cells.number(), cells.whole()
    return SeriesSummary(count, last_step, last, minimum, minimum_step, cells.number(), cells.whole())


def check_run(run: str | os.PathLike[str], directory: str | os.PathLike[str] = DEFAULT_DIRECTORY) -> list[str]:
    """Read all of a run, and return what is damaged in it: nothing, for one that is whole. ``run`` as for ``load_run``.

    Each row is decoded and compared with its checksum, each table with the number of its rows and their sum, each
    series with what it comes to; and SQLite looks at every page.

    Raises:
        RunNotFoundError: there is no run.
        RunFormatError: the file is not a run at all, too damaged to be opened, or has more than a reader takes.
    """
    place = _place_of(run, directory)
    with open_for_reading(place) as connection:
        damage = list(what_is_damaged(connection))
        try:
            read_header(connection, place)
        except (RunFormatError, ValueError) as error:
            damage.append(f"the run: {error}")
        return damage


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
        self._last_batch = 0
        self._archives = -1
        self._infos: list[ParameterInfo] = []
        self.clock: tuple[Int64Array, Float64Array]  # the latest steps, and their training seconds

    def read(self) -> None:
        """Look at the file again."""
        with open_for_reading(self.path) as connection:
            connection.execute("BEGIN")
            self.run = read_header(connection, self.path)
            archives = connection.execute("SELECT count(*) FROM archives").fetchone()[0]
            if archives != self._archives:  # a resume took values away: begin again
                self.history, self._last_batch, self._archives = History(), 0, archives
            found, self._last_batch = read_points(connection, self._last_batch)
            for name, series in found.items():
                self.history[name].extend(series.values, series.steps)
            self.history.findings = self.run.findings
            if not self._infos:
                self._infos = read_infos(connection)
            self.history.parameters = read_intervals(connection, self._infos, latest=self._intervals)
            self.clock = read_clock(connection, latest=1000)

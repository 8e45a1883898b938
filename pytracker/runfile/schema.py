"""The SQLite schema of a run, and how a file is opened. `docs/runs.md` describes every table for readers."""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import stat
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Final

from .._checks import shown
from ..errors import RunFormatError, RunNotFoundError, StoreError
from ..history import FIELDS
from .lock import is_locked
from .totals import TABLE, TOTALS_SCHEMA, begin_totals, keep_totals

FILE_NAME: Final = "run.sqlite"
APPLICATION_ID: Final = 0x70797472  # "pytr": `file run.sqlite` and other programs can tell what it is
FORMAT: Final = 1  # of the schema below; a newer one that only adds tables or columns stays readable_by = 1

_INTERVAL = ", ".join(("first_step INTEGER {}", "last_step INTEGER NOT NULL", *(f"{field} BLOB" for field in FIELDS)))
_BATCH = (
    "series INTEGER NOT NULL, first_step INTEGER NOT NULL, last_step INTEGER NOT NULL, count INTEGER NOT NULL, "
    "points TEXT NOT NULL"
)
_ROWS = (
    "first_step INTEGER {}, last_step INTEGER NOT NULL, count INTEGER NOT NULL, format TEXT NOT NULL, "
    "steps TEXT NOT NULL, moments BLOB NOT NULL"
)
_FINDING = "key TEXT {}, rule TEXT, severity TEXT, first_step INTEGER, last_step INTEGER, document TEXT NOT NULL"
_SUM = "checksum INTEGER NOT NULL"  # of the columns before it in a row, see packing.checksum
_ARCHIVE = "archive INTEGER NOT NULL REFERENCES archives (id)"

SCHEMA: Final = f"""
CREATE TABLE run (name TEXT NOT NULL, created REAL NOT NULL, config TEXT NOT NULL, readable_by INTEGER NOT NULL,
                  dropped_points INTEGER NOT NULL DEFAULT 0, dropped_blobs INTEGER NOT NULL DEFAULT 0,
                  dropped_rows INTEGER NOT NULL DEFAULT 0);
CREATE TABLE sessions (id INTEGER PRIMARY KEY, started REAL NOT NULL, last_written REAL NOT NULL, ended REAL,
                       state TEXT NOT NULL, error TEXT, facts TEXT NOT NULL DEFAULT '{{}}');
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL, {_SUM}) WITHOUT ROWID;
CREATE TABLE series (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, count INTEGER NOT NULL DEFAULT 0,
                     last_step INTEGER, last REAL, minimum REAL, minimum_step INTEGER, maximum REAL,
                     maximum_step INTEGER);
CREATE TABLE batches (id INTEGER PRIMARY KEY, {_BATCH}, {_SUM});
CREATE VIEW metrics AS
    SELECT series.name AS name, CAST(point.key AS INTEGER) AS step, point.value AS value
    FROM batches JOIN series ON series.id = batches.series JOIN json_each(batches.points) AS point;
CREATE TABLE clock (step INTEGER PRIMARY KEY, seconds REAL NOT NULL);
CREATE TABLE parameters (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, shape TEXT NOT NULL, dtype TEXT NOT NULL,
                         group_name TEXT NOT NULL, numel INTEGER NOT NULL, {_SUM});
CREATE TABLE intervals ({_INTERVAL.format("PRIMARY KEY")}, {_SUM});
CREATE TABLE exact_rows ({_ROWS.format("PRIMARY KEY")}, {_SUM});
CREATE TABLE findings ({_FINDING.format("PRIMARY KEY")}, {_SUM});
CREATE TABLE archives (id INTEGER PRIMARY KEY, created REAL NOT NULL, from_step INTEGER NOT NULL,
                       points INTEGER NOT NULL DEFAULT 0);
CREATE TABLE archived_batches ({_ARCHIVE}, {_BATCH}, {_SUM});
CREATE VIEW archived_metrics AS
    SELECT archive, series.name AS name, CAST(point.key AS INTEGER) AS step, point.value AS value
    FROM archived_batches JOIN series ON series.id = archived_batches.series
    JOIN json_each(archived_batches.points) AS point;
CREATE TABLE archived_intervals ({_ARCHIVE}, {_INTERVAL.format("NOT NULL")}, {_SUM});
CREATE TABLE archived_exact_rows ({_ARCHIVE}, {_ROWS.format("NOT NULL")}, {_SUM});
CREATE TABLE archived_findings ({_ARCHIVE}, {_FINDING.format("")}, {_SUM});
"""

_PLAIN_TABLE: Final = re.compile(r"CREATE TABLE (?!.*(\bGENERATED\b|\bAS\s*\())", re.DOTALL | re.IGNORECASE)
_LARGEST_ROW: Final = 128 * 2**20  # bytes of a row, or of a text or blob in it, that a reader takes
_INSTRUCTIONS: Final = 100_000  # of SQLite's machine between two looks at what reading costs

TABLES: Final = frozenset(re.findall(r"CREATE TABLE (\w+)", SCHEMA + TOTALS_SCHEMA))

_NETWORK_FILESYSTEMS: Final = (
    "nfs nfs4 cifs smb3 smbfs 9p afs ceph lustre beegfs gpfs glusterfs ocfs2 gfs2 pvfs2 orangefs virtiofs "
    "fuse.sshfs fuse.glusterfs fuse.s3fs fuse.gcsfuse fuse.rclone fuse.juicefs"
)


def filesystem_of(path: Path, mounts: Path = Path("/proc/self/mounts")) -> str:
    """Return the type of the file system that holds ``path`` ("ext4", "nfs4", ...); "" where that is unknown."""
    try:
        lines = mounts.read_text().splitlines()
    except OSError:
        return ""
    target = os.path.realpath(path)
    found, longest = "", -1
    for line in lines:
        _, mount, kind, *_ = line.split(" ")
        mount = mount.replace("\\040", " ").rstrip("/") or "/"
        inside = mount == "/" or target == mount or target.startswith(mount + "/")
        if inside and len(mount) >= longest:  # of two mounts at one place, the later one hides the other
            found, longest = kind, len(mount)
    return found


def journal_mode_for(path: Path) -> str:
    """Return the journal mode for a run in ``path``.

    WAL lets others read while the training writes. It needs memory shared between processes, which a network file
    system can't give, so there the rollback journal is used: as safe, and a reader may have to wait for a moment.
    """
    return "TRUNCATE" if filesystem_of(path) in _NETWORK_FILESYSTEMS.split() else "WAL"


def open_for_writing(folder: Path) -> tuple[sqlite3.Connection, str]:
    """Open or create the file in ``folder`` and return the connection and the journal mode that it got.

    Raises:
        RunFormatError: a file is there and it is not a run that this version can write.
        sqlite3.Error: the file cannot be opened or written now.
    """
    path = folder / FILE_NAME
    connection = sqlite3.connect(path, timeout=5.0, isolation_level=None, check_same_thread=False)
    try:
        check_format(connection, path, allow_empty=True)
        mode = connection.execute(f"PRAGMA journal_mode = {journal_mode_for(folder)}").fetchone()[0]
        connection.execute("PRAGMA synchronous = NORMAL")
        made = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
        tables = sorted(TABLES - {TABLE})
        if TABLE not in made:
            script = (
                "" if made else f"{SCHEMA} PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {FORMAT};"
            )
            connection.executescript(f"BEGIN IMMEDIATE; {script}")
            begin_totals(connection, tables)
            connection.execute("COMMIT")
        keep_totals(connection, tables)
    except BaseException:
        connection.close()
        raise
    return connection, str(mode).upper()


def check_format(connection: sqlite3.Connection, path: Path, *, allow_empty: bool = False) -> None:
    """Raise ``RunFormatError`` unless the file is a run that this version can read."""
    try:
        application = connection.execute("PRAGMA application_id").fetchone()[0]
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        made_by = dict(connection.execute("SELECT name, sql FROM sqlite_master"))
    except sqlite3.OperationalError:
        raise
    except sqlite3.DatabaseError as error:
        raise RunFormatError(damaged(path, error)) from error
    if not made_by and allow_empty:
        return
    if not made_by:
        raise RunFormatError(f"{path} is empty: not a run yet, or its training was killed as it began")
    if application != APPLICATION_ID or "run" not in made_by:
        raise RunFormatError(f"{path} is an SQLite file, and not a run of pytracker")
    strange = [name for name in TABLES & made_by.keys() if not _is_plain(str(made_by[name]))]
    if strange:  # a view or a column that is computed may go on for ever
        raise RunFormatError(f"{path} is not a run of pytracker: {strange[0]} is no plain table")
    row = connection.execute("SELECT readable_by FROM run").fetchone()
    if row and not isinstance(row[0], int):
        raise RunFormatError(f"{path} is damaged: its table run has {shown(row[0])} as readable_by")
    if row and row[0] > FORMAT:
        raise RunFormatError(
            f"{path} was written by a newer pytracker (format {version}, this one reads up to {FORMAT}): "
            "pip install -U pytracker"
        )


@lru_cache(maxsize=256)  # most runs of a folder have the same tables
def _is_plain(sql: str) -> bool:
    return bool(_PLAIN_TABLE.match(sql))


def damaged(path: Path, error: Exception) -> str:
    """Return the message for a file that SQLite cannot make sense of."""
    return f"{path} is damaged or not a run ({error}); `sqlite3 {path} .recover` may save what is left"


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")  # whatever a damaged byte is: the checksum tells


class Connection(sqlite3.Connection):
    """A connection to a file that may have been made to harm: it does no more work than the file is worth."""

    file: Path
    _instructions_left: float
    _bytes_left: float

    def limit(self, file: Path) -> None:
        """Bound what reading ``file`` may cost, by its size."""
        size = 0
        for part in _parts_of(file):
            with suppress(OSError):
                size += os.stat(part).st_size
        self.file = file
        self.text_factory = _text
        self._instructions_left = 2e7 + 50 * size
        self._bytes_left = 2**20 + 2 * size
        if hasattr(self, "setlimit"):  # from Python 3.11 on
            self.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _LARGEST_ROW)
        self.set_progress_handler(self._go_on, _INSTRUCTIONS)

    @property
    def is_exhausted(self) -> bool:
        """Whether a query was stopped, since it did more than the file is worth."""
        return self._instructions_left < 0

    def charge(self, data: object) -> None:
        """Count what was read: a file whose values have more bytes than itself is refused.

        Raises:
            RunFormatError: it is one.
        """
        if not isinstance(data, (str, bytes)):
            raise RunFormatError(f"{self.file} is damaged: it has {type(data).__name__} where data are expected")
        self._bytes_left -= len(data)
        if self._bytes_left < 0:
            raise RunFormatError(f"{self.file} is damaged: it claims to hold more than it has")

    def _go_on(self) -> bool:
        self._instructions_left -= _INSTRUCTIONS
        return self.is_exhausted


@contextmanager
def open_for_reading(path: Path) -> Iterator[Connection]:
    """Open the run file at ``path`` (its folder, or the file) read-only; also while it is being written.

    Raises:
        RunNotFoundError: there is no such file.
        RunFormatError: the file is damaged, a stranger's, or from a newer version.
        StoreError: it cannot be opened.
    """
    with ExitStack() as stack:
        connection = None
        file = path
        try:
            file = path / FILE_NAME if path.is_dir() else path
            _check_kind(file, path)
            connection = _connect_read_only(file, stack)
            check_format(connection, file)
            yield connection
        except StoreError as error:
            if isinstance(error, RunFormatError) and str(file) not in str(error):
                raise RunFormatError(damaged(file, error)) from error
            raise
        except sqlite3.OperationalError as error:
            if connection is not None and connection.is_exhausted:
                raise RunFormatError(f"{file} is damaged: reading it takes more than its size is worth") from error
            raise StoreError(f"{file} cannot be read now: {error}") from error
        except OSError as error:
            raise StoreError(f"{file} cannot be read: {error}") from error
        except (sqlite3.Error, ValueError, TypeError, LookupError, ArithmeticError, MemoryError, zlib.error) as error:
            raise RunFormatError(damaged(file, error)) from error  # SQLite found it, or what it gave made no sense


def _check_kind(file: Path, path: Path) -> None:
    """Raise unless ``file`` is a regular file: a pipe would be waited for."""
    try:
        mode = os.stat(file).st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise RunNotFoundError(f"there is no run at {path}: {file} does not exist") from None
    if not stat.S_ISREG(mode):
        raise RunFormatError(f"{file} is not a run: it is no regular file")


def _connect_read_only(file: Path, stack: ExitStack) -> Connection:
    """Connect read-only, or to a copy.

    A killed run may have a journal to play back. That takes a file that can be written, so it is done to a copy. While
    a process writes the run, no copy would be whole: then the error stands.
    """
    try:
        return stack.enter_context(closing(_open_and_touch(file)))
    except sqlite3.OperationalError:
        if is_locked(file.parent):
            raise
    scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pytracker-")))
    for source in _parts_of(file):
        if source.exists():
            shutil.copyfile(source, scratch / source.name)
    connection = sqlite3.connect(scratch / file.name, isolation_level=None, factory=Connection)
    stack.enter_context(closing(connection))
    connection.limit(file)
    return connection


def _open_and_touch(file: Path) -> Connection:
    uri = f"{file.absolute().as_uri()}?mode=ro"
    connection = sqlite3.connect(uri, uri=True, timeout=5.0, isolation_level=None, factory=Connection)
    try:
        connection.limit(file)
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except BaseException:
        connection.close()
        raise
    return connection


def interval_fields(connection: sqlite3.Connection) -> list[str]:
    """Return the fields of intervals that a file has columns for; one that was begun by an older version has fewer."""
    columns = {name for _, name, *_ in connection.execute("PRAGMA table_info(intervals)")}
    return [field for field in FIELDS if field in columns]


def log_of(file: Path) -> Path:
    """Return where SQLite keeps what was written and is not in ``file`` yet."""
    return file.with_name(f"{file.name}-wal")


def _parts_of(file: Path) -> list[Path]:
    return [file.with_name(file.name + suffix) for suffix in ("", "-wal", "-journal")]

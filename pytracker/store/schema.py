"""The SQLite schema of a run, and how a file is opened. `docs/runs.md` describes every table for readers."""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Final

from ..errors import RunFormatError, RunNotFoundError, StoreError
from ..history import FIELDS
from .lock import is_locked

FILE_NAME: Final = "run.sqlite"
APPLICATION_ID: Final = 0x70797472  # "pytr": `file run.sqlite` and other programs can tell what it is
FORMAT: Final = 1  # of the schema below; a newer one that only adds tables or columns stays readable_by = 1

_INTERVAL_COLUMNS = ", ".join(f"{field} BLOB" for field in FIELDS)

SCHEMA: Final = f"""
CREATE TABLE run (name TEXT NOT NULL, created REAL NOT NULL, config TEXT NOT NULL, readable_by INTEGER NOT NULL,
                  dropped_points INTEGER NOT NULL DEFAULT 0, dropped_blobs INTEGER NOT NULL DEFAULT 0);
CREATE TABLE sessions (id INTEGER PRIMARY KEY, started REAL NOT NULL, last_written REAL NOT NULL, ended REAL,
                       state TEXT NOT NULL, error TEXT, facts TEXT NOT NULL DEFAULT '{{}}');
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE series (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, count INTEGER NOT NULL DEFAULT 0,
                     last_step INTEGER, last REAL, minimum REAL, minimum_step INTEGER, maximum REAL,
                     maximum_step INTEGER);
CREATE TABLE points (series INTEGER NOT NULL REFERENCES series (id), step INTEGER NOT NULL, value REAL);
CREATE VIEW metrics AS SELECT series.name AS name, points.step AS step, points.value AS value
    FROM points JOIN series ON series.id = points.series;
CREATE TABLE clock (step INTEGER PRIMARY KEY, seconds REAL NOT NULL);
CREATE TABLE parameters (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, shape TEXT NOT NULL, dtype TEXT NOT NULL,
                         group_name TEXT NOT NULL, numel INTEGER NOT NULL);
CREATE TABLE intervals (first_step INTEGER PRIMARY KEY, last_step INTEGER NOT NULL, {_INTERVAL_COLUMNS});
CREATE TABLE exact_rows (step INTEGER PRIMARY KEY, moments BLOB NOT NULL);
CREATE TABLE findings (key TEXT PRIMARY KEY, rule TEXT, severity TEXT, first_step INTEGER, last_step INTEGER,
                       document TEXT NOT NULL);
CREATE TABLE archives (id INTEGER PRIMARY KEY, created REAL NOT NULL, from_step INTEGER NOT NULL);
CREATE TABLE archived_points (archive INTEGER NOT NULL REFERENCES archives (id), series INTEGER NOT NULL,
                              step INTEGER NOT NULL, value REAL);
CREATE TABLE archived_intervals (archive INTEGER NOT NULL REFERENCES archives (id), first_step INTEGER NOT NULL,
                                 last_step INTEGER NOT NULL, {_INTERVAL_COLUMNS});
CREATE TABLE archived_exact_rows (archive INTEGER NOT NULL REFERENCES archives (id), step INTEGER NOT NULL,
                                  moments BLOB NOT NULL);
CREATE TABLE archived_findings (archive INTEGER NOT NULL REFERENCES archives (id), key TEXT, rule TEXT, severity TEXT,
                                first_step INTEGER, last_step INTEGER, document TEXT NOT NULL);
"""

_NETWORK_FILESYSTEMS: Final = (
    "nfs nfs4 cifs smb3 smbfs 9p afs ceph lustre beegfs gpfs glusterfs ocfs2 gfs2 pvfs2 orangefs virtiofs "
    "fuse.sshfs fuse.glusterfs fuse.s3fs fuse.gcsfuse fuse.rclone fuse.juicefs"
)


def filesystem_of(path: Path, mounts: Path = Path("/proc/self/mounts")) -> str:
    """Return the type of the file system that holds ``path`` ("ext4", "nfs4", ...); "" where it can't be told."""
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
        if connection.execute("PRAGMA user_version").fetchone()[0] == 0:
            script = f"BEGIN IMMEDIATE; {SCHEMA} PRAGMA application_id = {APPLICATION_ID};"
            connection.executescript(f"{script} PRAGMA user_version = {FORMAT}; COMMIT;")
    except BaseException:
        connection.close()
        raise
    return connection, str(mode).upper()


def check_format(connection: sqlite3.Connection, path: Path, *, allow_empty: bool = False) -> None:
    """Raise ``RunFormatError`` unless the file is a run that this version can read."""
    try:
        application = connection.execute("PRAGMA application_id").fetchone()[0]
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
    except sqlite3.OperationalError:
        raise
    except sqlite3.DatabaseError as error:
        raise RunFormatError(damaged(path, error)) from error
    if not tables and allow_empty:
        return
    if not tables:
        raise RunFormatError(f"{path} is empty: not a run yet, or its training was killed as it began")
    if application != APPLICATION_ID or "run" not in tables:
        raise RunFormatError(f"{path} is an SQLite file, and not a run of pytracker")
    row = connection.execute("SELECT readable_by FROM run").fetchone()
    if row and row[0] > FORMAT:
        raise RunFormatError(
            f"{path} was written by a newer pytracker (format {version}, this one reads up to {FORMAT}): "
            "pip install -U pytracker"
        )


def damaged(path: Path, error: Exception) -> str:
    """Return the message for a file that SQLite cannot make sense of."""
    return f"{path} is damaged or not a run ({error}); `sqlite3 {path} .recover` may save what is left"


@contextmanager
def open_for_reading(path: Path) -> Iterator[sqlite3.Connection]:
    """Open the run file at ``path`` (its folder, or the file) read-only; also while it is being written.

    Raises:
        RunNotFoundError: there is no such file.
        RunFormatError: the file is damaged, a stranger's, or from a newer version.
        StoreError: it cannot be opened.
    """
    file = path / FILE_NAME if path.is_dir() else path
    if not file.exists():
        raise RunNotFoundError(f"there is no run at {path}: {file} does not exist")
    with ExitStack() as stack:
        try:
            connection = _connect_read_only(file, stack)
            check_format(connection, file)
            yield connection
        except sqlite3.OperationalError as error:
            raise StoreError(f"{file} cannot be read now: {error}") from error
        except (sqlite3.Error, ValueError, TypeError, LookupError, OverflowError) as error:
            raise RunFormatError(damaged(file, error)) from error  # SQLite found it, or what it gave made no sense


def _connect_read_only(file: Path, stack: ExitStack) -> sqlite3.Connection:
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
    for suffix in ("", "-wal", "-journal"):
        source = file.with_name(file.name + suffix)
        if source.exists():
            shutil.copyfile(source, scratch / source.name)
    return stack.enter_context(closing(sqlite3.connect(scratch / file.name, isolation_level=None)))


def _open_and_touch(file: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True, timeout=5.0, isolation_level=None)
    try:
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.DatabaseError:
        connection.close()
        raise
    return connection

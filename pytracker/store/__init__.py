"""The run store: one folder a run, one SQLite file in it. No torch here; `docs/runs.md` describes the file."""

from .._json import jsonable
from ..runfile import RunLock, SeriesSummary
from .names import checked_name
from .reading import Session, StoredRun, Tail, check_run, find_run, list_runs, load_run, newest_run
from .run import Run

__all__ = [
    "Run",
    "RunLock",
    "SeriesSummary",
    "Session",
    "StoredRun",
    "Tail",
    "check_run",
    "checked_name",
    "find_run",
    "jsonable",
    "list_runs",
    "load_run",
    "newest_run",
]

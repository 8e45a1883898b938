"""The run store: one folder a run, one SQLite file in it. No torch here; `docs/runs.md` describes the file."""

from .._json import jsonable
from .reading import SeriesSummary, Session, StoredRun, Tail, check_run, find_run, list_runs, load_run
from .run import Run

__all__ = [
    "Run",
    "SeriesSummary",
    "Session",
    "StoredRun",
    "Tail",
    "check_run",
    "find_run",
    "jsonable",
    "list_runs",
    "load_run",
]

"""Resolves RUN on the command line: a run, or another tool's log, which is converted to temporary runs."""

from __future__ import annotations

import atexit
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InvalidValueError

if TYPE_CHECKING:
    from ..history import History
    from ..store import StoredRun


def find_runs(name: str, directory: str) -> list[StoredRun]:
    """Return the run of that name, or all runs of a log of another tool; ``LOG#2`` is the third of them.

    A log is read into runs in a temporary folder, so that every verb can do with it what it does with a run.

    Raises:
        RunNotFoundError: there is none.
        RunFormatError: it is no run and no log that is known.
        InvalidValueError: the log has no run of that number.
    """
    from ..logs import is_log, read_log
    from ..store import find_run

    path, number = _numbered(name)
    if not path or not is_log(path):
        return [find_run(name, directory)]
    histories = read_log(path)
    if number is None:
        return _as_runs(Path(path), dict(enumerate(histories)), len(histories))
    if not 0 <= number < len(histories):
        raise InvalidValueError(f"{name}: the log has {len(histories)} runs, of the numbers 0 to {len(histories) - 1}")
    return _as_runs(Path(path), {number: histories[number]}, len(histories))


def find_one(name: str, directory: str) -> StoredRun:
    """Return the only run that ``name`` stands for.

    Raises:
        InvalidValueError: it is a log of several.
    """
    found = find_runs(name, directory)
    if len(found) > 1:
        raise InvalidValueError(
            f"{name}: the log has {len(found)} runs; choose one of {name}#0 to {name}#{len(found) - 1}"
        )
    return found[0]


def _numbered(name: str) -> tuple[str, int | None]:
    path, mark, number = name.rpartition("#")
    return (path, int(number)) if mark and number.isdecimal() and not Path(name).exists() else (name, None)


def _as_runs(path: Path, histories: dict[int, History], count: int) -> list[StoredRun]:
    from ..diagnostics import diagnose
    from ..store import Run, load_run

    folder = tempfile.TemporaryDirectory(prefix="pytracker-log-")
    atexit.register(folder.cleanup)
    found = []
    for number, history in histories.items():
        label = history.meta["log"].get("run") or str(number)
        with Run(folder.name, name=path.stem + (f"-{_plain(label)}" if count > 1 else ""), config={}) as run:
            config = history.meta.pop("config", {})
            run.set_meta(**history.meta, **({"config": config} if config else {}))
            for name, series in history.items():
                run.log_many(series.steps, {name: series.values})
            findings = diagnose(history)
            for finding in findings:
                run.log_finding(finding.to_dict())
            run.set_meta(unjudged=findings.unjudged)
        found.append(load_run(run.path))
    return found


def _plain(label: str) -> str:
    return "".join(each if each.isalnum() or each in "-_." else "-" for each in label)[:60]

"""Report: runs drawn into one HTML page that opens without a network. No torch here; plotly (an extra) draws."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ...errors import InvalidValueError
from ...store import StoredRun, load_run
from ..comparison import compare, distinct_names
from .heatmaps import heatmaps
from .lines import Subject, line_charts
from .page import page

__all__ = ["build_charts", "write_report"]


def write_report(runs: Iterable[StoredRun | str | os.PathLike[str]], output: str | os.PathLike[str]) -> Path:
    """Draw one run, or several over each other, into an HTML file, and return its path.

    Args:
        runs: what ``load_run`` gives, or paths.
        output: the file to write.

    Raises:
        InvalidValueError: there are no runs.
        MissingExtraError: plotly is not installed.
    """
    loaded = [run if isinstance(run, StoredRun) else load_run(run) for run in runs]
    if not loaded:
        raise InvalidValueError("report: no runs were given")
    subjects = _subjects(loaded)
    path = Path(output)
    path.write_text(page(loaded, subjects, compare(loaded), _charts(subjects)), encoding="utf-8")
    return path


def build_charts(runs: Iterable[StoredRun]) -> dict[str, list[dict[str, Any]]]:
    """Return the page's charts as plotly's JSON, under "lines" and "maps"."""
    return _charts(_subjects(list(runs)))


def _subjects(runs: list[StoredRun]) -> list[Subject]:
    names = distinct_names(runs)
    return [
        Subject(index, name, run.history, run.meta, run.findings)
        for index, (name, run) in enumerate(zip(names, runs, strict=True))
    ]


def _charts(subjects: list[Subject]) -> dict[str, list[dict[str, Any]]]:
    return {"lines": line_charts(subjects), "maps": [chart for each in subjects for chart in heatmaps(each)]}

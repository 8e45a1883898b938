"""The page on which runs are looked at: frozen into one file as a report, or fed by a server. No torch here.

``document.py`` has the table and the HTML, ``curves.py`` and ``parameters.py`` the numbers; ``charts.js`` says what is
drawn, ``drawing.js`` how. plotly (an extra) draws.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..._checks import items
from ...errors import InvalidValueError
from ...store import StoredRun, load_run
from ..comparison import distinct_names
from .curves import curves
from .document import LIVE_POLICY, frame, html, known_names, plotly, row, script

__all__ = [
    "LIVE_POLICY",
    "Report",
    "build_document",
    "curves",
    "html",
    "known_names",
    "plotly",
    "report",
    "row",
    "script",
    "write_report",
]


def write_report(runs: Iterable[StoredRun | str | os.PathLike[str]], output: str | os.PathLike[str]) -> Path:
    """Draw one run, or several over each other, into an HTML file, and return its path.

    Args:
        runs: what ``load_run`` gives, or paths.
        output: the file to write.

    Raises:
        InvalidValueError: there are no runs.
        MissingExtraError: plotly is not installed.
    """
    return report(runs).save(output)


class Report:
    """The page of some runs, as a notebook shows it: in a frame of its own, where it can reach nothing around it."""

    def __init__(self, page: str) -> None:
        """Keep the page."""
        self.page = page

    def save(self, output: str | os.PathLike[str]) -> Path:
        """Write the page into a file and return its path."""
        path = Path(output)
        path.write_text(self.page, encoding="utf-8")
        return path

    def _repr_html_(self) -> str:
        return frame(self.page)


def report(runs: StoredRun | str | os.PathLike[str] | Iterable[StoredRun | str | os.PathLike[str]]) -> Report:
    """Draw one run, or several over each other, to be looked at in a notebook, or kept with ``save``.

    Args:
        runs: what ``load_run`` gives, or paths; one, or several.

    Raises:
        InvalidValueError: there are no runs.
        MissingExtraError: plotly is not installed.
    """
    one = isinstance(runs, (StoredRun, str, os.PathLike))
    given: list[Any] = [runs] if one else items("runs", runs, "what load_run gives, or paths: one, or a list")
    loaded = [run if isinstance(run, StoredRun) else load_run(run) for run in given]
    if not loaded:
        raise InvalidValueError("report: no runs were given")
    title = loaded[0].name if len(loaded) == 1 else f"{len(loaded)} runs"
    return Report(html(build_document(loaded), title))


def build_document(runs: list[StoredRun]) -> dict[str, Any]:
    """Return what the page draws of ``runs``, as JSON-able data: "runs", "names", and "curves" by the run's id."""
    rows = [row(run, name) for run, name in zip(runs, distinct_names(runs), strict=True)]
    return {
        "runs": rows,
        "names": known_names(dict.fromkeys(name for run in runs for name in run.summaries)),
        "curves": {
            each["id"]: curves(run.history, run.clock(), len(runs)) for each, run in zip(rows, runs, strict=True)
        },
    }

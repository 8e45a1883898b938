"""Runs made visible: in the terminal, as comparisons, exports and reports. No torch here.

Names are imported when they are first used: a table in the terminal needs no report.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import attach

if TYPE_CHECKING:
    from . import console as console
    from .comparison import Comparison as Comparison
    from .comparison import compare as compare
    from .export import export_run as export_run
    from .formatting import sparkline as sparkline
    from .formatting import visible as visible
    from .manage import annotate_run as annotate_run
    from .manage import delete_run as delete_run
    from .manage import read_notes as read_notes
    from .manage import rename_run as rename_run
    from .page import build_document as build_document
    from .page import report as report
    from .page import write_report as write_report
    from .run_table import select_runs as select_runs
    from .server import make_app as make_app
    from .server import serve as serve
    from .watch import wait_for_run as wait_for_run
    from .watch import watch_run as watch_run

_HOMES = {
    "Comparison": "comparison",
    "annotate_run": "manage",
    "delete_run": "manage",
    "read_notes": "manage",
    "rename_run": "manage",
    "build_document": "page",
    "compare": "comparison",
    "export_run": "export",
    "make_app": "server",
    "report": "page",
    "select_runs": "run_table",
    "serve": "server",
    "sparkline": "formatting",
    "visible": "formatting",
    "wait_for_run": "watch",
    "watch_run": "watch",
    "write_report": "page",
}

__all__ = [
    "Comparison",
    "annotate_run",
    "build_document",
    "compare",
    "console",
    "delete_run",
    "export_run",
    "make_app",
    "read_notes",
    "rename_run",
    "report",
    "select_runs",
    "serve",
    "sparkline",
    "visible",
    "wait_for_run",
    "watch_run",
    "write_report",
]

__getattr__, __dir__ = attach(__name__, _HOMES)

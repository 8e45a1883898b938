"""The page as data: a row for each run, what is known of each metric's name, and the HTML around them."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable
from functools import cache
from importlib import resources
from typing import Any, Final

import jinja2

from ...diagnostics import most_severe_first
from ...errors import MissingExtraError
from ...store import StoredRun, jsonable
from ..comparison import flatten, metric_result
from ..manage import read_notes
from ..metric_names import describe, headline, ordered

SCRIPTS: Final = ("values.js", "charts.js", "drawing.js", "parameters.js", "table.js", "page.js")
_POLICY: Final = (
    "default-src 'none'; script-src {script}; style-src 'unsafe-inline'; img-src data: blob:; connect-src {connect}; "
    "base-uri 'none'; form-action 'none'"
)
LIVE_POLICY: Final = _POLICY.format(script="'self'", connect="'self'") + "; frame-ancestors 'none'"


def row(run: StoredRun, name: str | None = None) -> dict[str, Any]:
    """Return what the page's table says of a run, from its header alone."""
    findings, notes = most_severe_first(run.findings), read_notes(run.path)
    short_facts = {name: fact for name, fact in run.facts.items() if name not in ("git_diff", "packages")}
    document = {
        "id": name or run.name,
        "name": name or run.name,
        "state": run.state,
        "error": run.error,
        "created": run.created,
        "seconds": run.seconds,
        "steps": run.last_step + 1,
        "findings": len(findings),
        "severity": str(findings[0].get("severity")) if findings else None,
        "headline": headline(list(run.summaries)),
        "metrics": {each: vars(metric_result(run, each)) for each in ordered(run.summaries)},
        "config": flatten(run.config),
        "tags": notes.get("tags", []),
        "facts": {**notes, **run.meta, **short_facts, "path": str(run.path)},
    }
    plain: dict[str, Any] = jsonable(document)
    return plain


def known_names(names: Iterable[str]) -> dict[str, Any]:
    """Return for each metric's name, in the order of the page, what is known of it."""
    return {name: describe(name) for name in ordered(names)}


def html(document: dict[str, Any] | None, title: str) -> str:
    """Return the page: with ``document`` frozen in, a file that needs no network; with None, one that asks a server."""
    nonce = secrets.token_urlsafe(16)
    return _template().render(
        title=title,
        made=time.strftime("%Y-%m-%d %H:%M"),
        document=document,
        nonce=nonce,
        policy=_POLICY.format(script=f"'nonce-{nonce}'", connect="'none'"),
        style=asset("page.css"),
        plotly="" if document is None else plotly(),
        script="" if document is None else script(),
    )


def frame(page: str) -> str:
    """Return a frame that holds a whole page and keeps it apart from the page around it."""
    template = jinja2.Environment(autoescape=True).from_string(
        '<iframe srcdoc="{{ page }}" sandbox="allow-scripts allow-downloads" '
        'style="width:100%;height:900px;border:0" title="pytracker report"></iframe>'
    )
    return template.render(page=page)


def script() -> str:
    """Return the page's own scripts as one."""
    return "\n".join(map(asset, SCRIPTS))


def plotly() -> str:
    """Return plotly.js.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise MissingExtraError("the report", "plotly", "report") from error
    source: str = get_plotlyjs()
    return source


@cache
def asset(name: str) -> str:
    """Return a file of this folder."""
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(loader=jinja2.FunctionLoader(asset), autoescape=True, trim_blocks=True)
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    return environment.get_template("page.html")

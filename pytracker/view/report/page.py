"""The page around the charts: summary, configs, findings, and everything that makes it one file."""

from __future__ import annotations

import html
import json
import time
from importlib import resources
from typing import Any

from ...diagnostics import most_severe_first, span_of
from ...errors import MissingExtraError
from ...store import StoredRun, jsonable
from ..comparison import Comparison, MetricResult, flatten
from ..metric_names import goal
from .lines import Subject


def page(runs: list[StoredRun], subjects: list[Subject], compared: Comparison, charts: dict[str, Any]) -> str:
    """Return the whole page."""
    title = f"{compared.names[0]}" if len(runs) == 1 else f"{len(runs)} runs"
    sections = [
        _runs_bar(subjects) if len(runs) > 1 else "",
        f"<h2>Summary</h2>{_summary(subjects, compared)}{_config(runs, compared)}",
        _findings(subjects),
        f"<h2 id=series>Series</h2><div class=grid>{''.join(map(_line_card, charts['lines']))}</div>"
        if charts["lines"]
        else "",
        _map_section(subjects, charts["maps"]),
    ]
    # "</script" would end the script around the data, and "<!--<script" would keep the real end from ending it.
    data = json.dumps(jsonable(charts), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    when = time.strftime("%Y-%m-%d %H:%M")
    return f"""<!DOCTYPE html>
<html lang=en>
<head>
<meta charset=utf-8>
<meta name=viewport content="width=device-width, initial-scale=1">
<title>{_text(title)} - pytracker</title>
<link rel=icon href="data:,">
<style>{_asset("page.css")}</style>
<script>{_plotly()}</script>
</head>
<body>
<header><h1>{_text(title)}</h1><p class=soft>pytracker report, {when}</p></header>
<main>{"".join(sections)}</main>
<footer>Drag across a chart to zoom all, double-click to go back. Of long series the lowest and the highest value
of each stretch are drawn; a thick line over a faint one is the median of each stretch.</footer>
<script type="application/json" id=report>{data}</script>
<script>{_asset("page.js")}</script>
</body>
</html>
"""


def _plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise MissingExtraError("the report", "plotly", "report") from error
    script: str = get_plotlyjs()
    return script


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _text(value: Any) -> str:
    return html.escape(str(value))


def _dot(color: str) -> str:
    return f'<span class=dot style="background:{color}"></span>'


def _runs_bar(subjects: list[Subject]) -> str:
    chips = "".join(
        f"<button class=chip data-run={each.index} aria-pressed=true>{_dot(each.color)}{_text(each.name)}</button>"
        for each in subjects
    )
    return f'<nav class=runs aria-label="runs shown">{chips}</nav>'


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _seconds(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min"


def _summary(subjects: list[Subject], compared: Comparison) -> str:
    judged = [name for name in compared.metrics if goal(name)]
    heads = "".join(f"<th class=number>best {_text(name)}</th><th class=number>last</th>" for name in judged)
    rows = []
    for each in subjects:
        place, speed = each.index, compared.steps_per_second[each.index]
        cells = "".join(_metric_cells(compared.metrics[name][place]) for name in judged)
        rows.append(
            f"<tr><td>{_dot(each.color)} {_text(each.name)}</td>"
            f"<td><span class='state {compared.states[place]}'>{compared.states[place]}</span></td>"
            f"<td class=number>{compared.last_steps[place] + 1:,}</td>"
            f"<td class=number>{_seconds(compared.seconds[place])}</td>"
            f"<td class=number>{_number(speed)}</td>{cells}</tr>"
        )
    return (
        "<div class='card scroll'><table><tr><th>run</th><th>state</th><th class=number>steps</th>"
        f"<th class=number>time</th><th class=number>steps/s</th>{heads}</tr>{''.join(rows)}</table></div>"
    )


def _metric_cells(result: MetricResult | None) -> str:
    if result is None:
        return "<td></td><td></td>"
    best = f"{_number(result.best)} <span class=note>at {result.best_step}</span>"
    return f"<td class=number>{best}</td><td class=number>{_number(result.last)}</td>"


def _config(runs: list[StoredRun], compared: Comparison) -> str:
    differing = {**compared.config, **compared.facts}
    parts = []
    if differing:
        heads = "".join(f"<th>{_text(name)}</th>" for name in compared.names)
        rows = "".join(
            f"<tr><td>{_text(key)}</td>{''.join(f'<td>{_text(value)}</td>' for value in values)}</tr>"
            for key, values in differing.items()
        )
        parts.append(
            f"<h2>What differs</h2><div class='card scroll'><table><tr><th></th>{heads}</tr>{rows}</table></div>"
        )
    for name, run in zip(compared.names, runs, strict=True):
        facts = {**flatten(run.config), **run.meta, **run.facts}
        known = "".join(
            f"<dt>{_text(key)}</dt><dd>{_text(value)}</dd>" for key, value in facts.items() if value is not None
        )
        parts.append(
            f"<details><summary>config and facts of {_text(name)}</summary><dl class=card>{known}</dl></details>"
        )
    return "".join(parts)


def _findings(subjects: list[Subject]) -> str:
    many = len(subjects) > 1
    cards = [_finding(each, finding, many) for each in subjects for finding in most_severe_first(each.findings)]
    return f"<h2>Findings</h2>{''.join(cards)}" if cards else ""


def _finding(each: Subject, finding: dict[str, Any], named: bool) -> str:
    severity = str(finding.get("severity", "info"))
    first, last = finding.get("first_step") or 0, finding.get("last_step") or 0
    run = f"{_dot(each.color)} {_text(each.name)}: " if named else ""
    facts: dict[str, Any] = {"parameters": ", ".join(map(str, finding.get("parameters") or ()))}
    facts |= {name: finding.get(name) for name in ("cause", "action")}
    told = "".join(f"<dt>{name}</dt><dd>{_text(fact)}</dd>" for name, fact in facts.items() if fact)
    return (
        f"<div class='card finding {_text(severity)}'><h3>{run}{_text(finding.get('rule'))} "
        f"<a href='#series' data-first={first} data-last={last}>{span_of(finding)}</a></h3>"
        f"<p>{_text(finding.get('evidence', ''))}</p><dl>{told}</dl></div>"
    )


def _line_card(chart: dict[str, Any]) -> str:
    log = chart["layout"]["yaxis"]["type"] == "log"
    button = (
        f"<button class='small log' data-chart={chart['id']} aria-pressed={'true' if log else 'false'}>log</button>"
    )
    return _card(chart, button, "")


def _card(chart: dict[str, Any], control: str, kind: str) -> str:
    note = f"<span class=note>{_text(chart['note'])}</span>" if chart["note"] else ""
    return (
        f"<section class='card {kind}'><div class=head><h3>{_text(chart['title'])}</h3>{note}{control}</div>"
        f"<div class='chart {chart['kind']}' id={chart['id']}></div></section>"
    )


def _map_section(subjects: list[Subject], maps: list[dict[str, Any]]) -> str:
    if not maps:
        return ""
    runs = list(dict.fromkeys(chart["run"] for chart in maps))
    options = "".join(f"<option value={run}>{_text(subjects[run].name)}</option>" for run in runs)
    chooser = f'<select id=map-run aria-label="run shown below">{options}</select>' if len(runs) > 1 else ""
    shown = [chart for chart in maps if chart["run"] == runs[0]]
    cards = "".join(_card(chart, "", "" if index else "wide") for index, chart in enumerate(shown))
    return f"<div class=head><h2>Parameters</h2>{chooser}</div><div class=grid>{cards}</div>"

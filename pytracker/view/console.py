"""How runs look in a terminal: readable at 80 columns and without colour."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Console, Group, RenderableType
from rich.style import StyleType
from rich.table import Table
from rich.text import Text

from ..diagnostics import most_severe_first, span_of
from ..store import StoredRun
from .comparison import Comparison, flatten
from .formatting import age, duration, number, sparkline, visible
from .metric_names import goal, headline, ordered

_STATE_STYLES: Final = {"running": "green", "failed": "red", "interrupted": "yellow", "unreadable": "red"}
_SEVERITY_STYLES: Final = {"critical": "bold red", "warning": "yellow", "info": "cyan"}
_SHOWN_PARAMETERS: Final = 5
_COURSE_INTERVALS: Final = 100


def literal(text: str, style: str = "") -> Text:
    """Show text that a run brought as it stands: brackets are no markup, control characters are visible."""
    return Text(visible(text), style=style)


class _LiteralTable(Table):
    """A table whose plain cells are shown literally."""

    def add_row(self, *cells: RenderableType | None, style: StyleType | None = None, end_section: bool = False) -> None:
        shown = (literal(cell) if isinstance(cell, str) else cell for cell in cells)
        super().add_row(*shown, style=style, end_section=end_section)


def state(name: str) -> Text:
    """Show a run's state."""
    return literal(name, _STATE_STYLES.get(name, ""))


def plain_table(*columns: str, numbers: Sequence[str] = ()) -> Table:
    """Return an empty table in the house style; ``numbers`` are the columns to align on the right."""
    made = _LiteralTable(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        right = column in numbers
        made.add_column(column, justify="right" if right else "left", no_wrap=right, overflow="fold")
    return made


def titled(title: str, table: RenderableType) -> Group:
    """Put a title over a table; it may be wider."""
    return Group(literal(f"\n{title}", "bold"), table)


def run_list(runs: Iterable[StoredRun]) -> RenderableType:
    """Show runs, one a line, and below them why some can't be read."""
    table = plain_table("run", "state", "age", "steps", "time", "last", numbers=("age", "steps", "time"))
    broken = []
    for run in runs:
        metric = headline(list(run.summaries))
        last = f"{metric} {number(run.summaries[metric].last)}" if metric else ""
        steps = str(run.last_step + 1) if run.summaries else "-"
        table.add_row(run.name, state(run.state), age(run.created), steps, duration(run.seconds or None), last)
        if run.state == "unreadable":
            broken.append(literal(f"{run.name}: {run.error}", "red"))
    return Group(table, *broken)


def run_details(run: StoredRun) -> RenderableType:
    """Show what there is to know about one run."""
    parts: list[RenderableType] = [literal(run.name, "bold"), _pairs(_run_facts(run))]
    config = flatten(run.config)
    if config:
        parts.append(titled("Config", _pairs(config)))
    if run.summaries:
        numbers = ("last", "lowest", "at step", "highest", "at step ")
        table = plain_table("series", *numbers, numbers=numbers)
        for name in ordered(run.summaries):
            each = run.summaries[name]
            low, high = (number(each.minimum), str(each.minimum_step)), (number(each.maximum), str(each.maximum_step))
            table.add_row(name, number(each.last), *low, *high)
        parts.append(titled("Series", table))
    if run.parameters:
        parts.append(parameter_table(run))
    if run.findings:
        parts.append(findings(run.findings))
    return Group(*parts)


def _run_facts(run: StoredRun) -> dict[str, Any]:
    facts = run.facts
    commit = facts.get("git_commit")
    known = {
        "state": f"{run.state}: {run.error}" if run.error else run.state,
        "path": run.path,
        "started": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(run.created)) if run.sessions else None,
        "training time": duration(run.seconds or None),
        "steps": run.last_step + 1,
        "sessions": f"{len(run.sessions)}, {run.archived_points} repeated values archived"
        if len(run.sessions) > 1
        else None,
        "lost": f"{run.dropped_points} values, {run.dropped_blobs} per-parameter records, while the disk failed"
        if run.dropped_points or run.dropped_blobs
        else None,
        "command": facts.get("command"),
        "commit": f"{commit[:12]}{' with uncommitted changes' if facts.get('git_dirty') else ''}" if commit else None,
        "host": facts.get("host"),
        "journal": "rollback (a network file system)" if facts.get("journal_mode") == "TRUNCATE" else None,
        "devices": ", ".join(facts.get("devices") or ()) or None,
        "python, torch": f"{facts.get('python')}, {facts.get('torch') or 'none'}" if facts else None,
        **run.meta,
    }
    return {name: value for name, value in known.items() if value is not None}


def _pairs(values: dict[str, Any]) -> Table:
    table = _LiteralTable.grid(padding=(0, 2))
    width = max((literal(str(name)).cell_len for name in values), default=0)
    table.add_column(style="dim", no_wrap=width < 30, overflow="fold")
    table.add_column(overflow="fold")
    for name, value in values.items():
        table.add_row(str(name), str(value))
    return table


def loudest_and_quietest(names: Sequence[str], norms: NDArray[Any]) -> list[tuple[str, float]]:
    """Return the parameters with the largest and the smallest norms, from large to small; all, where they are few."""
    order = [index for index in np.argsort(-norms, kind="stable").tolist() if not math.isnan(norms[index])]
    if len(order) > 2 * _SHOWN_PARAMETERS:
        order = order[:_SHOWN_PARAMETERS] + order[-_SHOWN_PARAMETERS:]
    return [(names[index], float(norms[index])) for index in order]


def parameter_table(run: StoredRun) -> RenderableType:
    """Show the loudest and the quietest parameters of the last interval."""
    parameters = run.latest_intervals(_COURSE_INTERVALS)
    elements = sum(info.numel for info in run.parameters)
    title = f"{len(run.parameters)} parameters, {elements:,} elements"
    if not len(parameters):
        return Text(f"\n{title}", style="bold")
    norms = parameters.field("norm_mean")
    return norm_table(parameters.names, norms, f"{title}: mean norm in the last interval")


def norm_table(names: Sequence[str], norms: NDArray[Any], title: str) -> RenderableType:
    """Show the loudest and quietest of ``norms`` [m, T] in the last interval, each with its course."""
    table = plain_table("parameter", "norm", "course", numbers=("norm",))
    place = {name: index for index, name in enumerate(names)}
    for name, value in loudest_and_quietest(names, norms[-1]):
        with np.errstate(divide="ignore", invalid="ignore"):
            course = sparkline(np.log10(norms[:, place[name]]))
        table.add_row(name, number(value), course)
    return titled(title, table)


def findings(found: Iterable[dict[str, Any]]) -> RenderableType:
    """Show findings: what, where, how it is known, why, and what to do; the most severe first."""
    parts: list[RenderableType] = [Text("\nFindings", style="bold")]
    for finding in most_severe_first(found):
        severity = str(finding.get("severity", "info"))
        rest = literal(f" {finding.get('rule')}, {span_of(finding)}")
        head = Text.assemble(literal(severity, _SEVERITY_STYLES.get(severity, "")), rest)
        told = {"evidence": finding.get("evidence"), "parameters": named(finding)}
        told |= {name: finding.get(name) for name in ("cause", "action")}
        parts += [head, _pairs({f"  {name}": text for name, text in told.items() if text})]
    return Group(*parts) if len(parts) > 1 else Text("no findings")


def named(finding: dict[str, Any]) -> str:
    """Name the parameters of a finding, the first few of many.

    >>> named({"parameters": ["a", "b", "c", "d", "e", "f", "g"]})
    'a, b, c, d, e and 2 more'
    """
    names = list(map(str, finding.get("parameters") or ()))
    more = len(names) - _SHOWN_PARAMETERS
    return ", ".join(names[:_SHOWN_PARAMETERS]) + (f" and {more} more" if more > 0 else "")


def comparison(compared: Comparison) -> RenderableType:
    """Show runs side by side."""
    runs = plain_table("run", "state", "steps", "time", "steps/s", numbers=("steps", "time", "steps/s"))
    columns = (compared.names, compared.states, compared.last_steps, compared.seconds, compared.steps_per_second)
    for name, stands, last_step, seconds, speed in zip(*columns, strict=True):
        runs.add_row(name, state(stands), str(last_step + 1), duration(seconds), number(speed))
    parts: list[RenderableType] = [runs]
    metrics = plain_table("metric", "run", "best", "at step", "last", numbers=("best", "at step", "last"))
    for metric, results in compared.metrics.items():
        bests = [each.best for each in results if each is not None and each.best is not None]
        top = (min if goal(metric) == "min" else max)(bests, default=None)
        for index, (name, result) in enumerate(zip(compared.names, results, strict=True)):
            cells = ["-", "-", "-"]
            if result is not None:
                mark = "*" if result.best == top is not None and len(bests) > 1 else ""
                cells = [
                    number(result.best) + mark,
                    "-" if result.best_step is None else str(result.best_step),
                    number(result.last),
                ]
            metrics.add_row("" if index else metric, name, *cells, end_section=index == len(results) - 1)
    parts.append(titled("Metrics", metrics))
    if compared.reach:
        reach = plain_table("level", "run", "at step", "after", numbers=("at step", "after"))
        for each in compared.reach:
            level = f"{each.metric} {'<=' if goal(each.metric) == 'min' else '>='} {number(each.threshold)}"
            for index, name in enumerate(compared.names):
                step, after = each.steps[index], each.seconds[index]
                reach.add_row("" if index else level, name, "never" if step is None else str(step), duration(after))
        parts.append(titled("First reached", reach))
    for title, differences in (("Config, where it differs", compared.config), ("Surroundings", compared.facts)):
        if differences:
            table = plain_table("key", "run", "value")
            for key, values in differences.items():
                for index, (name, value) in enumerate(zip(compared.names, values, strict=True)):
                    table.add_row("" if index else key, name, "-" if value is None else str(value))
            parts.append(titled(title, table))
    return Group(*parts)


def show(what: RenderableType) -> None:
    """Print to standard output; 80 columns wide where that is no terminal."""
    Console(highlight=False).print(what)

"""How runs look in a terminal: readable at 80 columns and without colour."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.style import StyleType
from rich.table import Table
from rich.text import Text

from ..diagnostics import most_severe_first, span_of, title_of
from ..history import ParameterHistory, update_ratios
from ..store import StoredRun
from .comparison import Comparison, flatten
from .formatting import age, duration, number, sparkline, visible
from .manage import read_notes
from .metric_names import goal, ordered
from .run_table import best_of, differing_keys, value_of

_STATE_STYLES: Final = {"running": "green", "failed": "red", "interrupted": "yellow", "unreadable": "red"}
_SEVERITY_STYLES: Final = {"critical": "bold red", "warning": "yellow", "info": "cyan"}
_SHOWN_PARAMETERS: Final = 5
_COURSE_INTERVALS: Final = 100
_SHOWN_METRICS: Final = 6  # in a comparison without details
_SHOWN_KEYS: Final = 8  # of configs, in a list
_RIGHT: Final = ("age", "steps", "time", "findings")


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
        made.add_column(literal(column), justify="right" if right else "left", no_wrap=right, overflow="fold")
    return made


def titled(title: str, table: RenderableType) -> Group:
    """Put a title over a table; it may be wider."""
    return Group(literal(f"\n{title}", "bold"), table)


def run_list(runs: Sequence[StoredRun], columns: Sequence[str] = (), width: int = 80) -> Text:
    """Show runs, one a line.

    Without ``columns``, those that fit ``width``: of the rest, the rightmost are left out. A table of rich's takes
    three times as long for 2,000 runs as reading them.
    """
    table = _chosen_columns(runs, columns) if columns else _usual_columns(runs)
    heads = list(map(_one_line, table))
    cells = [list(map(_one_line, column)) for column in table.values()]
    widths = [max(map(cell_len, [head, *column])) for head, column in zip(heads, cells, strict=True)]
    while not columns and len(widths) > 2 and sum(widths) + 2 * (len(widths) - 1) > width:
        heads, cells, widths = heads[:-1], cells[:-1], widths[:-1]
    lines = [_aligned(heads, heads, widths), "-" * (sum(widths) + 2 * (len(widths) - 1))]
    lines += [_aligned(heads, row, widths) for row in zip(*cells, strict=True)]
    shown = Text("\n".join(lines), no_wrap=True, overflow="ignore")
    shown.highlight_regex(r"(?<=  )(failed|unreadable)(?=  )", "red")
    shown.highlight_regex(r"(?<=  )running(?=  )", "green")
    return shown


def _one_line(text: str) -> str:
    return visible(text).replace("\n", r"\n")


def _aligned(heads: Sequence[str], cells: Sequence[str], widths: Sequence[int]) -> str:
    padding = [" " * (width - cell_len(cell)) for cell, width in zip(cells, widths, strict=True)]
    return "  ".join(
        space + cell if head in _RIGHT else cell + space
        for head, cell, space in zip(heads, cells, padding, strict=True)
    ).rstrip()


def _usual_columns(runs: Sequence[StoredRun]) -> dict[str, list[str]]:
    columns = _chosen_columns(runs, ("run", "state", "age", "steps"))
    bests = [best_of(run) for run in runs]
    columns["best"] = ["" if best is None else f"{best[0]} {number(best[1])}" for best in bests]
    columns |= _chosen_columns(runs, ("findings", "time"))
    columns |= _chosen_columns(runs, [name for name in ("tags", "group") if any(value_of(run, name) for run in runs)])
    for key in differing_keys(runs)[:_SHOWN_KEYS] if len(runs) > 1 else ():
        columns |= _chosen_columns(runs, (key,))
    return columns


def _chosen_columns(runs: Sequence[StoredRun], names: Sequence[str]) -> dict[str, list[str]]:
    return {name: [_cell(run, name) for run in runs] for name in names}


def _cell(run: StoredRun, name: str) -> str:
    value = run.created if name == "age" else value_of(run, name)
    if value is None:
        return "" if name in ("findings", "tags", "group") else "-"
    if name == "age":
        return age(value)
    if name == "time":
        return duration(value)
    if name == "started":
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(value))
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return number(value) if isinstance(value, float) else str(value)


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
    if lines := not_judged(run.meta.get("unjudged")):
        parts.append(titled("Not judged", Group(*map(literal, lines))))
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
        **{name: ", ".join(each) if isinstance(each, list) else each for name, each in read_notes(run.path).items()},
        "lost": f"{run.dropped_points} values, {run.dropped_blobs} per-parameter records, while the disk failed"
        if run.dropped_points or run.dropped_blobs
        else None,
        "command": facts.get("command"),
        "commit": f"{commit[:12]}{' with uncommitted changes' if facts.get('git_dirty') else ''}" if commit else None,
        "host": facts.get("host"),
        "journal": "rollback (a network file system)" if facts.get("journal_mode") == "TRUNCATE" else None,
        "devices": ", ".join(map(str, devices)) or None if isinstance(devices := facts.get("devices"), list) else None,
        "kept": f"git_diff and {len(facts.get('packages') or ())} packages (--json)" if "packages" in facts else None,
        "python, torch": f"{facts.get('python')}, {facts.get('torch') or 'none'}" if facts else None,
        **{name: value for name, value in run.meta.items() if name != "unjudged"},
    }
    return {name: value for name, value in known.items() if value not in (None, [], {})}


def not_judged(unjudged: Any) -> list[str]:
    """Return which rules could not judge a training, a line for each reason."""
    reasons = unjudged if isinstance(unjudged, dict) else {}
    return [
        f"{', '.join(rule for rule, reason in reasons.items() if reason == why)}: {why}"
        for why in dict.fromkeys(map(str, reasons.values()))
    ]


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
    title = f"{title}: mean norm in the last interval"
    return norm_table(parameters.names, norms, title, _latest_update_ratios(parameters))


def _latest_update_ratios(parameters: ParameterHistory) -> NDArray[Any] | None:
    """Return what the latest step measured has added to each parameter, relative to it, [T]; None without any."""
    updates = parameters.field("update_norm")
    measured = np.flatnonzero(np.isfinite(updates).any(axis=1))
    if not len(measured):
        return None
    return update_ratios(updates[measured[-1]], parameters.field("weight_norm")[measured[-1]])


def norm_table(
    names: Sequence[str], norms: NDArray[Any], title: str, update_ratios: NDArray[Any] | None = None
) -> RenderableType:
    """Show the loudest and quietest of ``norms`` [m, T] in the last interval, each with its course.

    And, of each that is known, ``update_ratios`` [T].
    """
    more = () if update_ratios is None else ("update / weight",)
    table = plain_table("parameter", "norm", *more, "course", numbers=("norm", *more))
    place = {name: index for index, name in enumerate(names)}
    for name, value in loudest_and_quietest(names, norms[-1]):
        with np.errstate(divide="ignore", invalid="ignore"):
            course = sparkline(np.log10(norms[:, place[name]]))
        ratios = [] if update_ratios is None else [number(float(update_ratios[place[name]]))]
        table.add_row(name, number(value), *ratios, course)
    return titled(title, table)


def findings(found: Iterable[dict[str, Any]]) -> RenderableType:
    """Show findings: what, where, how it is known, why, and what to do; the most severe first."""
    parts: list[RenderableType] = [Text("\nFindings", style="bold")]
    for finding in most_severe_first(found):
        severity = str(finding.get("severity", "info"))
        rest = literal(f" {title_of(finding)}, {span_of(finding)}")
        head = Text.assemble(literal(severity, _SEVERITY_STYLES.get(severity, "")), rest)
        facts = {"evidence": finding.get("evidence"), "parameters": named(finding)}
        facts |= {name: finding.get(name) for name in ("cause", "action")}
        parts += [head, _pairs({f"  {name}": text for name, text in facts.items() if text})]
    return Group(*parts) if len(parts) > 1 else Text("no findings")


def named(finding: dict[str, Any]) -> str:
    """Name the parameters of a finding, the first few of many.

    >>> named({"parameters": ["a", "b", "c", "d", "e", "f", "g"]})
    'a, b, c, d, e and 2 more'
    """
    names = list(map(str, finding.get("parameters") or ()))
    more = len(names) - _SHOWN_PARAMETERS
    return ", ".join(names[:_SHOWN_PARAMETERS]) + (f" and {more} more" if more > 0 else "")


def comparison(compared: Comparison, *, details: bool = False) -> RenderableType:
    """Show runs side by side, one a row: what differs, and the best and last of the metrics with a goal.

    With ``details``, also every metric, when levels were first reached, and in what the surroundings differ.
    """
    judged = [name for name in compared.metrics if goal(name)][:_SHOWN_METRICS]
    heads = ["run", "state", "steps", "steps/s"]
    numbers = ["steps", "steps/s"]
    rows = [
        [name, stands, str(last_step + 1), number(speed)]
        for name, stands, last_step, speed in zip(
            compared.names, compared.states, compared.last_steps, compared.steps_per_second, strict=True
        )
    ]
    for key, values in list(compared.config.items())[:_SHOWN_KEYS]:
        heads.append(key)
        for row, value in zip(rows, values, strict=True):
            row.append("-" if value is None else str(value))
    for metric in judged:
        numbers += [f"best {metric}", f"last {metric}"]
        heads += [f"best {metric}", f"last {metric}"]
        for row, result, best in zip(rows, compared.metrics[metric], _marked(compared, metric), strict=True):
            row += [best, number(None if result is None else result.last)]
    parts: list[RenderableType] = [_plain_rows(heads, rows, numbers)]
    if compared.reach and (details or not compared.usual_levels):
        parts.append(titled("First reached", _reach_table(compared)))
    if details:
        parts.append(titled("Metrics", _metric_table(compared)))
        for title, differences in (("Config, where it differs", compared.config), ("Surroundings", compared.facts)):
            if differences:
                parts.append(titled(title, _difference_table(compared.names, differences)))
    return Group(*parts)


def _plain_rows(heads: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[str]) -> RenderableType:
    """Lay out rows in one table; where that is wider than the terminal, the columns fold into blocks of their own."""
    width = Console().width
    first = max(cell_len(visible(text)) for text in [heads[0], *(row[0] for row in rows)])
    blocks: list[list[int]] = [[]]
    used = first
    for index in range(1, len(heads)):
        wanted = 2 + max(cell_len(visible(text)) for text in [heads[index], *(row[index] for row in rows)])
        if blocks[-1] and used + wanted > width:
            blocks.append([])
            used = first
        blocks[-1].append(index)
        used += wanted
    tables: list[RenderableType] = []
    for block in blocks:
        table = plain_table(heads[0], *(heads[index] for index in block), numbers=numbers)
        for row in rows:
            table.add_row(row[0], *(row[index] for index in block))
        tables += [table] if not tables else [Text(""), table]
    return Group(*tables)


def _marked(compared: Comparison, metric: str) -> list[str]:
    """Return each run's best value of a metric; the best of all carries a star."""
    results = compared.metrics[metric]
    bests = [each.best for each in results if each is not None and each.best is not None]
    top = (min if goal(metric) == "min" else max)(bests, default=None)
    return [
        "-" if each is None else number(each.best) + ("*" if each.best == top is not None and len(bests) > 1 else "")
        for each in results
    ]


def _metric_table(compared: Comparison) -> Table:
    table = plain_table("metric", "run", "best", "at step", "last", numbers=("best", "at step", "last"))
    for metric, results in compared.metrics.items():
        for index, (name, result, best) in enumerate(
            zip(compared.names, results, _marked(compared, metric), strict=True)
        ):
            step = "-" if result is None or result.best_step is None else str(result.best_step)
            last = number(None if result is None else result.last)
            table.add_row("" if index else metric, name, best, step, last, end_section=index == len(results) - 1)
    return table


def _reach_table(compared: Comparison) -> Table:
    table = plain_table("level", "run", "at step", "after", numbers=("at step", "after"))
    for each in compared.reach:
        level = f"{each.metric} {'<=' if goal(each.metric) == 'min' else '>='} {number(each.threshold)}"
        for index, name in enumerate(compared.names):
            step, after = each.steps[index], each.seconds[index]
            table.add_row("" if index else level, name, "never" if step is None else str(step), duration(after))
    return table


def _difference_table(names: Sequence[str], differences: dict[str, list[Any]]) -> Table:
    table = plain_table("key", "run", "value")
    for key, values in differences.items():
        for index, (name, value) in enumerate(zip(names, values, strict=True)):
            table.add_row("" if index else key, name, "-" if value is None else str(value))
    return table


def show(what: RenderableType) -> None:
    """Print to standard output; 80 columns wide where that is no terminal."""
    Console(highlight=False).print(what)


def show_runs(runs: Sequence[StoredRun], columns: Sequence[str] = ()) -> None:
    """Print a list of runs, a line each that is never broken, and why some can't be read."""
    console = Console(highlight=False)
    console.print(run_list(runs, columns, console.width), soft_wrap=True)
    for run in runs:
        if run.state == "unreadable":
            console.print(literal(f"{run.name}: {run.error}", "red"))

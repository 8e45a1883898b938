"""Which runs a list shows, in which order, and with which columns: plain values, for the terminal and for programs."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from ..errors import InvalidValueError
from ..store import StoredRun
from .comparison import flatten, metric_result
from .manage import read_notes
from .metric_names import goal, headline

_FIXED: Final[dict[str, Callable[[StoredRun], Any]]] = {
    "run": lambda run: run.name,
    "state": lambda run: run.state,
    "started": lambda run: run.created if math.isfinite(run.created) else None,
    "steps": lambda run: run.last_step + 1 if run.summaries else None,
    "time": lambda run: run.seconds or None,
    "findings": lambda run: len(run.findings) or None,
}
_OPERATORS: Final[dict[str, Callable[[Any, Any], bool]]] = {
    "!=": lambda a, b: bool(a != b),
    "<=": lambda a, b: bool(a <= b),
    ">=": lambda a, b: bool(a >= b),
    "=": lambda a, b: bool(a == b),
    "<": lambda a, b: bool(a < b),
    ">": lambda a, b: bool(a > b),
}


def value_of(run: StoredRun, column: str) -> Any:
    """Return what a run has in a column; None where it has nothing.

    A column is one of run, state, started, steps, time, findings; a key of the config (``optimizer.lr``); a metric,
    which means its best value, or its last where neither high nor low is good; ``last:`` and a metric; tags, note and
    group (``read_notes``); or a key of the run's meta.
    """
    if column in _FIXED:
        return _FIXED[column](run)
    config = flatten(run.config)
    if column in config:
        return config[column]
    name = column.removeprefix("last:")
    if name in run.summaries:
        result = metric_result(run, name)
        return result.last if result.best is None or column != name else result.best
    return read_notes(run.path).get(column, run.meta.get(column))


def select_runs(
    runs: Iterable[StoredRun], *, where: Sequence[str] = (), sort: str | None = None, limit: int | None = None
) -> list[StoredRun]:
    """Return the runs that meet every condition, sorted, and no more than ``limit``.

    Args:
        runs: as ``list_runs`` gives them.
        where: conditions such as ``lr=1e-3``, ``val_loss<0.5``, ``state!=finished``: a column, an operator (=, !=, <,
            <=, >, >=) and a value. Numbers are compared as numbers. ``tags=NAME`` means that the tag is among them.
        sort: a column. A metric's best comes first; other numbers and texts ascend; a ``-`` in front turns it round.
            Runs without a value come last.
        limit: how many to return; None means all.

    Raises:
        InvalidValueError: a condition has no operator, or no run has a value in the column.
    """
    found = list(runs)
    for condition in where:
        found = _filtered(found, condition)
    if sort is not None:
        found = _sorted(found, sort)
    return found if limit is None else found[:limit]


def differing_keys(runs: Sequence[StoredRun]) -> list[str]:
    """Return the keys of the configs that are not the same in all readable runs."""
    configs = [flatten(run.config) for run in runs if run.state != "unreadable"]
    keys = dict.fromkeys(key for config in configs for key in config)
    return [key for key in keys if any(config.get(key) != configs[0].get(key) for config in configs)]


def best_of(run: StoredRun) -> tuple[str, float] | None:
    """Return the metric that says most of a run, and its best value."""
    name = headline(list(run.summaries))
    return None if name is None else (name, float(value_of(run, name)))


def _filtered(runs: list[StoredRun], condition: str) -> list[StoredRun]:
    parts = re.fullmatch(r"(.+?)(!=|<=|>=|=|<|>)(.*)", condition, re.DOTALL)
    if parts is None:
        raise InvalidValueError(f"where: expected a condition such as lr=1e-3 or val_loss<0.5, got {condition!r}")
    column, operator, wanted = parts.groups()
    _check_column(runs, column, "where")
    return [run for run in runs if _meets(value_of(run, column), operator, wanted)]


def _meets(value: Any, operator: str, wanted: str) -> bool:
    if isinstance(value, list):
        among = wanted in map(str, value)
        return among if operator == "=" else not among if operator == "!=" else False
    if value is None:
        return operator == "!="
    number = _as_number(wanted)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and number is not None:
        return _OPERATORS[operator](value, number)
    return _OPERATORS[operator](str(value), wanted)


def _as_number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _sorted(runs: list[StoredRun], sort: str) -> list[StoredRun]:
    column = sort.removeprefix("-")
    _check_column(runs, column, "sort")
    downwards = sort.startswith("-")
    if goal(column) == "max" and not any(column in flatten(run.config) for run in runs):
        downwards = not downwards
    values = [(value_of(run, column), run) for run in runs]
    known = [(value, run) for value, run in values if value is not None and value == value]
    numbers = all(isinstance(value, (int, float)) for value, _ in known)
    known.sort(key=lambda pair: pair[0] if numbers else str(pair[0]), reverse=downwards)
    return [run for _, run in known] + [run for value, run in values if value is None or value != value]


def _check_column(runs: list[StoredRun], column: str, name: str) -> None:
    if not runs or column in _FIXED or any(value_of(run, column) is not None for run in runs):
        return
    keys = dict.fromkeys(key for run in runs for key in [*flatten(run.config), *run.summaries])
    raise InvalidValueError(f"{name}: no run has {column!r}; there are {', '.join([*_FIXED, *keys][:30])}")

"""Assembles the histories of runs from the rows of a table: steps, ends of runs, sums, names."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np

from ..errors import InvalidValueError
from ..history import History, Series
from .names import STEPS, Columns, recognise, step_unit, words
from .table import Table

_LOOKS: Final = 20  # so many times at most does diagnose look at a log
_CLOCKS: Final = frozenset(["time", "timestamp", "wall", "runtime", "eta", "seconds", "memory"])


@dataclass
class _Steps:
    """The step of each row, the rows at which runs begin, and what a step is."""

    steps: list[int]
    starts: list[int]
    unit: str
    column: str


def histories_of(table: Table, names: Mapping[str, str]) -> list[History]:
    """Return a history for each run in a table.

    Raises:
        InvalidValueError: ``names`` has a column that the table has not.
    """
    counts = table.counts()
    for role, name in names.items():
        if name not in counts:
            raise InvalidValueError(
                f"names[{role!r}]: {table.path} has no column {name!r}; it has {', '.join(counts) or 'none'}"
            )
    step_name = names.get("step") or _step_column(table, counts)
    columns = recognise(counts, table.sums, {role: name for role, name in names.items() if role != "step"})
    found = _count_steps(table, columns, step_name)
    ends = [*found.starts[1:], len(table.rows)]
    made = [
        _history(table, columns, found, start, stop, index if len(ends) > 1 else None)
        for index, (start, stop) in enumerate(zip(found.starts, ends, strict=True))
    ]
    return [history for history in made if len(history)]


def _step_column(table: Table, counts: Mapping[str, int]) -> str:
    """Return the column that counts steps: the finest of those that are in at least half of the rows, "" for none."""
    known = [name for name in counts if step_unit(name) and counts[name] >= 0.5 * len(table.rows)]
    order = [unit for unit, _ in STEPS]

    def place(name: str) -> tuple[int, bool, bool, int]:
        plain = set(words(name)) & {"step", "steps", "iteration", "iterations"}
        return order.index(step_unit(name)), "global" not in words(name), not plain, -counts[name]

    return min(known, key=place, default="")


def _count_steps(table: Table, columns: Columns, name: str) -> _Steps:
    """Count the steps of all rows. A run begins where the file says so, or where the step goes back."""
    rows = table.rows
    epochs = next((each for each in table.counts() if step_unit(each) == "epoch" and each != name), "")
    unit = step_unit(name) if name else ""
    main = _main_columns(columns, rows)
    if not name or _is_within([row[name] for row in rows if name in row and not main.isdisjoint(row)]):
        unit = "epoch" if not name and _is_by_epoch(table, columns) else "step"
        known = sorted({0, *table.starts} & set(range(len(rows))))
        begun = np.repeat(known, np.diff([*known, len(rows)]))
        return _Steps((np.arange(len(rows)) - begun).tolist(), known, unit, "")
    steps: list[int] = []
    starts: list[int] = []
    last, last_epoch, offset, largest = -1, -math.inf, 0, 0
    for index, row in enumerate(rows):
        epoch = row.get(epochs, last_epoch) if epochs else last_epoch
        begins = index in table.starts
        given = row.get(name, math.nan)
        step = offset + round(given) if math.isfinite(given) else max(last, 0)
        if not begins and step < last:
            if epochs and epoch > last_epoch:  # the step counts within an epoch
                offset = largest + 1
                step = offset + round(given)
            elif main.isdisjoint(row) and not _goes_on_below(rows, index, main, name, last - offset):
                step = last  # rows of another kind count something else
            else:
                begins = True
        if begins or not starts:
            starts.append(index)
            offset, largest, step = 0, 0, round(given) if math.isfinite(given) else 0
        steps.append(step)
        last, last_epoch, largest = step, epoch, max(largest, step)
    return _Steps(steps, starts, unit, name)


def _goes_on_below(rows: list[dict[str, float]], index: int, main: set[str], name: str, last: int) -> bool:
    """Tell whether the next row of the main kind is before ``last`` too, so that a run has begun already."""
    following = next((row for row in rows[index + 1 :] if not main.isdisjoint(row)), None)
    return following is not None and following.get(name, math.inf) < last


def _main_columns(columns: Columns, rows: list[dict[str, float]]) -> set[str]:
    known = columns.by_role.get("loss")
    if known:
        return set(known)
    most = Counter(name for row in rows for name in row if not step_unit(name)).most_common(1)
    return {name for name, _ in most}


def _is_within(values: list[float]) -> bool:
    """Tell whether a column is no count of the rows: it has fractions, or stays the same from most rows to the next."""
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) < 4:
        return False
    same = sum(first == second for first, second in pairwise(finite))
    return any(value != int(value) for value in finite) or same > 0.5 * len(finite)


def _is_by_epoch(table: Table, columns: Columns) -> bool:
    """Tell whether rows without a step are epochs: each of them has a validation."""
    counts = table.counts()
    held_out = columns.by_role.get("val_loss") or columns.by_role.get("val_accuracy") or []
    return bool(held_out) and counts.get(held_out[0], 0) >= 0.9 * len(table.rows)


def _history(table: Table, columns: Columns, found: _Steps, start: int, stop: int, index: int | None) -> History:
    history = History()
    rows = table.rows[start:stop]
    steps = np.maximum(found.steps[start:stop], 0).astype(np.int64)
    taken = {name for chosen in columns.by_role.values() for name in chosen}
    for role, chosen in columns.by_role.items():
        _add(history, role, rows, steps, chosen)
    for name in table.counts():
        if name not in taken and not step_unit(name) and not _CLOCKS & set(words(name)):
            _add(history, name if name not in history else f"{name} ", rows, steps, [name])
    if not len(history):
        return history
    length = history.last_step - int(min(series.steps[0] for series in history.values())) + 1
    points = max(len(series) for series in history.values())
    every = max(1, round(10 * length / points), length // _LOOKS)
    run = table.run or ("" if index is None else f"run{index}")
    history.meta = {
        "every": every,
        "log": {
            "path": str(table.path),
            "format": table.format,
            **({"run": run} if run else {}),
            "columns": {role: " + ".join(chosen) for role, chosen in columns.by_role.items() if role in history},
            "step": found.column or "row",
            "unit": found.unit,
            **({"skipped": table.skipped[:20]} if table.skipped else {}),
        },
        **({"objective": columns.objective} if columns.objective else {}),
        **table.meta,
    }
    return history


def _add(history: History, name: str, rows: list[dict[str, float]], steps: Any, chosen: list[str]) -> None:
    """Add a series of the sums of the columns, where a row has all of them."""
    where = [index for index, row in enumerate(rows) if all(each in row for each in chosen)]
    values = np.array([sum(rows[index][each] for each in chosen) for index in where], np.float64)
    at = steps[where]
    known = ~np.isnan(values)
    if known.any() and (~known).sum() >= 0.5 * len(values):  # NaN stands for "not measured here"
        last = int(np.flatnonzero(known)[-1])
        if not known[:last].all():
            values, at = values[known], at[known]
    if len(values):
        history[name] = Series(values, at, name=name)

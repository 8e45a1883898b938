"""A run's numbers as CSV, JSON or Parquet. No torch here."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import IO, Any, Final, cast

import numpy as np
from numpy.typing import NDArray

from .._checks import flag
from ..errors import InvalidValueError, MissingExtraError
from ..history import FIELDS, Float64Array, History, Int64Array, ParameterHistory
from ..store import StoredRun, jsonable
from .formatting import visible

FORMATS: Final = ("csv", "json", "parquet")
_HEADER: Final = ("name", "state", "created", "seconds", "config", "meta", "facts", "findings")
_INTERVAL_COLUMNS: Final = ("first_step", "last_step", "parameter", *FIELDS)
_PART_CELLS: Final = 20_000  # intervals times parameters in memory at one time
_FORMULA: Final = re.compile(r"[\s\x00-\x1f\u200b-\u200f\ufeff\"']*[=+\-@\uff1d\uff0b\uff0d\uff20]|[\t\r\n]")
"""A text that a spreadsheet evaluates: it begins so, or does after blanks and quotes that some programs strip."""


def export_run(
    run: StoredRun,
    target: str | os.PathLike[str] | IO[str],
    *,
    format: str | None = None,
    parameters: bool = False,
    guard: bool = True,
) -> None:
    """Write a run's series, or its per-parameter intervals, to a file.

    Args:
        run: what ``load_run`` gives.
        target: a path, or an open text file (not for Parquet).
        format: "csv", "json" or "parquet"; by default what the path ends with.
        parameters: False: one row a step, one column a series. True: one row for each interval and parameter.
        guard: in CSV, put ``'`` before a name that a spreadsheet would evaluate (it begins with ``=``, ``+``, ``-`` or
            ``@``, or does after blanks and quotes), and write what a terminal would obey as escapes. False leaves names
            as they are, for programs.

    In CSV a value that a series lacks is empty, and NaN is ``nan``. JSON has null for NaN and infinities.

    Raises:
        InvalidValueError: the format is unknown.
        MissingExtraError: Parquet without pyarrow.
    """
    parameters, guard = flag("parameters", parameters), flag("guard", guard)
    name = os.fspath(target) if isinstance(target, (str, os.PathLike)) else ""
    chosen = format or Path(name).suffix.lstrip(".").lower()
    if chosen not in FORMATS:
        raise InvalidValueError(f"format: expected one of {', '.join(FORMATS)}, got {chosen!r}")
    if chosen == "parquet":
        if not name:
            raise InvalidValueError("format: Parquet needs a path to write to, not an open text file")
        _write_parquet(run, name, parameters)
        return
    with open(name, "w", newline="", encoding="utf-8") if name else nullcontext(cast("IO[str]", target)) as file:
        if chosen == "json":
            _write_json(run, file, parameters)
        else:
            _write_csv(run, file, parameters, _guarded if guard else str)


def _guarded(text: str) -> str:
    shown = visible(text)
    return f"'{shown}" if _FORMULA.match(text) else shown


def _write_csv(run: StoredRun, file: IO[str], parameters: bool, as_text: Callable[[str], str]) -> None:
    writer = csv.writer(file, lineterminator="\n")
    if parameters:
        names = [as_text(info.name) for info in run.parameters]
        writer.writerow(_INTERVAL_COLUMNS)
        for part in run.interval_parts(_PART_CELLS):
            arrays = interval_columns(part, names).values()
            writer.writerows(zip(*(array.tolist() for array in arrays), strict=True))
        return
    steps, columns = series_columns(run.load_history(parameters=False))
    writer.writerow(["step", *map(as_text, columns)])

    def cells(column: tuple[Float64Array, NDArray[np.bool_]]) -> Iterator[float | str]:
        values, known = column
        return (value if there else "" for value, there in zip(values.tolist(), known.tolist(), strict=True))

    writer.writerows(zip(steps.tolist(), *map(cells, columns.values()), strict=True))


def series_columns(history: History) -> tuple[Int64Array, dict[str, tuple[Float64Array, NDArray[np.bool_]]]]:
    """Align the series by step: all steps [n], and for each series its values [n] and where it has one [n].

    Of several values at one step the last counts, as in ``History.to_pandas``.
    """
    lengths = [series.steps for series in history.values()]
    steps: Int64Array = np.unique(np.concatenate(lengths)) if lengths else np.empty(0, np.int64)
    columns = {}
    for name, series in history.items():
        values, known = np.full(len(steps), np.nan), np.zeros(len(steps), np.bool_)
        places = np.searchsorted(steps, series.steps)
        values[places], known[places] = series.values, True
        columns[name] = (values, known)
    return steps, columns


def interval_columns(parameters: ParameterHistory, names: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Return per-parameter intervals as columns of one long table, m intervals times T parameters, called ``names``."""
    count = len(names)
    columns: dict[str, NDArray[Any]] = {
        "first_step": np.repeat(parameters.first_step, count),
        "last_step": np.repeat(parameters.last_step, count),
        "parameter": np.tile(np.array(names, object), len(parameters)),
    }
    return columns | {name: parameters.field(name).reshape(-1) for name in FIELDS}


def _write_json(run: StoredRun, file: IO[str], parameters: bool) -> None:
    document = {name: jsonable(getattr(run, name)) for name in _HEADER}
    if not parameters:
        history = run.load_history(parameters=False)
        document["series"] = {
            name: {"steps": series.steps.tolist(), "values": jsonable(series.values.tolist())}
            for name, series in history.items()
        }
        file.write(json.dumps(document, allow_nan=False) + "\n")
        return
    # A list of rows is written as it is read; the rest comes before it.
    file.write(json.dumps(document, allow_nan=False)[:-1] + ', "intervals": [')
    separator = ""
    for part in run.interval_parts(_PART_CELLS):
        columns = interval_columns(part, part.names)
        for row in zip(*(array.tolist() for array in columns.values()), strict=True):
            file.write(separator + json.dumps(jsonable(dict(zip(columns, row, strict=True))), allow_nan=False))
            separator = ",\n"
    file.write("]}\n")


def _write_parquet(run: StoredRun, path: str, parameters: bool) -> None:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtraError("export to Parquet", "pyarrow", "parquet") from error
    note = json.dumps(jsonable({"name": run.name, "state": run.state, "config": run.config, "meta": run.meta}))
    if parameters:
        kinds = {"first_step": "int64", "last_step": "int64", "parameter": "string", "first_nonfinite": "int64"}
        fields = [(name, pyarrow.type_for_alias(kinds.get(name, "float32"))) for name in _INTERVAL_COLUMNS]
        parts = run.interval_parts(_PART_CELLS)
        tables: Iterator[Any] = (pyarrow.table(interval_columns(part, part.names)) for part in parts)
        schema = pyarrow.schema(fields)
    else:
        steps, columns = series_columns(run.load_history(parameters=False))
        arrays = {name: pyarrow.array(values, mask=~known) for name, (values, known) in columns.items()}
        table = pyarrow.table({"step": steps, **arrays})
        tables, schema = iter([table]), table.schema
    schema = schema.with_metadata({"pytracker": note})
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        for table in tables:
            writer.write_table(table.cast(schema))

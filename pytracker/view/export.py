"""A run's numbers as CSV, JSON or Parquet. No torch here."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, Final, cast

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidValueError, MissingExtraError
from ..history import FIELDS, Float64Array, History, Int64Array
from ..store import StoredRun, jsonable

FORMATS: Final = ("csv", "json", "parquet")


def export_run(
    run: StoredRun, target: str | os.PathLike[str] | IO[str], *, format: str | None = None, parameters: bool = False
) -> None:
    """Write a run's series, or its per-parameter intervals, to a file.

    Args:
        run: what ``load_run`` gives.
        target: a path, or an open text file (not for Parquet).
        format: "csv", "json" or "parquet"; by default what the path ends with.
        parameters: False: one row a step, one column a series. True: one row for each interval and parameter.

    In CSV a value that a series lacks is empty, and NaN is ``nan``. JSON has null for NaN and infinities.

    Raises:
        InvalidValueError: the format is unknown.
        MissingExtraError: Parquet without pyarrow.
    """
    name = os.fspath(target) if isinstance(target, (str, os.PathLike)) else ""
    chosen = format or Path(name).suffix.lstrip(".").lower()
    if chosen not in FORMATS:
        raise InvalidValueError(f"format: expected one of {', '.join(FORMATS)}, got {chosen!r}")
    if chosen == "parquet":
        if not name:
            raise InvalidValueError("format: Parquet needs a path to write to, not an open text file")
        _write_parquet(run, name, parameters)
    elif name:
        with open(name, "w", newline="", encoding="utf-8") as file:
            _write_text(run, file, chosen, parameters)
    else:
        _write_text(run, cast("IO[str]", target), chosen, parameters)


def _write_text(run: StoredRun, file: IO[str], format: str, parameters: bool) -> None:
    if format == "csv":
        writer = csv.writer(file, lineterminator="\n")
        if parameters:
            columns = interval_columns(run.history)
            writer.writerow(columns)
            writer.writerows(zip(*(array.tolist() for array in columns.values()), strict=True))
        else:
            _write_series_csv(run, writer)
        return
    json.dump(_document(run, parameters), file, allow_nan=False)
    file.write("\n")


def _write_series_csv(run: StoredRun, writer: Any) -> None:
    steps, columns = series_columns(run.load_history(parameters=False))
    writer.writerow(["step", *columns])

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


def interval_columns(history: History) -> dict[str, NDArray[Any]]:
    """Return the per-parameter intervals as columns of one long table, m intervals times T parameters."""
    parameters = history.parameters
    count = len(parameters.infos)
    columns: dict[str, NDArray[Any]] = {
        "first_step": np.repeat(parameters.first_step, count),
        "last_step": np.repeat(parameters.last_step, count),
        "parameter": np.tile(np.array(parameters.names, object), len(parameters)),
    }
    return columns | {name: parameters.field(name).reshape(-1) for name in FIELDS}


def _document(run: StoredRun, parameters: bool) -> dict[str, Any]:
    kept = ("name", "state", "created", "seconds", "config", "meta", "facts", "findings")
    document: dict[str, Any] = {name: jsonable(getattr(run, name)) for name in kept}
    if parameters:
        columns = interval_columns(run.history)
        document["intervals"] = {name: _plain_list(array) for name, array in columns.items()}
    else:
        history = run.load_history(parameters=False)
        document["series"] = {
            name: {"steps": series.steps.tolist(), "values": _plain_list(series.values)}
            for name, series in history.items()
        }
    return document


def _plain_list(values: Iterable[Any]) -> list[Any]:
    return [
        None if isinstance(value, float) and not math.isfinite(value) else value
        for value in np.asarray(values).tolist()
    ]


def _write_parquet(run: StoredRun, path: str, parameters: bool) -> None:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtraError("export to Parquet", "pyarrow", "parquet") from error
    if parameters:
        table = pyarrow.table(interval_columns(run.history))
    else:
        steps, columns = series_columns(run.load_history(parameters=False))
        arrays = {name: pyarrow.array(values, mask=~known) for name, (values, known) in columns.items()}
        table = pyarrow.table({"step": steps, **arrays})
    note = json.dumps(jsonable({"name": run.name, "state": run.state, "config": run.config, "meta": run.meta}))
    pyarrow.parquet.write_table(table.replace_schema_metadata({"pytracker": note}), path)

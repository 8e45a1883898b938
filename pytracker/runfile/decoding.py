"""From the rows of a file to values, each checked as it is read: its type, its range, its size, its checksum."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from .._checks import LARGEST_STEP, shown, writable
from .._json import decode
from ..columns import COLUMNS
from ..errors import RunFormatError
from ..history import (
    DEFAULT_ROW_BYTES,
    FIELDS,
    Float64Array,
    Int64Array,
    ParameterHistory,
    ParameterInfo,
    Series,
    checked_finding,
    checked_steps,
)
from .packing import checksum, unpack_points, unpack_rows
from .schema import Connection, interval_fields

_BLOB_TYPES: Final = {name: "<i8" if name == "first_nonfinite" else "<f4" for name in FIELDS}
_LAST_TIME: Final = 253402300799.0  # of the year 9999, the last that Python's datetime knows
_NAMED: Final = 3  # of the damaged rows, in a warning


class Cells:
    """The cells of a row, read from the left, each as what it must be.

    >>> cells = Cells("series", ("loss", 3, None))
    >>> cells.text(), cells.whole(), cells.number()
    ('loss', 3, nan)
    """

    def __init__(self, table: str, row: tuple[Any, ...]) -> None:
        """Begin at the first cell."""
        self._table = table
        self._cells = iter(row)

    def text(self) -> str:
        """Return a text; lone surrogates in it are escaped."""
        return writable(self._next(str, "a text"))

    def text_or_none(self) -> str | None:
        """Return a text, or None for NULL."""
        found = self._next((str, type(None)), "a text")
        return None if found is None else writable(found)

    def whole(self, low: int = 0) -> int:
        """Return an integer from ``low`` to the largest step."""
        found: int = self._next(int, "an integer")
        if not low <= found <= LARGEST_STEP:
            raise self._wrong(found, f"an integer from {low} to {LARGEST_STEP}")
        return found

    def number(self) -> float:
        """Return a number; NULL is NaN."""
        found = self._next((float, int, type(None)), "a number")
        return math.nan if found is None else float(found)

    def time(self) -> float:
        """Return a time in Unix seconds."""
        found = self.time_or_none()
        if found is None:
            raise self._wrong(None, "a time")
        return found

    def time_or_none(self) -> float | None:
        """Return a time in Unix seconds, or None for NULL."""
        found = self.number()
        if math.isnan(found):
            return None
        if not 0 <= found <= _LAST_TIME:
            raise self._wrong(found, "a time")
        return found

    def document(self) -> Any:
        """Return what a JSON document says."""
        return decode(self._next(str, "a document"))

    def _next(self, kind: type | tuple[type, ...], expected: str) -> Any:
        found = next(self._cells)
        if not isinstance(found, kind):
            raise self._wrong(found, expected)
        return found

    def _wrong(self, found: Any, expected: str) -> RunFormatError:
        return RunFormatError(f"its table {self._table} has {shown(found)} where {expected} is expected")


class Damage:
    """The rows whose checksums are wrong: they are left out, and said to be."""

    def __init__(self) -> None:
        """Begin with none."""
        self.rows: list[str] = []

    def is_in(self, row: tuple[Any, ...], name: str) -> bool:
        """Tell whether the last column of ``row`` is not the checksum of the others, and note it by ``name``."""
        damaged = bool(checksum(*row[:-1]) != row[-1])
        if damaged:
            self.rows.append(name)
        return damaged

    def warn(self, connection: Connection) -> None:
        """Say what was left out."""
        if self.rows:
            more = f" and {len(self.rows) - _NAMED} more" if len(self.rows) > _NAMED else ""
            named = ", ".join(row.encode("unicode_escape").decode("ascii") for row in self.rows[:_NAMED])
            warnings.warn(
                f"{connection.file} is damaged: {named}{more} don't match their checksums and "
                f"are left out; `pytracker check {connection.file.parent}` lists them all",
                RuntimeWarning,
                stacklevel=2,
            )


def read_points(connection: Connection, after: int = 0) -> tuple[dict[str, Series], int]:
    """Read the batches with an id above ``after`` as series, and return them with the last id seen."""
    names = series_names(connection)
    columns = "series, first_step, last_step, count, points, checksum"
    rows = connection.execute(f"SELECT id, {columns} FROM batches WHERE id > ? ORDER BY id", (after,))
    texts: dict[int, list[str]] = {series: [] for series in names}
    counts = dict.fromkeys(names, 0)
    damage, last = Damage(), after
    for batch, *row in rows:
        series, first_step, last_step, count, points, _ = row
        last = batch
        connection.charge(points)
        if not damage.is_in(tuple(row), f"{names.get(series)!r} at steps {first_step} to {last_step}"):
            texts[series].append(points)
            counts[series] += count
    damage.warn(connection)
    found = {}
    for series, parts in texts.items():
        if parts:
            steps, values = unpack_points(parts)
            if len(steps) != counts[series]:
                raise RunFormatError(f"{names[series]!r} has {len(steps)} values, and there should be {counts[series]}")
            found[names[series]] = Series(values, steps, name=names[series])
    return found, last


def series_names(connection: Connection) -> dict[int, str]:
    """Read the names of the series, by their numbers."""
    rows = connection.execute("SELECT id, name FROM series ORDER BY id")
    return {cells.whole(): cells.text() for cells in (Cells("series", row) for row in rows)}


def read_infos(connection: Connection) -> list[ParameterInfo]:
    """Read the parameters, in the order of every blob."""
    infos = []
    for row in connection.execute("SELECT name, shape, dtype, group_name, numel FROM parameters ORDER BY id"):
        cells = Cells("parameters", row)
        name, shape, dtype, group, numel = cells.text(), cells.document(), cells.text(), cells.text(), cells.whole()
        infos.append(ParameterInfo(name, shape, dtype, group, numel))
    return infos


def read_intervals(
    connection: Connection,
    infos: list[ParameterInfo],
    *,
    latest: int | None = None,
    after: int = -1,
    limit: int = -1,
) -> ParameterHistory:
    """Read the per-parameter intervals; only the ``latest`` few, or at most ``limit`` that begin ``after`` a step."""
    width = len(infos)
    newest = "first_step IN (SELECT first_step FROM intervals ORDER BY first_step DESC LIMIT ?)"
    chosen = f"FROM intervals WHERE {newest} AND first_step > ? ORDER BY first_step LIMIT ?"
    which = (-1 if latest is None else latest, after, limit)
    count = connection.execute(f"SELECT count(*) FROM (SELECT 1 {chosen})", which).fetchone()[0]
    steps: list[tuple[int, int]] = []
    fields: dict[str, NDArray[Any]] = {}
    damage = Damage()
    known = interval_fields(connection)
    for row in connection.execute(f"SELECT first_step, last_step, {', '.join(known)}, checksum {chosen}", which):
        cells = Cells("intervals", row)
        first, last = cells.whole(), cells.whole()
        if damage.is_in(row, f"the interval of steps {first} to {last}"):
            continue
        for name, values in unpack_fields(dict(zip(known, row[2:-1], strict=True)), width).items():
            if name not in fields:  # it has had nothing to tell up to here
                fields[name] = np.full((count, width), FIELDS[name], values.dtype)
            fields[name][len(steps)] = values
        steps.append((first, last))
    damage.warn(connection)
    table = np.array(steps, np.int64).reshape(-1, 2)
    if (np.diff(table.ravel()) < 0).any() or (np.diff(table[:, 0]) <= 0).any():
        raise RunFormatError("its intervals overlap")
    whole = {name: array[: len(steps)] for name, array in fields.items()}
    return ParameterHistory.from_fields(infos, table[:, 0].copy(), table[:, 1].copy(), whole)


def unpack_fields(cells: Mapping[str, Any], width: int) -> dict[str, NDArray[Any]]:
    """Return the fields of an interval that are there and have something to tell, each for ``width`` parameters.

    Raises:
        RunFormatError: a cell is no such field.
    """
    found = {}
    for name in FIELDS:
        blob, dtype = cells.get(name), np.dtype(_BLOB_TYPES[name])
        if blob is None:
            continue
        if not isinstance(blob, bytes) or len(blob) != width * dtype.itemsize:
            raise RunFormatError(f"intervals.{name} is {shown(blob)}; expected a blob for {width} parameters")
        found[name] = np.frombuffer(blob, dtype)
    return found


def read_exact_rows(connection: Connection, parameters: ParameterHistory) -> None:
    """Read the latest rows of single steps into ``parameters``, as many as fit the memory for them."""
    width, bytes_left = len(parameters.infos), DEFAULT_ROW_BYTES
    columns = "first_step, last_step, count, format, steps, moments, checksum"
    blocks: list[tuple[Int64Array, Float64Array]] = []
    damage = Damage()
    for row in connection.execute(f"SELECT {columns} FROM exact_rows ORDER BY first_step DESC"):
        cells = Cells("exact_rows", row)
        first, last, count, format = cells.whole(), cells.whole(), cells.whole(), cells.text()
        bytes_left -= count * (width * len(COLUMNS) + 1) * 8
        if bytes_left < 0 and blocks:
            break
        if damage.is_in(row, f"the rows of steps {first} to {last}"):
            continue
        connection.charge(row[5])
        blocks.append(unpack_exact_rows(count, format, cells.document(), row[5], width))
    damage.warn(connection)
    for steps, rows in reversed(blocks):
        parameters.append_rows(steps, rows)


def unpack_exact_rows(
    count: int, format: str, steps: Any, moments: bytes, width: int
) -> tuple[Int64Array, Float64Array]:
    """Return the steps and the moments [n, T, 6] of a row of ``exact_rows``.

    Raises:
        RunFormatError, ValueError: they are not ``count`` rows of ``width`` parameters.
    """
    known = checked_steps("step", steps)
    if len(known) != count:
        raise RunFormatError(f"exact_rows has {len(known)} steps where {count} are expected")
    return known, unpack_rows(moments, format, count, width)


def read_clock(connection: Connection, latest: int = -1) -> tuple[Int64Array, Float64Array]:
    """Read the ``latest`` few steps, or all, and the training seconds at which they were logged, ascending."""
    rows = connection.execute("SELECT step, seconds FROM clock ORDER BY step DESC LIMIT ?", (latest,)).fetchall()
    known = [(cells.whole(), cells.number()) for cells in (Cells("clock", row) for row in reversed(rows))]
    return np.array([step for step, _ in known], np.int64), np.array([seconds for _, seconds in known], np.float64)


def read_documents(connection: Connection) -> dict[str, Any]:
    """Read the facts about the training, by name."""
    rows = connection.execute("SELECT key, value FROM meta")
    return {cells.text(): cells.document() for cells in (Cells("meta", row) for row in rows)}


def read_findings(connection: Connection) -> list[dict[str, Any]]:
    """Read the findings, the first ones first."""
    rows = connection.execute("SELECT document FROM findings ORDER BY first_step, rowid")
    return [checked_finding(Cells("findings", row).document()) for row in rows]

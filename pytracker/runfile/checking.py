"""A check of a run file: all of it is read, decoded, and compared with its checksums, its totals and its summaries."""

from __future__ import annotations

import sqlite3
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np

from .._checks import shown
from ..errors import RunFormatError
from .decoding import Cells, read_clock, read_infos, series_names, unpack_exact_rows, unpack_fields
from .lock import is_locked
from .packing import checksum, unpack_points
from .schema import TABLES, Connection, log_of
from .summary import SeriesSummary, summary_of
from .totals import TABLE, differing_totals, summed_columns
from .wal import damage_of_log

_MAKES_NO_SENSE: Final = (
    sqlite3.DatabaseError,
    RunFormatError,
    ValueError,
    TypeError,
    ArithmeticError,
    LookupError,
    zlib.error,
)


def what_is_damaged(connection: Connection) -> Iterator[str]:
    """Read everything, and say what is damaged. Each part is looked at, whatever was found before.

    Raises:
        sqlite3.OperationalError: the file cannot be read now, or reading it takes more than it is worth.
        sqlite3.DataError: a row has more bytes than a reader takes.
    """
    connection.execute("BEGIN")  # one view of the file
    made = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if missing := sorted(TABLES - made):
        yield f"the schema: it has no {', '.join(missing)}"
        return
    check = _Check(connection, has_others=bool(made - TABLES))
    for part in (check.log, check.parameters, check.clock, check.tables, check.totals, check.summaries, check.pages):
        yield from _go_on(part.__name__, part())


def _go_on(name: str, lines: Iterator[str]) -> Iterator[str]:
    try:
        yield from lines
    except (sqlite3.OperationalError, sqlite3.DataError):
        raise
    except _MAKES_NO_SENSE as error:
        yield f"{name}: {error}"


class _Check:
    """What was found so far, in one file."""

    def __init__(self, connection: Connection, *, has_others: bool) -> None:
        self._connection = connection
        self._has_others = has_others  # tables besides those of a run
        self._width = 0  # parameters
        self._found: dict[str, tuple[int, int]] = {}
        self._summaries: dict[int, SeriesSummary] = {}
        self._damaged_series: set[Any] = set()  # some of whose values are
        self._last_interval = -1
        self._decoders: dict[str, Callable[[dict[str, Any]], None]] = {
            "batches": self._points,
            "archived_batches": self._points,
            "intervals": self._interval,
            "archived_intervals": self._interval,
            "exact_rows": self._rows,
            "archived_exact_rows": self._rows,
        }

    def log(self) -> Iterator[str]:
        """Look at what a killed process left beside the file; while one writes, it changes."""
        file = self._connection.file
        if not is_locked(file.parent):
            yield from damage_of_log(log_of(file))

    def parameters(self) -> Iterator[str]:
        """Decode the parameters."""
        self._width = len(read_infos(self._connection))
        return iter(())

    def clock(self) -> Iterator[str]:
        """Decode the clock."""
        read_clock(self._connection)
        return iter(())

    def tables(self) -> Iterator[str]:
        """Read every row once."""
        for table in sorted(TABLES - {TABLE}):
            yield from _go_on(table, self._table(table))

    def _table(self, table: str) -> Iterator[str]:
        rows = self._connection.execute(f"SELECT * FROM {table}")
        columns = [column for column, *_ in rows.description]
        summed = [columns.index(column) for column in summed_columns(self._connection, table)]
        decode = self._decoders.get(table)
        first = columns[0] in ("id", "archive") and table != "parameters"
        count = total = 0
        for row in rows:
            count += 1
            total += checksum(*(row[index] for index in summed))
            named = ", ".join(f"{name} {shown(cell)}" for name, cell in zip(columns[:3], row, strict=False))
            try:
                if "checksum" in columns and checksum(*row[first : columns.index("checksum")]) != row[summed[-1]]:
                    problem = "doesn't match its checksum"
                elif decode is None:
                    continue
                else:
                    decode(dict(zip(columns, row, strict=True)))
                    continue
            except _MAKES_NO_SENSE as error:
                problem = f"makes no sense: {error}"
            if table == "batches":
                self._damaged_series.add(row[1])
            yield f"{table}: the row of {named} {problem}"
        self._found[table] = count, total

    def _points(self, row: dict[str, Any]) -> None:
        steps, values = unpack_points([row["points"]])
        if (row["first_step"], row["last_step"], row["count"]) != (int(steps[0]), int(steps[-1]), len(steps)):
            raise ValueError(f"it has {len(steps)} points, from step {steps[0]} to {steps[-1]}")
        if "archive" in row:
            return
        known, found = self._summaries.get(row["series"]), summary_of(steps.tolist(), values.tolist())
        if known is not None and found.count and known.last_step > steps[0]:
            raise ValueError(f"it begins at step {steps[0]}, and the one before it ends at {known.last_step}")
        self._summaries[row["series"]] = found if known is None else known + found

    def _interval(self, row: dict[str, Any]) -> None:
        unpack_fields(row, self._width)
        if "archive" not in row:
            if not self._last_interval < row["first_step"] <= row["last_step"]:
                raise ValueError(f"it begins at step {row['first_step']}, and others reach to {self._last_interval}")
            self._last_interval = row["last_step"]

    def _rows(self, row: dict[str, Any]) -> None:
        cells = Cells("exact_rows", tuple(row[name] for name in ("count", "format", "steps")))
        unpack_exact_rows(cells.whole(), cells.text(), cells.document(), row["moments"], self._width)

    def totals(self) -> Iterator[str]:
        """Compare what the tables come to."""
        return differing_totals(self._connection, self._found)

    def summaries(self) -> Iterator[str]:
        """Compare what each series comes to with its values."""
        names = series_names(self._connection)
        columns = "id, count, last_step, last, minimum, minimum_step, maximum, maximum_step"
        for series, *said in self._connection.execute(f"SELECT {columns} FROM series"):
            found = self._summaries.get(series)
            if series in self._damaged_series or (found is None and said[0] == 0):
                continue
            cells = Cells("series", tuple(said))
            noted = SeriesSummary(
                *(cells.whole(), cells.whole(), cells.number(), cells.number()),
                *(cells.whole(), cells.number(), cells.whole()),
            )
            if found is None or not _same(noted, found):
                yield f"series: {names[series]!r:.80} is said to be {noted}, and is {found}"
        for unknown in sorted(self._summaries.keys() - names.keys()):
            yield f"batches: there are values of a series {unknown}, and there is no such series"

    def pages(self) -> Iterator[str]:
        """Have SQLite look at every page; of a file with other tables, which may be huge, at those of its own."""
        for which in sorted(TABLES) if self._has_others else [20]:
            for (line,) in self._connection.execute(f"PRAGMA integrity_check({which})"):
                if line != "ok":
                    yield f"SQLite: {line}"


def _same(one: SeriesSummary, other: SeriesSummary) -> bool:
    values = [np.array(list(vars(each).values()), object) for each in (one, other)]
    return all(a == b or (a != a and b != b) for a, b in zip(*values, strict=True))

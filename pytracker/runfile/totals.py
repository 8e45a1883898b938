"""The totals of each table: its number of rows and the sum of their checksums.

The writer keeps it, by triggers that are temporary: they belong to its connection and not to the file, so a row that
goes or changes in any other way shows in a check.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from typing import Final

from .packing import checksum

TABLE: Final = "totals"
TOTALS_SCHEMA: Final = f"""
CREATE TABLE {TABLE} (name TEXT PRIMARY KEY, rows INTEGER NOT NULL, sum INTEGER NOT NULL) WITHOUT ROWID;
"""
SCHEMA_NAME: Final = "the schema"  # of the row that says what the tables themselves are
_CHANGES: Final = {"INSERT": "+ NEW", "DELETE": "- OLD", "UPDATE": "- OLD + NEW"}


def summed_columns(connection: sqlite3.Connection, table: str) -> list[str]:
    """Return the columns whose checksum is added: the key and the row's own checksum where it has one, or else all."""
    columns = [name for _, name, *_ in connection.execute(f"PRAGMA table_info({table})")]
    return [columns[0], "checksum"] if "checksum" in columns else columns


def schema_total(connection: sqlite3.Connection) -> tuple[int, int]:
    """Return what the schema comes to: how many tables, views and indices there are, and a checksum of them."""
    entries = connection.execute(
        "SELECT type, name, tbl_name, sql FROM sqlite_master WHERE name NOT LIKE 'sqlite_stat%' ORDER BY type, name"
    ).fetchall()
    pragmas = [connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")]
    return len(entries), checksum(*pragmas, *(cell for entry in entries for cell in entry))


def begin_totals(connection: sqlite3.Connection, tables: list[str]) -> None:
    """Note what the tables come to now. For a new file, or one of a version that kept no totals; in a transaction."""
    connection.execute(TOTALS_SCHEMA)
    for table in tables:
        columns = ", ".join(summed_columns(connection, table))
        sums = [checksum(*row) for row in connection.execute(f"SELECT {columns} FROM {table}")]
        connection.execute(f"INSERT INTO {TABLE} VALUES (?, ?, ?)", (table, len(sums), sum(sums)))
    connection.execute(f"INSERT INTO {TABLE} VALUES (?, ?, ?)", (SCHEMA_NAME, *schema_total(connection)))


def keep_totals(connection: sqlite3.Connection, tables: list[str]) -> None:
    """Have this connection bring the totals up to date with each row that it writes."""
    connection.create_function("checksum_of", -1, checksum, deterministic=True)
    connection.execute("PRAGMA recursive_triggers = ON")  # so that a row which is replaced counts as deleted
    for table in tables:
        columns = summed_columns(connection, table)
        for event, change in _CHANGES.items():
            added = change
            for row in ("NEW", "OLD"):
                cells = ", ".join(f"{row}.{column}" for column in columns)
                added = added.replace(row, f"checksum_of({cells})")
            rows = {"INSERT": "+ 1", "DELETE": "- 1", "UPDATE": ""}[event]
            connection.execute(
                f"CREATE TEMP TRIGGER {table}_{event.lower()} AFTER {event} ON main.{table} BEGIN "
                f"UPDATE {TABLE} SET rows = rows {rows}, sum = sum {added} WHERE name = '{table}'; END"
            )


def differing_totals(connection: sqlite3.Connection, found: dict[str, tuple[int, int]]) -> Iterator[str]:
    """Say which tables, of ``found`` rows and sums, are not what the writer left."""
    noted = {name: (rows, total) for name, rows, total in connection.execute(f"SELECT name, rows, sum FROM {TABLE}")}
    found = {**found, SCHEMA_NAME: schema_total(connection)}
    for name in sorted({*noted, *found}):
        if name not in noted:
            yield f"{name}: its total is missing"
        elif name not in found:
            yield f"{name!r:.80}: there is a total of it, and no such table"
        elif noted[name][0] != found[name][0]:
            yield f"{name}: it should have {noted[name][0]} rows, and has {found[name][0]}"
        elif noted[name] != found[name]:
            yield f"{name}: it was changed by something other than pytracker"

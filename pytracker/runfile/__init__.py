"""The file of a run as it lies on disk: its schema, how rows are packed, decoded and checked, and who may write it."""

from .checking import what_is_damaged
from .decoding import (
    Cells,
    read_clock,
    read_documents,
    read_exact_rows,
    read_findings,
    read_infos,
    read_intervals,
    read_points,
)
from .lock import RunLock, is_locked
from .packing import MOST_POINTS, MOST_ROW_BYTES, checksum, pack_points, pack_rows, unpack_points, unpack_rows
from .schema import FILE_NAME, FORMAT, Connection, interval_fields, open_for_reading, open_for_writing
from .summary import SeriesSummary, summary_of

__all__ = [
    "FILE_NAME",
    "FORMAT",
    "MOST_POINTS",
    "MOST_ROW_BYTES",
    "Cells",
    "Connection",
    "RunLock",
    "SeriesSummary",
    "checksum",
    "interval_fields",
    "is_locked",
    "open_for_reading",
    "open_for_writing",
    "pack_points",
    "pack_rows",
    "read_clock",
    "read_documents",
    "read_exact_rows",
    "read_findings",
    "read_infos",
    "read_intervals",
    "read_points",
    "summary_of",
    "unpack_points",
    "unpack_rows",
    "what_is_damaged",
]

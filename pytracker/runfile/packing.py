"""How points and rows are packed: many of them in one row of a table, with a checksum of it.

Points are JSON that SQLite can query, ``{"12":0.5,"13":null}``: steps and values in their order, null for NaN and 9e999
for infinity. A step may occur twice. Reading a million of them costs one parse instead of a million rows.

Rows of moments are compressed arrays, byte planes first (all first bytes, all second ones, ...), by zlib. Their format
is "float64", exact, or "float32": half the bytes, the root of ``sum_sq`` in its place, which is the norm, and values
that are finite and not zero stay so.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from ..columns import COLUMNS, SUM_SQ
from ..history import Float64Array, Int64Array, checked_steps, to_float32

MOST_POINTS: Final = 8192  # in a batch
MOST_ROW_BYTES: Final = 16 * 2**20  # of the moments in a row of `exact_rows`, before compression
_DTYPES: Final = {"float32": "<f4", "float64": "<f8"}
_LEVEL: Final = 1  # zlib's fastest: a norm's lower bytes don't compress at any level


def checksum(*columns: Any) -> int:
    """Return the CRC-32 of a row: each column's bytes (text in UTF-8, numbers as Python writes them) and a zero byte.

    >>> checksum("loss", 3, None) == checksum("loss", 3, None) != checksum("loss", 4, None)
    True
    """
    crc = 0
    for value in columns:
        data = value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogatepass")
        crc = zlib.crc32(b"\0", zlib.crc32(data, crc))
    return crc


def pack_points(steps: Sequence[int], values: Sequence[float]) -> str:
    """Return points as JSON.

    >>> pack_points([7, 8, 8], [0.5, math.nan, -math.inf])
    '{"7":0.5,"8":null,"8":-9e999}'
    """
    text = ",".join([f'"{step}":{value!r}' for step, value in zip(steps, values, strict=True)])
    if not all(map(math.isfinite, values)):
        text = text.replace(":nan", ":null").replace(":inf", ":9e999").replace(":-inf", ":-9e999")
    return "{" + text + "}"


def unpack_points(texts: Sequence[str]) -> tuple[Int64Array, Float64Array]:
    """Return the steps and values of the points of several batches.

    Raises:
        ValueError: they are not points.

    >>> unpack_points(['{"7":0.5}', '{"8":null,"8":9e999}'])
    (array([7, 8, 8]), array([0.5, nan, inf]))
    """
    joined = ",".join([text[1:-1] for text in texts])
    try:
        found = json.loads("[" + joined.replace('"', "").replace(":", ",") + "]")
        return checked_steps("step", found[::2]), np.array(found[1::2], np.float64)
    except (TypeError, RecursionError) as error:
        raise ValueError(f"points are not steps and numbers: {error}") from error


def pack_rows(rows: Float64Array, format: str) -> bytes:
    """Return moments [n, T, 6] as bytes."""
    planes: Any = np.array(np.moveaxis(rows, 2, 0), order="C")
    if format == "float32":
        planes[SUM_SQ] = np.sqrt(planes[SUM_SQ])
        planes = to_float32(planes)
    packed = planes.astype(_DTYPES[format], copy=False)
    return zlib.compress(packed.reshape(-1).view(np.uint8).reshape(-1, packed.itemsize).T.tobytes(), _LEVEL)


def unpack_rows(data: bytes, format: str, steps: int, parameters: int) -> Float64Array:
    """Return moments [n, T, 6] from bytes.

    Raises:
        ValueError: they are of another size or format.

    >>> rows = np.arange(12.0).reshape(1, 2, 6)
    >>> bool((unpack_rows(pack_rows(rows, "float64"), "float64", 1, 2) == rows).all())
    True
    """
    if format not in _DTYPES:
        raise ValueError(f"rows of the format {format!r}")
    dtype = np.dtype(_DTYPES[format])
    expected = steps * parameters * len(COLUMNS) * dtype.itemsize
    if steps > 1 and expected > MOST_ROW_BYTES:
        raise ValueError(f"rows of {expected} bytes")
    plain = zlib.decompressobj().decompress(data, expected + 1)  # no more, whatever the bytes claim
    if len(plain) != expected:
        raise ValueError(f"rows of {len(plain)} bytes; expected {expected}")
    bytes_of = np.frombuffer(plain, np.uint8).reshape(dtype.itemsize, -1).T
    planes = np.ascontiguousarray(bytes_of).view(dtype).reshape(len(COLUMNS), steps, parameters)
    rows: Float64Array = np.ascontiguousarray(np.moveaxis(planes, 0, 2), np.float64)
    if format == "float32":
        rows[:, :, SUM_SQ] **= 2
    return rows

"""An array that grows at its end, at amortized constant cost, and shows itself as a view."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

_FIRST_CAPACITY = 16


class GrowingArray:
    """Rows of one dtype and shape, appended one by one or many at once.

    ``view`` costs nothing and stays valid when the array grows: growth allocates a new buffer, and nobody writes to the
    rows of the old one again.

    >>> rows = GrowingArray(np.int64)
    >>> rows.append(3)
    >>> rows.extend([4, 5])
    >>> rows.view
    array([3, 4, 5])
    """

    __slots__ = ("_buffer", "_length")

    def __init__(self, dtype: DTypeLike, row_shape: tuple[int, ...] = ()) -> None:
        """Make an empty array whose rows have ``row_shape`` (a scalar each by default)."""
        self._buffer: NDArray[Any] = np.empty((0, *row_shape), dtype)
        self._length = 0

    def __len__(self) -> int:
        """Return the number of rows."""
        return self._length

    @property
    def view(self) -> NDArray[Any]:
        """The rows so far, read-only, without a copy."""
        view = self._buffer[: self._length]
        view.flags.writeable = False
        return view

    @property
    def writable(self) -> NDArray[Any]:
        """The rows so far, for the owner to change in place."""
        return self._buffer[: self._length]

    @property
    def nbytes(self) -> int:
        """Bytes held, the room for growth included."""
        return self._buffer.nbytes

    def append(self, row: Any) -> None:
        """Add one row."""
        length = self._length
        if length == len(self._buffer):
            self._reserve(length + 1)
        self._buffer[length] = row
        self._length = length + 1

    def extend(self, rows: Any) -> None:
        """Add many rows; numpy converts and checks them before anything is changed."""
        rows = np.asarray(rows, self._buffer.dtype)
        end = self._length + len(rows)
        if end > len(self._buffer):
            self._reserve(end)
        self._buffer[self._length : end] = rows
        self._length = end

    def adopt(self, rows: NDArray[Any]) -> None:
        """Take ``rows`` as the whole content, without a copy; nobody else may write to them from here on."""
        self._buffer = np.asarray(rows, self._buffer.dtype)
        self._length = len(rows)

    def keep(self, start: int, stop: int) -> None:
        """Keep only the rows ``start:stop``; views taken before stay as they were."""
        self._buffer = self._buffer[start:stop].copy()
        self._length = len(self._buffer)

    def replace(self, rows: NDArray[Any]) -> None:
        """Take ``rows`` as the whole content."""
        self._buffer = np.array(rows, self._buffer.dtype)
        self._length = len(rows)

    def _reserve(self, needed: int) -> None:
        capacity = max(needed, _FIRST_CAPACITY, len(self._buffer) * 3 // 2)
        buffer = np.empty((capacity, *self._buffer.shape[1:]), self._buffer.dtype)
        buffer[: self._length] = self._buffer[: self._length]
        self._buffer = buffer

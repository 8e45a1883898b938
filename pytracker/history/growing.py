"""Columns that grow at their end, at amortized constant cost, and show themselves as views."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

_FIRST_CAPACITY = 16

Column = tuple[DTypeLike, tuple[int, ...]]
"""What a column holds: a dtype, and the shape of its rows."""


class GrowingTable:
    """Rows that are appended one by one or many at once to columns of one length.

    Each change ends in one assignment, which makes the new rows visible in all columns together: whatever interrupts
    the work before it has changed nothing. Rows are put at a place, so that doing it once more is doing it once.

    ``column`` costs nothing, and its view stays valid when the table grows: growth allocates new buffers, and nobody
    writes to the rows of the old ones again.

    >>> table = GrowingTable((np.int64, ()), (np.float64, ()))
    >>> table.put_row(0, 3, 0.5)
    >>> table.put(1, [4, 5], [0.25, 0.125])
    >>> table.column(0), table.column(1)
    (array([3, 4, 5]), array([0.5  , 0.25 , 0.125]))
    """

    __slots__ = ("_state",)

    def __init__(self, *columns: Column) -> None:
        """Make an empty table."""
        self._state: tuple[tuple[NDArray[Any], ...], int] = (
            tuple(np.empty((0, *shape), dtype) for dtype, shape in columns),
            0,
        )

    @classmethod
    def adopt(cls, *columns: NDArray[Any]) -> GrowingTable:
        """Make a table of whole columns, without a copy; nobody else may write to them from here on."""
        table = cls()
        table._state = (columns, len(columns[0]))
        return table

    def __len__(self) -> int:
        """Return the number of rows."""
        return self._state[1]

    def column(self, index: int = 0) -> NDArray[Any]:
        """Return a column's rows so far: read-only, without a copy."""
        view = self.writable(index)
        view.flags.writeable = False
        return view

    def writable(self, index: int = 0) -> NDArray[Any]:
        """Return a column's rows so far, for the owner to change in place."""
        buffers, length = self._state
        return buffers[index][:length]

    @property
    def nbytes(self) -> int:
        """Bytes held, the room for growth included."""
        return sum(buffer.nbytes for buffer in self._state[0])

    def put_row(self, place: int, *row: Any) -> None:
        """Make ``row``, an element for each column, the last one, at ``place``."""
        buffers, length = self._state
        if place == len(buffers[0]):
            buffers = _grown(buffers, length, place + 1)
        for buffer, value in zip(buffers, row, strict=True):
            buffer[place] = value
        self._state = (buffers, place + 1)

    def put(self, place: int, *columns: NDArray[Any] | Sequence[Any]) -> None:
        """Make ``columns`` the rows from ``place`` on, where they are the last ones or follow on those."""
        buffers, length = self._state
        end = place + len(columns[0])
        if end > len(buffers[0]):
            buffers = _grown(buffers, length, end)
        for buffer, values in zip(buffers, columns, strict=True):
            buffer[place:end] = values
        self._state = (buffers, end)

    def keep(self, start: int, stop: int) -> None:
        """Keep only the rows ``start:stop``; views taken before stay as they were."""
        self._state = self.sliced(start, stop)._state

    def replace(self, *columns: NDArray[Any]) -> None:
        """Take ``columns`` as the whole content."""
        buffers = tuple(np.array(column, buffer.dtype) for column, buffer in zip(columns, self._state[0], strict=True))
        self._state = (buffers, len(buffers[0]))

    def sliced(self, start: int, stop: int) -> GrowingTable:
        """Return a table of its own with the rows ``start:stop``, without the room for growth."""
        buffers, length = self._state
        return GrowingTable.adopt(*(buffer[:length][start:stop].copy() for buffer in buffers))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the rows, without the room for growth."""
        return GrowingTable.adopt, self.sliced(0, len(self))._state[0]


def _grown(buffers: tuple[NDArray[Any], ...], length: int, needed: int) -> tuple[NDArray[Any], ...]:
    capacity = max(needed, _FIRST_CAPACITY, len(buffers[0]) * 3 // 2)
    grown = []
    for buffer in buffers:
        larger = np.empty((capacity, *buffer.shape[1:]), buffer.dtype)
        larger[:length] = buffer[:length]
        grown.append(larger)
    return tuple(grown)

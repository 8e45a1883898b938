"""What was logged and isn't on disk yet: bounded, and ready to be taken back when a write fails."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..history import Float64Array, Int64Array, Interval

_POINT_BYTES = 56  # a float, its share of a dict and of a tuple
_ENTRY_BYTES = 200


@dataclass(frozen=True)
class Points:
    """Metrics of one ``log`` (a step and floats) or one ``log_many`` (arrays), at ``seconds`` of training time."""

    steps: int | Int64Array
    seconds: float
    metrics: Mapping[str, Any]

    @property
    def count(self) -> int:
        """How many values are in here."""
        return len(self.metrics) * (1 if isinstance(self.steps, int) else len(self.steps))

    @property
    def nbytes(self) -> int:
        """About how much memory they hold."""
        return _ENTRY_BYTES + _POINT_BYTES * self.count


@dataclass(frozen=True)
class ExactRows:
    """The raw moments of single steps: int64 [n] and float64 [n, T, 6]."""

    steps: Int64Array
    rows: Float64Array

    @property
    def nbytes(self) -> int:
        """How much memory they hold."""
        return _ENTRY_BYTES + self.rows.nbytes


Blob = Interval | ExactRows
Rows = list[tuple[Any, ...]]  # of a document's table, ready for SQL


@dataclass
class Batch:
    """What one transaction writes."""

    points: deque[Points] = field(default_factory=deque)
    blobs: deque[Blob] = field(default_factory=deque)
    documents: dict[tuple[str, str], Rows] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """Tell whether there is anything to write."""
        return bool(self.points or self.blobs or self.documents)


class Pending:
    """Where the training thread leaves what it logs, and the writer takes it.

    At most ``max_bytes`` wait here. Beyond that the oldest per-parameter blobs go, then the oldest metrics; both are
    counted. Documents (metadata, findings) are few and keep only their latest version, so they always stay.
    """

    def __init__(self, max_bytes: int) -> None:
        """Make an empty one."""
        self.max_bytes = max_bytes
        self.dropped_points = 0
        self.dropped_blobs = 0
        self._batch = Batch()
        self._bytes = 0
        self._lock = threading.Lock()

    def add_points(self, points: Points) -> None:
        """Leave metrics to be written."""
        with self._lock:
            self._batch.points.append(points)
            self._bytes += points.nbytes
            if self._bytes > self.max_bytes:
                self._drop()

    def add_blob(self, blob: Blob) -> None:
        """Leave an interval or exact rows to be written."""
        with self._lock:
            self._batch.blobs.append(blob)
            self._bytes += _blob_bytes(blob)
            if self._bytes > self.max_bytes:
                self._drop()

    def add_document(self, table: str, key: str, rows: Rows) -> None:
        """Leave the rows of a document to be written; they take the place of older ones with its key."""
        with self._lock:
            self._batch.documents[table, key] = rows

    def take(self) -> Batch:
        """Take everything that waits."""
        with self._lock:
            batch, self._batch = self._batch, Batch()
            self._bytes = 0
            return batch

    def give_back(self, batch: Batch) -> None:
        """Put a batch that could not be written before everything that came since."""
        with self._lock:
            newer = self._batch
            batch.points.extend(newer.points)
            batch.blobs.extend(newer.blobs)
            batch.documents.update(newer.documents)
            self._batch = batch
            self._bytes = sum(points.nbytes for points in batch.points) + sum(map(_blob_bytes, batch.blobs))
            self._drop()

    def __len__(self) -> int:
        """Return the number of values and blobs that wait."""
        with self._lock:
            return sum(points.count for points in self._batch.points) + len(self._batch.blobs)

    def _drop(self) -> None:
        while self._bytes > self.max_bytes and self._batch.blobs:
            self._bytes -= _blob_bytes(self._batch.blobs.popleft())
            self.dropped_blobs += 1
        while self._bytes > self.max_bytes and self._batch.points:
            points = self._batch.points.popleft()
            self._bytes -= points.nbytes
            self.dropped_points += points.count


def _blob_bytes(blob: Blob) -> int:
    if isinstance(blob, ExactRows):
        return blob.nbytes
    return _ENTRY_BYTES + 12 * blob.norm_last.nbytes  # ten arrays of float32, one of them int64, and a little room

"""What was logged and isn't on disk yet: bounded, and ready to be taken back when a write fails."""

from __future__ import annotations

import contextlib
from collections import deque
from dataclasses import dataclass, field
from typing import TypeAlias

from ..history import Document, ExactRows, Interval, Points

_ENTRY_BYTES = 200

Blob: TypeAlias = Interval | ExactRows


@dataclass
class Batch:
    """What one transaction writes."""

    points: deque[Points] = field(default_factory=deque)
    blobs: deque[Blob] = field(default_factory=deque)
    documents: dict[tuple[str, str], Document] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """Tell whether there is anything to write."""
        return bool(self.points or self.blobs or self.documents)

    @property
    def nbytes(self) -> int:
        """About how much memory the points and blobs hold."""
        return sum(points.nbytes for points in self.points) + sum(map(_blob_bytes, self.blobs))


class Pending:
    """Where the training's threads leave what they log, one at a time, and the writer takes it.

    No lock is between them: each change is one operation of a deque or a dictionary, so that no thread that is
    interrupted keeps the other waiting. The writer knows what it has written, so an entry may be left twice.

    At most ``max_bytes`` wait, those that are being written included. Beyond that the oldest per-parameter blobs go,
    then the oldest metrics; both are counted. Documents (metadata, findings) are few and keep only their latest
    version, so they always stay.
    """

    def __init__(self, max_bytes: int) -> None:
        """Make an empty one."""
        self.max_bytes = max_bytes
        self.dropped_points = 0
        self.dropped_blobs = 0
        self._waiting = Batch()
        self._bytes_in = 0  # left here, less what was dropped: changed by those who leave it
        self._bytes_out = 0  # written: changed by the writer

    def add(self, entry: Points | Blob | Document) -> None:
        """Leave an entry to be written; a document takes the place of an older one with its key."""
        if isinstance(entry, Document):
            self._waiting.documents[entry.table, entry.key] = entry
            return
        if isinstance(entry, Points):
            self._waiting.points.append(entry)
            self._bytes_in += entry.nbytes
        else:
            self._waiting.blobs.append(entry)
            self._bytes_in += _blob_bytes(entry)
        if self._bytes_in - self._bytes_out > self.max_bytes:
            self._drop()

    def take(self) -> Batch:
        """Take everything that waits. Only the writer does."""
        batch, waiting = Batch(), self._waiting
        with contextlib.suppress(IndexError):  # what was counted may have been dropped since
            for _ in range(len(waiting.points)):
                batch.points.append(waiting.points.popleft())
        with contextlib.suppress(IndexError):
            for _ in range(len(waiting.blobs)):
                batch.blobs.append(waiting.blobs.popleft())
        documents = []
        while waiting.documents:
            documents.append(waiting.documents.popitem())  # the latest first
        batch.documents.update(reversed(documents))
        return batch

    def give_back(self, batch: Batch) -> None:
        """Put a batch that could not be written before everything that came since. Only the writer does."""
        self._waiting.points.extendleft(reversed(batch.points))
        self._waiting.blobs.extendleft(reversed(batch.blobs))
        for key, document in batch.documents.items():
            self._waiting.documents.setdefault(key, document)

    def done(self, batch: Batch) -> None:
        """Note that a batch is written. Only the writer does."""
        self._bytes_out += batch.nbytes

    def __len__(self) -> int:
        """Return the number of values, blobs and documents that wait."""
        waiting = self._waiting
        values = sum(points.count for points in list(waiting.points))
        return values + len(waiting.blobs) + len(waiting.documents)

    def _drop(self) -> None:
        with contextlib.suppress(IndexError):  # none left, or the writer took the last one
            while self._bytes_in - self._bytes_out > self.max_bytes:
                self._bytes_in -= _blob_bytes(self._waiting.blobs.popleft())
                self.dropped_blobs += 1
        with contextlib.suppress(IndexError):
            while self._bytes_in - self._bytes_out > self.max_bytes:
                points = self._waiting.points.popleft()
                self._bytes_in -= points.nbytes
                self.dropped_points += points.count


def _blob_bytes(blob: Blob) -> int:
    if isinstance(blob, ExactRows):
        return _ENTRY_BYTES + blob.rows.nbytes
    return _ENTRY_BYTES + 12 * blob.norm_last.nbytes  # ten arrays of float32, one of them int64, and a little room

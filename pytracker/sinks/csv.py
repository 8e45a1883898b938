"""Every value of every step as lines of a CSV file: ``step,name,value,time``."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .._checks import path as checked_path
from .layers import Layers
from .sink import RunInfo, SinkRows

_HEADER = ("step", "name", "value", "time")


class CSVSink:
    """Writes one line for each value: a series that comes late needs no new column.

    Values are written with all their digits, so reading them gives the same float64; ``time`` is in seconds since 1970.
    Lines are on disk after each drain. A resumed training drops the lines of steps that are recorded again. The file of
    another training is kept beside the new one, as ``training.1.csv``, ``training.2.csv``, ...

    Args:
        path: the file; its folder is made.
        per_parameter: also a value of each parameter: "norm", "abs_max", "zero_fraction" or "nonfinite".
        depth: of each module instead of each parameter, see ``Layers``.

    Example:
        >>> import tempfile, torch, pytracker
        >>> path = Path(tempfile.mkdtemp()) / "training.csv"
        >>> with pytracker.Tracker([], diagnosis=None, sinks=[CSVSink(path)]) as tracker:
        ...     tracker.step(loss=0.5)
        >>> [line.split(",")[:3] for line in path.read_text().split() if "loss" in line]
        [['0', 'loss', '0.5']]
    """

    def __init__(
        self,
        path: str | os.PathLike[str] = "training.csv",
        *,
        per_parameter: str | None = None,
        depth: int | None = None,
    ) -> None:
        self._path = checked_path("path", path)
        self._layers = Layers(per_parameter, depth)
        self._end = 0  # bytes that are written; what a failed write left beyond is cut off by the next

    def open(self, info: RunInfo) -> None:
        self._layers.infos = info.parameters
        self._path.parent.mkdir(parents=True, exist_ok=True)
        goes_on = bool(info.first_step or info.recorded)
        if self._path.exists() and not goes_on:
            self._path.rename(_free(self._path))
        if self._path.exists():
            self.truncate(info.first_step)
        else:
            self._end = 0
            self._append([_HEADER])

    def write(self, rows: SinkRows) -> None:
        every = self._layers.added_to(rows)
        self._append((step, name, value, time) for step, time, values in every for name, value in values.items())

    def late(self, step: int, time: float, values: Mapping[str, float]) -> None:
        self._append((step, name, value, time) for name, value in values.items())

    def truncate(self, step: int) -> None:
        lines = self._path.read_bytes().splitlines(keepends=True)
        whole = [line for line in lines[1:] if line.endswith(b"\n")]  # a process that was killed may leave half a line
        kept = b"".join([*lines[:1], *(line for line in whole if int(line.partition(b",")[0]) < step)])
        part = self._path.with_name(self._path.name + ".part")
        part.write_bytes(kept)
        part.replace(self._path)
        self._end = len(kept)

    def _append(self, lines: Iterable[tuple[Any, ...]]) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(lines)
        data = text.getvalue().encode()
        with self._path.open("ab") as file:
            file.truncate(self._end)
            file.write(data)
        self._end += len(data)


def _free(path: Path) -> Path:
    """Return a name beside ``path`` that no file has."""
    number = 1
    while (other := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    return other

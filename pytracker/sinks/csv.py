"""Every value of every step as lines of a CSV file: ``step,name,value``."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


class CSVSink:
    """Writes one line for each value: a series that comes late needs no new column, and no line is ever rewritten.

    Values are written with all their digits, so reading them gives the same float64. Lines are flushed at each drain.

    Args:
        path: the file; its folder is made. An existing file is continued.

    Raises:
        OSError: the file cannot be opened.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "training.csv"
        >>> sink = CSVSink(path)
        >>> sink.write(np.array([0, 1]), {"loss": np.array([0.5, 0.25])})
        >>> sink.close()
        >>> path.read_text().split()
        ['step,name,value', '0,loss,0.5', '1,loss,0.25']
    """

    def __init__(self, path: str | Path) -> None:
        """Open the file, and write the header where it is new."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", newline="", encoding="utf-8")
        self._writer = csv.writer(self._file, lineterminator="\n")
        if self._file.tell() == 0:
            self._writer.writerow(("step", "name", "value"))

    def write(self, steps: NDArray[np.int64], series: dict[str, NDArray[np.float64]]) -> None:
        """Append a line for each value, step by step."""
        columns = {name: values.tolist() for name, values in series.items()}
        for index, step in enumerate(steps.tolist()):
            self._writer.writerows((step, name, values[index]) for name, values in columns.items())
        self._file.flush()

    def close(self) -> None:
        """Close the file. More than once is fine."""
        self._file.close()

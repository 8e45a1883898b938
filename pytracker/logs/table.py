"""Table: what every reader makes of a file, whatever tool wrote it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

_MISSING: Final = frozenset(("", "none", "null", "na", "n/a", "-", "--"))
_WRAPPED: Final = re.compile(r"^[A-Za-z_][\w.]*\(\s*\[?\s*([-+.\w]+?)\s*\]?\s*(?:,.*)?\)$", re.DOTALL)


@dataclass
class Table:
    """Rows of named numbers in the order in which they were written. A name that a row does not have is missing in it.

    ``starts`` are the rows at which the file says that another run begins. ``skipped`` names each line that could not
    be read. ``sums`` says which columns are the parts of a loss, where the format does. ``texts`` holds the words of
    rows that have some, such as mmdetection's ``mode``.
    """

    path: Path
    format: str
    rows: list[dict[str, float]] = field(default_factory=list)
    texts: list[Mapping[str, str]] = field(default_factory=list)
    starts: set[int] = field(default_factory=set)
    skipped: list[str] = field(default_factory=list)
    sums: dict[str, list[str]] = field(default_factory=dict)
    run: str = ""
    meta: dict[str, Any] = field(default_factory=dict)

    def add(self, values: Mapping[str, float], texts: Mapping[str, str] | None = None) -> None:
        """Append one row."""
        self.rows.append(dict(values))
        self.texts.append(texts or {})

    def skip(self, line: int, why: str) -> None:
        """Note a line that is left out."""
        self.skipped.append(f"line {line}: {why}")

    def counts(self) -> dict[str, int]:
        """Return how many values each column has, in the order in which columns came."""
        found: dict[str, int] = {}
        for row in self.rows:
            for name in row:
                found[name] = found.get(name, 0) + 1
        return found

    def column(self, name: str) -> list[float]:
        """Return the values of a column, without the rows that lack it."""
        return [row[name] for row in self.rows if name in row]


def as_number(value: Any) -> float | None:
    """Return what a cell says as a float, or None where it says nothing, or no number.

    A one-element tensor that was written as text is its number.

    >>> as_number(" 3e-4 "), as_number("tensor(0.5, device='cuda:0')"), as_number("nan"), as_number(""), as_number("x")
    (0.0003, 0.5, nan, None, None)
    """
    if isinstance(value, (bool, int, float)):
        try:
            return float(value)
        except OverflowError:
            return math.inf if value > 0 else -math.inf
    if not isinstance(value, str):
        return None
    text = value.strip()
    if text.lower() in _MISSING:
        return None
    wrapped = _WRAPPED.match(text)
    text = wrapped.group(1) if wrapped else text.removesuffix("%")
    if "_" in text:  # float() would read 1_000
        return None
    try:
        return float(text)
    except ValueError:
        return None


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield what a nested mapping holds, its keys joined by "/".

    >>> dict(flat({"loss": 1.0, "val": {"loss": 2.0}}))
    {'loss': 1.0, 'val/loss': 2.0}
    """
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def numbers_of(values: Iterable[tuple[str, Any]]) -> tuple[dict[str, float], dict[str, str]]:
    """Return the numbers among ``values`` by name, and the texts."""
    numbers: dict[str, float] = {}
    texts: dict[str, str] = {}
    for name, value in values:
        number = as_number(value)
        if number is not None:
            numbers[str(name).strip()] = number
        elif isinstance(value, str) and value.strip():
            texts[str(name).strip()] = value.strip()
    return numbers, texts

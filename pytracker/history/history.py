"""History: what a training recorded, as named series over steps. No torch here.

The usual code on a dict of lists runs unchanged on a ``History``: ``history["loss"].append(x)``,
``history["loss"][-1]``, ``for name, series in history.items()``. Each series keeps the step of every value besides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, MutableSequence
from functools import partial
from typing import TYPE_CHECKING, Any, SupportsIndex, overload

import numpy as np
from numpy.typing import NDArray

from .._checks import real_number
from ..errors import InvalidTypeError, InvalidValueError, MissingExtraError
from .growing import GrowingArray
from .notebook import Curve, html_table
from .parameters import Float64Array, Int64Array, ParameterHistory

if TYPE_CHECKING:
    import pandas as pd


class Series(MutableSequence[float]):
    """One metric: values (float64) and the step of each (int64, never descending).

    It behaves as a list of floats. A slice is a plain list; ``values`` and ``steps`` are arrays.

    >>> loss = Series([0.9, 0.7], steps=[10, 20])
    >>> loss.append(0.6)
    >>> loss[-1], loss[:2], min(loss), loss.steps
    (0.6, [0.9, 0.7], 0.6, array([10, 20, 21]))
    """

    __slots__ = ("_on_first", "_steps", "_values", "name")

    def __init__(self, values: Iterable[float] = (), steps: Iterable[int] | None = None, *, name: str = "") -> None:
        """Make a series of ``values``; their steps are 0, 1, 2, ... unless given."""
        self.name = name
        self._values = GrowingArray(np.float64)
        self._steps = GrowingArray(np.int64)
        self._on_first: Callable[[Series], None] | None = None
        self.extend(values, steps)

    @property
    def values(self) -> Float64Array:
        """The values, float64 [n]: a read-only view."""
        return self._values.view

    @property
    def steps(self) -> Int64Array:
        """The step of each value, int64 [n]: a read-only view."""
        return self._steps.view

    def append(self, value: float, step: int | None = None) -> None:
        """Add one value; its step is the last one + 1 (0 for the first) unless given.

        Raises:
            InvalidTypeError: the value is not a number.
            InvalidValueError: the step comes before the last one.
        """
        number = value if type(value) is float else real_number(self._label, value)
        if step is None:
            step = self._last_step() + 1
        else:
            self.check_step(step)
        self._values.append(number)
        self._steps.append(step)
        if self._on_first is not None:
            self._join()

    def extend(self, values: Iterable[float], steps: Iterable[int] | None = None) -> None:
        """Add many values at once; nothing is added where one of them is refused.

        Raises:
            InvalidTypeError: a value is not a number.
            InvalidValueError: the steps descend, or there are not as many as values.
        """
        numbers = self._numbers(values)
        if steps is None:
            first = self._last_step() + 1
            where = np.arange(first, first + len(numbers), dtype=np.int64)
        else:
            where = np.asarray(steps if isinstance(steps, np.ndarray) else list(steps), np.int64)
        self.check_steps(where, len(numbers))
        if len(numbers):
            self._values.extend(numbers)
            self._steps.extend(where)
            self._join()

    def check_step(self, step: int) -> None:
        """Raise ``InvalidValueError`` where ``step`` comes before the last one."""
        steps = self._steps
        if len(steps) and step < (last := steps.writable[-1]):
            raise InvalidValueError(
                f"{self._label}: step {step} comes before the last recorded step {last}; "
                f"truncate({step}) goes back to it"
            )

    def check_steps(self, steps: Int64Array, count: int) -> None:
        """Raise ``InvalidValueError`` unless ``count`` values can be added at ``steps``."""
        if steps.shape != (count,):
            raise InvalidValueError(f"{self._label}: got {count} values and {steps.size} steps")
        if not count:
            return
        self.check_step(int(steps[0]))
        descents = np.flatnonzero(steps[1:] < steps[:-1])
        if len(descents):
            before, after = steps[descents[0] : descents[0] + 2]
            raise InvalidValueError(f"{self._label}: step {after} comes before step {before}; steps never descend")

    def truncate(self, step: int) -> None:
        """Forget the values at ``step`` and later."""
        keep = int(np.searchsorted(self._steps.view, step))
        self._values.keep(0, keep)
        self._steps.keep(0, keep)

    def clear(self) -> None:
        """Forget everything."""
        self._values.keep(0, 0)
        self._steps.keep(0, 0)

    def copy(self) -> Series:
        """Return a series of its own with the same values and steps."""
        return Series(self.values, self.steps, name=self.name)

    def __len__(self) -> int:
        """Return the number of values."""
        return len(self._values)

    @overload
    def __getitem__(self, index: SupportsIndex) -> float: ...
    @overload
    def __getitem__(self, index: slice) -> list[float]: ...
    def __getitem__(self, index: SupportsIndex | slice) -> float | list[float]:
        """Return one value as a float, or a slice as a list of floats."""
        place = index if isinstance(index, slice) else self._place(index)
        found: float | list[float] = self._values.view[place].tolist()
        return found

    def __setitem__(self, index: Any, value: Any) -> None:
        """Change values in place; they keep their steps. A slice can be replaced by as many values as it has."""
        if not isinstance(index, slice):
            self._values.writable[self._place(index)] = real_number(self._label, value)
            return
        numbers = self._numbers(value)
        places = range(*index.indices(len(self)))
        if len(places) != len(numbers):
            raise InvalidValueError(
                f"{self._label}: a slice of {len(places)} values can't be replaced by {len(numbers)}; "
                "use del, insert or extend"
            )
        self._values.writable[index] = numbers

    def __delitem__(self, index: SupportsIndex | slice) -> None:
        """Delete values and their steps; the others keep theirs."""
        where: Any = index if isinstance(index, slice) else self._place(index)
        self._values.replace(np.delete(self._values.view, where))
        self._steps.replace(np.delete(self._steps.view, where))

    def insert(self, index: SupportsIndex, value: float) -> None:
        """Insert before ``index``: the value takes the step found there; that and the later ones move on by one."""
        place = slice(index, None).indices(len(self))[0]
        if place == len(self):
            self.append(value)
            return
        number = real_number(self._label, value)
        steps = self._steps.view
        moved = np.concatenate([steps[: place + 1], steps[place:] + 1])
        self._values.replace(np.insert(self._values.view, place, number))
        self._steps.replace(moved)

    def __iter__(self) -> Iterator[float]:
        """Iterate over Python floats."""
        return iter(self._values.view.tolist())

    def __reversed__(self) -> Iterator[float]:
        """Iterate backwards over Python floats."""
        return iter(self._values.view[::-1].tolist())

    def __eq__(self, other: object) -> bool:
        """Compare with a list or tuple by values; with a series by values and steps."""
        if isinstance(other, Series):
            return np.array_equal(self.values, other.values) and np.array_equal(self.steps, other.steps)
        if isinstance(other, (list, tuple)):
            return self[:] == list(other)
        return NotImplemented

    __hash__ = None  # type: ignore[assignment]  # it changes, as a list does

    def __add__(self, other: list[float] | Series) -> list[float]:
        """Concatenate, as lists do: the result is a plain list."""
        return [*self, *other] if isinstance(other, (list, Series)) else NotImplemented

    def __radd__(self, other: list[float]) -> list[float]:
        """Concatenate, as lists do: the result is a plain list."""
        return [*other, *self] if isinstance(other, list) else NotImplemented

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """Give numpy (and what plots through it) a copy, or the read-only view where ``copy`` is False."""
        if copy is False:
            return np.asarray(self._values.view, dtype)
        return np.array(self._values.view, dtype)

    def __repr__(self) -> str:
        """Show a short series whole, and the ends of a long one."""
        if len(self) <= 8:
            return f"Series({self[:]})"
        head, tail = (", ".join(f"{value:.6g}" for value in part) for part in (self[:3], self[-3:]))
        return f"Series([{head}, ..., {tail}], {len(self)} values)"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle and copy the values and steps, without the room for growth."""
        return partial(Series, name=self.name), (self.values.copy(), self.steps.copy())

    def _last_step(self) -> int:
        return int(self._steps.writable[-1]) if len(self._steps) else -1

    def _join(self) -> None:
        join, self._on_first = self._on_first, None
        if join is not None:
            join(self)

    def _place(self, index: SupportsIndex) -> int:
        place = index.__index__()
        count = len(self)
        if not -count <= place < count:
            raise IndexError(f"{self._label}: index {place} is out of range, there are {count} values")
        return place % count

    @property
    def _label(self) -> str:
        return f"series {self.name!r}" if self.name else "series"

    def _numbers(self, values: Any) -> Float64Array:
        if isinstance(values, Series):
            return values.values
        if isinstance(values, np.ndarray) and values.ndim == 1 and values.dtype.kind in "fiub":
            return values.astype(np.float64)
        return np.array([real_number(self._label, value) for value in values], np.float64)


class History(MutableMapping[str, Series]):
    """What a training recorded: a mapping of name to ``Series``, what is known of its parameters, and its findings.

    A name never seen gives an empty series that joins the history when its first value is appended; until then
    ``name in history`` is False.

    >>> history = History(train_loss=[], val_loss=[])
    >>> history["train_loss"].append(0.5)
    >>> history["accuracy"].append(0.9)
    >>> list(history), history["train_loss"][-1]
    (['train_loss', 'val_loss', 'accuracy'], 0.5)
    """

    def __init__(self, series: Mapping[str, Iterable[float]] | None = None, /, **named: Iterable[float]) -> None:
        """Make a history of the series given by name, as ``dict`` does."""
        self.parameters = ParameterHistory()
        self.meta: dict[str, Any] = {}  # JSON-able: "optimizer", "clip_threshold", "scheduler", "every", ...
        self.findings: list[dict[str, Any]] = []  # as stored, see pytracker.diagnostics.Finding.to_dict
        self.truncations = 0  # how often it went back to an earlier step
        self._series: dict[str, Series] = {}
        self._pending: dict[str, Series] = {}
        for name, values in {**(series or {}), **named}.items():
            self[name] = values  # __setitem__ makes a Series of it

    def __getitem__(self, name: str) -> Series:
        """Return the series ``name``; an empty one that joins on its first value where there is none yet."""
        found = self._series.get(name)
        if found is None:
            found = self._pending.get(name)
        if found is None:
            found = self._pending[name] = Series(name=_checked_name(name))
            found._on_first = self._join
        return found

    def __setitem__(self, name: str, values: Series | Iterable[float]) -> None:
        """Take a series as it is, or make one of the values, with the steps 0, 1, 2, ..."""
        series = values if isinstance(values, Series) else Series(values, name=_checked_name(name))
        series._on_first = None
        self._pending.pop(name, None)
        self._series[_checked_name(name)] = series

    def __delitem__(self, name: str) -> None:
        """Take the series ``name`` out."""
        del self._series[name]

    def __contains__(self, name: object) -> bool:
        """Tell whether ``name`` was set or has a value."""
        return name in self._series

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names in the order in which they came."""
        return iter(self._series)

    def __len__(self) -> int:
        """Return the number of series."""
        return len(self._series)

    def get(self, name: str, default: Any = None) -> Any:
        """Return the series ``name``, or ``default`` where there is none."""
        return self._series.get(name, default)

    def setdefault(self, name: str, default: Any = ()) -> Series:
        """Return the series ``name``; set it to ``default`` first where there is none."""
        if name not in self._series:
            self[name] = default
        return self._series[name]

    def pop(self, name: str, *default: Any) -> Any:
        """Take the series ``name`` out and return it, or ``default`` where there is none."""
        return self._series.pop(name, *default)

    def copy(self) -> History:
        """Return a history with the same series in it, as ``dict.copy`` does."""
        other = History(self._series)
        other.parameters, other.meta, other.findings = self.parameters, self.meta, self.findings
        return other

    __copy__ = copy

    @property
    def last_step(self) -> int:
        """The last step of any series, -1 where nothing is recorded."""
        return max((int(series.steps[-1]) for series in self._series.values() if len(series)), default=-1)

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one value to each series named in ``metrics``, all at ``step``."""
        for name, value in metrics.items():
            self[name].append(value, step)

    def truncate(self, step: int) -> None:
        """Forget every value, interval and row at ``step`` and later, and the findings that rest on them."""
        self.truncations += 1
        for series in self._series.values():
            series.truncate(step)
        self.parameters.truncate(step)
        self.findings = [each for each in self.findings if (each.get("last_step") or each.get("first_step", 0)) < step]

    def to_dict(self) -> dict[str, list[float]]:
        """Return plain lists by name, which ``json.dumps`` and ``pandas.DataFrame`` take."""
        return {name: series[:] for name, series in self._series.items()}

    def to_pandas(self) -> pd.DataFrame:
        """Return a DataFrame: one row a step (index ``step``), one column a series, NaN where a series has no value.

        Where a series has several values at one step, the last one counts.

        Raises:
            MissingExtraError: pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise MissingExtraError("History.to_pandas", "pandas", "pandas") from error
        columns = {}
        for name, series in self._series.items():
            column = pd.Series(series.values.copy(), index=series.steps.copy())
            columns[name] = column[~column.index.duplicated(keep="last")]
        frame = pd.DataFrame(columns).sort_index()
        frame.index.name = "step"
        return frame

    def __repr__(self) -> str:
        """Say what is in here."""
        names = ", ".join(self._series)
        return f"History({len(self)} series up to step {self.last_step}: {names})"

    def _repr_html_(self) -> str:
        """Show each series in a notebook: its course, its last value, and its range."""
        rows = []
        for name, series in self._series.items():
            finite = series.values[np.isfinite(series.values)]
            ends = (float(finite.min()), float(finite.max())) if len(finite) else ("", "")
            rows.append([name, Curve(series.values), series[-1] if len(series) else "", *ends, len(series)])
        title = f"History: {len(self)} series up to step {self.last_step}"
        return html_table(title, ("series", "course", "last", "lowest", "highest", "values"), rows)

    def _ipython_key_completions_(self) -> list[str]:
        return list(self._series)

    def __getstate__(self) -> dict[str, Any]:
        """Pickle what is recorded; empty series that were only asked for stay behind."""
        return {**self.__dict__, "_pending": {}}

    def _join(self, series: Series) -> None:
        self._pending.pop(series.name, None)
        self._series[series.name] = series


def _checked_name(name: str) -> str:
    if not isinstance(name, str):
        raise InvalidTypeError(f"history: a series has a str for a name, got {type(name).__name__} {name!r}")
    if not name or not name.isprintable():  # a lone surrogate or a line break would spoil files and tables
        raise InvalidValueError(f"history: a series has a printable name, got {name!r}")
    return name

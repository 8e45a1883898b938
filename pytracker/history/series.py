"""Series: the values of one metric and the step of each. No torch here."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, MutableSequence
from functools import partial
from typing import TYPE_CHECKING, Any, SupportsIndex, overload

import numpy as np
from numpy.typing import NDArray

from .._checks import LARGEST_STEP, items, real_number, whole_number, wrong_type
from ..errors import InvalidValueError, SeriesIndexError
from .growing import GrowingTable
from .intervals import Float64Array, Int64Array, checked_steps
from .notebook import COURSE, course, html_table

if TYPE_CHECKING:
    from .history import History

_VALUES, _STEPS = 0, 1


class Series(MutableSequence[float]):
    """One metric: values (float64) and the step of each (int64, 0 or more, never descending).

    It behaves as a list of floats. A slice is a plain list; ``values`` and ``steps`` are arrays.

    >>> loss = Series([0.9, 0.7], steps=[10, 20])
    >>> loss.append(0.6)
    >>> loss[-1], loss[:2], min(loss), loss.steps
    (0.6, [0.9, 0.7], 0.6, array([10, 20, 21]))
    """

    __slots__ = ("_home", "_table", "name")

    def __init__(self, values: Iterable[float] = (), steps: Iterable[int] | None = None, *, name: str = "") -> None:
        """Make a series of ``values``; their steps are 0, 1, 2, ... unless given."""
        self.name = name
        self._table = GrowingTable((np.float64, ()), (np.int64, ()))
        self._home: History | None = None  # the history that it joins with its first value
        self.extend(values, steps)

    @property
    def values(self) -> Float64Array:
        """The values, float64 [n]: a read-only view."""
        return self._table.column(_VALUES)

    @property
    def steps(self) -> Int64Array:
        """The step of each value, int64 [n]: a read-only view."""
        return self._table.column(_STEPS)

    @property
    def last_step(self) -> int:
        """The step of the last value, -1 where there is none."""
        steps = self._table.writable(_STEPS)
        return int(steps[-1]) if len(steps) else -1

    def append(self, value: float, step: int | None = None) -> None:
        """Add one value; its step is the last one + 1 (0 for the first) unless given.

        Raises:
            InvalidTypeError: the value is not a number, or the step is not an int.
            InvalidValueError: the step is out of range, or comes before the last one.
        """
        number = value if type(value) is float else real_number(self._label, value)
        step = self._next_step(1) if step is None else self.checked_step(step)
        self.put_one(len(self._table), number, step)

    def extend(self, values: Iterable[float], steps: Iterable[int] | None = None) -> None:
        """Add many values at once; nothing is added where one of them is refused.

        Raises:
            InvalidTypeError: a value is not a number, or a step not an int.
            InvalidValueError: a step is out of range, the steps descend, or there are not as many as values.
        """
        numbers = self.checked_values(values)
        if steps is None:
            first = self._next_step(len(numbers))
            where = np.arange(first, first + len(numbers), dtype=np.int64)
        else:
            where = checked_steps(f"steps of {self._label}", steps)
        self.check_room(where, len(numbers))
        if len(numbers):
            self.put(len(self), numbers, where)

    def put_one(self, place: int, value: float, step: int) -> None:
        """Make a checked ``value`` at ``step`` the last one, at ``place``: twice is as good as once."""
        self._table.put_row(place, value, step)
        if self._home is not None:
            self._join()

    def put(self, place: int, values: Float64Array, steps: Int64Array) -> None:
        """Make checked ``values`` and ``steps`` those from ``place`` on: twice is as good as once."""
        self._table.put(place, values, steps)
        self._join()

    def checked_step(self, step: Any) -> int:
        """Return ``step`` as an int at which a value can be added now.

        Raises:
            InvalidTypeError: it is not an int.
            InvalidValueError: it is out of range, or comes before the last one.
        """
        at = whole_number("step", step)
        if at < (last := self.last_step):
            raise InvalidValueError(
                f"{self._label}: step {at} comes before the last recorded step {last}; truncate({at}) goes back to it"
            )
        return at

    def checked_values(self, values: Any) -> Float64Array:
        """Return ``values`` as float64 [n].

        Raises:
            InvalidTypeError: they are not numbers.
        """
        if isinstance(values, Series):
            return values.values
        if isinstance(values, np.ndarray) and values.ndim == 1 and values.dtype.kind in "fiub":
            return values.astype(np.float64)
        given = items(self._label, values, "a list of numbers")
        return np.array([real_number(self._label, value) for value in given], np.float64)

    def check_room(self, steps: Int64Array, count: int) -> None:
        """Raise ``InvalidValueError`` unless ``count`` values can be added at ``steps`` now."""
        if steps.shape != (count,):
            raise InvalidValueError(f"{self._label}: got {count} values and {steps.size} steps")
        if not count:
            return
        self.checked_step(int(steps[0]))
        descents = np.flatnonzero(steps[1:] < steps[:-1])
        if len(descents):
            before, after = steps[descents[0] : descents[0] + 2]
            raise InvalidValueError(f"{self._label}: step {after} comes before step {before}; steps never descend")

    def ends_with(self, values: Float64Array, steps: Int64Array) -> bool:
        """Tell whether the last values and their steps are these, to the bit."""
        start = len(self) - len(values)
        if start < 0 or not np.array_equal(self.steps[start:], steps):
            return False
        return self.values[start:].tobytes() == values.tobytes()

    def truncate(self, step: int) -> None:
        """Forget the values at ``step`` and later."""
        self._table.keep(0, int(np.searchsorted(self.steps, step)))

    def clear(self) -> None:
        """Forget everything."""
        self._table.keep(0, 0)

    def copy(self) -> Series:
        """Return a series of its own with the same values and steps."""
        return Series(self.values, self.steps, name=self.name)

    def __len__(self) -> int:
        """Return the number of values."""
        return len(self._table)

    @overload
    def __getitem__(self, index: SupportsIndex) -> float: ...
    @overload
    def __getitem__(self, index: slice) -> list[float]: ...
    def __getitem__(self, index: SupportsIndex | slice) -> float | list[float]:
        """Return one value as a float, or a slice as a list of floats.

        Raises:
            SeriesIndexError: there is no such value; an ``IndexError``, as a list raises.
        """
        place = index if isinstance(index, slice) else self._place(index)
        found: float | list[float] = self.values[place].tolist()
        return found

    def __setitem__(self, index: Any, value: Any) -> None:
        """Change values in place; they keep their steps. A slice can be replaced by as many values as it has."""
        if not isinstance(index, slice):
            self._table.writable(_VALUES)[self._place(index)] = real_number(self._label, value)
            return
        numbers = self.checked_values(value)
        places = range(*index.indices(len(self)))
        if len(places) != len(numbers):
            raise InvalidValueError(
                f"{self._label}: a slice of {len(places)} values can't be replaced by {len(numbers)}; "
                "use del, insert or extend"
            )
        self._table.writable(_VALUES)[index] = numbers

    def __delitem__(self, index: SupportsIndex | slice) -> None:
        """Delete values and their steps; the others keep theirs."""
        where: Any = index if isinstance(index, slice) else self._place(index)
        self._table.replace(np.delete(self.values, where), np.delete(self.steps, where))

    def insert(self, index: SupportsIndex, value: float) -> None:
        """Insert before ``index``: the value takes the step found there; that and the later ones move on by one."""
        place = slice(index, None).indices(len(self))[0]
        if place == len(self):
            self.append(value)
            return
        number = real_number(self._label, value)
        self._next_step(1)
        steps = self.steps
        moved = np.concatenate([steps[: place + 1], steps[place:] + 1])
        self._table.replace(np.insert(self.values, place, number), moved)

    def __iter__(self) -> Iterator[float]:
        """Iterate over Python floats."""
        return iter(self.values.tolist())

    def __reversed__(self) -> Iterator[float]:
        """Iterate backwards over Python floats."""
        return iter(self.values[::-1].tolist())

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
            return np.asarray(self.values, dtype)
        return np.array(self.values, dtype)

    def __repr__(self) -> str:
        """Show a short series whole, and the ends of a long one."""
        if len(self) <= 8:
            return f"Series({self[:]})"
        head, tail = (", ".join(f"{value:.6g}" for value in part) for part in (self[:3], self[-3:]))
        return f"Series([{head}, ..., {tail}], {len(self)} values)"

    def _repr_html_(self) -> str:
        """Show the course in a notebook, with the last value and the range."""
        rows = [[self.name or "values", *course(self.values)]]
        return html_table("", ("series", *COURSE), rows)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle and copy the values and steps, without the room for growth."""
        return partial(Series, name=self.name), (self.values.copy(), self.steps.copy())

    def waits_for(self, home: History | None) -> None:
        """Have the series join ``home`` with its first value; None for one that is there already."""
        self._home = home

    def _join(self) -> None:
        if self._home is not None:
            self._home.join(self)
            self._home = None

    def _next_step(self, count: int) -> int:
        """Return the step that follows, where ``count`` of them are left."""
        step = self.last_step + 1
        if step + count - 1 > LARGEST_STEP:
            raise InvalidValueError(f"{self._label}: there is no step after {self.last_step}; give the values steps")
        return step

    def _place(self, index: SupportsIndex) -> int:
        try:
            place = operator.index(index)
        except TypeError:
            raise wrong_type(f"index of {self._label}", index, "an int or a slice") from None
        count = len(self)
        if not -count <= place < count:
            waiting = self._home.what_there_is(self.name) if self._home is not None else ""
            raise SeriesIndexError(waiting or f"{self._label}: index {place} is out of range, there are {count} values")
        return place % count

    @property
    def _label(self) -> str:
        return f"series {self.name!r}" if self.name else "series"

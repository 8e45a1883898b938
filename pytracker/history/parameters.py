"""What is known of each parameter's gradient: the intervals of a training, and the latest exact rows. No torch here."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .._checks import shown, whole_number, wrong_type
from ..columns import COLUMNS, SUM_SQ
from ..errors import InvalidTypeError, InvalidValueError, MissingExtraError
from .growing import GrowingTable
from .intervals import (
    FIELDS,
    Float64Array,
    Int64Array,
    Interval,
    ParameterInfo,
    check_rows,
    checked_steps,
    dtype_of,
    says_nothing,
)
from .notebook import MOST_ROWS, Curve, html_table

if TYPE_CHECKING:
    import pandas as pd

DEFAULT_ROW_BYTES: Final = 128 * 2**20
DEFAULT_INTERVAL_BYTES: Final = 2**30


class ParameterHistory:
    """The intervals of a training and the latest exact rows, for a fixed list of parameters.

    Memory is bounded: exact rows stay while they fit ``max_bytes``, intervals while they fit ``max_interval_bytes``.
    The oldest go first and are counted (``dropped_rows``, ``dropped_intervals``). ``None`` means no bound.

    >>> from pytracker.history import summarize
    >>> info = ParameterInfo("weight", (2, 2), "float32", "", 4)
    >>> parameters = ParameterHistory([info])
    >>> rows = np.array([[[0.0, 9.0, 3.0, 1.0, 0.0, 0.0]], [[0.0, 16.0, 4.0, 3.0, 0.0, 0.0]]])
    >>> parameters.append_rows([10, 11], rows)
    >>> parameters.append(summarize([10, 11], rows, parameters.numel))
    >>> parameters.field("norm_max")
    array([[4.]], dtype=float32)
    >>> parameters.norms()
    (array([10, 11]), array([[3.],
           [4.]]))
    """

    def __init__(
        self,
        infos: Iterable[ParameterInfo] = (),
        *,
        max_bytes: int | None = DEFAULT_ROW_BYTES,
        max_interval_bytes: int | None = DEFAULT_INTERVAL_BYTES,
    ) -> None:
        """Make an empty history of the parameters ``infos``."""
        self.infos = as_infos(infos)
        self.max_bytes = max_bytes
        self.max_interval_bytes = max_interval_bytes
        self.dropped_rows = 0
        self.dropped_intervals = 0
        # The steps of the intervals, and the fields; one that only ever said "nothing to tell" is not in here. The
        # table of steps comes last in each change: its length is the number of intervals.
        self._intervals: tuple[GrowingTable, dict[str, GrowingTable]] = (_no_steps(), {})
        self._blocks: deque[tuple[Int64Array, Float64Array]] = deque()
        self._block_bytes = 0

    @classmethod
    def from_fields(
        cls,
        infos: Iterable[ParameterInfo],
        first_step: ArrayLike,
        last_step: ArrayLike,
        fields: dict[str, NDArray[Any]],
    ) -> ParameterHistory:
        """Make a history of intervals at once: steps int64 [m] and, of the fields that say anything, arrays [m, T].

        The arrays are taken over, not copied.
        """
        history = cls(infos, max_interval_bytes=None)
        steps = GrowingTable.adopt(np.asarray(first_step, np.int64), np.asarray(last_step, np.int64))
        adopted = {name: GrowingTable.adopt(np.asarray(array, dtype_of(name))) for name, array in fields.items()}
        history._intervals = (steps, adopted)
        return history

    @property
    def names(self) -> list[str]:
        """The parameters' names, in the order of every array here."""
        return [info.name for info in self.infos]

    @property
    def numel(self) -> Int64Array:
        """The elements of each parameter, int64 [T]."""
        return np.array([info.numel for info in self.infos], np.int64)

    def __len__(self) -> int:
        """Return the number of intervals kept."""
        return len(self._intervals[0])

    def __bool__(self) -> bool:
        """Tell whether any parameter is known."""
        return bool(self.infos)

    def __repr__(self) -> str:
        """Say how much is in here."""
        return f"ParameterHistory({len(self.infos)} parameters, {len(self)} intervals, {self._row_count()} exact rows)"

    @property
    def first_step(self) -> Int64Array:
        """The first step of each interval, int64 [m]."""
        return self._intervals[0].column(0)

    @property
    def last_step(self) -> Int64Array:
        """The last step of each interval, int64 [m]."""
        return self._intervals[0].column(1)

    @property
    def nbytes(self) -> int:
        """Bytes held by intervals and rows."""
        steps, fields = self._intervals
        return self._block_bytes + steps.nbytes + sum(field.nbytes for field in fields.values())

    def append(self, interval: Interval) -> None:
        """Add the next interval; its steps must come after those of the last one.

        Raises:
            InvalidValueError: it has another number of parameters, or its steps don't come after the last interval's.
        """
        self.check(interval)
        for name in FIELDS:
            self._put_field(name, np.asarray(getattr(interval, name)))
        self._intervals[0].put_row(len(self), interval.first_step, interval.last_step)
        self._drop_intervals()

    def check(self, interval: Interval) -> None:
        """Raise what ``append`` would raise for ``interval``."""
        if not isinstance(interval, Interval):
            raise wrong_type("interval", interval, "an Interval, as summarize returns")
        for name in FIELDS:
            array = np.asarray(getattr(interval, name))
            if array.shape != (len(self.infos),) or array.dtype.kind not in "fiub":
                raise InvalidValueError(
                    f"interval.{name}: expected one number for each of {len(self.infos)} parameters, "
                    f"got {array.dtype} of shape {list(array.shape)}"
                )
        before = int(self.last_step[-1]) if len(self) else -1
        first, last = whole_number("first_step", interval.first_step), whole_number("last_step", interval.last_step)
        if not before < first <= last:
            raise InvalidValueError(f"interval: steps {first} to {last} don't come after step {before}")

    def _put_field(self, name: str, array: NDArray[Any]) -> None:
        fields = self._intervals[1]
        if name not in fields:
            if says_nothing(name, array):
                return
            nothing = np.full((len(self), len(self.infos)), FIELDS[name], dtype_of(name))
            fields[name] = GrowingTable.adopt(nothing)
        fields[name].put(len(self), array[None])

    def _drop_intervals(self) -> None:
        if self.max_interval_bytes is None:
            return
        interval_bytes = max(1, sum(dtype_of(name).itemsize for name in self._intervals[1]) * len(self.infos))
        most = max(2, self.max_interval_bytes // interval_bytes)
        if len(self) > most:
            dropped = len(self) - most // 2  # half of them at once, so that the copy is paid rarely
            self._keep_intervals(dropped, len(self))
            self.dropped_intervals += dropped

    def _keep_intervals(self, start: int, stop: int) -> None:
        steps, fields = self._intervals
        kept = {name: field.sliced(start, stop) for name, field in fields.items()}
        self._intervals = (steps.sliced(start, stop), kept)

    def field(self, name: str) -> NDArray[Any]:
        """Return one field of every interval, [m, T], read-only and without a copy.

        float32, except ``first_nonfinite``: int64.

        Raises:
            InvalidValueError: there is no such field.
        """
        if name not in FIELDS:
            raise InvalidValueError(f"field {name!r}: expected one of {', '.join(FIELDS)}")
        steps, fields = self._intervals
        if name in fields:
            return fields[name].column()[: len(steps)]
        nothing: NDArray[Any] = np.full((1, 1), FIELDS[name], dtype_of(name))
        return np.broadcast_to(nothing, (len(steps), len(self.infos)))

    def __getitem__(self, name: str) -> dict[str, NDArray[Any]]:
        """Return what the intervals know of one parameter: ``first_step``, ``last_step`` and each field, arrays [m].

        Raises:
            InvalidValueError: there is no such parameter.
        """
        names = self.names
        if name not in names:
            some = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            raise InvalidValueError(f"parameters[{name!r}]: there is no such parameter; there are {some or 'none'}")
        place = names.index(name)
        steps = {"first_step": self.first_step, "last_step": self.last_step}
        return steps | {field: self.field(field)[:, place] for field in FIELDS}

    def __iter__(self) -> Iterator[str]:
        """Iterate over the parameters' names."""
        return iter(self.names)

    def _ipython_key_completions_(self) -> list[str]:
        return self.names

    def to_pandas(self) -> pd.DataFrame:
        """Return a DataFrame of the intervals: one row for each interval and parameter, which are its index.

        Raises:
            MissingExtraError: pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise MissingExtraError("ParameterHistory.to_pandas", "pandas", "pandas") from error
        index = pd.MultiIndex.from_product([self.first_step, self.names], names=["first_step", "parameter"])
        columns = {"last_step": np.repeat(self.last_step, len(self.infos))}
        return pd.DataFrame(columns | {name: self.field(name).reshape(-1) for name in FIELDS}, index=index)

    def _repr_html_(self) -> str:
        """Show each parameter in a notebook: the course of its norm, and its last one."""
        rows = []
        for place, info in enumerate(self.infos[:MOST_ROWS]):
            norms = self.field("norm_mean")[:, place]
            last = float(norms[-1]) if len(norms) else ""
            rows.append([info.name, " x ".join(map(str, info.shape)), Curve(norms), last])
        more = f"and {len(self.infos) - MOST_ROWS} more" if len(self.infos) > MOST_ROWS else ""
        return html_table(repr(self), ("parameter", "shape", "norm by interval", "last"), rows, more)

    def intervals(self) -> Iterator[Interval]:
        """Return the intervals kept, one by one."""
        fields = {name: self.field(name) for name in FIELDS}
        for index, (first, last) in enumerate(zip(self.first_step.tolist(), self.last_step.tolist(), strict=True)):
            yield Interval(first, last, **{name: array[index] for name, array in fields.items()})

    def blocks(self) -> list[tuple[Int64Array, Float64Array]]:
        """Return the exact rows kept as they were added: steps and rows of each time."""
        return list(self._blocks)

    def append_rows(self, steps: ArrayLike, rows: ArrayLike) -> None:
        """Keep the exact rows of single steps: steps int64 [n], rows float64 [n, T, 6].

        The arrays are copied. The oldest blocks are dropped when more than ``max_bytes`` are held.

        Raises:
            InvalidValueError: the shapes disagree, or the steps don't ascend.
        """
        self.put_rows(*self.checked_rows(steps, np.array(rows, np.float64)))

    def put_rows(self, steps: Int64Array, rows: Float64Array) -> None:
        """Keep checked rows; they are taken over, not copied."""
        if not len(steps):
            return
        self._blocks.append((steps, rows))
        self._block_bytes += _held(steps, rows)
        while self.max_bytes is not None and self._block_bytes > self.max_bytes and self._blocks:
            old_steps, old_rows = self._blocks.popleft()
            self._block_bytes -= _held(old_steps, old_rows)
            self.dropped_rows += len(old_steps)

    def checked_rows(self, steps: ArrayLike, rows: ArrayLike) -> tuple[Int64Array, Float64Array]:
        """Return ``steps`` and ``rows`` if ``append_rows`` can take them, and raise what it would if not."""
        where, moments = checked_steps("steps", steps), np.asarray(rows, np.float64)
        check_rows(where, moments, len(self.infos))
        if len(where) and where[0] <= self.newest_row:
            raise InvalidValueError(f"steps: step {where[0]} doesn't come after step {self.newest_row}")
        return where, moments

    @property
    def newest_row(self) -> int:
        """The step of the last exact row, -1 where there is none."""
        return int(self._blocks[-1][0][-1]) if self._blocks else -1

    def rows(self, since: int | None = None) -> tuple[Int64Array, Float64Array]:
        """Return the exact rows kept, as steps int64 [n] and rows float64 [n, T, 6]; a copy.

        With ``since``, only those of that step and later, at the cost of only those.
        """
        blocks = [block for block in self._blocks if since is None or block[0][-1] >= since]
        if not blocks:
            return np.empty(0, np.int64), np.empty((0, len(self.infos), len(COLUMNS)))
        start = 0 if since is None else int(np.searchsorted(blocks[0][0], since))
        blocks[0] = (blocks[0][0][start:], blocks[0][1][start:])
        return np.concatenate([steps for steps, _ in blocks]), np.concatenate([rows for _, rows in blocks])

    def norms(self, since: int | None = None) -> tuple[Int64Array, Float64Array]:
        """Return the exact L2 norms kept, as steps int64 [n] and norms float64 [n, T]; NaN where missing."""
        steps, rows = self.rows(since)
        return steps, np.sqrt(rows[:, :, SUM_SQ])

    def truncate(self, step: int) -> None:
        """Forget what was recorded at ``step`` and later; an interval that reaches into it goes whole."""
        keep = int(np.searchsorted(self.last_step, step))
        self._keep_intervals(0, keep)
        kept = [(steps[steps < step], rows[steps < step]) for steps, rows in self._blocks if steps[0] < step]
        self._blocks = deque(kept)
        self._block_bytes = sum(_held(steps, rows) for steps, rows in kept)

    def _row_count(self) -> int:
        return sum(len(steps) for steps, _ in self._blocks)


def as_infos(infos: Iterable[ParameterInfo]) -> list[ParameterInfo]:
    """Check a list of ``ParameterInfo`` and return it.

    Raises:
        InvalidTypeError: an element is something else.
        InvalidValueError: two have the same name.
    """
    given: Any = infos
    if not isinstance(given, Iterable):
        raise wrong_type("parameters", given, "a list of ParameterInfo")
    checked = list(given)
    seen: set[str] = set()
    for info in checked:
        if not isinstance(info, ParameterInfo):
            raise InvalidTypeError(f"parameters: expected ParameterInfo, got {type(info).__name__}: {shown(info)}")
        if info.name in seen:
            raise InvalidValueError(f"parameters: the name {info.name!r} occurs twice")
        seen.add(info.name)
    return checked


def _held(steps: Int64Array, rows: Float64Array) -> int:
    """Return the bytes that rows keep from being freed: all of the memory of which they are a part."""
    return steps.nbytes + int(getattr(rows.base, "nbytes", rows.nbytes))


def _no_steps() -> GrowingTable:
    return GrowingTable((np.int64, ()), (np.int64, ()))

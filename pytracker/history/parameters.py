"""What is known of each parameter's gradient: exact rows of single steps, and summaries of intervals. No torch here.

A row holds the raw moments of every parameter at one step, in the order of ``COLUMNS``. An ``Interval`` says what a
drain saw of every parameter; a ``ParameterHistory`` keeps the intervals of a training and the latest exact rows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import InvalidTypeError, InvalidValueError, MissingExtraError
from ..moments import is_missing
from .growing import GrowingArray
from .notebook import MOST_ROWS, Curve, html_table

if TYPE_CHECKING:
    import pandas as pd

Float32Array = NDArray[np.float32]
Float64Array = NDArray[np.float64]
Int64Array = NDArray[np.int64]

COLUMNS: Final = ("sum", "sum_sq", "abs_max", "zeros", "nans", "infs")
"""Raw moments of one parameter's gradient at one step, float64.

A parameter with no gradient in a step is missing: all six are NaN. The counts of a gradient that is present are never
NaN, so ``isnan(zeros)`` tells the two apart.
"""

SUM_SQ, ABS_MAX, ZEROS, NANS, INFS = (COLUMNS.index(name) for name in COLUMNS[1:])

FIELDS: Final[dict[str, float]] = {
    "norm_last": np.nan,
    "norm_mean": np.nan,
    "norm_max": np.nan,
    "abs_max": np.nan,
    "zero_fraction": np.nan,
    "nans": 0.0,
    "infs": 0.0,
    "missing": 0.0,
    "first_nonfinite": -1,
    "weight_norm": np.nan,
}
"""The arrays of an ``Interval``, each with the value that stands for "nothing to tell"."""

_REDUCED: Final = tuple(name for name in FIELDS if name != "first_nonfinite")
"""The float32 arrays of an ``Interval``, in the order in which ``summarize`` fills them."""

DEFAULT_ROW_BYTES: Final = 128 * 2**20
DEFAULT_INTERVAL_BYTES: Final = 2**30


@dataclass(frozen=True)
class ParameterInfo:
    """One parameter: what it is called and how it is made. ``group`` is its optimizer group ("" if there is none)."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    group: str
    numel: int


@dataclass(frozen=True)
class Interval:
    """What a drain says of every parameter. Arrays have one element a parameter: float32 [T] unless noted.

    Means and maxima go over the steps in which the gradient is present, and are NaN where it never was. NaN and Inf
    propagate. A finite value outside the range of float32 becomes the nearest float32 that is finite and not zero, so
    Inf always means that an Inf was seen.
    """

    first_step: int
    last_step: int
    norm_last: Float32Array  # L2 norm at the last step in which the gradient was present
    norm_mean: Float32Array
    norm_max: Float32Array
    abs_max: Float32Array  # largest absolute element of the interval
    zero_fraction: Float32Array  # mean share of elements that are zero
    nans: Float32Array  # NaN elements of the whole interval
    infs: Float32Array  # Inf elements of the whole interval
    missing: Float32Array  # steps without a gradient
    first_nonfinite: Int64Array  # int64: first step with a NaN or Inf element, -1 where there is none
    weight_norm: Float32Array  # L2 norm of the parameter itself at last_step, NaN where not measured


def summarize(steps: ArrayLike, rows: ArrayLike, numel: ArrayLike, weight_norm: ArrayLike | None = None) -> Interval:
    """Summarize the exact rows of a few steps into one ``Interval``.

    Args:
        steps: int64 [n], ascending, n >= 1.
        rows: float64 [n, T, 6], in the order of ``COLUMNS``.
        numel: int64 [T], the elements of each parameter.
        weight_norm: float [T], the norm of each parameter at the last step; None where it was not measured.

    Raises:
        InvalidValueError: the shapes disagree, or there is no step.

    >>> rows = np.array([[[0.0, 9.0, 3.0, 1.0, 0.0, 0.0]], [[0.0, 16.0, 4.0, 3.0, 0.0, 0.0]]])
    >>> interval = summarize([10, 11], rows, [4])
    >>> float(interval.norm_mean[0]), float(interval.norm_max[0]), float(interval.zero_fraction[0])
    (3.5, 4.0, 0.5)
    """
    steps = np.asarray(steps, np.int64)
    rows = np.asarray(rows, np.float64)
    numel = np.asarray(numel, np.int64)
    check_rows(steps, rows, len(numel))
    if not len(steps):
        raise InvalidValueError("summarize: no steps were given; an interval has at least one")

    # A drain calls this for each interval, so the usual case, no gradient missing, takes few passes over the rows.
    missing = is_missing(rows)
    some_missing = bool(missing.any())
    present: Any = ~missing if some_missing else True
    seen: Any = present.sum(axis=0) if some_missing else len(steps)
    norms = np.sqrt(rows[:, :, SUM_SQ])
    last = norms[-1]
    if some_missing:
        last = np.take_along_axis(norms, (len(steps) - 1 - np.argmax(present[::-1], axis=0))[None], axis=0)[0]
    counts = np.add.reduce(rows[:, :, ZEROS:], axis=0, where=present[:, :, None] if some_missing else True)

    wide = np.empty((len(_REDUCED), len(numel)))
    wide[0] = last
    wide[1] = np.add.reduce(norms, axis=0, where=present) / np.maximum(seen, 1)
    wide[2] = np.maximum.reduce(norms, axis=0, where=present, initial=0.0)
    wide[3] = np.maximum.reduce(rows[:, :, ABS_MAX], axis=0, where=present, initial=0.0)
    wide[4] = counts[:, 0] / (np.maximum(seen, 1) * np.maximum(numel, 1))
    wide[:5, seen == 0] = np.nan
    wide[5:7] = counts[:, 1:].T
    wide[7] = len(steps) - seen
    wide[8] = np.nan if weight_norm is None else weight_norm
    first_nonfinite = np.full(len(numel), -1, np.int64)
    if wide[5:7].any():
        nonfinite = (rows[:, :, NANS] + rows[:, :, INFS]) > 0  # a missing gradient's NaN is not above 0
        first_nonfinite = np.where(nonfinite.any(axis=0), steps[np.argmax(nonfinite, axis=0)], -1)
    fields = dict(zip(_REDUCED, _to_float32(wide), strict=True))
    return Interval(int(steps[0]), int(steps[-1]), **fields, first_nonfinite=first_nonfinite)


def check_rows(steps: NDArray[Any], rows: NDArray[Any], parameters: int) -> None:
    """Raise ``InvalidValueError`` unless ``rows`` is [n, T, 6] with one ascending step for each of its n rows."""
    expected = (len(steps), parameters, len(COLUMNS))
    if steps.ndim != 1 or rows.shape != expected:
        raise InvalidValueError(
            f"rows: expected shape [steps, parameters, columns] = {list(expected)}, got {list(rows.shape)}"
        )
    if np.any(steps[1:] <= steps[:-1]):
        raise InvalidValueError("steps: expected ascending steps, each once")


_LARGEST: Final = float(np.finfo(np.float32).max)
_SMALLEST: Final = float(np.finfo(np.float32).smallest_subnormal)


def _to_float32(wide: Float64Array) -> Float32Array:
    """Return float32; a finite value outside its range becomes the nearest one that is finite and not zero."""
    with np.errstate(over="ignore", under="ignore"):
        narrow = wide.astype(np.float32)
    narrow[np.isinf(narrow) & np.isfinite(wide)] = _LARGEST
    narrow[(narrow == 0) & (wide > 0)] = _SMALLEST
    return narrow


class ParameterHistory:
    """The intervals of a training and the latest exact rows, for a fixed list of parameters.

    Memory is bounded: exact rows stay while they fit ``max_bytes``, intervals while they fit ``max_interval_bytes``.
    The oldest go first and are counted (``dropped_rows``, ``dropped_intervals``). ``None`` means no bound.

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
        self._first = GrowingArray(np.int64)
        self._last = GrowingArray(np.int64)
        self._fields: dict[str, GrowingArray] = {}  # a field that only ever said "nothing to tell" is not in here
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
        history._first.extend(first_step)
        history._last.extend(last_step)
        for name, array in fields.items():
            field = history._fields[name] = GrowingArray(_dtype(name), (len(history.infos),))
            field.adopt(array)
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
        return len(self._first)

    def __bool__(self) -> bool:
        """Tell whether any parameter is known."""
        return bool(self.infos)

    def __repr__(self) -> str:
        """Say how much is in here."""
        return f"ParameterHistory({len(self.infos)} parameters, {len(self)} intervals, {self._row_count()} exact rows)"

    @property
    def first_step(self) -> Int64Array:
        """The first step of each interval, int64 [m]."""
        steps: Int64Array = self._first.view
        return steps

    @property
    def last_step(self) -> Int64Array:
        """The last step of each interval, int64 [m]."""
        steps: Int64Array = self._last.view
        return steps

    @property
    def newest_row(self) -> int:
        """The step of the last exact row, -1 where there is none."""
        return int(self._blocks[-1][0][-1]) if self._blocks else -1

    @property
    def nbytes(self) -> int:
        """Bytes held by intervals and rows."""
        intervals: int = sum(array.nbytes for array in (self._first, self._last, *self._fields.values()))
        return self._block_bytes + intervals

    def append(self, interval: Interval) -> None:
        """Add the next interval; its steps must come after those of the last one.

        Raises:
            InvalidValueError: it has another number of parameters, or its steps don't come after the last interval's.
        """
        arrays = {name: np.asarray(getattr(interval, name)) for name in FIELDS}
        for name, array in arrays.items():
            if array.shape != (len(self.infos),):
                raise InvalidValueError(
                    f"interval.{name}: expected one element for each of {len(self.infos)} parameters, "
                    f"got shape {list(array.shape)}"
                )
        before = self._last.view[-1] if len(self) else -1
        if not before < interval.first_step <= interval.last_step:
            raise InvalidValueError(
                f"interval: steps {interval.first_step} to {interval.last_step} don't come after step {before}"
            )
        for name, array in arrays.items():
            self._append_field(name, array)
        self._first.append(interval.first_step)
        self._last.append(interval.last_step)
        self._drop_intervals()

    def _append_field(self, name: str, array: NDArray[Any]) -> None:
        field = self._fields.get(name)
        if field is None:
            if says_nothing(name, array):
                return
            field = self._fields[name] = GrowingArray(_dtype(name), (len(self.infos),))
            field.extend(np.full((len(self), len(self.infos)), FIELDS[name], _dtype(name)))
        field.append(array)

    def _drop_intervals(self) -> None:
        if self.max_interval_bytes is None:
            return
        interval_bytes = max(1, sum(_dtype(name).itemsize for name in self._fields) * len(self.infos))
        most = max(2, self.max_interval_bytes // interval_bytes)
        if len(self) > most:
            dropped = len(self) - most // 2  # half of them at once, so that the copy is paid rarely
            self._keep_intervals(dropped, len(self))
            self.dropped_intervals += dropped

    def _keep_intervals(self, start: int, stop: int) -> None:
        for array in (self._first, self._last, *self._fields.values()):
            array.keep(start, stop)

    def field(self, name: str) -> NDArray[Any]:
        """Return one field of every interval, [m, T], read-only and without a copy.

        float32, except ``first_nonfinite``: int64.

        Raises:
            InvalidValueError: there is no such field.
        """
        if name not in FIELDS:
            raise InvalidValueError(f"field {name!r}: expected one of {', '.join(FIELDS)}")
        if name in self._fields:
            return self._fields[name].view
        nothing: NDArray[Any] = np.full((1, 1), FIELDS[name], _dtype(name))
        return np.broadcast_to(nothing, (len(self), len(self.infos)))

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

    def append_rows(self, steps: ArrayLike, rows: ArrayLike) -> None:
        """Keep the exact rows of single steps: steps int64 [n], rows float64 [n, T, 6].

        The arrays are copied. The oldest blocks are dropped when more than ``max_bytes`` are held.

        Raises:
            InvalidValueError: the shapes disagree, or the steps don't ascend.
        """
        steps = np.array(steps, np.int64)
        rows = np.array(rows, np.float64)
        check_rows(steps, rows, len(self.infos))
        if not len(steps):
            return
        if self._blocks and steps[0] <= self._blocks[-1][0][-1]:
            raise InvalidValueError(f"steps: step {steps[0]} doesn't come after step {self._blocks[-1][0][-1]}")
        self._blocks.append((steps, rows))
        self._block_bytes += steps.nbytes + rows.nbytes
        while self.max_bytes is not None and self._block_bytes > self.max_bytes and self._blocks:
            old_steps, old_rows = self._blocks.popleft()
            self._block_bytes -= old_steps.nbytes + old_rows.nbytes
            self.dropped_rows += len(old_steps)

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
        keep = int(np.searchsorted(self._last.view, step))
        self._keep_intervals(0, keep)
        kept = [(steps[steps < step], rows[steps < step]) for steps, rows in self._blocks if steps[0] < step]
        self._blocks = deque(kept)
        self._block_bytes = sum(steps.nbytes + rows.nbytes for steps, rows in kept)

    def _row_count(self) -> int:
        return sum(len(steps) for steps, _ in self._blocks)


def as_infos(infos: Iterable[ParameterInfo]) -> list[ParameterInfo]:
    """Check a list of ``ParameterInfo`` and return it.

    Raises:
        InvalidTypeError: an element is something else.
        InvalidValueError: two have the same name.
    """
    checked = list(infos)
    seen: set[str] = set()
    for info in checked:
        if not isinstance(info, ParameterInfo):
            raise InvalidTypeError(f"parameters: expected ParameterInfo, got {type(info).__name__}: {info!r}")
        if info.name in seen:
            raise InvalidValueError(f"parameters: the name {info.name!r} occurs twice")
        seen.add(info.name)
    return checked


def _dtype(field: str) -> np.dtype[Any]:
    return np.dtype(np.int64 if field == "first_nonfinite" else np.float32)


def says_nothing(field: str, array: NDArray[Any]) -> bool:
    """Tell whether a field of an interval has nothing to tell of any parameter."""
    nothing = FIELDS[field]
    return bool(np.isnan(array).all()) if np.isnan(nothing) else bool((array == nothing).all())

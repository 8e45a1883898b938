"""History: what a training recorded, as named series over steps. No torch here.

The usual code on a dict of lists runs unchanged on a ``History``: ``history["loss"].append(x)``,
``history["loss"][-1]``, ``for name, series in history.items()``. Each series also keeps the step of every value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

from .._checks import shown, whole_number, wrong_type
from ..errors import InvalidTypeError, InvalidValueError, MissingExtraError
from .notebook import COURSE, course, html_table
from .parameters import ParameterHistory
from .series import Series

if TYPE_CHECKING:
    import pandas as pd

_NAMES_SHOWN = 8


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
        self.waiting: Callable[[], int] | None = None  # how many steps are recorded and not in here yet
        self._series: dict[str, Series] = {}
        self._pending: dict[str, Series] = {}
        if series is not None and not isinstance(series, Mapping):
            raise wrong_type("series", series, "a mapping of names to values")
        for name, values in {**(series or {}), **named}.items():
            self[name] = values  # __setitem__ makes a Series of it

    def __getitem__(self, name: str) -> Series:
        """Return the series ``name``; an empty one that joins on its first value where there is none yet."""
        found = self._series.get(name)
        if found is None:
            found = self._pending.get(name)
        if found is None:
            found = self._pending[name] = Series(name=_checked_name(name))
            found.waits_for(self)
        return found

    def __setitem__(self, name: str, values: Series | Iterable[float]) -> None:
        """Take a series as it is, or make one of the values, with the steps 0, 1, 2, ..."""
        name = _checked_name(name)
        series = values if isinstance(values, Series) else Series(values, name=name)
        series.waits_for(None)
        self._pending.pop(name, None)
        self._series[name] = series

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
        return max((series.last_step for series in self._series.values()), default=-1)

    def truncate(self, step: int) -> None:
        """Forget every value, interval and row at ``step`` and later, and the findings that rest on them.

        Raises:
            InvalidTypeError, InvalidValueError: ``step`` is not a whole number, 0 or more.
        """
        step = whole_number("step", step)
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
        rows = [[name, *course(series.values)] for name, series in self._series.items()]
        return html_table(f"History: {len(self)} series up to step {self.last_step}", ("series", *COURSE), rows)

    def _ipython_key_completions_(self) -> list[str]:
        return list(self._series)

    def __getstate__(self) -> dict[str, Any]:
        """Pickle what is recorded; empty series that were only asked for stay behind."""
        return {**self.__dict__, "_pending": {}, "waiting": None}

    def join(self, series: Series) -> None:
        """Take in a series that was asked for by its name and has got its first value."""
        self._pending.pop(series.name, None)
        self._series[series.name] = series

    def what_there_is(self, name: str) -> str:
        """Say that ``name`` has no value, which series there are, and what may be missing."""
        names = list(self._series)
        some = ", ".join(names[:_NAMES_SHOWN]) + (", ..." if len(names) > _NAMES_SHOWN else "")
        known = f"there are {some}" if names else "nothing is recorded yet"
        steps = self.waiting() if self.waiting is not None else 0
        late = "1 step is" if steps == 1 else f"{steps} steps are"
        missing = f"; {late} still on the way: call flush() before you read what is missing" if steps else ""
        return f"series {name!r} has no value; {known}{missing}"


def _checked_name(name: str) -> str:
    if not isinstance(name, str):
        raise InvalidTypeError(f"history: a series has a str for a name, got {type(name).__name__} {shown(name)}")
    if not name or not name.isprintable():  # a lone surrogate or a line break would spoil files and tables
        raise InvalidValueError(f"history: a series has a printable name, got {shown(name)}")
    return name

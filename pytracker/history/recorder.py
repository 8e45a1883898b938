"""Recorder: puts what a training says into a history. No torch here.

Each call is recorded whole or not at all, once, whatever interrupts it: it checks everything first, then leaves one
entry with one assignment, and an entry that was left is carried out by this call or by the next one. Carrying it out
twice does no harm: rows are put at their place, and documents take the place of those with their key.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, SupportsFloat, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from .._checks import by_name, real_number, text, whole_number, wrong_type, wrong_value
from ..errors import InvalidTypeError, InvalidValueError
from .history import History
from .intervals import Float64Array, Int64Array, Interval, ParameterInfo, checked_steps
from .notebook import COURSE, course, html_table
from .parameters import ParameterHistory, as_infos

_POINT_BYTES = 56  # a float, its share of a dict and of a tuple
_ENTRY_BYTES = 200


@dataclass(frozen=True)
class Points:
    """Values of one ``log`` (a step and floats) or one ``log_many`` (arrays), and their places in the series."""

    steps: int | Int64Array
    values: Mapping[str, Any]
    places: Mapping[str, int]
    seconds: float  # of training time, when they were logged

    @property
    def count(self) -> int:
        """How many values are in here."""
        return len(self.values) * (1 if isinstance(self.steps, int) else len(self.steps))

    @property
    def nbytes(self) -> int:
        """About how much memory they hold."""
        return _ENTRY_BYTES + _POINT_BYTES * self.count


@dataclass(frozen=True)
class ExactRows:
    """The raw moments of single steps: int64 [n] and float64 [n, T, 6]."""

    steps: Int64Array
    rows: Float64Array


@dataclass(frozen=True)
class Document:
    """A fact ("meta"), a finding ("findings") or all parameters ("parameters"); it replaces the one with its key."""

    table: str
    key: str
    value: Any
    rows: tuple[tuple[Any, ...], ...] = ()  # as the store writes it


@dataclass(frozen=True)
class Truncation:
    """Everything at ``step`` and later is forgotten."""

    step: int


Entry: TypeAlias = Points | Interval | ExactRows | Document | Truncation


class Recorder:
    """Records a training in memory; ``store.Run`` also writes it to disk.

    Several threads may record at once: one lock orders them. Steps must not descend, whoever logs them.

    >>> recorder = Recorder()
    >>> recorder.log(0, loss=0.5, accuracy=0.25)
    >>> recorder.log_many([1, 2], {"loss": [0.4, 0.3]})
    >>> recorder.history["loss"]
    Series([0.5, 0.4, 0.3])
    """

    every_step = False

    def __init__(self) -> None:
        """Make one with an empty history."""
        self._history = History()
        self._lock = threading.RLock()  # a thread that was interrupted in it can enter it again
        self._left: Entry | None = None  # recorded, and perhaps not yet carried out

    @property
    def history(self) -> History:
        """What is recorded."""
        if self._left is not None:
            with self._lock:
                self._carry_out()
        return self._history

    def _repr_html_(self) -> str:
        """Show in a notebook what it is and what is recorded."""
        rows = [[name, *course(series.values)] for name, series in self.history.items()]
        return html_table(repr(self), ("series", *COURSE), rows)

    def log(self, step: int | None = None, /, *unnamed: Any, **metrics: SupportsFloat) -> None:
        """Record one value of each metric at ``step``. Never waits for the disk; a tensor's device may be waited for.

        Args:
            step: the step, without a name.
            unnamed: an error, which says how values are given.
            metrics: by name a number, or a tensor of one element.

        Raises:
            InvalidTypeError: the step is not an integer, or a value not a number. Nothing of the call is recorded.
            InvalidValueError: the step is out of range or comes before the last one of a metric.
        """
        if step is None or unnamed:
            by_name("run.log", unnamed, "step, loss=0.5")
            raise InvalidTypeError("run.log() needs the step, first and without a name: run.log(step, loss=0.5)")
        with self._lock:
            at = self._begin(step, "a whole number, as in run.log(step, loss=0.5) or run.log(step, **metrics)")
            series = [self._history[name] for name in metrics]
            for each in series:
                if at < each.last_step:
                    each.checked_step(at)  # which raises
            values = {
                name: value if type(value) is float else real_number(f"metric {name!r}", value)
                for name, value in metrics.items()
            }
            if values:
                places = {each.name: len(each) for each in series}
                self._record(Points(at, values, places, self._seconds()))

    def log_many(self, steps: Iterable[int], metrics: Mapping[str, Iterable[float]]) -> None:
        """Record a value of each metric at each of ``steps``. The arrays are copied.

        What the series end with already is not recorded again, so a call that was interrupted can be made once more.

        Raises:
            InvalidTypeError: a step is not an integer, or a value not a number.
            InvalidValueError: lengths differ, or steps descend or come before the last one. Nothing is recorded.
        """
        where = checked_steps("steps", steps)
        if not isinstance(metrics, Mapping):
            raise wrong_type("metrics", metrics, "a mapping of names to values")
        with self._lock:
            series = [self._history[name] for name in metrics]
            values = {each.name: each.checked_values(metrics[each.name]) for each in series}
            for each in series:
                if values[each.name].shape != where.shape:
                    each.check_room(where, len(values[each.name]))
            if not len(where) or not series:
                return
            self._begin(int(where[0]))
            if all(each.ends_with(values[each.name], where) for each in series):
                return
            for each in series:
                each.check_room(where, len(where))
            self._record(Points(where, values, {each.name: len(each) for each in series}, self._seconds()))

    def set_parameters(self, infos: Iterable[ParameterInfo]) -> None:
        """Say which parameters there are, in the order of every interval and row; a second time they must be the same.

        Raises:
            InvalidTypeError: they are not ``ParameterInfo``.
            InvalidValueError: two have one name, or they are others than those recorded.
        """
        given = as_infos(infos)
        with self._lock:
            self._check_open()
            self._carry_out()
            known = self._history.parameters.infos
            if known:
                _check_same_parameters(known, given)
            if given != known:  # the first time, or they have moved to other groups of the optimizer
                self._record_document("parameters", "", given)

    def log_interval(self, interval: Interval) -> None:
        """Record what an interval of steps says of every parameter; the one that came last is not recorded again.

        Raises:
            InvalidTypeError: it is no ``Interval``.
            InvalidValueError: it has another number of parameters, or its steps don't come after the last one's.
        """
        if not isinstance(interval, Interval):
            raise wrong_type("interval", interval, "an Interval, as summarize returns")
        with self._lock:
            self._begin(interval.first_step)
            if self._is_last(interval):
                return
            self._history.parameters.check(interval)
            self._record(interval)

    def log_rows(self, steps: ArrayLike, rows: ArrayLike) -> None:
        """Record the moments of single steps, int64 [n] and float64 [n, T, 6]; those that came last are not again.

        Raises:
            InvalidTypeError: a step is not an integer.
            InvalidValueError: the shapes disagree, or steps don't ascend.
        """
        self.take_rows(steps, np.array(rows, np.float64))

    def take_rows(self, steps: ArrayLike, rows: Float64Array) -> None:
        """Record rows as ``log_rows`` does, and keep the array itself: it must not change from now on."""
        where = checked_steps("steps", steps)
        if not len(where):
            return
        with self._lock:
            self._begin(int(where[0]))
            if int(where[-1]) == self._history.parameters.newest_row:
                return
            self._record(ExactRows(*self._history.parameters.checked_rows(where, rows)))

    def log_finding(self, finding: Mapping[str, Any]) -> None:
        """Record a finding; one with the same key (its "key", or rule, first step and parameters) is replaced.

        Raises:
            InvalidTypeError: it is no mapping, or a part of it is not what a finding has there.
            InvalidValueError: a step is out of range, or no rule is named.
        """
        checked = checked_finding(finding)
        if not checked.get("rule"):
            raise wrong_value("finding", finding, 'one that names its rule: {"rule": "loss_spike", ...}')
        with self._lock:
            self._check_open()
            self._carry_out()
            self._record_document("findings", finding_key(checked), checked)

    def set_meta(self, **facts: Any) -> None:
        """Record facts about the training: "optimizer", "clip_threshold", "scheduler", "every", ..."""
        with self._lock:
            self._check_open()
            self._carry_out()
            documents = [self._document("meta", text("meta", key), value) for key, value in facts.items()]
            for document in documents:
                self._record(document)

    def truncate(self, step: int) -> None:
        """Go back to ``step``: forget what is recorded at it and later.

        Raises:
            InvalidTypeError, InvalidValueError: ``step`` is not a whole number, 0 or more.
        """
        at = whole_number("step", step)
        with self._lock:
            self._check_open()
            self._carry_out()
            self._record(Truncation(at))

    def _check_open(self) -> None:
        """Raise unless it records."""

    def _begin(self, step: Any, expected: str = "a whole number") -> int:
        """Make sure that ``step`` can be recorded now, with everything before it carried out."""
        self._check_open()
        at = whole_number("step", step, expected=expected)
        self._carry_out()
        return at

    def _seconds(self) -> float:
        return 0.0

    def _encoded(self, document: Document) -> Document:
        """Return it as ``_pass_on`` takes it, or raise: from there on nothing may."""
        return document

    def _pass_on(self, entry: Entry) -> None:
        """Take an entry that is in the history now; the same one may come twice."""

    def _document(self, table: str, key: str, value: Any) -> Document:
        return self._encoded(Document(table, key, value))

    def _record_document(self, table: str, key: str, value: Any) -> None:
        self._record(self._document(table, key, value))

    def _record(self, entry: Entry) -> None:
        self._left = entry  # from here on it is recorded
        self._carry_out()

    def _carry_out(self) -> None:
        entry = self._left
        if entry is None:
            return
        try:
            if isinstance(entry, Truncation):
                self._pass_on(entry)  # which may fail: then nothing is forgotten in memory either
            self._put(entry)
        except Exception:
            self._left = None
            raise
        if not isinstance(entry, Truncation):
            self._pass_on(entry)
        self._left = None

    def _put(self, entry: Entry) -> None:
        history = self._history
        if isinstance(entry, Points):
            for name, place in entry.places.items():
                if isinstance(entry.steps, int):
                    history[name].put_one(place, entry.values[name], entry.steps)
                else:
                    history[name].put(place, entry.values[name], entry.steps)
        elif isinstance(entry, Interval):
            if not self._is_last(entry):
                history.parameters.append(entry)
        elif isinstance(entry, ExactRows):
            if int(entry.steps[-1]) != history.parameters.newest_row:
                history.parameters.put_rows(entry.steps, entry.rows)
        elif isinstance(entry, Truncation):
            history.truncate(entry.step)
        else:
            self._put_document(entry)

    def _put_document(self, document: Document) -> None:
        history = self._history
        if document.table == "parameters":
            if history.parameters.infos:
                history.parameters.infos = document.value
            else:
                history.parameters = ParameterHistory(document.value)
        elif document.table == "meta":
            history.meta[document.key] = document.value
        else:
            known = history.findings
            place = next((i for i, other in enumerate(known) if finding_key(other) == document.key), len(known))
            known[place : place + 1] = [document.value]

    def _is_last(self, interval: Interval) -> bool:
        known = self._history.parameters
        return (
            len(known) > 0 and known.first_step[-1] == interval.first_step and known.last_step[-1] == interval.last_step
        )


_TEXTS = ("key", "rule", "severity", "evidence", "cause", "action")


def checked_finding(finding: Any) -> dict[str, Any]:
    """Return a finding as a dict, if each part that it has is what readers rely on.

    Raises:
        InvalidTypeError: a part is of the wrong type.
        InvalidValueError: a step is out of range.
    """
    if not isinstance(finding, Mapping):
        raise wrong_type("finding", finding, "a mapping, as Finding.to_dict returns")
    checked = dict(finding)
    for name in _TEXTS:
        if name in checked:
            checked[name] = text(f"the finding's {name}", checked[name])
    for name in ("first_step", "last_step"):
        if checked.get(name) is not None:
            checked[name] = whole_number(f"the finding's {name}", checked[name])
    parameters, numbers = checked.get("parameters") or (), checked.get("numbers") or {}
    if isinstance(parameters, str) or not isinstance(parameters, Iterable):
        raise wrong_type("the finding's parameters", parameters, "names")
    for parameter in parameters:
        text("a parameter of the finding", parameter)
    if not isinstance(numbers, Mapping):
        raise wrong_type("the finding's numbers", numbers, "a mapping of names to numbers")
    for name, number in numbers.items():
        real_number(f"the finding's {name!r}", number)
    return checked


def finding_key(finding: Mapping[str, Any]) -> str:
    """Return what makes two findings the same: the "key" they give, or rule, first step and parameters."""
    given = finding.get("key")
    if given is not None:
        return text("key", str(given))
    parameters = finding.get("parameters") or ()
    named = ",".join(map(str, parameters)) if isinstance(parameters, Iterable) else str(parameters)
    return text("key", f"{finding.get('rule')}@{finding.get('first_step')}:{named}")


def _check_same_parameters(known: list[ParameterInfo], given: list[ParameterInfo]) -> None:
    for before, now in zip(known, given, strict=False):
        if (before.name, before.numel) != (now.name, now.numel):
            raise InvalidValueError(
                f"the run was recorded with parameter {before.name!r} of shape {list(before.shape)}, and now "
                f"{now.name!r} of shape {list(now.shape)} is in its place: record another model in another run"
            )
    if len(known) != len(given):
        raise InvalidValueError(
            f"the run was recorded with {len(known)} parameters, and now there are {len(given)}: "
            "record another model in another run"
        )

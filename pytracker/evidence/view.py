"""View: a history as it stood at one step, which is what a rule reads."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..history import History, ParameterHistory, ParameterInfo, frozen_in, players_of
from .findings import Finding
from .statistics import Course, course_of, log10, median

T = TypeVar("T")
Float64Array = NDArray[np.float64]
Int64Array = NDArray[np.int64]

LOSS_NAMES = ("loss", "train_loss")
VALIDATION_NAMES = ("val_loss", "valid_loss", "validation_loss", "eval_loss")
ACCURACY_NAMES = ("val_accuracy", "val_acc", "valid_accuracy", "validation_accuracy", "eval_accuracy")
_REWARD = re.compile(r"(^|[/_ .])(rewards?|returns?|advantages?)([/_ .]|$)", re.IGNORECASE)
_CRITICS = "(d|disc|discriminator|critic)"
_CRITIC = re.compile(rf"(^|[/_ .])({_CRITICS}[/_ .]?loss|loss[/_ .]?{_CRITICS}($|[/_ .]))", re.IGNORECASE)
_NAMED = 8  # names in a sentence


@dataclass(frozen=True)
class Points:
    """A metric up to the view's last step: ``steps`` int64 [n], ``values`` float64 [n], no copies."""

    steps: Int64Array
    values: Float64Array

    def __len__(self) -> int:
        """Return the number of values."""
        return len(self.values)

    def head(self, count: int) -> Points:
        """Return the first ``count`` points."""
        return Points(self.steps[:count], self.values[:count])

    def tail(self, count: int) -> Points:
        """Return the last ``count`` points."""
        start = max(0, len(self) - count)
        return Points(self.steps[start:], self.values[start:])

    def since(self, step: int, context: int) -> Points:
        """Return the points at ``step`` and later, and ``context`` before them."""
        start = max(0, self.index(step) - context)
        return Points(self.steps[start:], self.values[start:])

    def index(self, step: int) -> int:
        """Return the place of the first point at ``step`` or later."""
        return int(np.searchsorted(self.steps, step))

    def runaway(self, since: int) -> Points:
        """Return up to 5 finite values before the first non-finite one at ``since`` or later; none if all are."""
        first = self.index(since)
        bad = np.flatnonzero(~np.isfinite(self.values[first:]))
        end = first + int(bad[0]) if len(bad) else 0
        start = max(0, end - 5)
        known = np.isfinite(self.values[start:end])
        return Points(self.steps[start:end][known], self.values[start:end][known])

    def at(self, step: int) -> float:
        """Return the value at ``step``, NaN where there is none."""
        place = self.index(step)
        return float(self.values[place]) if place < len(self) and self.steps[place] == step else float("nan")


_NOTHING = Points(np.empty(0, np.int64), np.empty(0))


class Layout:
    """What never changes about the parameters of a training, computed once."""

    def __init__(self, infos: list[ParameterInfo]) -> None:
        """Read sizes and shapes off ``infos``."""
        self.infos = infos
        self.numel = np.array([max(1, info.numel) for info in infos], np.float64)
        self.root = np.sqrt(self.numel)
        self.grouped = np.array([bool(info.group) for info in infos], bool)  # which are in the optimizer
        self.weights = np.array([index for index, info in enumerate(infos) if len(info.shape) >= 2], np.int64)


class View:
    """A history up to (and without) the step ``stop``. Every access costs the same however long the history is.

    ``since`` is the first step that the rule has not been shown before (0 at first): a rule that looks at each step
    once starts there. ``previous`` is the finding that the rule has made so far, or None.
    """

    def __init__(
        self,
        history: History,
        *,
        stop: int | None = None,
        since: int = 0,
        layout: Layout | None = None,
        rule: str = "",
        previous: Finding | None = None,
    ) -> None:
        """Look at ``history``; ``stop=None`` means all of it."""
        self._history = history
        self.stop = history.last_step + 1 if stop is None else stop
        self.since = since
        self.layout = Layout(history.parameters.infos) if layout is None else layout
        self.rule = rule
        self.previous = previous
        self._points: dict[str, Points] = {}
        self._known: dict[Any, Any] = {}
        self.unjudged = ""  # why the rule could not judge
        self.withdrawn = ""  # why what the rule has found before doesn't hold

    def for_rule(self, rule: str, previous: Finding | None) -> View:
        """Return the same view for one rule."""
        self.rule, self.previous = rule, previous
        self.unjudged = self.withdrawn = ""
        return self

    def cannot_judge(self, why: str) -> None:
        """Say why the rule has nothing to go by: silence is not health."""
        self.unjudged = why

    def withdraw(self, why: str) -> None:
        """Take back what the rule has found before, if it has: the training has shown that it was wrong."""
        self.withdrawn = why

    def lacks(self, what: str) -> str:
        """Return what to say where a series is missing: ``what``, and the names that there are."""
        names = ", ".join(self.names[:_NAMED]) + (", ..." if len(self.names) > _NAMED else "")
        return f"no {what}; names there are {names or 'none'}"

    def once(self, work: Callable[[View], T]) -> T:
        """Return ``work(self)``, done once for all rules that ask for it; it may not depend on which of them does.

        >>> view = View(History(loss=[3.0, 2.0]))
        >>> view.once(len_of_loss := lambda view: len(view.loss)), view.once(len_of_loss)
        (2, 2)
        """
        if work not in self._known:
            self._known[work] = work(self)
        known: T = self._known[work]
        return known

    def __contains__(self, name: str) -> bool:
        """Tell whether the metric ``name`` has a value."""
        return len(self[name]) > 0

    def __getitem__(self, name: str) -> Points:
        """Return the metric ``name``, empty where it has no value."""
        points = self._points.get(name)
        if points is None:
            series = self._history.get(name)
            if series is None:
                return _NOTHING
            stop = int(np.searchsorted(series.steps, self.stop))
            points = self._points[name] = Points(series.steps[:stop], series.values[:stop])
        return points

    @property
    def names(self) -> list[str]:
        """The names of all metrics."""
        return list(self._history)

    @property
    def meta(self) -> dict[str, Any]:
        """What the history knows of the training: optimizer, clip_threshold, scheduler, ..."""
        return self._history.meta

    @cached_property
    def loss(self) -> Points:
        """The training loss: ``loss``, or else ``train_loss``."""
        return self._first_of(LOSS_NAMES)

    @cached_property
    def validation(self) -> Points:
        """The validation loss."""
        return self._first_of(VALIDATION_NAMES)

    @cached_property
    def accuracy(self) -> Points:
        """The accuracy on the validation data; empty where it isn't recorded."""
        return self._first_of(ACCURACY_NAMES)

    @cached_property
    def objective(self) -> str:
        """What the loss is for, where it isn't meant to fall: "adversarial", "reinforcement", or "".

        ``meta["objective"]`` says it, or the names beside the loss do: rewards, or the loss of a discriminator; or a
        player is one.
        """
        given = self.meta.get("objective")
        if isinstance(given, str):
            return given
        if any(_CRITIC.search(name) for name in [*self.names, *(f"{each}/loss" for each in players_of(self._history))]):
            return "adversarial"
        return "reinforcement" if any(_REWARD.search(name) for name in self.names) else ""

    @cached_property
    def unit(self) -> str:
        """What a step is: "step", or "epoch" in a log that has one row for each."""
        log = self.meta.get("log")
        unit = log.get("unit") if isinstance(log, dict) else None
        return unit if isinstance(unit, str) and unit else "step"

    @cached_property
    def signed(self) -> bool:
        """Whether the loss is negative somewhere: then neither its level nor zero is a scale."""
        return bool((self.loss.values < 0).any())

    @cached_property
    def learning_rates(self) -> dict[str, Points]:
        """The learning rate of each parameter group: ``lr``, or the series ``lr/<group>``.

        Of several groups ``lr`` is the first one's once more, and is here only where it began before them. Of players
        that step together each has its own, ``lr/<player>/<group>``.
        """
        groups = {name: self[name] for name in self._history if name.startswith("lr/")}
        for player in players_of(self._history):
            of_groups = {name: self[name] for name in self._history if name.startswith(f"{player}/lr/")}
            groups |= {f"lr/{player}/{name.removeprefix(f'{player}/lr/')}": each for name, each in of_groups.items()}
            if f"{player}/lr" in self._history and not of_groups:
                groups[f"lr/{player}/0"] = self[f"{player}/lr"]
        if "lr" not in self._history:
            return groups
        whole = self["lr"]
        begins = [points.steps[0] for points in groups.values() if len(points)]
        repeats = bool(begins) and (not len(whole) or min(begins) <= whole.steps[0])
        return groups if repeats else {"lr": whole, **groups}

    @cached_property
    def initial_loss(self) -> float:
        """The loss before training moved it; NaN where there is none.

        The median of the first 3 finite values, or the very first where that is less than half of it: then the loss has
        blown up at once.
        """
        head = self.loss.values[:20]
        head = head[np.isfinite(head)][:3]
        if not len(head):
            return float("nan")
        usual = median(head)
        return float(head[0]) if abs(usual) > 2.0 * abs(float(head[0])) else usual

    @cached_property
    def course(self) -> Course:
        """How the loss went so far, as a whole."""
        return course_of(self.loss.steps, self.loss.values, self.initial_loss)

    @property
    def learns(self) -> bool:
        """Whether the loss has fallen, for sure and by a tenth of itself, and has not lost half of that again.

        Of a loss that is negative somewhere, or that begins at zero, only whether it fell for sure. False where the
        loss is not meant to fall.
        """
        course = self.course
        if self.objective or not np.isfinite(course.now):
            return False
        share = 0.0 if self.signed else 0.1 * abs(course.start)
        fell = course.start - course.now
        kept = course.now <= course.lowest + 0.5 * (course.start - course.lowest)
        return bool(fell > max(share, 4.0 * course.error) and kept)

    @property
    def parameters(self) -> ParameterHistory:
        """The history of the parameters, also past ``stop``; ``intervals`` is the part before it."""
        return self._history.parameters

    @cached_property
    def interval_stop(self) -> int:
        """The number of intervals before ``stop``."""
        return int(np.searchsorted(self.parameters.last_step, self.stop))

    @cached_property
    def interval_since(self) -> int:
        """The place of the first interval that reaches ``since`` or later."""
        return min(self.interval_stop, int(np.searchsorted(self.parameters.last_step, self.since)))

    @cached_property
    def frozen(self) -> NDArray[np.bool_]:
        """Which parameters require no gradient, bool [T]."""
        return frozen_in(self._history)

    def field(self, name: str, count: int = 1) -> NDArray[Any]:
        """Return ``name`` of the last ``count`` intervals, [<= count, T]."""
        return self.parameters.field(name)[max(0, self.interval_stop - count) : self.interval_stop]

    @cached_property
    def weight_norms(self) -> Float64Array:
        """The usual gradient norm of each weight matrix, float64 [W]: the median of its last 3 intervals' means.

        NaN where one of them has none. W counts ``layout.weights``.
        """
        norms = self.field("norm_mean", 3)[:, self.layout.weights].astype(np.float64)
        return np.asarray(np.sort(norms, axis=0)[len(norms) // 2]) if len(norms) else np.empty(0)

    @cached_property
    def weight_levels(self) -> Float64Array:
        """log10 of the usual root mean square gradient element of each weight matrix, float64 [W]; NaN where zero."""
        if not len(self.weight_norms):
            return np.empty(0)
        return log10(self.weight_norms / self.layout.root[self.layout.weights])

    def finding(
        self,
        severity: str,
        evidence: str,
        *,
        first_step: int | None = None,
        last_step: int | None = None,
        cause: str = "",
        action: str = "",
        parameters: tuple[str, ...] = (),
        numbers: dict[str, float] | None = None,
    ) -> Finding:
        """Return a finding of this rule; its last step, and first where none is given, is the view's last step."""
        end = self.stop - 1 if last_step is None else last_step
        start = end if first_step is None else first_step
        return Finding(self.rule, severity, int(start), int(end), evidence, parameters, cause, action, numbers or {})

    def _first_of(self, names: tuple[str, ...]) -> Points:
        return next((self[name] for name in names if name in self), _NOTHING)

"""Delivers the rows that have arrived to the means, the run and the sinks, once each."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._warn import warn_user
from ..columns import COLUMNS, SUM_SQ
from ..core import Rows
from ..errors import in_words
from ..history import Interval
from ..sinks import NoSinks
from .epoch_means import EpochMeans
from .gradient_watch import GradientWatch
from .whose_steps import WhoseSteps


@dataclass
class _Parcel:
    """Rows, and what is recorded of them."""

    rows: Rows
    series: dict[str, tuple[NDArray[np.intp], NDArray[np.float64]]]  # name -> indices of the rows that have it, values
    interval: Interval | None  # None: there are no parameters
    mirrored: bool = False


class Delivery:
    """Hands rows to everyone who wants them, each row once, however often it is interrupted.

    Rows leave the queue after everyone has them. Where an interruption (Ctrl-C) came between, the next call does the
    rest: whoever has the rows already is passed over. A recorder that fails is warned of once; the training goes on.

    Args:
        run: what records them.
        sinks: what mirrors them.
        watch: what warns of gradients that cannot be what was meant.
        whose_steps: knows which player's they are, and of how many parameters.
        weights: returns what was measured of this rank's parameters before a step (``WeightWatch.until``).
    """

    def __init__(
        self,
        run: Any,
        sinks: NoSinks,
        watch: GradientWatch,
        whose_steps: WhoseSteps,
        weights: Callable[[int], NDArray[np.float64] | None],
    ) -> None:
        self.means = EpochMeans()
        self._whose_steps = whose_steps
        self._weight_norms = np.full(whose_steps.parameters, np.nan)
        self._has_intervals = False  # the first has the norms that the parameters began with, so that rules know those
        self._weights = weights
        self._run, self._sinks, self._watch = run, sinks, watch
        reference = weakref.ref(self)
        run.history.waiting = lambda: here.means.waiting if (here := reference()) is not None else 0
        self._queue: deque[_Parcel] = deque()
        self._prepared: tuple[Rows | None, _Parcel | None] = None, None
        self._newest = -1  # the last step that everyone has
        self._failed: set[str] = set()

    def weigh(self, moments: NDArray[np.float64]) -> None:
        """Take what was measured of the parameters now, [T, 6]."""
        self._weight_norms = np.sqrt(moments[:, SUM_SQ])

    def expect(self, step: int, n: float, player: str) -> None:
        """Take note of a step before its row can arrive: the weight of its scalars, and whose it is, "" for all."""
        self.means.weigh(step, n)
        self._whose_steps.note(step, player)

    def restart(self, step: int) -> None:
        """Go on with the row of ``step``."""
        self.means = EpochMeans()
        self._newest = step - 1

    def put(self, rows: Rows) -> None:
        """Take rows, unless they have been taken, and hand on all that waits."""
        newest = self._queue[-1].rows.steps[-1] if self._queue else self._newest
        if len(rows.steps) and rows.steps[-1] > newest:
            prepared, parcel = self._prepared
            self._queue.append(parcel if parcel is not None and prepared is rows else self._parcel(rows))
            self._prepared = None, None
            self._whose_steps.forget(int(rows.steps[-1]))
        self.finish()

    def prepare(self, rows: Rows) -> None:
        """Work out what is recorded of rows that ``put`` will be given, on whatever thread this is."""
        self._prepared = rows, self._parcel(rows)

    def _parcel(self, rows: Rows) -> _Parcel:
        rows, gradients = self._whose_steps.sorted(rows)
        interval = None
        if len(self._weight_norms) and rows.has_gradients:
            moments, update_norms = rows.weights, None
            if moments is None:
                moments = self._weights(int(rows.steps[-1]))
            if moments is not None:
                update_norms, weight_norms = np.sqrt(moments[:, :, SUM_SQ])
                self._weight_norms = weight_norms if self._has_intervals else self._weight_norms
            interval = self._whose_steps.interval(rows, self._weight_norms, update_norms)
            self._has_intervals = True
        return _Parcel(rows, {**gradients, **rows.scalars}, interval)

    def finish(self) -> None:
        """Hand on what waits."""
        while self._queue:
            parcel = self._queue[0]
            self.means.add(parcel.rows)
            self._try("the run", self._record, parcel)
            self._try("the sinks", self._mirror, parcel)
            if parcel.rows.has_gradients:
                self._watch.check(parcel.rows)
            if self._queue and self._queue[0] is parcel:
                self._newest = int(parcel.rows.steps[-1])
                self._queue.popleft()

    def _try(self, what: str, action: Callable[[_Parcel], None], parcel: _Parcel) -> None:
        try:
            action(parcel)
        except Exception as error:  # a fault of the observer is no reason to end a training
            if what not in self._failed:
                self._failed.add(what)
                warn_user(f"{what} could not take what was recorded; the training goes on: {in_words(error)}")

    def _record(self, parcel: _Parcel) -> None:
        """Record it; a recorder passes over what it has, where an interruption makes this the second time."""
        rows = parcel.rows
        batches: dict[bytes, dict[str, NDArray[np.float64]]] = {}  # what has the same steps is one append
        for name, (where, values) in parcel.series.items():
            batches.setdefault(where.tobytes(), {})[name] = values
        for places, metrics in batches.items():
            self._run.log_many(rows.steps[np.frombuffer(places, np.intp)], metrics)
        if parcel.interval is not None:
            self._run.take_rows(rows.steps, rows.tensors)
            self._run.log_interval(parcel.interval)

    def _mirror(self, parcel: _Parcel) -> None:
        if not parcel.mirrored:
            rows = parcel.rows
            nothing = (len(rows.steps), len(self._weight_norms), len(COLUMNS))
            moments = rows.tensors if rows.has_gradients else np.full(nothing, np.nan)
            self._sinks.write(rows.steps, parcel.series, moments)
            parcel.mirrored = True
            if parcel.interval is not None:
                self._sinks.parameters(parcel.interval)

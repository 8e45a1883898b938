"""The means of an epoch, weighted by the samples of each step."""

from __future__ import annotations

import numpy as np

from ..core import Rows
from ..distributed import NOISE_SERIES


class EpochMeans:
    """The weighted means of the scalars over the steps of an epoch."""

    def __init__(self) -> None:
        self._weights: dict[int, float] = {}  # of the steps that have not arrived yet
        self._sums: dict[str, tuple[float, float]] = {}  # name -> sum of n * value, sum of n
        self._added: Rows | None = None  # the latest rows; an interrupted delivery gives them again

    def weigh(self, step: int, n: float) -> None:
        self._weights[step] = n

    @property
    def waiting(self) -> int:
        """How many steps have not arrived yet."""
        return len(self._weights)

    def add(self, rows: Rows) -> None:
        if rows is self._added:
            return
        weights = np.array([self._weights.get(step, 1.0) for step in rows.steps.tolist()], np.float64)
        sums = dict(self._sums)
        for name, (where, values) in rows.scalars.items():
            if name in NOISE_SERIES:
                continue  # means over many steps already
            here = weights[where]
            counted = here != 0  # 0 * inf would be NaN
            total, weight = sums.get(name, (0.0, 0.0))
            sums[name] = total + float(values[counted] @ here[counted]), weight + float(here.sum())
        self._sums, self._added = sums, rows
        for step in rows.steps.tolist():
            self._weights.pop(step, None)

    def take(self) -> dict[str, float]:
        means = {name: total / weight for name, (total, weight) in self._sums.items() if weight}
        self._sums = {}
        return means

"""The means of an epoch, weighted by the samples of each step."""

from __future__ import annotations

import numpy as np

from ..core import Rows
from ..distributed import NOISE_SERIES


class EpochMeans:
    """The weighted means of the scalars over the steps of an epoch."""

    def __init__(self) -> None:
        self._weights: dict[int, float] = {}  # of the steps that have not arrived yet
        self._sums: dict[str, list[float]] = {}  # name -> [sum of n * value, sum of n]

    def weigh(self, step: int, n: float) -> None:
        self._weights[step] = n

    def add(self, rows: Rows) -> None:
        weights = np.array([self._weights.pop(step, 1.0) for step in rows.steps.tolist()], np.float64)
        for name, (where, values) in rows.scalars.items():
            if name in NOISE_SERIES:
                continue  # means over many steps already
            here = weights[where]
            counted = here != 0  # 0 * inf would be NaN
            total = self._sums.setdefault(name, [0.0, 0.0])
            total[0] += float(values[counted] @ here[counted])
            total[1] += float(here.sum())

    def take(self) -> dict[str, float]:
        means = {name: total / weight for name, (total, weight) in self._sums.items() if weight}
        self._sums = {}
        return means

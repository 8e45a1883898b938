"""The summary of a series: a few numbers kept beside it, updated batch by batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class SeriesSummary:
    """The columns of the table ``series``. NaN is neither a minimum nor a maximum, unless there is nothing else."""

    count: int
    last_step: int
    last: float
    minimum: float
    minimum_step: int
    maximum: float
    maximum_step: int

    def __add__(self, later: SeriesSummary) -> SeriesSummary:
        """Return the summary of this and what comes after it.

        >>> (summary_of([1, 2], [3.0, 4.0]) + summary_of([3], [2.0])).minimum_step
        3
        """
        lower = math.isnan(self.minimum) or later.minimum < self.minimum
        higher = math.isnan(self.maximum) or later.maximum > self.maximum
        low, high = later if lower else self, later if higher else self
        return SeriesSummary(
            self.count + later.count,
            later.last_step,
            later.last,
            low.minimum,
            low.minimum_step,
            high.maximum,
            high.maximum_step,
        )


def summary_of(steps: Sequence[int], values: Sequence[float]) -> SeriesSummary:
    """Return the summary of at least one point.

    >>> summary_of([7, 8], [math.nan, 2.0]).minimum_step
    8
    """
    array = np.asarray(values, np.float64)
    known = not np.isnan(array).all()
    lowest, highest = (int(np.nanargmin(array)), int(np.nanargmax(array))) if known else (0, 0)
    low, high = float(array[lowest]), float(array[highest])
    return SeriesSummary(len(array), steps[-1], float(array[-1]), low, steps[lowest], high, steps[highest])

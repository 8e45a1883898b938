"""Fewer points and the same picture: every peak, every dip and every non-finite value stays."""

from __future__ import annotations

import numpy as np

from ...history import Float64Array, Int64Array


def thin(steps: Int64Array, values: Float64Array, points: int) -> tuple[Int64Array, Float64Array]:
    """Return at most about ``points`` of a series, as drawn on a screen that is no wider.

    The series is cut into equal parts, and of each the smallest, the largest and the first non-finite value are kept,
    in order, and the first and the last of all. A short enough series comes back whole.

    >>> steps, values = np.arange(1000), np.zeros(1000)
    >>> values[500] = 7.0
    >>> kept, shown = thin(steps, values, points=20)
    >>> len(kept) <= 20, 7.0 in shown, int(kept[-1])
    (True, True, 999)
    """
    count = len(values)
    if count <= points:
        return steps, values
    parts = max(1, (points - 2) // 3)
    width = -(-count // parts)
    padded = np.full(parts * width, np.nan)
    padded[:count] = values
    table = padded.reshape(parts, width)
    finite = np.isfinite(table)
    offsets = np.arange(parts) * width
    kept = [np.array([0, count - 1])]
    for filled, pick in ((np.inf, np.argmin), (-np.inf, np.argmax)):
        places = offsets + pick(np.where(finite, table, filled), axis=1)
        kept.append(places[finite.any(axis=1)])
    bad = ~finite
    bad.reshape(-1)[count:] = False
    kept.append((offsets + np.argmax(bad, axis=1))[bad.any(axis=1)])
    places = np.unique(np.concatenate(kept))
    return steps[places], values[places]


def means(steps: Int64Array, values: Float64Array, parts: int) -> tuple[Int64Array, Float64Array]:
    """Return the mean of the finite values of at most ``parts`` equal stretches, each at its middle step.

    >>> means(np.arange(6), np.array([1.0, 3.0, np.nan, 5.0, np.inf, np.nan]), parts=3)
    (array([0, 2, 4]), array([ 2.,  5., nan]))
    """
    starts = groups(len(values), parts)
    finite = np.isfinite(values)
    counts = np.add.reduceat(finite.astype(np.float64), starts)
    sums = np.add.reduceat(np.where(finite, values, 0.0), starts)
    ends = np.append(starts[1:], len(values)) - 1
    with np.errstate(invalid="ignore", divide="ignore"):
        return steps[(starts + ends) // 2], sums / counts


def groups(count: int, most: int) -> Int64Array:
    """Return the starts of at most ``most`` groups of neighbours, of nearly equal size.

    >>> groups(5, 2), groups(3, 10)
    (array([0, 2]), array([0, 1, 2]))
    """
    parts = min(count, most)
    return np.arange(parts, dtype=np.int64) * count // max(parts, 1)

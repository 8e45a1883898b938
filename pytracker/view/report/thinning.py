"""Fewer points and the same picture: every peak, every dip and every non-finite value stays."""

from __future__ import annotations

import numpy as np

from ...history import Float64Array, Int64Array


def thin(steps: Int64Array, values: Float64Array, points: int) -> tuple[Int64Array, Float64Array]:
    """Return at most about ``points`` of a series, as drawn on a screen that is no wider.

    The series is cut into equal parts, and of each the smallest, the largest and the first non-finite value are kept,
    in order; besides the first and the last of all. A series that is short enough comes back whole.

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


def trend(steps: Int64Array, values: Float64Array, parts: int) -> tuple[Int64Array, Float64Array] | None:
    """Return the medians of at most ``parts`` equal stretches of a noisy series; None of a smooth or short one.

    Noisy: its ups and downs together are more than three times those of the medians.

    >>> steps = np.arange(1000)
    >>> trend(steps, steps / 1000, parts=50) is None
    True
    >>> middle, line = trend(steps, (-1.0) ** steps, parts=50)
    >>> len(line), float(abs(line).max())
    (50, 0.0)
    """
    finite = np.isfinite(values)
    steps, values = steps[finite], values[finite]
    parts = min(parts, len(values) // 8)
    if parts < 20:
        return None
    medians = np.array([np.median(part) for part in np.array_split(values, parts)])
    if np.abs(np.diff(values)).sum() <= 3 * np.abs(np.diff(medians)).sum():
        return None
    middles = np.array([part[len(part) // 2] for part in np.array_split(steps, parts)])
    return middles, medians


def groups(count: int, most: int) -> Int64Array:
    """Return the starts of at most ``most`` groups of neighbours, of nearly equal size.

    >>> groups(5, 2), groups(3, 10)
    (array([0, 2]), array([0, 1, 2]))
    """
    parts = min(count, most)
    return np.arange(parts, dtype=np.int64) * count // max(parts, 1)

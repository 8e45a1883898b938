"""Robust statistics of short windows, in plain numpy. Every function costs O(n) or works on a thinned series."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

Float64Array = NDArray[np.float64]

MAD_TO_SIGMA = 1.4826  # of a normal distribution: 1 / Phi^-1(3/4)


class Slope(NamedTuple):
    """A slope by step and the limits of its confidence interval."""

    estimate: float
    low: float
    high: float


def thin(
    steps: NDArray[np.int64], values: Float64Array, bins: int = 64, most: int = 64
) -> tuple[Float64Array, Float64Array]:
    """Return at most ``bins`` bin centres and bin medians of the finite values.

    A bin looks at no more than ``most`` of its values, evenly spaced, so that the cost doesn't grow with the series.
    Medians keep a single spike from moving a bin.

    >>> thin(np.arange(6), np.array([1.0, 1.0, 9.0, 2.0, 2.0, 2.0]), bins=2)
    (array([1., 4.]), array([1., 2.]))
    """
    width = max(1, -(-len(values) // bins))
    count = len(values) // width
    if count == 0:
        return np.empty(0), np.empty(0)
    stride = max(1, width // most)
    tail = slice(len(values) - count * width, None)  # a ragged rest is left out at the beginning
    blocks = values[tail].reshape(count, width)[:, ::stride]
    centres = steps[tail].reshape(count, width)[:, width // 2].astype(np.float64)
    middles = finite_median(blocks)
    known = np.isfinite(middles)
    return centres[known], middles[known]


def blocks_of(values: Float64Array, width: int = 20, bins: int = 64) -> tuple[Float64Array, float]:
    """Return the median of each block of at least ``width`` values, at most ``bins``, and a typical deviation in one.

    Blocks end with the last value. Of a longer block, ``width`` evenly spaced values are looked at. The deviation is
    the median of the blocks' standard deviations: a few wild blocks don't move it. Blocks that aren't finite are left
    out.

    >>> blocks_of(np.array([1.0, 3.0, 5.0, 5.0, 8.0, 10.0]), width=2)
    (array([2., 5., 9.]), 1.4142135623730951)
    """
    long = max(width, -(-len(values) // bins))
    count = len(values) // long
    blocks = values[len(values) - count * long :].reshape(count, long)[:, :: long // width][:, :width]
    blocks = blocks[np.isfinite(blocks).all(axis=1)]
    if not len(blocks):
        return np.empty(0), float("nan")
    with np.errstate(over="ignore", invalid="ignore"):
        deviation = median(blocks.std(axis=1, ddof=1))
    return medians(blocks), deviation


def medians(blocks: Float64Array) -> Float64Array:
    """Return the median along the last axis, NaN where one of the values is NaN or there is none.

    What numpy's own median says, without the 50 us that a call of it takes for a few numbers, and without overflow.

    >>> medians(np.array([[1.0, 5.0, 3.0, 2.0], [1.0, 2.0, np.nan, 4.0]]))
    array([2.5, nan])
    """
    count = blocks.shape[-1]
    if not count:
        return np.full(blocks.shape[:-1], np.nan)
    low, high = (count - 1) // 2, count // 2
    ordered = np.partition(blocks, sorted({low, high, count - 1}), axis=-1)  # NaN comes last
    with np.errstate(over="ignore", invalid="ignore"):
        middle = ordered[..., low] if low == high else (ordered[..., low] + ordered[..., high]) / 2
        if np.isinf(middle).any():
            middle = np.where(np.isinf(middle), ordered[..., low] / 2 + ordered[..., high] / 2, middle)
    return np.where(np.isnan(ordered[..., -1]), np.nan, middle)


def median(values: Float64Array) -> float:
    """Return the median of all values of one axis, NaN where one of them is NaN or there is none.

    >>> median(np.array([4.0, 1.0, 2.0]))
    2.0
    """
    return float(medians(values))


def finite_median(blocks: Float64Array) -> Float64Array:
    """Return the median of the finite values along the last axis, NaN where there is none.

    >>> finite_median(np.array([[1.0, np.nan, 3.0], [np.inf, np.nan, np.nan]]))
    array([ 2., nan])
    """
    if not blocks.shape[-1]:
        return np.full(blocks.shape[:-1], np.nan)
    finite = np.isfinite(blocks)
    if finite.all():
        return medians(blocks)
    ordered = np.sort(np.where(finite, blocks, np.inf), axis=-1)
    count = finite.sum(axis=-1)
    low = np.take_along_axis(ordered, np.maximum((count - 1) // 2, 0)[..., None], -1)[..., 0]
    high = np.take_along_axis(ordered, np.minimum(count // 2, blocks.shape[-1] - 1)[..., None], -1)[..., 0]
    return np.where(count > 0, np.where(count > 0, low, 0) / 2 + np.where(count > 0, high, 0) / 2, np.nan)


def theil_sen(x: Float64Array, y: Float64Array, z: float = 1.96) -> Slope:
    """Return the median of the slopes of all pairs of points, with Sen's confidence interval.

    The interval takes the ranks M/2 +- z * sigma / 2 of the M ordered slopes, with Kendall's variance
    sigma^2 = n (n - 1) (2 n + 5) / 18 (Theil 1950; Sen, JASA 63, 1968). It assumes independent residuals, which bins of
    a series nearly are. The cost is O(n^2): thin a long series first. At least two points of different ``x`` are
    needed.

    >>> theil_sen(np.array([0.0, 1.0, 2.0, 3.0, 4.0]), np.array([0.0, 2.0, 4.0, 6.0, 90.0])).estimate
    2.0
    """
    first, second = np.triu_indices(len(x), 1)
    run = x[second] - x[first]
    with np.errstate(over="ignore"):
        slopes = np.sort(((y[second] - y[first]) / np.where(run == 0, 1, run))[run != 0])
    count, points = len(slopes), len(x)
    half = z * np.sqrt(points * (points - 1) * (2 * points + 5) / 18.0) / 2.0
    low = max(0, int(np.floor(count / 2 - half)))
    high = min(count - 1, int(np.ceil(count / 2 + half)))
    return Slope(median(slopes), float(slopes[low]), float(slopes[high]))


class Course(NamedTuple):
    """How a loss went, by medians of at most 64 stretches; NaN where there are too few values."""

    start: float
    lowest: float  # of the running medians over 3 stretches
    place: int  # of the lowest among the stretches
    now: float  # the median of the last eighth, 3 stretches at least
    deviation: float  # of a single value around its level
    error: float  # the standard error of the difference of two levels
    steps: Float64Array  # the centres of the stretches
    levels: Float64Array


def course_of(steps: NDArray[np.int64], values: Float64Array, start: float) -> Course:
    """Return the course of a loss that began at ``start``.

    >>> course_of(np.arange(6), np.array([8.0, 4.0, 2.0, 2.0, 2.0, 2.0]), 8.0)[:4]
    (8.0, 2.0, 2, 2.0)
    """
    centres, levels = thin(steps, values)
    if len(levels) < 4:
        nothing = float("nan")
        return Course(start, nothing, 0, nothing, nothing, nothing, centres, levels)
    smooth = running_median(levels, 3) if len(levels) >= 8 else levels
    last = levels[-max(3, len(levels) // 8) :]
    with np.errstate(over="ignore", invalid="ignore"):
        changes = np.abs(np.diff(levels))
        between = MAD_TO_SIGMA * median(changes) / 2.0**0.5
        width = max(1, len(values) // len(levels))
        deviation = blocks_of(values)[1] if len(values) >= 200 else between * width**0.5
        error = max(between, deviation / width**0.5) * (1 / len(last) + 1 / 3) ** 0.5
    place = int(np.argmin(smooth))
    return Course(start, float(smooth[place]), place, median(last), deviation, float(error), centres, levels)


def running_median(values: Float64Array, width: int) -> Float64Array:
    """Return the centred running median; at the ends the window is cut off by repeating the last full one.

    >>> running_median(np.array([1.0, 9.0, 2.0, 3.0, 2.0]), 3)
    array([2., 2., 3., 2., 2.])
    """
    width = min(width, len(values)) | 1 if len(values) > 1 else 1
    if width > len(values):
        width -= 2
    middle = medians(sliding_window_view(values, width))
    return np.pad(middle, width // 2, mode="edge")


def spread(values: Float64Array) -> float:
    """Return the standard deviation that a normal distribution with the same median absolute deviation has."""
    return MAD_TO_SIGMA * median(np.abs(values - median(values)))


def finite_only(**numbers: float) -> dict[str, float]:
    """Return the numbers that are neither NaN nor Inf, for a finding.

    >>> finite_only(norm=2.0, reference=float("nan"))
    {'norm': 2.0}
    """
    return {name: float(value) for name, value in numbers.items() if np.isfinite(value)}


def log10(values: NDArray[np.floating]) -> Float64Array:
    """Return the base-10 logarithm, NaN where there is none (zero, negative, not finite)."""
    values = np.asarray(values, np.float64)
    usable = np.isfinite(values) & (values > 0)
    return np.where(usable, np.log10(np.where(usable, values, 1.0)), np.nan)

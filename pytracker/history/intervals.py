"""Intervals: what a drain says of every parameter, summarized from the exact rows of single steps. No torch here.

A row holds the raw moments of every parameter at one step, float64, in the order of ``columns.COLUMNS``. A parameter
with no gradient in a step is missing: all six are NaN. The counts of a gradient that is present are never NaN, so
``isnan(zeros)`` tells the two apart.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .._checks import LARGEST_STEP, items, text, whole_number, wrong_type
from ..columns import ABS_MAX, COLUMNS, EXTRAS, INFS, NANS, SUM_SQ, ZEROS
from ..errors import InvalidValueError
from ..moments import is_missing

Float32Array = NDArray[np.float32]
Float64Array = NDArray[np.float64]
Int64Array = NDArray[np.int64]

FIELDS: Final[dict[str, float]] = {
    "norm_last": np.nan,
    "norm_mean": np.nan,
    "norm_max": np.nan,
    "abs_max": np.nan,
    "zero_fraction": np.nan,
    "nans": 0.0,
    "infs": 0.0,
    "missing": 0.0,
    "first_nonfinite": -1,
    "weight_norm": np.nan,
    "update_norm": np.nan,
    "l1_mean": np.nan,
    "subnormal_bf16_fraction": np.nan,
    "subnormal_fp16_fraction": np.nan,
    "subnormal_e4m3_fraction": np.nan,
    "near_max_bf16_fraction": np.nan,
    "near_max_fp16_fraction": np.nan,
    "near_max_e4m3_fraction": np.nan,
}
"""The arrays of an ``Interval``, each with the value that stands for "nothing to tell"."""

_OF_EXTRAS: Final = tuple(FIELDS)[-len(EXTRAS) :]
"""The fields of the further columns, in their order."""

_REDUCED: Final = tuple(name for name in FIELDS if name != "first_nonfinite" and name not in _OF_EXTRAS)
"""The other float32 arrays of an ``Interval``, in the order in which ``summarize`` fills them."""


@dataclass(frozen=True)
class ParameterInfo:
    """One parameter: what it is called and how it is made. ``group`` is its optimizer group ("" if there is none)."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    group: str
    numel: int

    def __post_init__(self) -> None:
        """Check the types; a text that can't be written is escaped.

        Raises:
            InvalidTypeError, InvalidValueError: a field can't be what it is given.
        """
        sizes: Any = self.shape
        if not isinstance(sizes, Iterable):
            raise wrong_type("shape", sizes, "the sizes of a parameter")
        checked = {
            **{name: text(name, getattr(self, name)) for name in ("name", "dtype", "group")},
            "shape": tuple(whole_number("shape", size) for size in sizes),
            "numel": whole_number("numel", self.numel),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)


@dataclass(frozen=True)
class Interval:
    """What a drain says of every parameter. Arrays have one element a parameter: float32 [T] unless noted.

    Means and maxima go over the steps in which the gradient is present, and are NaN where it never was. NaN and Inf
    propagate. A finite value outside the range of float32 becomes the nearest float32 that is finite and not zero, so
    Inf always means that an Inf was seen.
    """

    first_step: int
    last_step: int
    norm_last: Float32Array  # L2 norm at the last step in which the gradient was present
    norm_mean: Float32Array
    norm_max: Float32Array
    abs_max: Float32Array  # largest absolute element of the interval
    zero_fraction: Float32Array  # mean share of elements that are zero
    nans: Float32Array  # NaN elements of the whole interval
    infs: Float32Array  # Inf elements of the whole interval
    missing: Float32Array  # steps without a gradient
    first_nonfinite: Int64Array  # int64: first step with a NaN or Inf element, -1 where there is none
    weight_norm: Float32Array  # L2 norm of the parameter itself when it was last measured, NaN where it was not
    update_norm: Float32Array  # L2 norm of what the latest step measured in the interval has added to it, or NaN
    # On request, or NaN (columns.EXTRA_COLUMNS): the mean of the L1 norm, and mean shares of the elements.
    l1_mean: Float32Array
    subnormal_bf16_fraction: Float32Array
    subnormal_fp16_fraction: Float32Array
    subnormal_e4m3_fraction: Float32Array
    near_max_bf16_fraction: Float32Array
    near_max_fp16_fraction: Float32Array
    near_max_e4m3_fraction: Float32Array


def summarize(
    steps: ArrayLike,
    rows: ArrayLike,
    numel: ArrayLike,
    weight_norm: ArrayLike | None = None,
    update_norm: ArrayLike | None = None,
    *,
    of_steps: ArrayLike | None = None,
    extras: ArrayLike | None = None,
) -> Interval:
    """Summarize the exact rows of a few steps into one ``Interval``.

    Args:
        steps: int64 [n], ascending, n >= 1.
        rows: float64 [n, T, 6], in the order of ``COLUMNS``.
        numel: [T], the elements of each gradient, or [n, T] where they change from step to step.
        weight_norm: float [T], the norm of each parameter when it was last measured; None where it was not.
        update_norm: float [T], the norm of what one of the steps has added to each; None where it was not measured.
        of_steps: [T], in how many of the steps each gradient was to be there; None: in all.
        extras: float64 [n, T, 7], the further columns, in the order of ``EXTRAS``; None where they were not measured.

    Raises:
        InvalidValueError: the shapes disagree, or there is no step.

    >>> rows = np.array([[[0.0, 9.0, 3.0, 1.0, 0.0, 0.0]], [[0.0, 16.0, 4.0, 3.0, 0.0, 0.0]]])
    >>> interval = summarize([10, 11], rows, [4])
    >>> float(interval.norm_mean[0]), float(interval.norm_max[0]), float(interval.zero_fraction[0])
    (3.5, 4.0, 0.5)
    """
    steps = checked_steps("steps", steps)
    rows = np.asarray(rows, np.float64)
    numel = np.asarray(numel, np.float64)
    if numel.ndim == 2 and len(numel) and (numel.strides[0] == 0 or (numel == numel[0]).all()):
        numel = numel[0]  # the same on each step
    numel = np.maximum(numel, 1.0)
    check_rows(steps, rows, numel.shape[-1])
    if not len(steps):
        raise InvalidValueError("summarize: no steps were given; an interval has at least one")

    # A drain calls this for each interval, so the usual case, no gradient missing, takes few passes over the rows.
    missing = is_missing(rows)
    some_missing = bool(missing.any())
    present: Any = ~missing if some_missing else True
    seen: Any = present.sum(axis=0) if some_missing else len(steps)
    norms = np.sqrt(rows[:, :, SUM_SQ])
    last = norms[-1]
    if some_missing:
        last = np.take_along_axis(norms, (len(steps) - 1 - np.argmax(present[::-1], axis=0))[None], axis=0)[0]
    if some_missing:
        counts = np.add.reduce(rows[:, :, ZEROS:], axis=0, where=present[:, :, None])
    else:  # all of the memory, one after the other, is faster than half of it
        counts = np.add.reduce(rows.reshape(len(rows), -1), axis=0).reshape(-1, len(COLUMNS))[:, ZEROS:]

    wide = np.empty((len(_REDUCED), rows.shape[1]))
    wide[0] = last
    wide[1] = np.add.reduce(norms, axis=0, where=present) / np.maximum(seen, 1)
    wide[2] = np.maximum.reduce(norms, axis=0, where=present, initial=0.0)
    wide[3] = np.maximum.reduce(rows[:, :, ABS_MAX], axis=0, where=present, initial=0.0)
    if numel.ndim == 1:
        shares = counts[:, 0] / numel
    else:
        shares = np.add.reduce(rows[:, :, ZEROS] / numel, axis=0, where=present)
    wide[4] = shares / np.maximum(seen, 1)
    wide[:5, seen == 0] = np.nan
    wide[5:7] = counts[:, 1:].T
    wide[7] = (len(steps) if of_steps is None else np.asarray(of_steps)) - seen
    wide[8] = np.nan if weight_norm is None else weight_norm
    wide[9] = np.nan if update_norm is None else update_norm
    first_nonfinite = np.full(rows.shape[1], -1, np.int64)
    if wide[5:7].any():
        nonfinite = (rows[:, :, NANS] + rows[:, :, INFS]) > 0  # a missing gradient's NaN is not above 0
        first_nonfinite = np.where(nonfinite.any(axis=0), steps[np.argmax(nonfinite, axis=0)], -1)
    fields = dict(zip(_REDUCED, to_float32(wide), strict=True))
    if extras is None:
        fields |= dict.fromkeys(_OF_EXTRAS, np.full(rows.shape[1], np.nan, np.float32))
    else:
        means = to_float32(_means(np.asarray(extras, np.float64), numel, missing).T)
        fields |= dict(zip(_OF_EXTRAS, means, strict=True))
    return Interval(int(steps[0]), int(steps[-1]), **fields, first_nonfinite=first_nonfinite)


def _means(extras: Float64Array, numel: Float64Array, missing: NDArray[np.bool_]) -> Float64Array:
    """Return the means [T, 7] over the steps in which a gradient was present: of the L1 norms, and of shares."""
    shares = extras / np.where(np.arange(len(EXTRAS)) == 0, 1.0, np.broadcast_to(numel, missing.shape)[:, :, None])
    present = ~missing[:, :, None]
    seen = present.sum(axis=0)
    means: Float64Array = np.add.reduce(shares, axis=0, where=present) / np.maximum(seen, 1)
    return np.where(seen > 0, means, np.nan)


def update_ratios(update_norm: ArrayLike, weight_norm: ArrayLike) -> Float64Array:
    """Return what a step has added to each parameter, relative to it; NaN where that, or anything, isn't known.

    >>> update_ratios([0.5, 0.1, np.nan], [10.0, 0.0, 1.0])
    array([0.05,  nan,  nan])
    """
    updates, weights = np.asarray(update_norm, np.float64), np.asarray(weight_norm, np.float64)
    ratios: Float64Array = np.divide(updates, weights, out=np.full(updates.shape, np.nan), where=weights > 0)
    return ratios


def checked_steps(name: str, steps: Any) -> Int64Array:
    """Return ``steps`` as int64 [n], each 0 or more; floats are refused, since those above 2**53 are not exact.

    Raises:
        InvalidTypeError: they are not integers.
        InvalidValueError: one is out of range.
    """
    given = steps if isinstance(steps, (np.ndarray, range)) else items(name, steps, "a list of steps")
    try:
        array = np.asarray(given) if len(given) else np.empty(0, np.int64)
    except (TypeError, ValueError):  # an array without an axis; lists within lists
        raise wrong_type(name, steps, "a list of steps") from None
    if array.ndim != 1 or array.dtype.kind not in "iu":
        return np.array([whole_number(name, step) for step in given], np.int64)
    if len(array) and not (array.min() >= 0 and array.max() <= LARGEST_STEP):
        return np.array([whole_number(name, step) for step in array.tolist()], np.int64)
    return array.astype(np.int64)


def check_rows(steps: NDArray[Any], rows: NDArray[Any], parameters: int) -> None:
    """Raise ``InvalidValueError`` unless ``rows`` is [n, T, 6] with one ascending step for each of its n rows."""
    expected = (len(steps), parameters, len(COLUMNS))
    if steps.ndim != 1 or rows.shape != expected:
        raise InvalidValueError(
            f"rows: expected shape [steps, parameters, columns] = {list(expected)}, got {list(rows.shape)}"
        )
    if np.any(steps[1:] <= steps[:-1]):
        raise InvalidValueError("steps: expected ascending steps, each once")


_LARGEST: Final = float(np.finfo(np.float32).max)
_SMALLEST: Final = float(np.finfo(np.float32).smallest_subnormal)


def to_float32(wide: Float64Array) -> Float32Array:
    """Return float32; a finite value outside its range becomes the nearest one that is finite and not zero."""
    with np.errstate(over="ignore", under="ignore"):
        narrow = wide.astype(np.float32)
    narrow[np.isinf(narrow) & np.isfinite(wide)] = _LARGEST
    narrow[(narrow == 0) & (wide > 0)] = _SMALLEST
    return narrow


def dtype_of(field: str) -> np.dtype[Any]:
    """Return the dtype of a field of an interval."""
    return np.dtype(np.int64 if field == "first_nonfinite" else np.float32)


def says_nothing(field: str, array: NDArray[Any]) -> bool:
    """Tell whether a field of an interval has nothing to tell of any parameter."""
    nothing = FIELDS[field]
    return bool(np.isnan(array).all()) if np.isnan(nothing) else bool((array == nothing).all())

"""Raw moments: which are missing, how two are merged, and the totals over all tensors.

The only place in Python that merges moments, as ``csrc/accumulator.h`` is in the native core; ``columns.py`` declares
each column's rule. Arrays are NumPy's or torch's, float64, and the result is of the same kind. Nothing waits for a
device.

A merge over ranks is two collectives, a sum and a maximum: ``split`` prepares what they reduce, and ``join`` makes
moments of what they return.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from .columns import ABS_MAX, COLUMNS, MAXIMA, NANS, SUM_SQ, TOTALS, ZEROS

Array: TypeAlias = Any
"""A NumPy array or a torch tensor; of one kind in a call."""

PRESENT = ABS_MAX
"""The column of summands that holds how many rows are present, in place of a maximum, which is no sum."""


def _library(array: Any) -> Any:
    return np if isinstance(array, np.ndarray) else sys.modules["torch"]


def is_missing(rows: Array) -> Array:
    """Return where rows [..., 6] are of no gradient at all, bool [...]: a count is never NaN otherwise.

    Example:
        >>> is_missing(np.array([[1.0, 1.0, 1.0, 0.0, 0.0, 0.0], [np.nan] * 6])).tolist()
        [False, True]
    """
    zeros = rows[..., ZEROS]
    return zeros != zeros


def merge(parts: Sequence[Array]) -> Array:
    """Merge rows [..., 6 or 7] of several devices, each column by its rule. None may be missing.

    Example:
        >>> one = np.array([[1.0, 4.0, 2.0, 0.0, 0.0, 0.0, 4.0]])
        >>> two = np.array([[1.0, 9.0, 3.0, 1.0, 0.0, 0.0, 9.0]])
        >>> merge([one, two]).tolist()
        [[2.0, 13.0, 3.0, 1.0, 0.0, 0.0, 9.0]]
    """
    merged = parts[0]
    for part in parts[1:]:
        left, merged = merged, merged + part
        for column in (column for column in MAXIMA if column < merged.shape[-1]):
            merged[..., column] = _library(left).maximum(left[..., column], part[..., column])
    return merged


def totals(rows: Array) -> Array:
    """Return the totals [..., 7] of the rows [..., T, 6] of all tensors; missing ones are left out.

    Example:
        >>> totals(np.array([[3.0, 9.0, 3.0, 0.0, 0.0, 0.0], [np.nan] * 6])).tolist()
        [3.0, 9.0, 3.0, 0.0, 0.0, 0.0, 9.0]
    """
    library = _library(rows)
    shape = (*rows.shape[:-2], TOTALS)
    whole = np.zeros(shape) if library is np else rows.new_zeros(shape)
    if rows.shape[-2] == 0:
        return whole
    missing = is_missing(rows)
    if library is not np or missing.any():  # of a tensor on a device it isn't asked
        rows = library.where(missing[..., None], 0.0, rows)
    if library is np:  # a column at a time is twice as fast, and pairwise
        for column in (column for column in range(len(COLUMNS)) if column not in MAXIMA):
            whole[..., column] = rows[..., column].sum(axis=-1)
    else:
        whole[..., : len(COLUMNS)] = rows.sum(-2)
    whole[..., ABS_MAX] = library.amax(rows[..., ABS_MAX], -1)
    whole[..., len(COLUMNS)] = library.amax(rows[..., SUM_SQ], -1)
    return whole


def split(rows: Array, counted: Array) -> tuple[Array, Array]:
    """Return what a sum [..., 6] and a maximum [...] over ranks reduce, of one rank's rows [..., 6].

    Args:
        rows: moments; missing rows add nothing.
        counted: bool, broadcast to [...]: False where another rank adds the same.
    """
    library = _library(rows)
    present = ~is_missing(rows) & counted
    summands = library.where(present[..., None], rows, 0.0)
    maxima = library.nan_to_num(summands[..., ABS_MAX], nan=0.0, posinf=float("inf"))  # `join` brings a NaN back
    summands[..., PRESENT] = present
    return summands, maxima


def join(sums: Array, maxima: Array) -> tuple[Array, Array]:
    """Return moments [..., 6], in the memory of ``sums``, and in how many ranks' rows they were present, [...].

    Example:
        >>> sums, maxima = split(np.array([1.0, 4.0, 2.0, 0.0, 0.0, 0.0]), np.True_)
        >>> join(sums + sums, maxima)
        (array([2., 8., 2., 0., 0., 0.]), np.float64(2.0))
    """
    library = _library(sums)
    present = library.stack([sums[..., PRESENT]])[0]  # a copy
    sums[..., ABS_MAX] = library.where(sums[..., NANS] > 0, np.nan, maxima)
    if library is not np or not present.all():
        sums[...] = library.where((present > 0)[..., None], sums, np.nan)
    return sums, present

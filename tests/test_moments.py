"""Merged moments are those of the elements together, in NumPy and in torch, whatever is missing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pytracker import moments
from pytracker.columns import ABS_MAX, COLUMNS, POWERS, SUM, SUM_SQ, TOTAL_COLUMNS, ZEROS

LIBRARIES = {"numpy": np.asarray, "torch": lambda rows: torch.from_numpy(np.array(rows))}

tensors = st.lists(st.floats(-1e6, 1e6) | st.sampled_from([0.0, math.nan, math.inf, -math.inf]), max_size=5)
ranks = st.lists(st.lists(st.none() | tensors, min_size=3, max_size=3), min_size=1, max_size=4)


def row_of(elements: list[float] | None) -> list[float]:
    """Return the six moments of some elements; None has no gradient."""
    if elements is None:
        return [math.nan] * len(COLUMNS)
    nans = sum(map(math.isnan, elements))
    whole = sum(elements) if any(not math.isfinite(value) for value in elements) else math.fsum(elements)
    squares = sum(value * value for value in elements)
    largest = math.nan if nans else max(map(abs, elements), default=0.0)
    return [whole, squares, largest, elements.count(0.0), nans, sum(map(math.isinf, elements))]


def together(parts: list[list[float] | None]) -> list[float] | None:
    present = [part for part in parts if part is not None]
    return [value for part in present for value in part] if present else None


@pytest.mark.parametrize("library", LIBRARIES)
@given(held=ranks)
@np.errstate(invalid="ignore")
def test_rows_split_over_ranks_join_to_the_moments_of_all_elements(library: str, held: list) -> None:
    parts = [moments.split(LIBRARIES[library]([row_of(each) for each in rank]), True) for rank in held]
    maxima = np.max([np.asarray(maxima) for _, maxima in parts], axis=0)
    joined, present = moments.join(sum(sums for sums, _ in parts), LIBRARIES[library](maxima))
    expected = [row_of(together([rank[index] for rank in held])) for index in range(3)]
    np.testing.assert_allclose(np.asarray(joined), expected, rtol=1e-12, atol=1e-6)
    assert np.asarray(present).tolist() == [sum(rank[index] is not None for rank in held) for index in range(3)]


@pytest.mark.parametrize("library", LIBRARIES)
@given(held=st.lists(st.none() | tensors, max_size=5))
def test_totals_are_the_moments_of_all_tensors_that_have_a_gradient(library: str, held: list) -> None:
    rows = LIBRARIES[library](np.array([row_of(each) for each in held], float).reshape(-1, len(COLUMNS)))
    whole = np.asarray(moments.totals(rows))
    squares = [row_of(each)[SUM_SQ] for each in held if each is not None]
    largest = math.nan if any(map(math.isnan, squares)) else max(squares, default=0.0)
    expected = [*row_of(together(held) or []), largest]
    np.testing.assert_allclose(whole, expected, rtol=1e-12, atol=1e-6)


@pytest.mark.parametrize("library", LIBRARIES)
def test_what_another_rank_adds_too_is_left_out(library: str) -> None:
    rows = LIBRARIES[library]([row_of([3.0]), row_of([4.0])])
    sums, maxima = moments.split(rows, LIBRARIES[library]([True, False]))
    joined, present = moments.join(sums, maxima)
    assert np.asarray(present).tolist() == [1, 0]
    assert np.asarray(moments.is_missing(joined)).tolist() == [False, True]
    assert float(joined[0, SUM_SQ]) == 9


def test_each_column_scales_with_its_power_of_the_gradient() -> None:
    elements = [3.0, -4.0, 0.0]
    scaled, row = row_of([2 * value for value in elements]), row_of(elements)
    assert [value * 2.0**power for value, power in zip(row, POWERS[: len(row)], strict=True)] == scaled
    assert [column.name for column in TOTAL_COLUMNS if column.merge == "max"] == [COLUMNS[ABS_MAX], "max_sum_sq"]
    assert [COLUMNS[SUM], COLUMNS[ZEROS]] == ["sum", "zeros"]

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pytracker.evidence import (
    finite_median,
    finite_only,
    log10,
    median,
    medians,
    running_median,
    spread,
    theil_sen,
    thin,
)

finite = st.floats(-1e6, 1e6)
anything = st.one_of(finite, st.sampled_from([np.nan, np.inf, -np.inf]))


@given(arrays(np.float64, st.tuples(st.integers(1, 5), st.integers(1, 9)), elements=anything))
def test_finite_median_is_the_median_of_what_is_finite(blocks):
    for row, got in zip(blocks, finite_median(blocks), strict=True):
        known = [value for value in row.tolist() if np.isfinite(value)]
        if known:
            assert got == pytest.approx(np.median(known), rel=1e-12, abs=1e-9)
        else:
            assert np.isnan(got)


@given(arrays(np.float64, st.tuples(st.integers(1, 5), st.integers(1, 9)), elements=anything))
@example(np.array([[5e-324, 5e-324]]))
def test_medians_are_those_of_numpy(blocks):
    with np.errstate(invalid="ignore"):
        expected = np.median(blocks, axis=-1)
    np.testing.assert_array_equal(medians(blocks), expected)
    np.testing.assert_array_equal([median(row) for row in blocks], expected)


def test_the_median_of_nothing_is_unknown():
    assert np.isnan(finite_median(np.empty(0)))
    assert np.isnan(median(np.empty(0)))
    assert medians(np.empty((2, 0))).shape == (2,)


@pytest.mark.filterwarnings("error")
def test_medians_and_slopes_of_the_largest_numbers_do_not_overflow():
    huge = np.array([-1.7e308, 1.7e308, 1.7e308, 1.7e308])
    assert median(huge) == finite_median(huge) == 1.7e308
    assert np.isnan(median(np.array([-np.inf, np.inf])))
    assert theil_sen(np.arange(5.0), np.append(huge, 1.7e308)).estimate == 0.0


def test_a_findings_numbers_are_those_that_are_finite():
    assert finite_only(a=1, b=np.float64(2.0), c=float("nan"), d=-np.inf) == {"a": 1.0, "b": 2.0}


@given(arrays(np.float64, st.integers(2, 20), elements=finite))
def test_theil_sen_is_the_median_of_all_pairwise_slopes(values):
    x = np.arange(len(values), dtype=np.float64) * 3.0
    slopes = sorted((values[j] - values[i]) / (x[j] - x[i]) for i, j in combinations(range(len(values)), 2))
    slope = theil_sen(x, values)
    assert slope.estimate == pytest.approx(np.median(slopes), rel=1e-12, abs=1e-9)
    assert slopes[0] <= slope.low <= slope.estimate <= slope.high <= slopes[-1]


def test_the_interval_of_theil_sen_covers_the_true_slope_about_as_often_as_it_says():
    random = np.random.default_rng(0)
    x = np.arange(40.0)
    covered = 0
    for _ in range(300):
        slope = theil_sen(x, 0.3 * x + random.standard_normal(40))
        covered += slope.low <= 0.3 <= slope.high
    assert 0.92 <= covered / 300 <= 0.99


def test_a_quarter_of_wild_values_does_not_move_theil_sen_far():
    x = np.arange(60.0)
    y = -0.5 * x
    y[::4] += 1e6
    assert theil_sen(x, y).estimate == pytest.approx(-0.5, abs=0.2)


@given(arrays(np.float64, st.integers(3, 30), elements=finite), st.sampled_from([3, 5, 7]))
def test_running_median_matches_a_loop_inside(values, width):
    got = running_median(values, width)
    assert got.shape == values.shape
    for index in range(width // 2, len(values) - width // 2):
        assert got[index] == np.median(values[index - width // 2 : index + width // 2 + 1])


@given(st.integers(1, 5000), st.integers(2, 64))
def test_thin_gives_few_bins_in_order_and_the_value_of_a_constant(count, bins):
    centres, medians = thin(np.arange(count), np.full(count, 7.0), bins=bins)
    assert 1 <= len(centres) <= bins
    assert (np.diff(centres) > 0).all()
    assert (medians == 7.0).all()


def test_thin_leaves_out_bins_without_a_finite_value():
    values = np.array([1.0, 1.0, np.nan, np.inf, 3.0, 3.0])
    centres, medians = thin(np.arange(6), values, bins=3)
    assert medians.tolist() == [1.0, 3.0]
    assert centres.tolist() == [1.0, 5.0]


def test_spread_is_the_standard_deviation_of_normal_noise():
    assert spread(np.random.default_rng(0).normal(5.0, 2.0, 20_000)) == pytest.approx(2.0, rel=0.03)


def test_log10_is_unknown_where_there_is_none():
    assert log10(np.array([100.0, 0.0, -1.0, np.inf, np.nan])).tolist()[:1] == [2.0]
    assert np.isnan(log10(np.array([0.0, -1.0, np.inf, np.nan]))).all()

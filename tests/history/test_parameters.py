"""Summaries of exact rows against a plain loop, and what a ParameterHistory keeps."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic import gradient_rows

from pytracker.errors import InvalidTypeError, InvalidValueError
from pytracker.history import FIELDS, ParameterHistory, ParameterInfo, summarize

MISSING = [math.nan] * 6


def loop_summary(steps, rows, numel):
    """One parameter at a time, one step at a time, in Python floats."""
    fields = {name: [] for name in FIELDS}
    for index, count in enumerate(numel):
        seen = [(step, row[index]) for step, row in zip(steps, rows, strict=True) if not math.isnan(row[index][3])]
        norms = [math.sqrt(row[1]) for _, row in seen]
        bad = [step for step, row in seen if row[4] + row[5] > 0]
        poisoned = any(math.isnan(norm) for norm in norms)
        fields["norm_last"].append(norms[-1] if seen else math.nan)
        fields["norm_mean"].append(sum(norms) / len(norms) if seen else math.nan)
        fields["norm_max"].append(math.nan if poisoned or not seen else max(norms))
        abs_max = [row[2] for _, row in seen]
        fields["abs_max"].append(math.nan if not seen or any(map(math.isnan, abs_max)) else max(abs_max))
        fields["zero_fraction"].append(sum(row[3] / max(count, 1) for _, row in seen) / len(seen) if seen else math.nan)
        fields["nans"].append(sum(row[4] for _, row in seen))
        fields["infs"].append(sum(row[5] for _, row in seen))
        fields["missing"].append(len(steps) - len(seen))
        fields["first_nonfinite"].append(bad[0] if bad else -1)
        for name in list(FIELDS)[list(FIELDS).index("weight_norm") :]:  # nothing of these was measured
            fields[name].append(math.nan)
    return fields


kinds = st.sampled_from(["fine", "missing", "nan", "inf", "zero", "huge", "tiny"])


def row_of(kind, count, generator):
    if kind == "missing":
        return MISSING
    if kind == "nan":
        return [math.nan, math.nan, math.nan, 0, 1, 0]
    if kind == "inf":
        return [math.inf, math.inf, math.inf, 0, 0, 2]
    if kind == "zero":
        return [0, 0, 0, count, 0, 0]
    scale = {"fine": 1.0, "huge": 1e20, "tiny": 1e-20}[kind]
    values = generator.normal(scale=scale, size=count)
    return [values.sum(), (values**2).sum(), np.abs(values).max(), 0, 0, 0]


@given(st.lists(st.tuples(kinds, kinds), min_size=1, max_size=12), st.integers(0, 2**31))
def test_a_summary_equals_the_plain_loop(steps_of_kinds, seed):
    generator = np.random.default_rng(seed)
    numel = [5, 3]
    rows = np.array(
        [[row_of(kind, count, generator) for kind, count in zip(kinds, numel, strict=True)] for kinds in steps_of_kinds]
    )
    steps = np.arange(7, 7 + 2 * len(rows), 2)
    interval = summarize(steps, rows, numel)
    expected = loop_summary(steps.tolist(), rows.tolist(), numel)
    assert (interval.first_step, interval.last_step) == (steps[0], steps[-1])
    for name in FIELDS:
        np.testing.assert_allclose(getattr(interval, name), expected[name], rtol=1e-6, err_msg=name)


def test_an_empty_parameter_has_norm_zero_and_no_zeros():
    interval = summarize([0], [[[0, 0, 0, 0, 0, 0]]], [0])
    assert interval.norm_max[0] == 0
    assert interval.zero_fraction[0] == 0
    assert interval.missing[0] == 0


def test_a_finite_norm_outside_float32_stays_finite_and_nonzero():
    interval = summarize([0], [[[1e100, 1e200, 1e100, 0, 0, 0], [1e-60, 1e-120, 1e-60, 0, 0, 0]]], [1, 1])
    assert np.isfinite(interval.norm_max).all()
    assert (interval.norm_max > 0).all()
    assert interval.norm_max.dtype == np.float32


@pytest.mark.parametrize(
    ("steps", "rows", "message"),
    [
        ([], np.empty((0, 1, 6)), "no steps were given"),
        ([0], np.zeros((1, 2, 6)), r"expected shape \[steps, parameters, columns\] = \[1, 1, 6\], got \[1, 2, 6\]"),
        ([1, 1], np.zeros((2, 1, 6)), "expected ascending steps"),
    ],
)
def test_a_wrong_shape_is_named(steps, rows, message):
    with pytest.raises(InvalidValueError, match=message):
        summarize(steps, rows, [4])


def filled(infos, intervals=4, every=5, **bounds):
    parameters = ParameterHistory(infos, **bounds)
    generator = np.random.default_rng(0)
    for index in range(intervals):
        steps = np.arange(index * every, (index + 1) * every)
        rows = gradient_rows(generator, every, parameters.numel)
        parameters.append_rows(steps, rows)
        parameters.append(summarize(steps, rows, parameters.numel))
    return parameters


def test_fields_are_intervals_by_parameters(infos):
    parameters = filled(infos)
    assert len(parameters) == 4
    assert parameters.first_step.tolist() == [0, 5, 10, 15]
    assert parameters.last_step.tolist() == [4, 9, 14, 19]
    for name in FIELDS:
        assert parameters.field(name).shape == (4, 3), name
    assert (parameters.field("norm_max") > 0).all()
    assert (parameters.field("nans") == 0).all()
    assert (parameters.field("first_nonfinite") == -1).all()
    assert np.isnan(parameters.field("weight_norm")).all()
    with pytest.raises(InvalidValueError, match="field 'norm': expected one of norm_last, norm_mean"):
        parameters.field("norm")


def test_a_field_that_speaks_late_says_nothing_for_the_intervals_before(infos):
    parameters = filled(infos, intervals=2)
    rows = np.zeros((1, 3, 6))
    rows[0, 1] = [math.nan, math.nan, math.nan, 0, 4, 0]
    parameters.append(summarize([10], rows, parameters.numel, weight_norm=[1.0, 2.0, 3.0]))
    assert parameters.field("nans").tolist() == [[0, 0, 0], [0, 0, 0], [0, 4, 0]]
    assert parameters.field("first_nonfinite").tolist() == [[-1, -1, -1], [-1, -1, -1], [-1, 10, -1]]
    assert np.isnan(parameters.field("weight_norm")[:2]).all()
    assert parameters.field("weight_norm")[2].tolist() == [1.0, 2.0, 3.0]


def test_rows_and_norms_come_back_exactly(infos):
    parameters = filled(infos)
    steps, rows = parameters.rows()
    assert steps.tolist() == list(range(20))
    assert rows.shape == (20, 3, 6)
    generator = np.random.default_rng(0)
    expected = np.concatenate([gradient_rows(generator, 5, parameters.numel) for _ in range(4)])
    np.testing.assert_array_equal(rows, expected)
    late, norms = parameters.norms(since=13)
    assert late.tolist() == list(range(13, 20))
    np.testing.assert_array_equal(norms, np.sqrt(expected[13:, :, 1]))
    assert parameters.rows(since=99)[1].shape == (0, 3, 6)


def test_the_oldest_rows_go_first_and_are_counted(infos):
    block_bytes = 5 * 3 * 6 * 8 + 5 * 8
    parameters = filled(infos, max_bytes=2 * block_bytes)
    assert parameters.rows()[0].tolist() == list(range(10, 20))
    assert parameters.dropped_rows == 10


def test_the_oldest_intervals_go_first_and_are_counted(infos):
    parameters = filled(infos, intervals=40, max_interval_bytes=3 * 4 * 5 * 10)
    assert len(parameters) + parameters.dropped_intervals == 40
    assert len(parameters) <= 10
    assert parameters.last_step[-1] == 199
    assert parameters.field("norm_max").shape == (len(parameters), 3)


def test_truncate_forgets_rows_at_the_step_and_intervals_that_reach_it(infos):
    parameters = filled(infos)
    parameters.truncate(12)
    assert parameters.last_step.tolist() == [4, 9]
    assert parameters.rows()[0].tolist() == list(range(12))
    parameters.append_rows([12], np.zeros((1, 3, 6)))
    assert parameters.rows()[0][-1] == 12


def test_steps_that_go_back_are_refused_and_change_nothing(infos):
    parameters = filled(infos)
    with pytest.raises(InvalidValueError, match="step 3 doesn't come after step 19"):
        parameters.append_rows([3], np.zeros((1, 3, 6)))
    with pytest.raises(InvalidValueError, match="steps 3 to 3 don't come after step 19"):
        parameters.append(summarize([3], np.zeros((1, 3, 6)), parameters.numel))
    assert len(parameters) == 4
    assert len(parameters.rows()[0]) == 20


def test_a_name_used_twice_and_a_stranger_are_refused(infos):
    with pytest.raises(InvalidValueError, match=r"the name 'conv\.weight' occurs twice"):
        ParameterHistory([infos[0], infos[0]])
    with pytest.raises(InvalidTypeError, match="expected ParameterInfo, got str"):
        ParameterHistory(["conv.weight"])


def test_a_pickle_keeps_everything(infos):
    parameters = filled(infos)
    other = pickle.loads(pickle.dumps(parameters))
    np.testing.assert_array_equal(other.field("norm_mean"), parameters.field("norm_mean"))
    np.testing.assert_array_equal(other.rows()[1], parameters.rows()[1])
    assert other.infos == [ParameterInfo(**vars(info)) for info in infos]

"""Rows that were cut are, joined again, what they were."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pytracker.columns import COLUMNS
from pytracker.core import Rows, joined


@given(st.data())
def test_rows_that_were_cut_anywhere_are_joined_to_what_they_were(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 12))
    cuts = sorted(data.draw(st.sets(st.integers(1, 11).filter(lambda cut: cut < count)))) if count > 1 else []
    random = np.random.default_rng(count)
    scalars = {}
    for name in data.draw(st.sets(st.sampled_from("abc"))):
        where = np.array(sorted(data.draw(st.sets(st.integers(0, count - 1), min_size=1))), np.intp)
        scalars[name] = where, random.random(len(where))
    rows = Rows(
        np.arange(count) * 3,
        random.random((count, 7)),
        random.random((count, 2, len(COLUMNS))),
        random.random((count, 2)),
        scalars,
    )
    ends = [0, *cuts, count]
    parts = [rows.part(begin, end) for begin, end in pairwise(ends)]
    for part, begin in zip(parts, ends, strict=False):
        for name, (where, values) in part.scalars.items():  # by hand: the value of each step
            of_step = dict(zip(rows.steps[scalars[name][0]].tolist(), scalars[name][1], strict=True))
            assert [of_step[step] for step in part.steps[where].tolist()] == values.tolist()
        assert part.steps[0] == 3 * begin
    again = joined(parts)
    for name in ("steps", "totals", "tensors", "elements"):
        np.testing.assert_array_equal(getattr(again, name), getattr(rows, name))
    assert again.scalars.keys() == scalars.keys()
    for name, (where, values) in scalars.items():
        np.testing.assert_array_equal(again.scalars[name][0], where)
        np.testing.assert_array_equal(again.scalars[name][1], values)


def test_where_the_gradients_of_some_rows_were_left_out_those_of_all_are() -> None:
    rows = Rows(
        np.arange(4), np.ones((4, 7)), np.ones((4, 2, 6)), np.ones((4, 2)), {"loss": (np.arange(4), np.ones(4))}
    )
    mixed = joined([rows.part(0, 2), rows.part(2, 4).without_gradients()])
    assert not mixed.has_gradients
    assert mixed.steps.tolist() == mixed.scalars["loss"][0].tolist() == [0, 1, 2, 3]

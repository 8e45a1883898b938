"""Levels: every rank is in one small group of each level, and what they reduce and say reaches all."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from launch import run

from pytracker.collectives.levels import groups_of, widths
from pytracker.collectives.missing_ranks import absent


@given(count=st.integers(1, 300), first=st.integers(0, 5))
def test_every_rank_but_the_first_has_one_way_up_and_the_first_is_at_the_top(count: int, first: int) -> None:
    members = range(first, first + count)
    ways_up = Counter(rank for member in members for group in groups_of(members, member) for rank in group[1:])
    for member in members:
        groups = groups_of(members, member)
        assert all(group[0] == member for group in groups[:-1])
        assert all(member in group for group in groups)
        assert sum(member in group[1:] for group in groups) == (member != first)
    assert set(ways_up) == set(members) - {first}


@pytest.mark.parametrize("count", [33, 64, 512, 2048, 10_000])
def test_no_rank_has_more_partners_than_a_group_has_ranks(count: int) -> None:
    assert sum(len(group) - 1 for group in groups_of(range(count), 0)) <= 32
    assert max(widths(count)) <= 8


@given(missing=st.sets(st.integers(0, 199), max_size=5))
def test_missing_ranks_are_found_by_few_questions(missing: set[int]) -> None:
    class Signs:
        asked = 0

        def check(self, keys: list[str]) -> bool:
            self.asked += 1
            return not any(int(key.partition("/")[2]) in missing for key in keys)

    signs = Signs()
    assert absent(signs, "here", range(200)) == sorted(missing)
    assert signs.asked <= 1 + 16 * len(missing)


@pytest.mark.parametrize("way", ["gathered", "in_rings"])
def test_ranks_in_two_levels_merge_meet_and_name_who_differs(way: str) -> None:
    run("leveled", f"two_levels:{way}", 6)

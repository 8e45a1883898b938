"""Ranks that merge cut their rows at the same steps, by the first one's clock, and no step waits."""

from __future__ import annotations

import pytest
from launch import run


@pytest.mark.parametrize(("seconds", "length"), [("0.25", "8"), ("0.7", "2"), ("10", "1"), ("0.001", "50")])
@pytest.mark.parametrize("world", [2, 4])
def test_an_interval_takes_as_long_as_the_first_ranks_clock_has_it(world: int, seconds: str, length: str) -> None:
    run("paced", f"slow:{seconds}:{length}", world)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_that_hear_late_cut_late_and_at_the_same_steps(world: int, seed: int) -> None:
    run("paced", f"late:{seed}", world)


def test_steps_that_begin_elsewhere_are_cut_from_there() -> None:
    run("paced", "again", 2)


def test_copies_are_compared_at_steps_known_beforehand() -> None:
    run("paced", "compared", 2)


def test_what_waits_for_a_first_rank_that_tells_nothing_is_bounded() -> None:
    run("paced", "silent", 2)

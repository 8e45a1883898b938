"""What cannot be told is refused, with the argument to give; ranks that do not do the same are told so, and how."""

from __future__ import annotations

import pytest
from launch import run, run_alone


def test_plain_parameters_of_many_ranks_are_refused_unless_a_wrapper_or_a_group_says_what_they_are() -> None:
    run("disagreeing", "untold", 2)


def test_a_rank_that_trains_alone_says_so_by_a_group_of_its_own() -> None:
    run("disagreeing", "alone", 2)


def test_different_parameters_of_one_name_are_not_taken_for_copies() -> None:
    run("disagreeing", "no_copies", 3)


def test_shards_that_only_their_maker_knows_are_not_taken_for_copies() -> None:
    run("disagreeing", "no_copies_on_other_meshes", 4)


def test_copies_that_drift_apart_later_are_told_once_and_the_training_goes_on() -> None:
    run("disagreeing", "drifted", 2)


def test_all_ranks_that_share_a_parameter_must_track_it_the_same_way() -> None:
    run("disagreeing", "members", 4)


def test_ranks_with_other_arguments_are_told_so_before_a_step() -> None:
    run("disagreeing", "settings", 2)


@pytest.mark.parametrize("case", ["steps", "one_epoch", "other_steps", "told_while_they_meet"])
def test_ranks_with_other_steps_are_told_so_and_nothing_is_recorded_of_what_not_all_have(case: str) -> None:
    run("disagreeing", case, 2)


def test_a_new_tracker_is_not_disturbed_by_what_a_failed_one_left_under_way() -> None:
    run("disagreeing", "again", 2)


def test_ranks_that_share_copies_with_different_others_find_each_other() -> None:
    run("disagreeing", "copies_of_some", 3)


def test_a_tracker_made_by_one_rank_alone_names_those_that_it_waited_for() -> None:
    run_alone("disagreeing", "absent", 2, survivors={0, 1})


def test_a_rank_that_raises_while_copies_are_compared_waits_for_nobody() -> None:
    run("disagreeing", "raises_while_compared", 2)


def test_a_step_waits_for_no_rank_that_is_late() -> None:
    run("disagreeing", "late", 2)

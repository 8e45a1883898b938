"""check_replicas: ranks that should hold the same are compared, and one that drifted is named."""

from __future__ import annotations

import pytest
from launch import run


@pytest.mark.parametrize(("layout", "world"), [("ddp", 2), ("fsdp2", 2), ("tp", 2), ("hsdp", 4)])
def test_copies_that_are_equal_are_no_finding(layout: str, world: int) -> None:
    run("replicated", f"alike:{layout}", world)


@pytest.mark.parametrize(("layout", "world", "rank"), [("ddp", 3, 1), ("tp", 2, 1), ("hsdp", 4, 3)])
def test_a_rank_whose_gradient_drifts_is_named_with_parameter_and_step(layout: str, world: int, rank: int) -> None:
    run("replicated", f"gradient:{layout}:{rank}", world)


def test_a_nan_on_one_rank_only_is_a_drift() -> None:
    run("replicated", "nan", 2)


def test_weights_that_differ_are_found_at_the_next_epoch() -> None:
    run("replicated", "weights", 3)


def test_ranks_at_different_steps_are_told() -> None:
    run("replicated", "other_steps", 2)


def test_a_drift_that_the_first_rank_takes_no_part_in_reaches_it() -> None:
    run("replicated", "pipeline", 4)

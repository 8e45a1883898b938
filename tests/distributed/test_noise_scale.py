"""GradientNoiseScale: what the communication hook measures is what the ranks' gradients say, and costs no wait."""

from __future__ import annotations

import pytest
from launch import run


@pytest.mark.parametrize("case", ["plain", "buckets", "static", "views", "unused"])
def test_the_estimates_are_those_of_the_ranks_gradients_by_hand(case: str) -> None:
    run("noise", f"identities:{case}", 2)


def test_with_three_ranks_as_well() -> None:
    run("noise", "identities:buckets", 3)


def test_accumulated_batches_count_as_one_larger_batch() -> None:
    run("noise", "identities:buckets:3", 2)


def test_a_scaled_loss_changes_nothing() -> None:
    run("noise", "identities:plain:1:1024", 2)


@pytest.mark.parametrize("case", ["plain", "buckets", "views"])
def test_the_gradients_have_the_bits_of_ddp_without_a_hook(case: str) -> None:
    run("noise", f"untouched:{case}", 2)


def test_no_collective_on_a_step_and_two_a_drain() -> None:
    run("noise", "collectives", 2)


def test_the_noise_scale_of_gaussian_gradients_is_the_exact_one() -> None:
    run("noise", "exact", 2)


def test_steps_that_are_not_averaged_or_not_finite_are_left_out() -> None:
    run("noise", "left_out", 2)


def test_what_cannot_be_measured_is_refused_with_the_reason() -> None:
    run("noise", "refused", 2)

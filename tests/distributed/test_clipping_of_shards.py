"""Gradients over any number of ranks are clipped by the norm of the whole. Each case runs in processes of its own."""

from __future__ import annotations

import pytest
from launch import run


@pytest.mark.parametrize("way", ["within", "after", "alone"])
@pytest.mark.parametrize(
    ("layout", "world"),
    [("ddp", 2), ("fsdp2", 3), ("fsdp2_columns", 2), ("tensor_parallel", 2), ("sequence_parallel", 2)],
)
def test_spread_gradients_are_clipped_as_those_of_one_rank(layout: str, world: int, way: str) -> None:
    run("clipped", f"train:{layout}:{way}", world)


@pytest.mark.parametrize("layout", ["hsdp", "tp_fsdp", "tp_fsdp_mixed"])
def test_meshes_of_two_dimensions_count_each_element_once(layout: str) -> None:
    run("clipped", f"train:{layout}:within", 4)
    run("clipped", f"train:{layout}:alone", 4)


def test_a_mesh_of_three_dimensions_counts_each_element_once() -> None:
    run("clipped", "train:tp_hsdp:after", 8)


@pytest.mark.parametrize("layout", ["ddp", "fsdp2", "tensor_parallel"])
def test_the_largest_magnitude_of_all_ranks_limits_them_all(layout: str) -> None:
    run("clipped", f"train:{layout}:after:inf", 2)


@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_a_norm_of_another_order_is_that_of_all_ranks(layout: str) -> None:
    run("clipped", f"train:{layout}:after:1", 2)


def test_a_fused_optimizer_takes_the_factor_of_all_ranks() -> None:
    run("clipped", "train:ddp:fused", 2)  # torch has no fused SGD of sharded tensors; AdamW is in the next test


def test_a_nan_on_one_rank_makes_all_of_them_skip_the_step() -> None:
    run("clipped", "skipped", 2)


def test_stages_of_a_pipeline_share_one_norm_and_copies_count_once() -> None:
    run("clipped", "pipeline", 3)

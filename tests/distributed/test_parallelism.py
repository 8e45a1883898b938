"""On any number of ranks the statistics are those of the whole gradient. Each case runs in processes of its own."""

from __future__ import annotations

import pytest
from launch import run


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_data_parallel_ranks_have_the_statistics_of_one(layout: str, world: int) -> None:
    run("layouts", f"compare:{layout}", world)


@pytest.mark.parametrize("parameters", ["original", "flat"])
@pytest.mark.parametrize("strategy", ["FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD"])
def test_fsdp1_has_the_statistics_of_each_original_parameter(strategy: str, parameters: str) -> None:
    run("layouts", f"compare:fsdp1_{strategy}_{parameters}", 2)


@pytest.mark.parametrize("layout", ["tensor_parallel", "sequence_parallel"])
def test_tensor_parallel_ranks_have_the_statistics_of_one(layout: str) -> None:
    run("layouts", f"compare:{layout}", 2)


@pytest.mark.parametrize("layout", ["hsdp", "tp_fsdp", "fsdp1_HYBRID_SHARD_original", "fsdp1_HYBRID_SHARD_flat"])
def test_ranks_in_two_dimensions_have_the_statistics_of_one(layout: str) -> None:
    run("layouts", f"compare:{layout}", 4)


@pytest.mark.parametrize("layout", ["ddp", "fsdp2", "fsdp1_FULL_SHARD_original", "fsdp1_FULL_SHARD_flat"])
def test_gradients_accumulated_without_sync_are_those_of_the_whole_batch(layout: str) -> None:
    run("layouts", f"compare:{layout}:accumulate", 2)


@pytest.mark.parametrize("way", ["scaled", "unscaled"])
@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_a_grad_scaler_changes_no_statistic(layout: str, way: str) -> None:
    run("layouts", f"compare:{layout}:{way}", 2)


def test_parameters_have_their_names_in_the_model_whatever_is_wrapped_around_it() -> None:
    run("layouts", "compare:compiled_ddp", 2)


def test_pipeline_stages_are_all_counted() -> None:
    run("layouts", "pipeline", 3)


def test_gradients_that_only_one_rank_keeps_count_once() -> None:
    run("layouts", "zero", 2)

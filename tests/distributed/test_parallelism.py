"""On any number of ranks the statistics are those of the whole gradient. Each case runs in processes of its own."""

from __future__ import annotations

import pytest
from launch import run, run_alone


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


@pytest.mark.parametrize("world", [2, 3])
def test_shards_by_columns_are_pieces_like_any_other(world: int) -> None:
    run("layouts", "compare:fsdp2_columns", world)


@pytest.mark.parametrize(
    "layout", ["hsdp", "tp_fsdp", "tp_fsdp_mixed", "fsdp1_HYBRID_SHARD_original", "fsdp1_HYBRID_SHARD_flat"]
)
def test_ranks_in_two_dimensions_have_the_statistics_of_one(layout: str) -> None:
    run("layouts", f"compare:{layout}", 4)


def test_gradients_of_dtensors_are_read_as_they_are_however_they_were_on_the_step_before() -> None:
    run("layouts", "changing", 2)


def test_sixteen_ranks_count_each_shard_and_copy_once() -> None:
    run_alone("layouts", "compare:hsdp", 16, survivors=set(range(16)))


def test_a_mesh_of_three_dimensions_counts_each_element_once() -> None:
    run("layouts", "compare:tp_hsdp", 8)


@pytest.mark.parametrize("layout", ["ddp", "fsdp2_whole", "fsdp1_whole_original", "fsdp1_whole_flat"])
def test_a_weight_that_two_layers_share_counts_once(layout: str) -> None:
    run("layouts", f"compare:{layout}:tied", 2)


@pytest.mark.parametrize("layout", ["ddp", "fsdp2", "fsdp1_FULL_SHARD_original", "tensor_parallel"])
def test_parameters_that_are_not_trained_are_missing(layout: str) -> None:
    run("layouts", f"compare:{layout}:frozen", 2)


@pytest.mark.parametrize(
    "layout", ["ddp", "fsdp2", "hsdp_of_four", "fsdp1_FULL_SHARD_original", "fsdp1_FULL_SHARD_flat"]
)
def test_gradients_accumulated_without_sync_are_those_of_the_whole_batch(layout: str) -> None:
    run("layouts", f"compare:{layout.removesuffix('_of_four')}:accumulate", 4 if layout.endswith("_of_four") else 2)


@pytest.mark.parametrize("way", ["scaled", "unscaled"])
@pytest.mark.parametrize("layout", ["ddp", "fsdp2", "sequence_parallel", "fsdp1_FULL_SHARD_flat"])
def test_a_grad_scaler_changes_no_statistic(layout: str, way: str) -> None:
    run("layouts", f"compare:{layout}:{way}", 2)


def test_parameters_have_their_names_in_the_model_whatever_is_wrapped_around_it() -> None:
    run("layouts", "compare:compiled_ddp", 2)


def test_wrappers_inside_the_model_are_recognised() -> None:
    run("layouts", "compare:inner_ddp", 2)


@pytest.mark.parametrize(("schedule", "world"), [("gpipe", 2), ("1f1b", 3)])
def test_the_stages_of_torchs_pipelining_are_all_counted(schedule: str, world: int) -> None:
    run("trainings", f"pipeline:{schedule}", world)


@pytest.mark.parametrize("beside", ["ddp", "fsdp2"])
def test_stages_that_are_replicated_or_sharded_count_once(beside: str) -> None:
    run("trainings", f"pipeline:1f1b:{beside}", 4)


@pytest.mark.parametrize("kind", ["list", "module_list"])
def test_several_stages_of_a_rank_go_by_their_names_in_the_model(kind: str) -> None:
    run("trainings", f"interleaved:{kind}", 2)


@pytest.mark.parametrize(
    ("batches", "compared"), [("9+5", "alone"), ("5+9", "alone"), ("5+9", "compared"), ("6+6", "compared")]
)
def test_uneven_batches_within_join_lose_no_row_of_the_first_rank(batches: str, compared: str) -> None:
    run("trainings", f"joined:{batches}:{compared}", 2)


def test_nan_among_dtensors_is_located_by_one_rank_alone() -> None:
    run("trainings", "searched_by_one", 2)


def test_a_zero_redundancy_optimizer_changes_no_statistic() -> None:
    run("trainings", "zero_optimizer", 2)


@pytest.mark.parametrize("case", ["zero", "kept"])
@pytest.mark.parametrize("world", [2, 3])
def test_gradients_that_only_one_rank_keeps_count_once(case: str, world: int) -> None:
    run("trainings", case, world)


def test_players_that_are_sharded_have_the_statistics_of_their_whole_gradients() -> None:
    run("adversaries", "sharded", 2)


def test_large_intervals_are_merged_beside_the_training_with_the_same_statistics() -> None:
    run("beside", "compare:fsdp2", 2)


@pytest.mark.parametrize("case", ["no_copies", "drifted", "other_steps"])
def test_what_is_wrong_in_a_large_interval_is_told_as_in_a_small_one(case: str) -> None:
    run("beside", f"disagree:{case}", 3 if case == "no_copies" else 2)


def test_shards_that_are_read_in_the_backward_have_the_statistics_of_the_whole() -> None:
    run("adversaries", "in_backward", 2)


def test_a_compiled_step_of_shards_breaks_the_graph_and_has_the_statistics_of_the_whole() -> None:
    run("adversaries", "compiled", 2)

"""Ranks that disagree, fail, stop or die: the others are told who, and nothing recorded is lost."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from launch import run, run_alone

import pytracker


def test_what_is_not_finite_on_one_shard_reaches_the_whole_and_is_counted_once() -> None:
    run("faults", "nonfinite", 2)


def test_ranks_that_disagree_are_told_so_before_a_number_is_recorded() -> None:
    run("faults", "mismatch", 2)


def test_a_rank_that_raises_leaves_at_once_and_the_others_are_told(tmp_path: Path) -> None:
    run_alone("faults", f"raises:{tmp_path}/runs", 3, survivors={0, 1, 2})


def test_a_rank_that_is_killed_is_named_to_the_others(tmp_path: Path) -> None:
    run_alone("faults", f"killed:{tmp_path}/runs", 3, survivors={0, 1})


@pytest.mark.parametrize("end", ["SIGKILL", "SIGSTOP", "raises"])
def test_a_rank_that_is_lost_ends_no_training_and_is_named_once(end: str, tmp_path: Path) -> None:
    run_alone("departures", f"goes_on:{end}:{tmp_path}/runs", 3, survivors={0, 1, 2} if end == "raises" else {0, 1})


def test_what_waits_for_a_stopped_rank_is_bounded_and_counted() -> None:
    run("departures", "behind_a_stopped_rank", 2)


def test_torch_knows_none_of_a_trackers_groups_and_all_is_freed() -> None:
    run_alone("departures", "unknown_to_torch", 2, survivors={0, 1})  # on ranks that hold nothing of another case


def test_a_job_that_begins_torch_distributed_again_has_trackers_as_before(tmp_path: Path) -> None:
    run_alone("departures", f"begun_again:{tmp_path}", 2, survivors={0, 1})


def test_a_gradient_that_only_some_shards_have_is_missing_and_named() -> None:
    run("faults", "partly_present", 2)


def test_a_rank_that_does_not_come_is_named_after_the_timeout(tmp_path: Path) -> None:
    run_alone("faults", f"stalled:{tmp_path}/runs", 3, survivors={0, 1, 2})


def test_after_a_fault_every_call_says_so_at_once_and_close_ends_the_run(tmp_path: Path) -> None:
    run("faults", f"refused_after:{tmp_path}/runs", 2)


@pytest.mark.parametrize("size", [4, 7])
def test_a_rank_that_leaves_one_of_two_trackers_disturbs_the_other_in_nothing(size: int) -> None:
    run("faults", f"two_trackers:{size}", 2)


@pytest.mark.parametrize("wrapper", ["fsdp2", "check_replicas"])
def test_a_rank_that_raises_and_tries_again_meets_the_others(wrapper: str) -> None:
    run("faults", f"retried:{wrapper}", 2)


def test_a_model_that_changes_is_noticed_at_the_same_step_on_all_ranks() -> None:
    run("faults", "changed", 2)


def test_one_rank_may_record_more_scalars_than_the_others() -> None:
    run("faults", "scalars_of_one", 2)


def test_an_interrupt_while_others_are_waited_for_keeps_whole_rows(tmp_path: Path) -> None:
    run("faults", f"interrupted:{tmp_path}/runs", 2)


def test_a_root_that_fsdp2_has_gathered_is_no_other_model() -> None:
    run("faults", "whole_root", 2)


@pytest.mark.parametrize("fault", ["other_steps", "an_exception"])
@pytest.mark.parametrize("asked", ["noise_scale", "check_replicas"])
def test_rows_that_need_no_other_rank_survive_any_fault(asked: str, fault: str) -> None:
    run("faults", f"whole_rows_survive:{asked}:{fault}", 2)


def test_gradients_that_are_not_reduced_yet_are_refused() -> None:
    run("faults", "unreduced", 2)


def test_a_step_without_fsdp2s_gradient_sync_is_told_once() -> None:
    run("faults", "unreduced_by_fsdp2", 2)


def test_a_step_within_ddps_no_sync_is_recorded_as_this_ranks_own_and_told_once() -> None:
    run("faults", "unreduced_by_ddp", 2)


def test_parameters_whose_layout_cannot_be_told_are_refused() -> None:
    run("faults", "refused", 2)


def test_a_first_rank_that_cannot_open_its_run_leaves_and_the_others_are_told() -> None:
    run("faults", "cannot_open", 2)


def test_only_the_first_rank_writes_judges_and_feeds_the_sinks(tmp_path: Path) -> None:
    run("faults", f"first_writes:{tmp_path}/runs", 2)


def test_a_step_costs_no_collective_and_a_drain_two_or_under_ddp_none() -> None:
    run("faults", "collectives", 2)


PROGRAM = """
import sys, torch, torch.distributed as dist, pytracker
from torch.distributed.fsdp import fully_shard
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
model = fully_shard(torch.nn.Linear(4, 4))
model(torch.ones(1, 4)).sum().backward()
tracker = pytracker.Tracker(model, run=f"{folder}/runs", every=4, diagnosis=None)
for step in range(10):
    tracker.step()
dist.destroy_process_group()
"""


def test_ranks_that_end_without_close_lose_no_step(tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen([sys.executable, "-c", PROGRAM, str(rank), str(tmp_path)], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=300)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    (run,) = pytracker.list_runs(tmp_path / "runs")
    assert run.state == "finished"
    assert pytracker.load_run(run.path).history["grad_norm"][:] == [pytest.approx(20**0.5)] * 10

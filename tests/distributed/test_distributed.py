"""On any number of ranks the statistics are those of the whole gradient. Each case runs in processes of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("layouts.py")


def run(case: str, world: int, folder: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(WORKER), case]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(world), str(folder / "store")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    failed = [f"rank {i}:\n{out}" for i, (rank, out) in enumerate(zip(ranks, outputs, strict=True)) if rank.returncode]
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_data_parallel_ranks_have_the_statistics_of_one(layout: str, world: int, tmp_path: Path) -> None:
    run(layout, world, tmp_path)


def test_tensor_parallel_ranks_have_the_statistics_of_one(tmp_path: Path) -> None:
    run("tensor_parallel", 2, tmp_path)


@pytest.mark.parametrize("layout", ["hsdp", "tp_fsdp"])
def test_ranks_in_two_dimensions_have_the_statistics_of_one(layout: str, tmp_path: Path) -> None:
    run(layout, 4, tmp_path)


def test_pipeline_stages_are_all_counted(tmp_path: Path) -> None:
    run("pipeline", 3, tmp_path)


def test_gradients_that_only_one_rank_keeps_count_once(tmp_path: Path) -> None:
    run("zero", 2, tmp_path)


def test_what_is_not_finite_on_one_shard_reaches_the_whole(tmp_path: Path) -> None:
    run("nonfinite", 2, tmp_path)


def test_ranks_that_disagree_are_told_so(tmp_path: Path) -> None:
    run("mismatch", 2, tmp_path)


def test_a_layout_that_cannot_be_told_is_an_error(tmp_path: Path) -> None:
    run("fsdp1", 2, tmp_path)


def test_a_rank_that_fails_leaves_and_the_others_are_told(tmp_path: Path) -> None:
    run("fault", 2, tmp_path)


def test_a_step_costs_no_collective_and_a_drain_two(tmp_path: Path) -> None:
    run("collectives", 2, tmp_path)

"""Cases of test_faults.py: ranks that stop, leave or begin again, and what is left of the groups they were in."""

from __future__ import annotations

import gc
import os
import signal
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hooks import until_merged, waits_forbidden
from torch import nn
from torch.distributed.fsdp import fully_shard

import pytracker
from pytracker.errors import RankMismatchError


def goes_on(rank: int, world: int, end: str, folder: str) -> None:
    """By default a rank that is killed, stops or leaves ends no training: a warning says who, and the run is marked."""
    model = fully_shard(nn.Linear(4, 4))
    model(torch.ones(1, 4)).sum().backward()
    tracker = pytracker.Tracker(model, every=2, run=folder, diagnosis=None, rank_timeout=10.0)
    for step in range(4):
        tracker.step(loss=step)
    tracker.flush()
    if rank == 2:
        if end == "raises":
            tracker.close(error="a bad batch")
            return
        os.kill(os.getpid(), getattr(signal, end))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(4, 30):
            with waits_forbidden():
                tracker.step(loss=step)
            time.sleep(0.01)
        tracker.close()
    told = [str(warning.message) for warning in caught if "no longer work together" in str(warning.message)]
    assert len(told) == 1, told
    assert "no answer from ranks [2]" in told[0], told
    if rank == 0:
        (path,) = Path(folder).iterdir()
        run = pytracker.load_run(path)
        assert (run.state, run.error) == ("finished", None)
        assert "no answer from ranks [2]" in run.history.meta["rank_fault"]
        assert run.history["loss"][:] == list(range(30))
        assert run.history["grad_norm"].steps.tolist() == [0, 1, 2, 3]


def behind_a_stopped_rank(rank: int, world: int) -> None:
    """What waits for a rank that has stopped is bounded: the latest gradients are left out and counted."""
    model = fully_shard(nn.Linear(4, 4))
    model(torch.ones(1, 4)).sum().backward()
    tracker = pytracker.Tracker(model, every=1, diagnosis=None, rank_timeout=60.0)
    if rank:
        dist.barrier()  # that the other enters after its last step
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(30):
            tracker.step(loss=step)
            until_merged(tracker) if rank else None
        if rank == 0:
            dist.barrier()
        tracker.close()
    if rank == 0:
        assert tracker.history["grad_norm"].steps.tolist() == list(range(8))
        assert sorted(tracker.history["loss"].steps.tolist()) == list(range(30))
        assert len([each for each in caught if "gradients of steps 8 to 8" in str(each.message)]) == 1


def unknown_to_torch(rank: int, world: int) -> None:
    """Trackers make no group of torch's, and let go of their sockets, descriptors and threads; also where they fail."""
    model, other = fully_shard(nn.Linear(4, 4)), fully_shard(nn.Linear(4, 4))
    model(torch.ones(1, 4)).sum().backward()
    with pytracker.Tracker(model, every=2, diagnosis=None) as tracker:
        tracker.step()
    known = len(dist.distributed_c10d._world.pg_names), dist.distributed_c10d._world.group_count
    before = held_of_the_system()
    for _ in range(3):
        with pytracker.Tracker(model, every=2, diagnosis=None) as tracker:
            for _ in range(5):
                tracker.step()
        with pytest.raises(RankMismatchError, match="different `every`"):
            pytracker.Tracker(other, every=2 + rank, diagnosis=None)
    until = time.monotonic() + 60  # a thread or two of the last one's may be ending yet
    while any(now > then for now, then in zip(held_of_the_system(), before, strict=True)):
        assert time.monotonic() < until, f"{before} descriptors and threads before, {held_of_the_system()} after"
        time.sleep(0.01)
    assert (len(dist.distributed_c10d._world.pg_names), dist.distributed_c10d._world.group_count) == known
    dist.barrier()
    dist.new_group([0, 1])  # is named after the groups that a rank has made
    dist.barrier()


def held_of_the_system() -> tuple[int, int]:
    """Return how many descriptors and threads this process has."""
    gc.collect()
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def begun_again(rank: int, world: int, folder: str) -> None:
    """Trackers are as before where torch.distributed is begun again, and where one rank had made one alone."""
    for life in range(2):
        model = fully_shard(nn.Linear(4, 4))
        model(torch.ones(1, 4)).sum().backward()
        if rank == 1:
            with pytest.raises(RankMismatchError, match=r"came to make the tracker.*no answer from ranks \[0\]"):
                pytracker.Tracker(model, diagnosis=None, rank_timeout=1.0)
        dist.barrier()
        with pytracker.Tracker(model, every=3, diagnosis=None, rank_timeout=20.0) as tracker:
            for _ in range(5):
                tracker.step()
        assert rank or tracker.history["grad_norm"][:] == [pytest.approx(20**0.5)] * 5
        dist.barrier()
        dist.destroy_process_group()
        dist.init_process_group("gloo", init_method=f"file://{folder}/{life}", rank=rank, world_size=world)

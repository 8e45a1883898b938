"""Cases of test_pace.py: ranks whose clocks differ, and which hear late how long an interval is."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from hooks import until_merged, waits_forbidden
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import pytracker
from pytracker.collectives.levels import Announcement
from pytracker.core import Rows
from pytracker.distributed import pace
from pytracker.distributed.row_merger import RowMerger

EVERY = 50


class Clock:
    """A clock that goes on by what a step takes."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@contextmanager
def timed() -> Iterator[tuple[Clock, list[list[int]]]]:
    """Give the intervals a clock of our own, and note which steps each one has that is merged."""
    clock, merged = Clock(), []
    start = RowMerger.start

    def noting(merger: RowMerger, rows: Rows, receive: object) -> None:
        merged.append(rows.steps.tolist())
        start(merger, rows, receive)

    with (
        mock.patch.object(pace, "monotonic", clock),
        mock.patch.object(pace, "FIRST", 1),
        mock.patch.object(RowMerger, "start", noting),
    ):
        yield clock, merged


def fill(model: nn.Module, step: int) -> None:
    """Give every element of every gradient the number of the step, plus 1."""
    for parameter in model.parameters():
        local = torch.full_like(parameter.to_local(), step + 1.0)
        parameter.grad = DTensor.from_local(
            local, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
        )


def check(rank: int, world: int, history: pytracker.History, merged: list[list[int]], steps: int) -> None:
    """Every rank has cut alike, nothing is lost, and every row is exact."""
    everywhere: list[object] = [None] * world
    dist.all_gather_object(everywhere, merged)
    assert everywhere == [merged] * world
    assert list(chain(*merged)) == list(range(steps))
    if rank == 0:
        assert history["grad_norm"].steps.tolist() == list(range(steps))
        np.testing.assert_allclose(history["grad_norm"][:], [(step + 1) * 20**0.5 for step in range(steps)])
        assert history["loss"][:] == list(range(steps))


def slow(rank: int, world: int, seconds_of_a_step: str, length: str) -> None:
    """Intervals are as long as the first rank's clock has it, whatever the others' say, and rows come home as often.

    Each is at most twice as long as the one before: the first step takes no time here, and says nothing of the others.
    """
    model = fully_shard(nn.Linear(4, 4))
    with timed() as (clock, merged):
        tracker = pytracker.Tracker(model, every=EVERY, diagnosis=None)
        for step in range(60):
            clock.now += 0.0 if step == 0 else float(seconds_of_a_step) if rank == 0 else random.random()
            fill(model, step)
            with waits_forbidden():
                tracker.step(loss=step)
            until_merged(tracker)
            dist.barrier()
            if rank == 0 and step > 2:
                assert tracker.history.last_step >= step - int(length) - 1
        tracker.close()
        expected = [1]
        while sum(expected) < 60:
            fitting = max(min(2 * expected[-1], int(length)), 2 if len(expected) == 1 else 1)
            expected.append(min(fitting, 60 - sum(expected)))
        assert [len(each) for each in merged] == expected
        check(rank, world, tracker.history, merged, 60)


def late(rank: int, world: int, seed: str) -> None:
    """Ranks hear late how long the next interval is, each at another time: they cut late, and alike."""
    model = fully_shard(nn.Linear(4, 4))
    chance = random.Random(f"{seed}/{rank}")
    has_come = Announcement.has_come
    pauses = [random.Random(seed).choice([0.01, 0.1, 1.0, 5.0]) for _ in range(200)]

    def late_in_coming(announcement: Announcement) -> bool:
        return has_come(announcement) if chance.random() < 0.4 else False

    with timed() as (clock, merged), mock.patch.object(Announcement, "has_come", late_in_coming):
        tracker = pytracker.Tracker(model, every=7, diagnosis=None)
        for step in range(200):
            clock.now += pauses[step]
            fill(model, step)
            with waits_forbidden():
                tracker.step(loss=step)
            dist.barrier()  # as a training's own reduction, so that no rank is many intervals behind
            if step % 60 == 59:
                tracker.flush()
        tracker.close()
        assert max(map(len, merged)) <= 7
        check(rank, world, tracker.history, merged, 200)


def again(rank: int, world: int) -> None:
    """Steps that begin elsewhere after a checkpoint was loaded are cut from there."""
    model = fully_shard(nn.Linear(4, 4))
    with timed() as (clock, merged):
        tracker = pytracker.Tracker(model, every=5, diagnosis=None)
        for begin in (0, 4, 1000):
            if begin:
                tracker.load_state_dict({"steps": begin, "epochs": 0})
            for step in range(begin, begin + 13):
                clock.now += 1.0
                fill(model, step)
                tracker.step()
        tracker.close()
    everywhere: list[object] = [None] * world
    dist.all_gather_object(everywhere, merged)
    assert everywhere == [merged] * world
    assert list(chain(*merged)) == [*range(13), *range(4, 17), *range(1000, 1013)]
    if rank == 0:
        assert tracker.history["grad_norm"].steps.tolist() == [*range(17), *range(1000, 1013)]


def compared(rank: int, world: int) -> None:
    """Where copies are compared, ranks wait for each other at the comparison: it comes at steps known beforehand."""
    model = fully_shard(nn.Linear(4, 4))
    with timed() as (clock, merged):
        with pytracker.Tracker(model, every=6, diagnosis=None, check_replicas=True) as tracker:
            for step in range(20):
                clock.now += 100.0
                fill(model, step)
                tracker.step(loss=step)
        assert [len(each) for each in merged] == [6, 6, 6, 2]
        check(rank, world, tracker.history, merged, 20)


def silent(rank: int, world: int) -> None:
    """What waits for a first rank that does not tell is bounded: what comes after is left out, and the scalars kept."""
    model = fully_shard(nn.Linear(4, 4))
    with timed():
        tracker = pytracker.Tracker(model, every=2, diagnosis=None, rank_timeout=60.0)
        if rank == 0:
            dist.barrier()  # that the others enter after their last step
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for step in range(40):
                fill(model, step)
                tracker.step(loss=step)
        told = [each for each in caught if "16 steps wait for a rank that is behind" in str(each.message)]
        assert rank == 0 or len(told) == 1
        if rank:
            assert tracker._team._intervals.count == 38
            assert sum(rows.tensors.nbytes for rows in tracker._team._intervals._rows) <= 24 * 2 * 6 * 8
            dist.barrier()
        tracker.close()
    if rank == 0:
        assert tracker.history["loss"][:] == list(range(40))
        assert tracker.history["grad_norm"].steps.tolist()[:16] == list(range(16))

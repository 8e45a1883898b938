"""Cases of test_parallelism.py: intervals as those of large models are: packed on threads, and reduced in rings."""

from __future__ import annotations

import threading
from unittest import mock

import disagreeing
import layouts

from pytracker.collectives import levels
from pytracker.distributed import moment_merger, row_merger


def compare(rank: int, world: int, layout: str) -> None:
    """Every statistic is as it is otherwise, and the training's thread neither packs nor unpacks."""
    threads: set[str] = set()
    pack, unpack = moment_merger.MomentMerger.pack, moment_merger.MomentMerger.unpack

    def packing(*arguments):
        threads.add(threading.current_thread().name)
        return pack(*arguments)

    def unpacking(*arguments):
        threads.add(threading.current_thread().name)
        return unpack(*arguments)

    with (
        mock.patch.object(row_merger, "_LARGE", 0),
        mock.patch.object(levels, "_GATHERED", 0),
        mock.patch.object(moment_merger.MomentMerger, "pack", packing),
        mock.patch.object(moment_merger.MomentMerger, "unpack", unpacking),
    ):
        layouts.compare(rank, world, layout)
    assert threads
    assert threading.main_thread().name not in threads


def disagree(rank: int, world: int, case: str) -> None:
    """What is wrong is told as it is otherwise."""
    with mock.patch.object(row_merger, "_LARGE", 0):
        getattr(disagreeing, case)(rank, world)

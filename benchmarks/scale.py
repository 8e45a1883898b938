"""What a tracker's other ranks cost a rank, by how many there are: sockets, threads, bytes of the store, CPU and wall.

    python -m benchmarks.scale [--worlds 8,16,32,64]
    python -m benchmarks.scale --levels
    python -m benchmarks.scale --store

Forked processes, each with a toy model under FSDP2, meet as they would on hosts. On fewer cores than processes the wall
is that of processes which take turns; counts and the CPU of a process hold anywhere. Each figure is the median over
the ranks, and that of the first rank, which has the most to do. Before a figure is printed, the norms that were merged
are compared with torch's own.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import statistics
import tempfile
import time
from multiprocessing.queues import SimpleQueue
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.distributed.fsdp import fully_shard

from pytracker import Tracker
from pytracker.collectives import groups, levels, rendezvous

EVERY, DRAINS = 10, 10
CLIENTS, REQUESTS, ANSWER = 8, 4000, 75  # a rank's are of 75 bytes: 1,800 in 24
A_RANK = 37  # requests of a rank in two levels, as measured
SHAPES, ROUNDS = [[16], [8, 2], [4, 4], [4, 2, 2], [2, 2, 2, 2]], 3
TRAINING = 0.0015  # seconds of a step, for each rank that shares these cores; merging goes on meanwhile


class CountingStore(dist.Store):
    """Hands everything on to another store, and counts the bytes of values that are written and read."""

    def __init__(self, store: Any) -> None:
        super().__init__()
        self._store, self.bytes, self.requests = store, 0, 0

    def _count(self, *values: Any) -> None:
        self.requests += 1
        self.bytes += sum(len(value) for value in values)

    def set(self, key: str, value: Any) -> None:
        self._count(key, value)
        self._store.set(key, value)

    def get(self, key: str) -> bytes:
        value: bytes = self._store.get(key)
        self._count(key, value)
        return value

    def add(self, key: str, value: int) -> int:
        self._count(key)
        return int(self._store.add(key, value))

    def compare_set(self, key: str, expected: Any, desired: Any) -> bytes:
        self._count(key, expected, desired)
        value: bytes = self._store.compare_set(key, expected, desired)
        return value

    def check(self, keys: list[str]) -> bool:
        self._count(*keys)
        return bool(self._store.check(keys))

    def wait(self, keys: list[str], timeout: Any = None) -> None:
        self._count(*keys)
        self._store.wait(keys, *([] if timeout is None else [timeout]))


def held() -> dict[str, int]:
    """Return what this process has of the system."""
    names = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    links = [os.readlink(name) for name in names if os.path.lexists(name)]
    return {
        "sockets": sum(link.startswith("socket:") for link in links),
        "descriptors": len(links),
        "threads": len(os.listdir("/proc/self/task")),
    }


def spent(begin: tuple[float, float]) -> tuple[float, float]:
    """Return the CPU and wall milliseconds since ``begin``."""
    return 1e3 * (time.process_time() - begin[0]), 1e3 * (time.perf_counter() - begin[1])


def now() -> tuple[float, float]:
    return time.process_time(), time.perf_counter()


def work(rank: int, world: int, folder: str, results: SimpleQueue[Any], shape: list[int] | None) -> None:
    if shape is not None:
        levels.widths = lambda count: shape
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    torch.manual_seed(0)
    model = fully_shard(nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8)))
    model(torch.ones(2, 64)).square().sum().backward()
    norm = sum(p.grad.full_tensor().square().sum().item() for p in model.parameters()) ** 0.5  # type: ignore[union-attr]
    dist.barrier()
    before, begin, stores = held(), now(), []

    def counting(store: Any, name: str) -> Any:
        stores.append(CountingStore(part(store, name)))
        return stores[-1]

    part = groups.part_of
    with mock.patch.object(rendezvous, "part_of", counting):
        tracker = Tracker(model, every=EVERY, diagnosis=None)
    made = spent(begin)
    figures: dict[str, float] = {"make, CPU ms": made[0], "make, wall ms": made[1]}
    figures["store, bytes"] = stores[0].bytes  # the first is the one through which all goes
    figures["store, requests"] = stores[0].requests
    figures |= {name: count - before[name] for name, count in held().items()}
    for _ in range(EVERY):  # what is imported and planned at first
        tracker.step()
    tracker.flush()
    dist.barrier()
    begin = now()
    for _ in range(EVERY * DRAINS):
        tracker.step()
        time.sleep(TRAINING * world)
    figures["a drain, CPU ms"] = spent(begin)[0] / DRAINS
    begin = now()
    tracker.flush()
    figures["flush, CPU ms"], figures["flush, wall ms"] = spent(begin)
    dist.barrier()
    begin = now()
    tracker.close()
    figures["close, CPU ms"], figures["close, wall ms"] = spent(begin)
    if rank == 0:
        np.testing.assert_allclose(tracker.history["grad_norm"][:], norm, rtol=1e-6)
    results.put((rank, figures))
    dist.barrier()
    dist.destroy_process_group()


def measure(world: int, shape: list[int] | None = None) -> list[dict[str, float]]:
    """Return the figures of every rank, in levels of these widths."""
    forking = multiprocessing.get_context("fork")
    results: SimpleQueue[Any] = forking.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [forking.Process(target=work, args=(rank, world, folder, results, shape)) for rank in range(world)]
        for rank in ranks:
            rank.start()
        found = dict(results.get() for _ in ranks)
        for rank in ranks:
            rank.join()
    return [found[rank] for rank in range(world)]


def ask(port: int, times: int) -> None:
    """Write and read what a rank does, so often."""
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    for turn in range(times):
        key = f"{os.getpid()}/{turn}"
        store.set(key, "0" * ANSWER)
        store.get(key)


def the_store() -> None:
    """Print what the host of the store works for a request, and for those of 10,000 ranks that make their tracker."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    forking = multiprocessing.get_context("fork")
    begin = now()
    clients = [forking.Process(target=ask, args=(server.port, REQUESTS // 2)) for _ in range(CLIENTS)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    cpu, wall = spent(begin)  # of this process, which answers
    count = CLIENTS * REQUESTS
    each = cpu / count
    print(
        f"{count:,} requests of {ANSWER} bytes by {CLIENTS} processes: {1e3 * each:.1f} us of the host's CPU each, and "
        f"{1e3 * wall / count:.1f} us in all; {A_RANK} of each of 10,000 ranks take it {10 * A_RANK * each:.0f} s"
    )


def by_levels() -> None:
    """Print what a drain costs the first rank in levels of several shapes, of 16 processes each, and what 10,000 would.

    Fitted is a + b levels + c (the ranks that the first one gathers from in all its levels).
    """
    table, rows, costs = Table("levels of", "a drain, CPU ms: median", "first rank", "its sockets"), [], []
    for shape in SHAPES * ROUNDS:
        figures = measure(math.prod(shape), shape)
        found = [each["a drain, CPU ms"] for each in figures]
        rows.append([1.0, len(shape), sum(shape) - len(shape)])
        costs.append(found[0])
        costs_of = (f"{statistics.median(found):.1f}", f"{found[0]:.1f}", f"{figures[0]['sockets']:.0f}")
        table.add_row(" x ".join(map(str, shape)), *costs_of)
    Console(width=120).print(table)
    fit, *_ = np.linalg.lstsq(np.array(rows), np.array(costs), rcond=None)
    many = levels.widths(10_000)
    cost = float(fit @ [1.0, len(many), sum(many) - len(many)])
    print(
        f"fitted, CPU ms of the first rank: {fit[0]:.1f} + {fit[1]:.1f} levels + {fit[2]:.2f} ranks; in levels of "
        f"{' x '.join(map(str, many))}, {cost:.0f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worlds", default="8,16,32,64")
    parser.add_argument("--levels", action="store_true", help="measure 16 ranks in levels of several shapes instead")
    parser.add_argument("--store", action="store_true", help="measure what the host of the store works instead")
    arguments = parser.parse_args()
    if arguments.levels or arguments.store:
        return by_levels() if arguments.levels else the_store()
    worlds = [int(world) for world in arguments.worlds.split(",")]
    found = {world: measure(world) for world in worlds}
    table = Table("a rank's", *[f"{world} ranks" for world in worlds], "growth")
    for name in found[worlds[0]][0]:
        medians = [statistics.median(each[name] for each in found[world]) for world in worlds]
        firsts = [found[world][0][name] for world in worlds]
        # the power of the number of ranks with which the first rank's figure grows
        power = np.polyfit(np.log(worlds), np.log(np.maximum(firsts, 1e-3)), 1)[0] if len(worlds) > 1 else np.nan
        table.add_row(name, *[f"{m:,.0f} / {f:,.0f}" for m, f in zip(medians, firsts, strict=True)], f"R^{power:.2f}")
    Console(width=120).print(table)
    print("median of the ranks / the first rank; growth: of the first rank's, fitted")


if __name__ == "__main__":
    main()

"""Runs cases on several ranks, processes of their own with gloo: `run` on ranks that are kept, `run_alone` on new ones.

A rank is forked by a server that has imported torch, so that it is there at once. It takes cases from its pipe, a
module and a case each, and answers whether they ended well.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path

PATIENCE = 300  # seconds: on a busy machine, ranks that take turns are slow

_forking = multiprocessing.get_context("forkserver")
_forking.set_forkserver_preload(["torch.distributed.fsdp", "torch.distributed.tensor.parallel", "pytracker", "pytest"])


class Pool:
    """Some ranks that wait for cases."""

    def __init__(self, world: int) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._pipes: list[Connection] = []
        self._ranks = []
        for rank in range(world):
            pipe, theirs = _forking.Pipe()
            process = _forking.Process(target=serve, args=(rank, world, self._folder.name, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(pipe)
            self._ranks.append(process)

    def run(self, module: str, case: str, awaited: set[int]) -> set[int]:
        """Run a case on every rank; return the ranks on which it ended well: the others failed, died or stopped.

        Only those that are ``awaited`` are given time for it, and the others as long as these need.
        """
        for pipe in self._pipes:
            with contextlib.suppress(BrokenPipeError):
                pipe.send((module, case))
        end = time.monotonic() + PATIENCE
        well = set()
        for rank in sorted(range(len(self._pipes)), key=lambda rank: rank not in awaited):
            pipe, patience = self._pipes[rank], max(0.0, end - time.monotonic()) if rank in awaited else 0.0
            with contextlib.suppress(EOFError, ConnectionResetError):  # where it died
                if pipe.poll(patience) and pipe.recv():
                    well.add(rank)
        return well

    def said(self) -> str:
        """Return what all ranks have printed, and where those that live are at."""
        for rank in self._ranks:
            if rank.is_alive():
                os.kill(rank.pid, signal.SIGUSR1)
        time.sleep(1)
        logs = [Path(f"{self._folder.name}/{rank}.log").read_text(errors="replace") for rank in range(len(self._ranks))]
        return "\n".join(f"rank {rank} said:\n{log}" for rank, log in enumerate(logs))

    def close(self) -> dict[int, int]:
        """End the ranks; return how those did that did not end well."""
        for pipe in self._pipes:
            pipe.close()
        end = time.monotonic() + 20
        for rank in self._ranks:
            rank.join(max(0.0, end - time.monotonic()))
            rank.kill()
            rank.join()
        return {number: rank.exitcode for number, rank in enumerate(self._ranks) if rank.exitcode != 0}


_pools: dict[int, Pool] = {}


def run(module: str, case: str, world: int) -> None:
    """Run ``case`` on ``world`` ranks that are kept for the next; fail with what they printed unless all end well.

    ``case`` is a function of the module, and its arguments after rank and world: "compare:fsdp2:accumulate".
    """
    if world not in _pools:
        _pools[world] = Pool(world)
    pool = _pools[world]
    if pool.run(module, case, set(range(world))) == set(range(world)):
        return
    del _pools[world]
    said = pool.said()
    pool.close()
    raise AssertionError(f"{module} {case}:\n{said}")


def run_alone(module: str, case: str, world: int, survivors: set[int]) -> None:
    """Run ``case`` on ranks of its own, which it may break: fail unless just the ``survivors`` end well."""
    pool = Pool(world)
    try:
        well = pool.run(module, case, survivors)
        assert well == survivors, f"{module} {case}: ended well: {well}\n{pool.said()}"
    finally:
        pool.close()


def end_pools() -> None:
    """End all ranks, which must end well."""
    for pool in list(_pools.values()):
        codes = pool.close()
        assert not codes, f"ranks ended with {codes}\n{pool.said()}"
    _pools.clear()


def stop_the_clock() -> None:
    """Have every interval of `every` steps, however slow the machine is: `paced.py` says what else there can be."""
    from pytracker.distributed import pace

    pace.monotonic = lambda: 0.0
    pace.FIRST = 1000


def serve(rank: int, world: int, folder: str, pipe: Connection) -> None:
    """Run the cases that come, as one of the ranks."""
    with open(f"{folder}/{rank}.log", "wb") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    faulthandler.register(signal.SIGUSR1)
    import torch  # not by the tests' own process, which has no use for it
    import torch.distributed as dist

    torch.set_num_threads(1)
    stop_the_clock()
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    gc.freeze()  # what is imported is no garbage of any case
    while True:
        try:
            module, case = pipe.recv()
        except EOFError:
            break
        function, *arguments = case.split(":")
        try:
            getattr(importlib.import_module(module), function)(rank, world, *arguments)
            gc.collect()  # nothing that a case has left may wait for the other ranks
            pipe.send(True)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            pipe.send(False)
            os._exit(1)
    dist.destroy_process_group()

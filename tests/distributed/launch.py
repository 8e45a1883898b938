"""Runs cases on several ranks, processes of their own with gloo: `run` on ranks that are kept, `run_alone` on new ones.

Each rank is this file, started with its rank, the number of ranks and the file where they meet. It takes cases from its
standard input, a module and a case a line, and writes "ok" or "failed" for each to a pipe.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import select
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

PATIENCE = 300  # seconds: on a busy machine, ranks that take turns are slow


class Pool:
    """Some ranks that wait for cases."""

    def __init__(self, world: int) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._ranks: list[subprocess.Popen[bytes]] = []
        self._results: list[int] = []
        for rank in range(world):
            result, write = os.pipe()
            arguments = [str(rank), str(world), f"{self._folder.name}/store", str(write)]
            with open(f"{self._folder.name}/{rank}.log", "wb") as log:
                self._ranks.append(
                    subprocess.Popen(
                        [sys.executable, __file__, *arguments],
                        env=os.environ | {"OMP_NUM_THREADS": "1"},
                        stdin=subprocess.PIPE,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        pass_fds=[write],
                    )
                )
            os.close(write)
            self._results.append(result)

    def run(self, module: str, case: str) -> set[int]:
        """Run a case on every rank; return the ranks on which it ended well, the others having failed or died."""
        for rank in self._ranks:
            with contextlib.suppress(BrokenPipeError):
                rank.stdin.write(f"{module} {case}\n".encode())
                rank.stdin.flush()
        end = time.monotonic() + PATIENCE
        well = set()
        for rank, result in enumerate(self._results):
            ready, _, _ = select.select([result], [], [], max(0.0, end - time.monotonic()))
            if ready and os.read(result, 100) == b"ok\n":
                well.add(rank)
        return well

    def said(self) -> str:
        """Return what all ranks have printed."""
        logs = [Path(f"{self._folder.name}/{rank}.log").read_text(errors="replace") for rank in range(len(self._ranks))]
        return "\n".join(f"rank {rank} said:\n{log}" for rank, log in enumerate(logs))

    def close(self) -> dict[int, int]:
        """End the ranks; return how those did that did not end well."""
        codes = {}
        for rank in self._ranks:  # all at once: each takes a second to end
            with contextlib.suppress(BrokenPipeError):
                rank.stdin.close()
        for number, rank in enumerate(self._ranks):
            with contextlib.suppress(subprocess.TimeoutExpired):
                rank.wait(20)
            rank.kill()
            codes[number] = rank.wait()
        for result in self._results:
            os.close(result)
        return {number: code for number, code in codes.items() if code != 0}


_pools: dict[int, Pool] = {}


def run(module: str, case: str, world: int) -> None:
    """Run ``case`` on ``world`` ranks that are kept for the next; fail with what they printed unless all end well.

    ``case`` is a function of the module, and its arguments after rank and world: "compare:fsdp2:accumulate".
    """
    if world not in _pools:
        _pools[world] = Pool(world)
    pool = _pools[world]
    if pool.run(module, case) == set(range(world)):
        return
    del _pools[world]
    time.sleep(1)  # for the others to say what they met
    said = pool.said()
    pool.close()
    raise AssertionError(f"{module} {case}:\n{said}")


def run_alone(module: str, case: str, world: int, survivors: set[int]) -> None:
    """Run ``case`` on ranks of its own, which it may break: fail unless just the ``survivors`` end well."""
    pool = Pool(world)
    try:
        well = pool.run(module, case)
        assert well == survivors, f"{module} {case}: ended well: {well}\n{pool.said()}"
    finally:
        pool.close()


def end_pools() -> None:
    """End all ranks, which must end well."""
    for pool in list(_pools.values()):
        said, codes = pool.said(), pool.close()
        assert not codes, f"ranks ended with {codes}\n{said}"
    _pools.clear()


def main(rank: int, world: int, store: str, result: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    for line in sys.stdin:
        module, case = line.split()
        function, *arguments = case.split(":")
        try:
            getattr(importlib.import_module(module), function)(rank, world, *arguments)
            os.write(result, b"ok\n")
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os.write(result, b"failed\n")
            os._exit(1)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))

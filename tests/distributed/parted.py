"""The program of test_partition.py: two ranks that train alone, and merge their rows over a network that fails.

Arguments: rank, folder. It says when ten steps are merged, waits for a line, and makes 30 steps more.
"""

from __future__ import annotations

import datetime
import os
import sys
import time
import warnings

import torch
import torch.distributed as dist
from hooks import waits_forbidden

import pytracker
from pytracker.collectives import missing_ranks, ranks

FIRST_HOST, PORT = "10.77.0.1", 29577


def main() -> None:
    rank, folder = int(sys.argv[1]), sys.argv[2]
    ranks.PATIENCE, missing_ranks.ANSWER = 1.0, 4.0
    patience = datetime.timedelta(seconds=120)
    store = dist.TCPStore(FIRST_HOST, PORT, 2, is_master=rank == 0, timeout=patience)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    weight = torch.nn.Parameter(torch.zeros(4))
    run = pytracker.Run(folder, name="job")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tracker = pytracker.Tracker(
            [(f"of-rank-{rank}", weight)],
            run=run,
            every=5,
            diagnosis=None,
            process_group=dist.group.WORLD,
            rank_timeout=10.0,
        )
        for step in range(40):
            weight.grad = torch.full((4,), float(step))
            with waits_forbidden():
                tracker.step(loss=step)
            if step == 9:
                tracker.flush()
                print("ready", flush=True)
                sys.stdin.readline()
        time.sleep(12.0)  # longer than rank_timeout: the fault is found beside the training
        tracker.close()
    print([str(each.message) for each in caught if "no longer work together" in str(each.message)], flush=True)
    os._exit(0)  # torch's own store waits for the other


if __name__ == "__main__":
    main()

"""The program of test_elastic.py: FSDP2 under torchrun, with checkpoints, on as many ranks as there are.

Arguments: a folder, and the step at which it stops. Rank 1 kills itself in step 13 of the first life.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.fsdp import fully_shard

import pytracker

EVERY_CHECKPOINT = 5


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1)).double()


def batch(step: int) -> torch.Tensor:
    return torch.randn(12, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(step))


def main() -> None:
    folder, stop = Path(sys.argv[1]), int(sys.argv[2])
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    model = make_model()
    fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = pytracker.Run(folder / "runs", name="job", resume=True)
    with pytracker.Tracker(model, optimizer, run=run, every=4, diagnosis=None) as tracker:
        begin = 0
        if checkpoints := sorted(folder.glob("checkpoint-*/tracker.pt")):
            begin = int(checkpoints[-1].parent.name.split("-")[1])
            dcp.load({"model": model.state_dict()}, checkpoint_id=checkpoints[-1].parent)
            tracker.load_state_dict(torch.load(checkpoints[-1]))
        for step in range(begin, stop):
            x = batch(step).chunk(world)[rank]
            loss = model(x).square().mean()
            loss.backward()
            tracker.step(world=world)
            optimizer.step()
            optimizer.zero_grad()
            if step == 13 and rank == 1 and not (folder / "killed").exists():
                (folder / "killed").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if (step + 1) % EVERY_CHECKPOINT == 0:
                state, place = tracker.state_dict(), folder / f"checkpoint-{step + 1:03d}"
                dcp.save({"model": model.state_dict()}, checkpoint_id=place)
                if rank == 0:
                    torch.save(state, place / "tracker.pt")
                dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

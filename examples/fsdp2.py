"""FSDP2: every rank has a piece of each gradient, and the recorded statistics are those of the whole model.

torchrun --nproc-per-node 2 examples/fsdp2.py
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import pytracker


def main() -> None:
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    if kind == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    torch.manual_seed(0)
    x, y = load_digits(return_X_y=True)
    x = torch.tensor(x, dtype=torch.float32, device=kind)[rank::world] / 16
    y = torch.tensor(y, device=kind)[rank::world]

    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).to(kind)
    mesh = init_device_mesh(kind, (world,))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    with pytracker.Tracker(model, optimizer=optimizer, run="runs", every=20) as tracker:
        for _ in range(4):
            for batch in torch.randperm(len(x), device=kind)[: len(x) // 32 * 32].split(32):
                loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
                loss.backward()
                tracker.step(loss=loss, n=len(batch))
                optimizer.step()
                optimizer.zero_grad()
            means = tracker.epoch()
            if rank == 0:
                print(f"loss {means['loss']:.3f}, gradient norm {tracker.history['grad_norm'][-1]:.3f}")
    if rank == 0:
        print(*tracker.findings or ["no findings"], sep="\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""Tensor parallelism: layers are cut by columns and by rows, and the recorded statistics are those of the whole model.

torchrun --nproc-per-node 2 examples/tensor_parallel.py
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import pytracker


def main() -> None:
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    if kind == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    torch.manual_seed(0)  # every rank draws the same batches
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x, dtype=torch.float32, device=kind) / 16, torch.tensor(y, device=kind)

    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).to(kind)
    parallelize_module(model, init_device_mesh(kind, (world,)), {"0": ColwiseParallel(), "2": RowwiseParallel()})
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    with pytracker.Tracker(model, optimizer=optimizer, run="runs", every=20, check_replicas=True) as tracker:
        for _ in range(2):
            for batch in torch.randperm(len(x), device=kind).split(32):
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

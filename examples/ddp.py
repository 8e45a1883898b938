"""DDP: every rank has the whole gradient, so tracking needs no collective; the noise scale takes one an interval.

torchrun --nproc-per-node 2 examples/ddp.py
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import pytracker


def main() -> None:
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    device = (
        torch.device("cuda", rank % torch.cuda.device_count()) if torch.cuda.is_available() else torch.device("cpu")
    )
    torch.manual_seed(0)
    x, y = load_digits(return_X_y=True)
    x = torch.tensor(x, dtype=torch.float32, device=device)[rank::world] / 16
    y = torch.tensor(y, device=device)[rank::world]

    model = DistributedDataParallel(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).to(device))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    noise = pytracker.GradientNoiseScale(model, batch_size=32)
    with pytracker.Tracker(model, optimizer=optimizer, run="runs", every=20, noise_scale=noise) as tracker:
        for _ in range(4):
            for batch in torch.randperm(len(x), device=device)[: len(x) // 32 * 32].split(32):
                loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
                loss.backward()
                tracker.step(loss=loss, n=len(batch))
                optimizer.step()
                optimizer.zero_grad()
            means = tracker.epoch()
            if rank == 0:
                print(f"loss {means['loss']:.3f}, gradient norm {tracker.history['grad_norm'][-1]:.3f}")
    if rank == 0:
        print(f"noise scale: batches of about {tracker.history['noise_scale'][-1]:.0f} samples still pay off")
        print(*tracker.findings or ["no findings"], sep="\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

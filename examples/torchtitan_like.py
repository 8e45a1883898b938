"""A loop as torchtitan's: FSDP2 by block, accumulation, a clip over the mesh, checkpoints that hold the tracker.

torchrun --nproc-per-node 2 examples/torchtitan_like.py
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import pytracker

STEPS, MICRO = 60, 2


def train(model: nn.Module, tracker: pytracker.Tracker, optimizer: torch.optim.Optimizer, until: int) -> None:
    device = next(model.parameters()).device
    while tracker.steps < until:
        total = torch.zeros((), device=device)
        for _ in range(MICRO):
            x = torch.randn(16, 64, device=device)
            loss = (model(x) - x.roll(1, 1)).square().mean() / MICRO
            loss.backward()
            total += loss.detach()
        tracker.step(loss=total)  # the whole model's gradients, from every rank's pieces: before the clip
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def main() -> None:
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    if kind == "cuda":
        torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(3)), nn.Linear(64, 64)).to(kind)
    mesh = init_device_mesh(kind, (dist.get_world_size(),))
    for part in (*model, model):
        fully_shard(part, mesh=mesh)
    torch.manual_seed(dist.get_rank())  # its own data
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with pytracker.Tracker(model, optimizer=optimizer, run="runs", every=20) as tracker:
        train(model, tracker, optimizer, STEPS // 2)
        checkpoint = {"tracker": tracker.state_dict()}  # beside the model's and the optimizer's
        tracker.load_state_dict(checkpoint["tracker"])
        train(model, tracker, optimizer, STEPS)
    if dist.get_rank() == 0:
        loss = tracker.history["loss"]
        print(f"loss {loss[0]:.3f} -> {loss[-1]:.3f} in {len(loss)} steps of {dist.get_world_size()} ranks")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""Accelerate: `step` records where micro-batches complete a step, and takes an fp16 scale out."""

import torch
from accelerate import Accelerator
from torch import nn

import pytracker
from pytracker.integrations.accelerate import step

accelerator = Accelerator(cpu=not torch.cuda.is_available(), gradient_accumulation_steps=4)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 1))
x = torch.randn(4096, 20)
data = torch.utils.data.DataLoader(x, 16)
model, optimizer, data = accelerator.prepare(model, torch.optim.Adam(model.parameters(), lr=1e-2), data)

with pytracker.Tracker(model, optimizer=optimizer, run="runs") as tracker:  # after prepare
    for _ in range(3):
        for batch in data:
            with accelerator.accumulate(model):
                loss = (model(batch) - batch.sum(1, keepdim=True)).square().mean()
                accelerator.backward(loss)
                step(tracker, accelerator, loss=loss)  # before the clip
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 5.0)
                optimizer.step()
                optimizer.zero_grad()

loss = tracker.history["loss"]
print(f"loss {loss[0]:.3f} -> {loss[-1]:.3f} in {len(loss)} steps")
print(*tracker.findings or ["no findings"], sep="\n")

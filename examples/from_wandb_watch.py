"""From wandb.watch: it draws a histogram of each gradient every hundredth step, and waits for it on the step's path.

Run it with WANDB_MODE=offline to look before you log in.
"""

import torch

import pytracker
from pytracker.sinks import WandbSink

model = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

# wandb.init(project="digits", config={"lr": 1e-3})
# wandb.watch(model, log="gradients", log_freq=100)
sink = WandbSink(project="digits", config={"lr": 1e-3}, per_parameter="norm", depth=1)  # grad_norm/0, grad_norm/2
with pytracker.Tracker(model, optimizer=optimizer, sinks=[sink]) as tracker:
    for _ in range(200):
        x = torch.randn(64, 20)
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        # wandb.log({"loss": loss.item()})     a wait on each step
        tracker.step(loss=loss)  # every step, every layer; a thread sends it to W&B, findings as alerts
        optimizer.step()
print(f"{len(tracker.history['grad_norm'])} steps, {len(tracker.findings)} findings")

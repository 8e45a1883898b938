"""Mixed precision: record between `unscale_` and the clip; a step that the scaler skips shows its NaN and Inf."""

import torch
from torch import nn

import pytracker

device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.float16 if device == "cuda" else torch.bfloat16
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 1)).to(device)
optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
scaler = torch.amp.GradScaler(device, init_scale=1024.0)

with pytracker.Tracker(model, optimizer=optimizer) as tracker:
    for _ in range(200):
        x = torch.randn(64, 20, device=device)
        with torch.autocast(device, dtype=dtype):
            loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        tracker.step(loss=loss)  # or before `unscale_`, with grad_scale=scaler.get_scale(), which waits for the device
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        scaler.step(optimizer)
        scaler.update()

loss, norm = tracker.history["loss"], tracker.history["grad_norm"]
print(f"loss {loss[0]:.3f} -> {loss[-1]:.3f}, gradient norm {norm[0]:.3f} -> {norm[-1]:.3f}")
print(f"steps with a NaN or Inf: {sum(count > 0 for count in tracker.history['grad_nonfinite'])}")

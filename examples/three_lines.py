"""Adopt pytracker in three lines: import, a Tracker, and one call in each step."""

import torch

import pytracker  # 1

model = torch.nn.Linear(20, 1)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
tracker = pytracker.Tracker(model, optimizer=optimizer)  # 2

for _ in range(1000):
    x = torch.randn(64, 20)
    loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    tracker.step(loss=loss)  # 3
    optimizer.step()

tracker.close()
print(f"loss {tracker.history['loss'][0]:.3f} -> {tracker.history['loss'][-1]:.3f}")
print(f"gradient norm {tracker.history['grad_norm'][0]:.3f} -> {tracker.history['grad_norm'][-1]:.3f}")

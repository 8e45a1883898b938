"""A plain loop with validation, kept on disk: `pytracker report` makes a page of it."""

import torch
from sklearn.datasets import load_digits
from torch import nn

import pytracker

torch.manual_seed(0)
x, y = load_digits(return_X_y=True)
x, y = torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y)
order = torch.randperm(len(x))
train, test = order[:1500], order[1500:]

model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
run = pytracker.Run("runs", config={"lr": 3e-3, "batch": 50})

with pytracker.Tracker(model, optimizer=optimizer, run=run) as tracker:
    for epoch in range(8):
        for batch in train[torch.randperm(len(train))].split(50):
            loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            tracker.step(loss=loss, n=len(batch))
            optimizer.step()
        with torch.no_grad():
            outputs = model(x[test])
        accuracy = (outputs.argmax(1) == y[test]).float().mean()
        means = tracker.epoch(val_loss=nn.functional.cross_entropy(outputs, y[test]), accuracy=accuracy)
        print(f"epoch {epoch}: loss {means['loss']:.3f}, val_loss {means['val_loss']:.3f}, {means['accuracy']:.1%}")

print(*tracker.findings or ["no findings"], sep="\n")
print(f"pytracker report {run.path}")

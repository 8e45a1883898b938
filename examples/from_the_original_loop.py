"""From AverageMeter, the loop over parameters and a dict of lists, line by line: what goes is in the comments."""

import torch

from pytracker import Tracker  # from utils import AverageMeter

model = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
tracker = Tracker(model, optimizer=optimizer)  # history = {"train_loss": [], "grad_norm": [], "grad_max": []}

for epoch in range(3):
    # losses = AverageMeter("loss")
    # norms = []
    for _ in range(100):
        x = torch.randn(64, 20)
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        # total = 0.0
        # for p in model.parameters():
        #     total += p.grad.norm(2).item() ** 2     a kernel and a wait for each parameter
        # norms.append(total ** 0.5)
        # losses.update(loss.item(), len(x))          one more wait
        tracker.step(loss=loss, n=len(x))  # no wait at all
        optimizer.step()
    # history["train_loss"].append(losses.avg)
    means = tracker.epoch()
    tracker.history["train_loss"].append(means["loss"])  # a history is a dict of lists, if you want one
    print(f"epoch {epoch}: loss {means['loss']:.4f}, gradient norm {tracker.history['grad_norm'][-1]:.4f}")

tracker.close()
print(len(tracker.history["grad_norm"]), "norms,", len(tracker.history["grad_max"]), "maxima")

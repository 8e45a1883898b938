"""Keep your own logging, and replace only the loop over the parameters."""

import torch

from pytracker import AverageMeter, clip_grad_norm_, compute_gradient_stats, gradient_stats

model = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
losses = AverageMeter()

for step in range(200):
    x = torch.randn(64, 20)
    loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    losses.update(loss, n=len(x))  # the tensor itself: nothing waits until a value is read
    clip_grad_norm_(model.parameters(), max_norm=5.0)
    optimizer.step()
    if step % 50 == 0:
        stats = compute_gradient_stats(model)  # two floats, one wait for all parameters
        print(f"step {step}: mean loss {losses.avg:.3f}, norm {stats['grad_norm']:.3f}, max {stats['grad_max']:.3f}")

stats = gradient_stats(model)  # everything, on the device, without a wait
for name, norm, zeros in zip(stats.names, stats.norms.tolist(), stats.zero_fraction.tolist(), strict=True):
    print(f"{name:<10} norm {norm:.4f}, {zeros:.0%} zeros")

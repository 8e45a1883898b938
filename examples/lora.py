"""Low-rank adapters on a frozen base: only what is trained has gradients, and only that is tracked."""

import torch
from torch import nn

import pytracker


class LowRank(nn.Module):
    """Adds a trained product of two thin matrices to a frozen linear layer."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features**0.5)
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x @ self.a.T @ self.b.T


torch.manual_seed(0)
model = nn.Sequential(LowRank(nn.Linear(20, 64), 4), nn.Tanh(), LowRank(nn.Linear(64, 1), 4))
trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
optimizer = torch.optim.Adam([parameter for _, parameter in trained], lr=1e-2)

with pytracker.Tracker(trained, optimizer=optimizer) as tracker:
    for _ in range(300):
        x = torch.randn(64, 20)
        loss = (model(x) - x[:, :3].sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        tracker.step(loss=loss)
        optimizer.step()

steps, norms = tracker.history.parameters.norms()  # [steps], [steps, parameters]
for info, first, last in zip(tracker.history.parameters.infos, norms[0], norms[-1], strict=True):
    print(f"{info.name:<5} gradient norm {first:.4f} -> {last:.4f}")  # b is zero at first, so a has no gradient
print(f"loss {tracker.history['loss'][0]:.3f} -> {tracker.history['loss'][-1]:.3f}")

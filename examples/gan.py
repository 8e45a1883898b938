"""A GAN: two players in one run, each with its optimizer, and each stepped when its own gradients are there."""

import torch
from torch import nn

import pytracker

torch.manual_seed(0)
generator = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
critic = nn.Sequential(nn.Linear(2, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))
players = {"generator": generator, "critic": critic}
optimizers = {name: torch.optim.Adam(each.parameters(), lr=1e-3, betas=(0.5, 0.9)) for name, each in players.items()}
binary = nn.functional.binary_cross_entropy_with_logits

with pytracker.Tracker(players, optimizers, run=pytracker.Run("runs", name="gan")) as tracker:
    for _ in range(400):
        angle = torch.rand(64) * 2 * torch.pi
        real, fake = torch.stack([angle.cos(), angle.sin()], 1), generator(torch.randn(64, 4))
        loss = binary(critic(real), torch.ones(64, 1)) + binary(critic(fake.detach()), torch.zeros(64, 1))
        optimizers["critic"].zero_grad()
        loss.backward()
        tracker.step(only="critic", loss=loss)  # reads the critic's gradients alone
        optimizers["critic"].step()

        loss = binary(critic(fake), torch.ones(64, 1))
        optimizers["generator"].zero_grad()
        loss.backward()  # leaves gradients in the critic too, which are not read
        tracker.step(only="generator", loss=loss)
        optimizers["generator"].step()

for name in players:
    norms = tracker.history[f"{name}/grad_norm"]
    print(f"{name:<9} {len(norms)} steps, gradient norm {norms[0]:.3f} -> {norms[-1]:.3f}")

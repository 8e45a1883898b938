"""A GAN: each player has its tracker, and is stepped when its own gradients are there."""

import torch
from torch import nn

import pytracker

torch.manual_seed(0)
generator = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
critic = nn.Sequential(nn.Linear(2, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))
players = {
    "generator": torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.5, 0.9)),
    "critic": torch.optim.Adam(critic.parameters(), lr=1e-3, betas=(0.5, 0.9)),
}
runs = {name: pytracker.Run("runs", name=name) for name in players}
binary = nn.functional.binary_cross_entropy_with_logits

with (
    pytracker.Tracker(generator, optimizer=players["generator"], run=runs["generator"]) as of_generator,
    pytracker.Tracker(critic, optimizer=players["critic"], run=runs["critic"]) as of_critic,
):
    for _ in range(400):
        angle = torch.rand(64) * 2 * torch.pi
        real, fake = torch.stack([angle.cos(), angle.sin()], 1), generator(torch.randn(64, 4))
        loss = binary(critic(real), torch.ones(64, 1)) + binary(critic(fake.detach()), torch.zeros(64, 1))
        players["critic"].zero_grad()
        loss.backward()
        of_critic.step(adversarial=loss)  # not `loss`: nobody expects it to fall
        players["critic"].step()

        loss = binary(critic(fake), torch.ones(64, 1))
        players["generator"].zero_grad()
        loss.backward()  # leaves gradients in the critic too, which the generator's tracker does not read
        of_generator.step(adversarial=loss)
        players["generator"].step()

for name, tracker in (("generator", of_generator), ("critic", of_critic)):
    norms = tracker.history["grad_norm"]
    print(f"{name:<9} {len(norms)} steps, gradient norm {norms[0]:.3f} -> {norms[-1]:.3f}")

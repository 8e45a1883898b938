"""A case of test_parallelism.py: two players whose parameters are sharded, and step in turn."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

import pytracker


def norm_of(model: nn.Module) -> float:
    whole = [parameter.grad.full_tensor().double() for parameter in model.parameters()]
    return float(sum((each**2).sum() for each in whole) ** 0.5)


def sharded(rank: int, world: int) -> None:
    """Each player's norm is that of its whole gradient, and a clip goes by that."""
    torch.manual_seed(0)
    players = {
        "G": nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 5)),
        "D": nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 1)),
    }
    for model in players.values():
        fully_shard(model)
    optimizers = {name: torch.optim.SGD(model.parameters(), lr=0.01) for name, model in players.items()}
    expected: dict[str, list[float]] = {"G": [], "D": []}
    torch.manual_seed(rank)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytracker.Tracker(players, optimizers, every=5, diagnosis=None) as tracker:
            for step in range(17):
                turn = "GDD"[step % 3]
                model, optimizer = players[turn], optimizers[turn]
                optimizer.zero_grad()
                model(torch.randn(4, 3 if turn == "G" else 5)).pow(2).mean().backward()
                expected[turn].append(norm_of(model))
                tracker.step(only=turn, loss=1.0, clip=0.05 if turn == "D" else None)
                if turn == "D":
                    assert norm_of(model) == pytest.approx(min(0.05, expected[turn][-1]), rel=1e-4)
                optimizer.step()
    if rank == 0:
        for name, norms in expected.items():
            assert tracker.history[f"{name}/grad_norm"][:] == pytest.approx(norms, rel=1e-6)
        missing = tracker.history.parameters.field("missing")
        assert (missing == 0).all()
        assert tracker.history["D/clip_factor"].steps.tolist() == [step for step in range(17) if step % 3]

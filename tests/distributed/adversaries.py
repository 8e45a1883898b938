"""Cases of test_parallelism.py: players whose parameters are sharded; shards that are read in the backward."""

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


def in_backward(rank: int, world: int) -> None:
    """Shards whose gradients are freed as they come have the statistics of the whole gradient."""
    torch.manual_seed(0)
    model = fully_shard(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)).double())
    seen: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():

        def free(which: torch.Tensor, name: str = name) -> None:
            seen[name], which.grad = which.grad, None

        parameter.register_post_accumulate_grad_hook(free)
    torch.manual_seed(rank)
    expected = []
    with pytracker.Tracker(model, every=3, diagnosis=None, in_backward=True) as tracker:
        for _ in range(7):
            model(torch.randn(2, 4, dtype=torch.float64)).square().mean().backward()
            tracker.step()
            expected.append(float(sum((each.full_tensor() ** 2).sum() for each in seen.values()) ** 0.5))
    if rank == 0:
        assert tracker.history["grad_norm"][:] == pytest.approx(expected, rel=1e-12)


def compiled(rank: int, world: int) -> None:
    """Within torch.compile the calls of a tracker of DTensors break the graph, and the numbers are the same."""
    torch.manual_seed(0)
    model = fully_shard(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)).double())
    torch.manual_seed(rank)
    expected = []
    with pytracker.Tracker(model, every=3, diagnosis=None) as tracker:

        @torch.compile(backend="eager")
        def step(loss: torch.Tensor) -> torch.Tensor:
            tracker.step(loss=loss * 2, clip=0.1)
            return loss + 1

        for _ in range(7):
            for parameter in model.parameters():
                parameter.grad = None
            model(torch.randn(2, 4, dtype=torch.float64)).square().mean().backward()
            expected.append(norm_of(model))
            step(torch.tensor(1.0))
            assert norm_of(model) == pytest.approx(min(0.1, expected[-1]), rel=1e-4)
    if rank == 0:
        assert tracker.history["grad_norm"][:] == pytest.approx(expected, rel=1e-12)
        assert tracker.history["loss"][:] == [2.0] * 7

"""Cases of test_clipping_of_shards.py: gradients that are spread over ranks are clipped as those of one rank are."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from layouts import EVERY, LAYOUTS, RATE, STEPS, Network, batch, readers_of
from torch import nn
from torch.distributed.fsdp import fully_shard

import pytracker
from pytracker import AGC, MaxNorm, Tracker
from pytracker.errors import InvalidValueError, LayoutError

LIMIT = 0.05


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def trained_alone(layout: str, world: int, order: float) -> tuple[list[float], list[torch.Tensor]]:
    """Return the norms of a training on one rank, clipped in plain arithmetic, and the parameters at its end."""
    torch.manual_seed(0)
    model = Network().double()
    norms = []
    for step in range(STEPS):
        model.zero_grad()
        losses = [model(batch(step, reader)).square().mean() for reader in range(readers_of(layout, world))]
        torch.stack(losses).mean().backward()
        norms.append(torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in model.parameters()]), order).item())
        with torch.no_grad():
            for p in model.parameters():
                p -= RATE * min(1.0, LIMIT / (norms[-1] + 1e-6)) * p.grad
    return norms, [p.detach() for p in model.parameters()]


def train(rank: int, world: int, layout: str, way: str, order: str = "2") -> None:
    """Clip within the step, after it, by clip_grad_norm_ alone, or in a fused optimizer."""
    norms, expected = trained_alone(layout, world, float(order))
    torch.manual_seed(0)
    model = LAYOUTS[layout](Network().double(), world)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, fused=way == "fused")
    with Tracker(model, optimizer=optimizer, every=EVERY, diagnosis=None) as tracker:
        for step in range(STEPS):
            loss = model(batch(step, rank * readers_of(layout, world) // world)).square().mean()
            loss.backward()
            before = [whole(p.grad).clone() for p in model.parameters()]
            if way == "after":
                tracker.step(loss=loss.detach())
                norm = tracker.clip(LIMIT, order)
                np.testing.assert_allclose(norm.item(), norms[step], rtol=1e-9)
            elif way == "alone":
                tracker.step(loss=loss.detach())
                norm = pytracker.clip_grad_norm_(model.parameters(), LIMIT, float(order))
                np.testing.assert_allclose(whole(norm).item(), norms[step], rtol=1e-9)
            else:
                tracker.step(loss=loss.detach(), clip=MaxNorm(LIMIT, order))
            if way == "fused":
                after = [whole(p.grad) for p in model.parameters()]
                assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
            optimizer.step()
            optimizer.zero_grad()
    for p, wanted in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(whole(p.detach()), wanted, rtol=1e-6 if way == "fused" else 1e-10, atol=1e-9)
    if rank == 0 and way != "alone":
        factors = [min(1.0, LIMIT / (norm + 1e-6)) for norm in norms]
        assert min(factors) < 1
        np.testing.assert_allclose(tracker.history["clip_factor"][:], factors, rtol=1e-6)
        if way == "fused":
            assert set(tracker.history["step_skipped"][:]) == {0.0}


def skipped(rank: int, world: int) -> None:
    """A NaN in one rank's shard makes every rank skip the step."""
    torch.manual_seed(0)
    model = fully_shard(Network())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    with Tracker(model, optimizer=optimizer, every=2, diagnosis=None) as tracker:
        for step in range(4):
            model(batch(step, rank).float()).square().mean().backward()
            if step == 2:
                before = [whole(p.detach()).clone() for p in model.parameters()]
                if rank == world - 1:
                    model.first.weight.grad.to_local().view(-1)[0] = math.nan
            tracker.step(clip=1.0)
            optimizer.step()
            optimizer.zero_grad()
            if step == 2:
                assert all(torch.equal(whole(p), q) for p, q in zip(model.parameters(), before, strict=True))
    if rank == 0:
        assert tracker.history["step_skipped"][:] == [0, 0, 1, 0]


def pipeline(rank: int, world: int) -> None:
    """Each rank has a stage, and all have the same norm layer, which counts once."""
    torch.manual_seed(0)
    stages = [nn.Linear(4, 4) for _ in range(world)]
    shared = nn.LayerNorm(4)
    every = [*(p for stage in stages for p in stage.parameters()), *shared.parameters()]
    for p in every:
        p.grad = torch.randn_like(p)
    norm = math.sqrt(sum((p.grad.double() ** 2).sum().item() for p in every))
    largest = max(p.grad.abs().max().item() for p in every)
    named = [(f"stage{rank}.{name}", p) for name, p in stages[rank].named_parameters()]
    named += [(f"shared.{name}", p) for name, p in shared.named_parameters()]
    before = copy.deepcopy([p.grad for _, p in named])
    with Tracker(named, process_group=dist.group.WORLD, every=2, diagnosis=None) as tracker:
        tracker.step(loss=1.0, clip=0.5)
        for (_, p), gradient in zip(named, before, strict=True):
            torch.testing.assert_close(p.grad, gradient * 0.5 / (norm + 1e-6), rtol=1e-6, atol=0)
            p.grad = gradient.clone()
        tracker.step(loss=1.0)
        np.testing.assert_allclose(tracker.clip(0.01, math.inf).item(), largest, rtol=1e-12)
        with pytest.raises(InvalidValueError, match=r"only the norms of order 2 and inf are known"):
            tracker.clip(0.01, 1.0)
        with pytest.raises(LayoutError, match="AGC needs whole parameters"):
            tracker.clip(AGC())
    if rank == 0:
        np.testing.assert_allclose(tracker.history["clip_factor"][0], 0.5 / (norm + 1e-6), rtol=1e-9)

"""Cases of test_noise_scale.py: the noise scale under DDP, against per-rank gradients computed by hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hooks import until_merged
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

import pytracker
from pytracker.collectives.testing import collectives as counted_collectives
from pytracker.errors import InvalidTypeError, InvalidValueError, LayoutError

BATCH, STEPS, EVERY = 4, 9, 4
OPTIONS = {
    "plain": {},
    "buckets": {"bucket_cap_mb": 1e-4},
    "static": {"static_graph": True, "bucket_cap_mb": 1e-4},
    "views": {"gradient_as_bucket_view": True},
    "unused": {"find_unused_parameters": True, "bucket_cap_mb": 1e-4},
}


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.spare, self.last = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor, spare: bool = False) -> Tensor:
        x = self.first(x).tanh()
        return self.last(self.spare(x).tanh() if spare else x)


def batch(step: int, rank: int, part: int = 0) -> Tensor:
    return torch.randn(BATCH, 6, generator=torch.Generator().manual_seed(1000 * part + 10 * step + rank)).double()


def train(
    rank: int, case: str, *, noise: bool = True, parts: int = 1, scale: float = 1.0
) -> Iterator[tuple[pytracker.Tracker, nn.Module]]:
    """Train some steps; yield the tracker and the model at each, with its gradient."""
    network = Network().double()
    if case != "unused":
        del network.spare
    model = DistributedDataParallel(network, **OPTIONS[case])
    meter = pytracker.GradientNoiseScale(model, BATCH * parts, decay=0.9) if noise else None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with pytracker.Tracker(model, every=EVERY, diagnosis=None, noise_scale=meter) as tracker:
        for step in range(STEPS):
            for part in range(parts):
                with model.no_sync() if part < parts - 1 else nullcontext():
                    (scale * model(batch(step, rank, part)).square().mean() / parts).backward()
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad /= scale  # as GradScaler.unscale_ does
            tracker.step()
            yield tracker, network
            optimizer.step()
            optimizer.zero_grad()


def by_hand(network: nn.Module, step: int, world: int, parts: int) -> tuple[float, float]:
    """Return the mean squared norm of the ranks' gradients, and that of their mean."""
    gradients = []
    for rank in range(world):
        loss = sum(network(batch(step, rank, part)).square().mean() / parts for part in range(parts))
        used = [parameter for name, parameter in network.named_parameters() if "spare" not in name]
        gradients.append(torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, used)]))
    stacked = torch.stack(gradients)
    return float(stacked.square().sum(dim=1).mean()), float(stacked.mean(dim=0).square().sum())


def identities(rank: int, world: int, case: str, parts: int = 1, scale: float = 1.0) -> None:
    parts, scale = int(parts), float(scale)
    expected = []
    steps = train(rank, case, parts=parts, scale=scale)
    for _, (tracker, network) in zip(range(STEPS), steps, strict=False):
        expected.append(by_hand(network, len(expected), world, parts))
        assert tracker.steps == len(expected)
    list(steps)  # ends the training
    assert not [name for name in tracker.history if name.startswith("_")]
    if rank:
        assert "noise_scale" not in tracker.history
        return
    small, large = np.array(expected).T
    b, big = BATCH * parts, BATCH * parts * world
    squared = (big * large - b * small) / (big - b)
    variance = (small - large) / (1 / b - 1 / big)
    history = tracker.history
    np.testing.assert_allclose(history["grad_sq_estimate"][:], squared, rtol=1e-10)
    np.testing.assert_allclose(history["grad_variance_estimate"][:], variance, rtol=1e-10)
    weights = 0.9 ** np.arange(STEPS)[::-1]
    for step in range(STEPS):
        recent = weights[STEPS - 1 - step :]
        ratio = (recent @ variance[: step + 1]) / (recent @ squared[: step + 1])
        got = history["noise_scale"][step]
        assert got == pytest.approx(ratio, rel=1e-10) if recent @ squared[: step + 1] > 0 else np.isnan(got)
    assert history["noise_scale"].steps.tolist() == list(range(STEPS))


def untouched(rank: int, world: int, case: str) -> None:
    """The gradients have the bits of DDP without a hook."""
    with_noise, without = train(rank, case), train(rank, case, noise=False)
    for (_, network), (_, other) in zip(with_noise, without, strict=True):
        for mine, theirs in zip(network.parameters(), other.parameters(), strict=True):
            assert (mine.grad is None) == (theirs.grad is None)
            assert mine.grad is None or torch.equal(mine.grad, theirs.grad)


def collectives(rank: int, world: int) -> None:
    """No collective on a step, two a drain."""
    model = DistributedDataParallel(nn.Linear(6, 3))
    noise = pytracker.GradientNoiseScale(model, BATCH)
    per_step = []
    with pytracker.Tracker(model, every=EVERY, diagnosis=None, noise_scale=noise) as tracker:
        for _ in range(3 * EVERY):
            model(torch.randn(BATCH, 6)).mean().backward()
            until_merged(tracker)
            with counted_collectives() as counted:
                tracker.step()
            per_step.append(len(counted))
    assert per_step == [0, 0, 0, 2] * 3


def exact(rank: int, world: int) -> None:
    """A loss that is linear in the weights: a sample's gradient is the sample, of known mean and covariance."""
    steps, mean, deviation = 3000, torch.tensor([1.0, -0.5, 0.25]), torch.tensor([2.0, 1.0, 3.0])
    model = DistributedDataParallel(nn.Linear(3, 1, bias=False))
    noise = pytracker.GradientNoiseScale(model, BATCH, decay=1 - 1e-9)  # all steps count alike
    random = torch.Generator().manual_seed(rank)
    with pytracker.Tracker(model, every=100, diagnosis=None, noise_scale=noise) as tracker:
        for _ in range(steps):
            samples = mean + deviation * torch.randn(BATCH, 3, generator=random)
            model(samples).mean().backward()
            tracker.step()
            model.zero_grad()
    squared, variance = float(mean.square().sum()), float(deviation.square().sum())
    for name, truth in () if rank else (("grad_sq_estimate", squared), ("grad_variance_estimate", variance)):
        values = np.array(tracker.history[name][:])
        error = values.std() / steps**0.5
        assert abs(values.mean() - truth) < 4 * error < 0.2 * truth, (name, values.mean(), truth, error)
    assert rank or tracker.history["noise_scale"][-1] == pytest.approx(variance / squared, rel=0.15)


def left_out(rank: int, world: int) -> None:
    """A step that isn't synchronized has no value, one that isn't finite doesn't spoil the average."""
    model = DistributedDataParallel(nn.Linear(3, 1))
    noise = pytracker.GradientNoiseScale(model, BATCH, hook=bf16_compress_hook)
    with pytracker.Tracker(model, every=2, diagnosis=None, noise_scale=noise) as tracker:
        for step in range(6):
            x = torch.full((BATCH, 3), 1.0 + rank + step)
            with model.no_sync() if step == 1 else nullcontext():
                (model(x) * (float("nan") if step == 3 else 1.0)).mean().backward()
            tracker.step()
            model.zero_grad()
    if rank:
        return
    assert tracker.history["noise_scale"].steps.tolist() == [0, 2, 4, 5]
    assert np.isfinite(tracker.history["noise_scale"][:]).all()


def refused(rank: int, world: int) -> None:
    with pytest.raises(InvalidTypeError, match="model is a Linear"):
        pytracker.GradientNoiseScale(nn.Linear(2, 2), 4)
    model = DistributedDataParallel(nn.Linear(2, 2))
    for keywords in ({"batch_size": 0}, {"batch_size": 4, "decay": 1.0}):
        with pytest.raises(InvalidValueError, match=r"(batch_size|decay) is"):
            pytracker.GradientNoiseScale(model, **keywords)
    noise = pytracker.GradientNoiseScale(model, 4)
    with pytest.raises(LayoutError, match="has a communication hook already"):
        pytracker.GradientNoiseScale(model, 4)
    with pytest.raises(InvalidTypeError, match="noise_scale is 4"):
        pytracker.Tracker(model, noise_scale=4)
    with pytest.raises(LayoutError, match="spread over the ranks"):
        pytracker.Tracker(model, noise_scale=noise, process_group=dist.group.WORLD)
    alone = dist.new_group([rank], use_local_synchronization=True)
    with pytest.raises(LayoutError, match="one rank only"):
        pytracker.GradientNoiseScale(DistributedDataParallel(nn.Linear(2, 2), process_group=alone), 4)

"""Clips on a device: how many launches they are, what they read and write, and that nobody waits."""

from __future__ import annotations

import math

import pytest
import torch
from cuda_helpers import SIMULATED
from torch import nn

from pytracker import MaxNorm, Tracker, ZClip

if SIMULATED:
    import cudasim


def model_on_the_device(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 3)).to(dtype).cuda()
    for p in model.parameters():
        p.grad = torch.randn(p.shape).to(dtype).cuda()
    return model


def norm_of(model: nn.Module, order: float = 2.0) -> float:
    return torch.linalg.vector_norm(
        torch.cat([p.grad.cpu().double().flatten() for p in model.parameters()]), order
    ).item()


@pytest.mark.simulated
def test_a_clip_within_the_step_is_two_launches_and_one_after_it_three():
    model = model_on_the_device(torch.float64)
    with Tracker(model, diagnosis=None, seconds=1e6) as tracker:
        tracker.step(clip=1.0)
        with cudasim.expect(launches=2, blocking=0, h2d=0, d2h=0, kernels={"gradients_kernel": 1, "scale_kernel": 1}):
            tracker.step(clip=1.0)
        tracker.step()
        tracker.clip(1.0)
        with cudasim.expect(
            launches=3,
            blocking=0,
            h2d=0,
            d2h=0,
            kernels={"gradients_kernel": 1, "decide_kernel": 1, "scale_kernel": 1},
        ):
            tracker.step()
            tracker.clip(1.0)


@pytest.mark.simulated
def test_a_clip_by_a_fused_optimizer_is_the_steps_own_launch():
    model = model_on_the_device()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    with Tracker(model, optimizer, diagnosis=None, seconds=1e6) as tracker:
        tracker.step(clip=0.5)
        with cudasim.expect(launches=1, blocking=0, h2d=0, d2h=0, kernels={"gradients_kernel": 1}):
            tracker.step(clip=0.5)
        factor = 0.5 / (norm_of(model) + 1e-6)
        assert optimizer.grad_scale.item() == pytest.approx(1 / factor, rel=1e-6)
        assert optimizer.found_inf.item() == 0
        model[0].bias.grad[0] = math.nan
        tracker.step(clip=0.5)
        assert (optimizer.grad_scale.item(), optimizer.found_inf.item()) == (1, 1)
    assert tracker.history["step_skipped"][:] == [0, 0, 1]
    assert tracker.history["clip_factor"][:2] == pytest.approx([factor, factor])


@pytest.mark.parametrize("order", [2.0, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gradients_and_records_are_those_of_the_host(dtype: torch.dtype, order: float):
    on_device, on_host = model_on_the_device(dtype), model_on_the_device(dtype).cpu()
    for p, q in zip(on_device.parameters(), on_host.parameters(), strict=True):
        q.grad = p.grad.cpu()
    trackers = [Tracker(model, diagnosis=None, every=2) for model in (on_device, on_host)]
    for tracker in trackers:
        for bound in (1e6, 0.9, 0.01):
            tracker.step(clip=MaxNorm(bound, order))
            tracker.step()
            if dtype == torch.float64 or not SIMULATED:  # torch narrows what clip returns by a kernel of its own
                tracker.clip(bound / 2, order)
        tracker.close()
    for p, q in zip(on_device.parameters(), on_host.parameters(), strict=True):
        torch.testing.assert_close(p.grad.cpu(), q.grad, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=0)
    on_device_too, expected = (tracker.history["clip_factor"][:] for tracker in trackers)
    assert len(expected) >= 3
    # Host and device group fp32 sums differently: each is within 9e-8 of exact.
    tolerance = {torch.bfloat16: 1e-2, torch.float32: 2e-7, torch.float64: 1e-9}[dtype]
    assert on_device_too == pytest.approx(expected, rel=tolerance)


@pytest.mark.skipif(SIMULATED, reason="torch's kernels do not run in the simulator")
def test_a_rule_that_adapts_asks_nothing_of_the_host():
    p = nn.Parameter(torch.zeros(64, device="cuda"))
    rule = ZClip(warmup=3)
    with Tracker([p], diagnosis=None, seconds=1e6) as tracker:
        for step in range(5):
            p.grad = torch.full((64,), 50.0 if step == 4 else 1.0 + 0.1 * step, device="cuda")
            tracker.step(clip=rule)
    factors = tracker.history["clip_factor"][:]
    assert factors[:4] == [1.0] * 4
    assert factors[4] < 0.1


@pytest.mark.parametrize("late", [False, True])
def test_each_replay_of_a_captured_step_clips_and_records_its_factor(late: bool):
    p = nn.Parameter(torch.zeros(3000, dtype=torch.float64).cuda())
    p.grad = torch.ones(3000, dtype=torch.float64).cuda()
    graph = torch.cuda.CUDAGraph()
    with Tracker([("w", p)], every=4, diagnosis=None) as tracker:
        tracker.step(clip=1.0)
        with torch.cuda.graph(graph):
            if late:
                tracker.step()
                tracker.clip(2.0)
            else:
                tracker.step(clip=2.0)
        for step in range(1, 7):
            p.grad.copy_(torch.full((3000,), float(step), dtype=torch.float64))
            graph.replay()
            tracker.replayed()
            assert norm_of_gradient(p) == pytest.approx(2.0, rel=1e-6)
    norms = [3000**0.5 * max(step, 1) for step in range(7)]
    factors = [bound / (norm + 1e-6) for bound, norm in zip([1.0, *[2.0] * 6], norms, strict=True)]
    assert tracker.history["grad_norm"][:] == pytest.approx(norms)
    assert tracker.history["clip_factor"][:] == pytest.approx(factors)


def norm_of_gradient(p: nn.Parameter) -> float:
    return p.grad.cpu().norm().item()

"""What single steps add to the parameters, on a GPU: torch's kernels copy and subtract, which no simulator has."""

from __future__ import annotations

import pytest
import torch
from cuda_helpers import SIMULATED

import pytracker

pytestmark = pytest.mark.skipif(SIMULATED, reason="torch's kernels do not run in the simulator")


def test_updates_are_measured_without_a_wait():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Tanh(), torch.nn.Linear(32, 8)).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    x, updates = torch.randn(16, 64, device="cuda"), []
    with pytracker.Tracker(model, optimizer, every=4, weights_every=2, diagnosis=None) as tracker:
        for _ in range(8):
            before = [parameter.detach().double().clone() for parameter in model.parameters()]
            optimizer.zero_grad()
            model(x).square().mean().backward()
            torch.cuda.set_sync_debug_mode("error")
            try:
                tracker.step()
                optimizer.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            moved = zip(model.parameters(), before, strict=True)
            updates.append([(now.detach().double() - then).norm().item() for now, then in moved])
    assert tracker.waits == 0
    parameters = tracker.history.parameters
    for found, last in zip(parameters.field("update_norm"), parameters.last_step.tolist(), strict=True):
        measured = [step for step in range(0, last, 2) if step > last - 4]
        assert found.tolist() == pytest.approx(updates[measured[-1]], rel=1e-5)

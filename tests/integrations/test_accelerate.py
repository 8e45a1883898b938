"""Accelerate: the recipe, and pytracker as a tracker of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import pytracker
from pytracker import Tracker

accelerate = pytest.importorskip(
    "accelerate", reason="accelerate is not installed: pip install 'pytracker[accelerate]'"
)

import gradients

from pytracker.integrations.accelerate import PytrackerTracker, step


@pytest.fixture(autouse=True)
def new_state() -> None:
    """Accelerate keeps one state for a process."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def test_a_step_is_recorded_before_the_clip_where_micro_batches_complete_it_and_logs_join_the_run(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    accelerator = accelerate.Accelerator(
        cpu=True, gradient_accumulation_steps=2, log_with=PytrackerTracker(str(tmp_path), name="a")
    )
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    accelerator.init_trackers("project", config={"lr": 0.1})
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    batches = torch.utils.data.DataLoader(torch.randn(20, 4), 4)  # five micro-batches: the last step has one
    model, optimizer, batches = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), batches)
    norms, losses = [], []
    run = accelerator.get_tracker("pytracker", unwrap=True)
    with Tracker(model, optimizer=optimizer, run=run, diagnosis=None) as tracker:
        for x in batches:
            with accelerator.accumulate(model):
                loss = model(x).square().mean()
                accelerator.backward(loss)
                step(tracker, accelerator, loss=loss)
                losses.append(loss.item())
                if accelerator.sync_gradients:
                    norms.append(gradients.total(model) / 256)
                    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
                optimizer.step()
                optimizer.zero_grad()
        accelerator.log({"accuracy": 0.5, "note": "a text"}, step=3)
    accelerator.end_training()
    kept = pytracker.load_run(tmp_path / "a")
    np.testing.assert_allclose(kept.history["grad_norm"][:], norms, rtol=1e-12)
    assert len(norms) == 3
    means = [np.mean(losses[:2]), np.mean(losses[2:4]), losses[4]]
    np.testing.assert_allclose(kept.history["loss"][:], means, rtol=1e-6)
    assert kept.history["lr"][:] == [0.1] * 3
    assert (kept.history["accuracy"].steps.tolist(), kept.history["accuracy"][:]) == ([3], [0.5])
    assert kept.history.meta["config"] == {"lr": 0.1}
    assert kept.state == "finished"

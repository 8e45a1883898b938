"""A tracker inside a compiled training step."""

from __future__ import annotations

import torch
import torch._dynamo
from torch._dynamo.utils import counters

import pytracker


def test_a_step_inside_a_compiled_function_is_not_compiled_again_on_each_call() -> None:
    torch._dynamo.reset()
    counters.clear()
    model = torch.nn.Linear(4, 1)

    with pytracker.Tracker(model, every=4, diagnosis=None) as tracker:

        @torch.compile(backend="eager")
        def train(x: torch.Tensor) -> torch.Tensor:
            loss = model(x).square().mean()
            loss.backward()
            tracker.step(loss=loss)
            return loss

        train(torch.ones(3, 4))
        after_first = counters["stats"]["unique_graphs"]
        for size in range(2, 12):
            train(torch.full((3, 4), float(size)))
    assert after_first <= counters["stats"]["unique_graphs"] <= after_first + 2
    assert len(tracker.history["loss"]) == 11
    torch._dynamo.reset()

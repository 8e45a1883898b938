"""Players on a device: the step of one is one launch that reads its gradients alone, captured in a graph as well."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from cuda_helpers import SIMULATED, with_gradient

from pytracker import Tracker

if SIMULATED:
    import cudasim

SIZES = {"G": 5000, "D": 300}


def players() -> dict[str, list[tuple[str, torch.Tensor]]]:
    return {name: [("w", with_gradient(torch.full((size,), 1.0)))] for name, size in SIZES.items()}


@pytest.mark.simulated
def test_a_step_of_a_player_is_one_launch_and_no_wait():
    with Tracker(players(), every=1000, seconds=1e6, diagnosis=None) as tracker:
        tracker.step(only="G")  # makes the tables
        for turn in ("D", "G", "D", "G"):
            with cudasim.expect(launches=1, blocking=0, h2d=0, d2h=0, allocations=0, kernels={"gradients_kernel": 1}):
                tracker.step(only=turn)
    assert tracker.history["G/grad_norm"][:] == pytest.approx([math.sqrt(5000)] * 3)
    assert tracker.history["D/grad_norm"][:] == pytest.approx([math.sqrt(300)] * 2)


def test_graphs_of_two_players_give_each_replay_its_row():
    models = players()
    graphs = {name: torch.cuda.CUDAGraph() for name in models}
    expected: dict[str, list[tuple[int, float]]] = {name: [] for name in models}
    with Tracker(models, every=4, diagnosis=None) as tracker:
        for name, graph in graphs.items():
            with torch.cuda.graph(graph):
                tracker.step(only=name)
        for count, name in enumerate(["D", "G", "G", "D", "D", "G", "D", "G", "G"], 1):
            for each in models.values():
                each[0][1].grad.copy_(torch.full_like(each[0][1].grad, float(count)))
            graphs[name].replay()
            expected[name].append((tracker.steps, count * math.sqrt(SIZES[name])))
            tracker.replayed(only=name)
    for name, points in expected.items():
        series = tracker.history[f"{name}/grad_norm"]
        assert series.steps.tolist() == [step for step, _ in points]
        np.testing.assert_allclose(series.values, [value for _, value in points], rtol=1e-7)

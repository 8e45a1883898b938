"""Columns on request, on a device: the same launch, in eager steps and in graphs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cuda_helpers import SIMULATED, with_gradient

from pytracker import Tracker

if SIMULATED:
    import cudasim

VALUES = [torch.tensor([0.0, 2.0**-20, -3.0, 2.0**15]), torch.full((9000,), 2.0**-10, dtype=torch.bfloat16)]
COLUMNS = ("l1", "exponents")


@pytest.mark.simulated
def test_a_step_with_them_is_one_launch_and_no_wait():
    parameters = [with_gradient(values) for values in VALUES]
    with Tracker(parameters, every=1000, seconds=1e6, diagnosis=None, columns=COLUMNS) as tracker:
        tracker.step()  # makes the tables
        for _ in range(3):
            kernels = {"gradients_and_extras_kernel": 1}
            with cudasim.expect(launches=1, blocking=0, h2d=0, d2h=0, allocations=0, kernels=kernels):
                tracker.step(loss=1.0)
    l1 = sum(values.double().abs().sum().item() for values in VALUES)
    assert tracker.history["grad_l1"][:] == pytest.approx([l1] * 4, rel=2e-7)
    np.testing.assert_array_equal(tracker.history["grad_subnormal_fp16_fraction"].values, [1 / 9004] * 4)
    np.testing.assert_array_equal(tracker.history["grad_subnormal_e4m3_fraction"].values, [9001 / 9004] * 4)
    np.testing.assert_array_equal(tracker.history["grad_near_max_fp16_fraction"].values, [1 / 9004] * 4)


def test_each_replay_of_a_graph_has_them_in_its_row():
    parameter = with_gradient(torch.ones(500))
    graph = torch.cuda.CUDAGraph()
    with Tracker([parameter], every=3, diagnosis=None, columns=COLUMNS) as tracker:
        with torch.cuda.graph(graph):
            tracker.step()
        for replay in range(7):
            parameter.grad.copy_(torch.full((500,), 2.0 ** (replay - 17)))
            graph.replay()
            tracker.replayed()
    assert tracker.history["grad_l1"][:] == pytest.approx([500 * 2.0 ** (replay - 17) for replay in range(7)])
    assert tracker.history["grad_subnormal_fp16_fraction"][:] == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]

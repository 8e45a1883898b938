"""What a captured graph uses lives as long as the graph, and the order of steps survives every change at once."""

from __future__ import annotations

import gc

import numpy as np
import torch
from cuda_helpers import with_gradient

import pytracker


def test_a_replay_after_its_tracker_is_gone_leaves_the_users_memory_alone():
    tensor = with_gradient(torch.randn(3000))
    tracker = pytracker.Tracker([("w", tensor)], every=4, diagnosis=None)
    tracker.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tracker.step()
    tracker.close()
    del tracker
    gc.collect()
    theirs = [torch.full((n,), 7, dtype=torch.uint8).cuda() for n in (64, 512, 512, 1024, 4096, 16384)]
    graph.replay()
    torch.cuda.synchronize()
    assert all(bool((each.cpu() == 7).all()) for each in theirs)


def test_steps_stay_in_order_where_layouts_and_the_stream_change_at_once():
    tensor = with_gradient(torch.randn(3000))
    norms = []
    with pytracker.Tracker([("w", tensor)], every=8, diagnosis=None) as tracker:
        for step in range(6):
            values = torch.randn(3000 if step % 2 else 2000, dtype=torch.float64 if step % 3 else torch.float32)
            with torch.cuda.stream(torch.cuda.Stream()):
                tensor.data = torch.empty(values.shape, dtype=values.dtype, device="cuda")
                tensor.grad = values.cuda()
                tracker.step(loss=float(step))
            norms.append(values.double().norm().item())
        torch.cuda.synchronize()
    np.testing.assert_array_equal(tracker.history["loss"].values, np.arange(6))
    np.testing.assert_allclose(tracker.history["grad_norm"].values, norms, rtol=1e-7)


def test_a_capture_between_two_eager_steps_shares_nothing_with_them():
    tensor = with_gradient(torch.randn(200_000))
    want = tensor.grad.cpu().double().norm().item()
    with pytracker.Tracker([("w", tensor)], every=8, diagnosis=None) as tracker:
        for _ in range(2):
            with torch.cuda.stream(torch.cuda.Stream()):
                tracker.step()
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                tracker.step()
        torch.cuda.synchronize()
    np.testing.assert_allclose(tracker.history["grad_norm"].values, [want, want], rtol=1e-7)

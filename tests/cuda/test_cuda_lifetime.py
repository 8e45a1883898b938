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


def finish_last_first(streams: list[torch.cuda.Stream]) -> None:
    """Wait for the last stream first: the simulator runs what that needs and nothing else."""
    for stream in reversed(streams):
        stream.synchronize()


def test_steps_stay_in_order_where_layouts_and_the_stream_change_at_once():
    tensor = with_gradient(torch.randn(3000))
    streams = [torch.cuda.Stream() for _ in range(5)]
    norms = []
    kept = []  # as a step on another stream than the gradient's own asks for
    with pytracker.Tracker([("w", tensor)], every=8, diagnosis=None) as tracker:
        for step, stream in enumerate(streams):
            values = torch.randn(2000 + step, dtype=torch.float64 if step % 2 else torch.float32)
            tensor.data = torch.empty(values.shape, dtype=values.dtype, device="cuda")
            tensor.grad = values.cuda()
            kept.append(tensor.grad)
            norms.append(values.double().norm().item())
            with torch.cuda.stream(stream):
                tracker.step(loss=float(step))
        finish_last_first(streams)
    np.testing.assert_array_equal(tracker.history["loss"].values, np.arange(5))
    np.testing.assert_allclose(tracker.history["grad_norm"].values, norms, rtol=1e-7)

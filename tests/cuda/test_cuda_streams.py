"""Streams, graphs and devices: the order of work where torch lets the user choose it."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from cuda_helpers import assert_moments, make_plan, reduce, with_gradient

import pytracker


def refill(parameter: torch.nn.Parameter, values: torch.Tensor) -> None:
    """Write new values into the memory of a gradient."""
    parameter.grad.copy_(values)


@pytest.mark.parametrize("warm", [True, False], ids=["after a step", "first of all"])
def test_a_captured_reduction_replays_on_what_the_gradients_then_hold(warm):
    parameters = [with_gradient(torch.randn(n)) for n in (100, 40000, 7)]
    plan = make_plan(parameters)
    if warm:
        plan.reduce(None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (row,) = plan.reduce(None)
    for _ in range(3):
        values = [torch.randn(p.shape) for p in parameters]
        for tensor, value in zip(parameters, values, strict=True):
            refill(tensor, value)
        graph.replay()
        for got, value in zip(row.cpu().numpy()[7:].reshape(-1, 6), values, strict=True):
            assert_moments(got, value)
        totals, _ = reduce(plan)  # an eager step between replays
        assert_moments(totals[:6], torch.cat(values))


def test_a_captured_reduction_outlives_a_change_of_the_layouts():
    tensor = with_gradient(torch.randn(5000))
    first = tensor.grad
    plan = make_plan([tensor])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (row,) = plan.reduce(None)
    tensor.data = torch.empty(5000, dtype=torch.float64, device="cuda")
    tensor.grad = torch.randn(5000, dtype=torch.float64).cuda()
    reduce(plan)
    junk = [torch.full((n,), 7, dtype=torch.uint8).cuda() for n in (64, 512, 512, 1024, 4096)]  # reuses freed memory
    values = torch.randn(5000)
    first.copy_(values)
    graph.replay()
    assert_moments(row.cpu().numpy()[7:], values)
    del junk


def test_a_tracker_records_a_row_for_each_replay_of_a_captured_step():
    tensor = with_gradient(torch.randn(3000))
    with pytracker.Tracker([("w", tensor)], every=4, diagnosis=None) as tracker:
        tracker.step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            tracker.step()
        want = [tensor.grad.cpu()]
        for _ in range(6):
            want.append(torch.randn(3000))
            refill(tensor, want[-1])
            graph.replay()
            tracker.replayed()
            torch.cuda.synchronize()
    norms = [value.double().norm().item() for value in want]
    np.testing.assert_allclose(tracker.history["grad_norm"], norms, rtol=1e-7)


def test_a_step_on_another_stream_follows_that_stream():
    values = torch.randn(50000)
    tensor = with_gradient(torch.zeros(50000))
    plan = make_plan([tensor])
    reduce(plan)
    pinned = values.pin_memory()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        tensor.grad.copy_(pinned, non_blocking=True)
        (row,) = plan.reduce(None)
        host = row.to("cpu", non_blocking=True)
    stream.synchronize()
    assert_moments(host.numpy()[7:], values)


def test_two_streams_that_take_turns_do_not_disturb_each_other():
    tensor = with_gradient(torch.randn(200000))
    want = tensor.grad.cpu()
    plan = make_plan([tensor])
    streams = [torch.cuda.Stream() for _ in range(3)]
    rows = []
    for turn in range(12):
        with torch.cuda.stream(streams[turn % 3]):
            rows += plan.reduce(None)
    torch.cuda.synchronize()
    for row in rows:
        assert_moments(row.cpu().numpy()[7:], want)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_plan_works_on_its_own_device_whatever_the_current_one():
    values = torch.randn(20000)
    plan = make_plan([with_gradient(values, "cuda:1")])
    for current in (0, 1):
        with torch.cuda.device(current):
            (row,) = plan.reduce(None)
            assert row.device == torch.device("cuda:1")
            assert torch.cuda.current_device() == current
            assert_moments(row.cpu().numpy()[7:], values)


STEPS = """
import torch, pytracker
torch.manual_seed(0)
parameters = [torch.nn.Parameter(torch.randn(n).cuda()) for n in (3, 70000, 5000, 0, 129)]
for p in parameters: p.grad = torch.randn(p.shape).cuda()
with pytracker.Tracker([(str(i), p) for i, p in enumerate(parameters)], every=3, diagnosis=None) as tracker:
    for step in range(7): tracker.step(loss=torch.tensor(step / 8).cuda())
print({name: [value.hex() for value in series] for name, series in tracker.history.items()})
"""


def run_steps(**environment: object) -> str:
    variables = os.environ | {key: str(value) for key, value in environment.items()}
    result = subprocess.run([sys.executable, "-c", STEPS], env=variables, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "RACECHECK" not in result.stderr, result.stderr
    assert "INITCHECK" not in result.stderr, result.stderr
    return result.stdout


@pytest.mark.simulated
@pytest.mark.parametrize(
    "environment",
    [
        {"PYTORCH_NO_CUDA_MEMORY_CACHING": 1},
        {"CUDASIM_INITCHECK": 1},
        {"CUDASIM_RACECHECK": 2},
        {"CUDASIM_WEAK": 1, "CUDASIM_SEED": 3},
        {"CUDASIM_WEAK": 2, "CUDASIM_SEED": 4},
        {"CUDASIM_STREAM_RANDOM": 1, "CUDASIM_SEED": 5},
        {"CUDASIM_EAGER": 1},
        {"CUDASIM_SM_COUNT": 1, "CUDASIM_SLICE": 20},
    ],
    ids=lambda environment: " ".join(f"{key}={value}" for key, value in environment.items()),
)
def test_a_tracker_records_the_same_bits_under_every_check(environment):
    assert run_steps(**environment) == expected_steps()


def expected_steps() -> str:
    if not hasattr(expected_steps, "output"):
        expected_steps.output = run_steps()
    return expected_steps.output

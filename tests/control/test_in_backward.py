"""Gradients that an optimizer in the backward frees: one row a step, with the statistics of each as it was."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pytracker import Tracker
from pytracker.errors import InvalidValueError


def model_of(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3), nn.Linear(3, 1)).to(dtype)


def frees(model: nn.Module, seen: dict[str, torch.Tensor]) -> None:
    """Let each parameter have an optimizer of its own, in the backward, as torch's tutorial does."""
    for name, parameter in model.named_parameters():
        optimizer = torch.optim.SGD([parameter], lr=0.05)

        def step(which: torch.Tensor, name=name, optimizer=optimizer) -> None:
            seen[name] = which.grad.double().clone()
            optimizer.step()
            optimizer.zero_grad()

        parameter.register_post_accumulate_grad_hook(step)


@settings(deadline=None, max_examples=20)
@given(
    every=st.integers(1, 9),
    steps=st.integers(1, 20),
    first=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_a_step_is_one_row_of_gradients_that_are_gone(every, steps, first, dtype):
    model, seen, expected = model_of(dtype), {}, []
    if first:
        frees(model, seen)
    with Tracker(model, every=every, diagnosis=None, in_backward=True) as tracker:
        if not first:
            frees(model, seen)
        for step in range(steps):
            model(torch.full((2, 4), 1.0 + step, dtype=dtype)).square().mean().backward()
            assert all(parameter.grad is None for parameter in model.parameters())
            tracker.step(loss=float(step))
            expected.append([float(seen[name].norm()) for name, _ in model.named_parameters()])
    where, norms = tracker.history.parameters.norms()
    assert where.tolist() == list(range(steps))
    np.testing.assert_allclose(norms, expected, rtol=1e-7)
    np.testing.assert_allclose(tracker.history["grad_norm"][:], np.linalg.norm(expected, axis=1), rtol=1e-7)
    np.testing.assert_allclose(tracker.history["grad_max"][:], np.max(expected, axis=1), rtol=1e-7)
    assert tracker.history["loss"][:] == list(range(steps))


def test_what_has_no_gradient_in_a_backward_is_missing_in_its_step():
    model, seen = model_of(), {}
    frees(model, seen)
    with Tracker(model, diagnosis=None, in_backward=True) as tracker:
        model(torch.ones(2, 4)).mean().backward()
        tracker.step()
        model[3](torch.ones(2, 3)).mean().backward()
        tracker.step()
    norms = tracker.history.parameters.norms()[1]
    assert np.isfinite(norms[0]).all()
    assert np.isnan(norms[1]).tolist() == [True] * 4 + [False] * 2
    assert tracker.history["grad_norm"][1] == pytest.approx(math.hypot(*norms[1][4:]), rel=1e-12)


def test_gradients_that_stay_are_read_once_and_a_scale_is_taken_out():
    model = model_of()
    with Tracker(model, diagnosis=None, in_backward=True) as tracker:
        (8.0 * model(torch.ones(2, 4)).mean()).backward()
        tracker.step(grad_scale=8.0)
        expected = math.sqrt(sum(float((p.grad.double() ** 2).sum()) for p in model.parameters())) / 8.0
        tracker.step()  # nothing was accumulated since
    assert tracker.history["grad_norm"][0] == pytest.approx(expected, rel=1e-7)
    assert math.isnan(tracker.history["grad_norm"][1])


def test_nan_is_counted_where_it_came():
    model, seen = model_of(), {}
    frees(model, seen)
    with Tracker(model, diagnosis=None, in_backward=True) as tracker:
        (model(torch.ones(2, 4)).mean() * math.nan).backward()
        tracker.step()
    assert tracker.history["grad_nonfinite"][0] == sum(parameter.numel() for parameter in model.parameters())
    assert math.isnan(tracker.history["grad_norm"][0])


def test_a_clip_is_refused_and_the_row_is_not_lost():
    model = model_of()
    with Tracker(model, diagnosis=None, in_backward=True) as tracker:
        model(torch.ones(2, 4)).mean().backward()
        with pytest.raises(InvalidValueError, match="the first are gone"):
            tracker.step(clip=1.0)
        tracker.step()
        with pytest.raises(InvalidValueError, match="the first are gone"):
            tracker.clip(1.0)
    assert len(tracker.history["grad_norm"]) == 1
    assert math.isfinite(tracker.history["grad_norm"][0])


def test_the_hooks_are_gone_when_the_tracker_is_closed():
    model = model_of()
    with Tracker(model, diagnosis=None, in_backward=True):
        pass
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())


def test_players_read_in_the_backward_are_refused():
    with pytest.raises(InvalidValueError, match="in_backward is of one model"):
        Tracker({"G": model_of()}, in_backward=True)


def test_a_model_without_parameters_has_rows_too():
    with Tracker([], diagnosis=None, in_backward=True) as tracker:
        tracker.step(loss=1.0)
    assert tracker.history["loss"][:] == [1.0]

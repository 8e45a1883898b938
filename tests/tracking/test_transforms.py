"""A tracker works within torch.func.grad, jvp, functionalize and vmap; what cannot be measured there says so."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

import pytracker
from pytracker.errors import InvalidValueError

X = torch.ones(2)
TRANSFORMS: dict[str, Callable[[Callable], object]] = {
    "grad": lambda f: torch.func.grad(f)(X),
    "jvp": lambda f: torch.func.jvp(f, (X,), (X,)),
    "functionalize": lambda f: torch.func.functionalize(f)(X),
    "vmap": lambda f: torch.func.vmap(f)(X[None]),
    "grad of grad": lambda f: torch.func.grad(lambda x: torch.func.grad(f)(x).sum())(X),
}
WRAPPING = [name for name in TRANSFORMS if name != "vmap"]


def within(transform: str, call: Callable[[], object]) -> object:
    """Return what a call returns within a transform, or the error that it raises."""
    outcomes: list[object] = []

    def inside(x: torch.Tensor) -> torch.Tensor:
        try:
            outcomes.append(call())
        except Exception as error:
            outcomes.append(error)
        return (x * 2).sum()

    TRANSFORMS[transform](inside)
    (outcome,) = outcomes
    return outcome


@pytest.fixture
def weight() -> torch.nn.Parameter:
    parameter = torch.nn.Parameter(torch.tensor([6.0, 8.0]))
    parameter.grad = torch.tensor([3.0, 4.0])
    return parameter


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_tracker_within_a_transform_records_what_it_does_outside(transform: str, weight) -> None:
    def training() -> pytracker.Tracker:
        with pytracker.Tracker([("w", weight)], every=2, seconds=1000, diagnosis=None) as tracker:
            for step in range(5):  # drains come on the way
                tracker.step(loss=float(step), grad_scale=2.0)
            tracker.log(val_loss=0.5)
            assert tracker.epoch(accuracy=0.25) == {"loss": 2.0, "accuracy": 0.25}
        return tracker

    tracker = within(transform, training)
    assert isinstance(tracker, pytracker.Tracker), tracker
    assert tracker.history["loss"][:] == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert tracker.history["grad_norm"][:] == [2.5] * 5
    assert (tracker.history["val_loss"][:], tracker.history["accuracy"][:]) == ([0.5], [0.25])
    np.testing.assert_array_equal(tracker.history.parameters.field("weight_norm"), [[10.0]] * 3)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_gradient_meter_within_a_transform_gives_what_it_does_outside(transform: str, weight) -> None:
    meter = pytracker.GradientMeter([weight])
    assert within(transform, meter.update) is None
    outcome = within(transform, meter.compute)
    assert isinstance(outcome, dict), outcome
    assert outcome["grad_norm"]["mean"] == 5.0


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_norms_within_a_transform_are_those_outside(transform: str, weight) -> None:
    outcome = within(transform, lambda: pytracker.compute_gradient_stats([weight]))
    assert outcome == {"grad_norm": 5.0, "grad_max": 5.0} == pytracker.compute_gradient_stats([weight])


@pytest.mark.parametrize("transform", WRAPPING)
@pytest.mark.parametrize(
    "call",
    [
        lambda weight: pytracker.gradient_stats([weight]).to_dict(),
        lambda weight: pytracker.gradient_stats([weight], grad_scale=1.0).to_dict(),
        lambda weight: pytracker.gradient_stats([weight], grad_scale=torch.tensor(1.0)).to_dict(),
        lambda weight: {"grad_norm": float(pytracker.clip_grad_norm_([weight], 10.0))},
    ],
    ids=["gradient_stats", "a float scale", "a tensor scale", "clip_grad_norm_"],
)
def test_what_cannot_be_measured_within_a_transform_says_so_and_can_be_outside(call, transform: str, weight) -> None:
    outcome = within(transform, lambda: call(weight))
    assert isinstance(outcome, InvalidValueError)
    assert "gradients cannot be measured within a transform of torch.func" in str(outcome)
    assert call(weight)["grad_norm"] == 5.0

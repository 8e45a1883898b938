"""Shares and means are quotients by the elements of the gradient that was read, also where that changes its size."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import pytracker
from pytracker import reference
from pytracker.core import native
from pytracker.history import summarize

PLANS = {"native": native.make_plan, "reference": lambda *given: reference.Plan(*given)}


def resized(parameter: torch.nn.Parameter, *shape: int) -> None:
    parameter.grad = None
    parameter.data = torch.zeros(shape)
    parameter.grad = torch.zeros(shape)
    parameter.grad.view(-1)[0] = 2


def test_the_statistics_of_a_gradient_that_grew_are_by_its_present_elements() -> None:
    model = torch.nn.Linear(2, 2, bias=False)
    resized(model.weight, 2, 2)
    before = pytracker.gradient_stats(model)
    resized(model.weight, 8, 2)
    after = pytracker.gradient_stats(model)
    for stats, elements in ((before, 4), (after, 16)):  # also those that were taken before
        assert stats.zero_fraction.tolist() == [(elements - 1) / elements]
        assert stats.rms.tolist() == [2 / np.sqrt(elements)]
        assert stats.means.tolist() == [2 / elements]
        assert stats.to_dict()["zero_fraction"] == (elements - 1) / elements


def test_a_tracker_divides_each_row_by_its_own_elements() -> None:
    model = torch.nn.Linear(2, 2)
    model.bias.grad = torch.zeros(2)
    with pytracker.Tracker(model, every=4, seconds=1000, diagnosis=None) as tracker:
        for shape in ((2, 2), (8, 2), (8, 2), (1, 2)):
            resized(model.weight, *shape)
            tracker.step()
    assert tracker.history["grad_zero_fraction"][:] == [5 / 6, 17 / 18, 17 / 18, 3 / 4]
    expected = np.mean([3 / 4, 15 / 16, 15 / 16, 1 / 2])
    assert tracker.history.parameters.field("zero_fraction")[-1].tolist() == pytest.approx([expected, 1.0])


def test_a_missing_gradient_adds_no_elements() -> None:
    model = torch.nn.Linear(2, 2)
    with pytracker.Tracker(model, every=2, diagnosis=None) as tracker:
        resized(model.weight, 8, 2)
        tracker.step()
        model.weight.grad, model.bias.grad = None, torch.tensor([0.0, 1.0])
        tracker.step()
    assert tracker.history["grad_zero_fraction"][:] == [15 / 16, 1 / 2]


@pytest.mark.parametrize("kind", PLANS)
def test_a_plan_counts_expanded_sparse_empty_and_windowed_gradients_whole(kind: str) -> None:
    gradients = [
        torch.ones(1).expand(7),
        torch.sparse_coo_tensor([[0, 2]], [1.0, 2.0], (9,), check_invariants=True),
        torch.ones(0),
        torch._efficientzerotensor((3,)),
        torch.ones(6)[::2],
    ]
    parameters = []
    for gradient in gradients:
        parameters.append(torch.nn.Parameter(torch.zeros(gradient.shape)))
        parameters[-1].grad = gradient
    plan = PLANS[kind](parameters, list("abcde"))
    plan.reduce()
    assert plan.elements.tolist() == [7, 9, 0, 3, 3]
    flat = torch.nn.Parameter(torch.zeros(10))
    flat.grad = torch.ones(10)
    plan = PLANS[kind]([flat, flat], ["a", "b"], "gradient", [(0, 4), (4, 6)])
    plan.reduce()
    assert plan.elements.tolist() == [4, 6]


def test_a_summary_takes_elements_that_change_from_step_to_step() -> None:
    rows = np.array([[[0.0, 1, 1, zeros, 0, 0]] for zeros in (1, 3)])
    assert summarize([0, 1], rows, [4]).zero_fraction == pytest.approx([0.5])
    assert summarize([0, 1], rows, [[4], [4]]).zero_fraction == pytest.approx([0.5])
    assert summarize([0, 1], rows, [[2], [4]]).zero_fraction == pytest.approx([0.625])

"""Gradients that are not in .grad are read and clipped where they are."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from pytracker import MaxNorm, Tracker
from pytracker.errors import InvalidTypeError, InvalidValueError


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def total(gradients: list[torch.Tensor], order: float = 2.0) -> float:
    return torch.cat([g.double().flatten() for g in gradients]).norm(order).item()


def loss_of(model: nn.Module) -> torch.Tensor:
    return 100 * model(torch.arange(8.0).reshape(2, 4)).square().sum()


@pytest.mark.parametrize("fused", [False, True])
def test_an_attribute_is_read_and_scaled_in_the_place_of_grad(fused: bool) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
    norms = []
    with Tracker(model, optimizer, gradient=lambda p: p.main_grad, every=1, diagnosis=None) as tracker:
        for step in range(3):
            for p in model.parameters():
                p.main_grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
                p.grad = torch.ones_like(p)
            norms.append(total([p.main_grad for p in model.parameters()]))
            if step < 2:
                tracker.step(clip=0.5)
            else:
                tracker.step()
                assert tracker.clip(0.5).item() == pytest.approx(norms[-1])
            assert total([p.main_grad for p in model.parameters()]) == pytest.approx(0.5, rel=1e-5)
            assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    assert tracker.history["grad_norm"][:] == pytest.approx(norms)


@pytest.mark.parametrize("order", [2.0, 1.0])
def test_gradients_that_autograd_returned_are_read_and_scaled(order: float) -> None:
    model = network()
    parameters = list(model.parameters())
    with Tracker(model, every=1, diagnosis=None) as tracker:
        gradients = list(torch.autograd.grad(loss_of(model), parameters))
        norm = total(gradients)
        gradients[1] = None
        rest = total([g for g in gradients if g is not None])
        tracker.step(gradients=gradients, clip=MaxNorm(0.5, order))
        assert norm > rest > 0.5
        assert total([g for g in gradients if g is not None], order) == pytest.approx(0.5, rel=1e-5)
        with pytest.raises(InvalidValueError, match="give them to clip"):
            tracker.clip(1.0)
        loss_of(model).backward()
        tracker.step()  # and .grad again
    assert tracker.history["grad_norm"][:] == pytest.approx([rest, norm])
    assert all(p.grad is not None for p in parameters)


@pytest.mark.parametrize("order", [2.0, 1.0, math.inf])
def test_gradients_that_a_step_was_given_are_clipped_by_it_where_they_are(order: float) -> None:
    model = network()
    with Tracker(model, diagnosis=None) as tracker:
        gradients = list(torch.autograd.grad(loss_of(model), list(model.parameters())))
        whole = total(gradients, order)
        tracker.step(gradients=gradients)
        norm = tracker.clip(MaxNorm(whole / 4, order), gradients=gradients)
    assert float(norm) == pytest.approx(whole, rel=1e-6)
    assert total(gradients, order) == pytest.approx(whole / 4, rel=1e-5)
    assert tracker.history["clip_factor"][:] == pytest.approx([0.25], rel=1e-5)


def test_what_are_no_gradients_of_the_parameters_is_refused() -> None:
    model = network()
    with Tracker(model, diagnosis=None) as tracker:
        with pytest.raises(InvalidValueError, match="gradients is '3 of them'; expected one tensor for each parameter"):
            tracker.step(gradients=[None] * 3)
        with pytest.raises(InvalidTypeError, match=r"gradients: that of parameter 1 is 2\.0"):
            tracker.step(gradients=[None, 2.0, None, None])
        with pytest.raises(InvalidTypeError, match="gradients is 1"):
            tracker.step(gradients=1)
    with pytest.raises(InvalidTypeError, match="gradient is 'main_grad'"):
        Tracker(model, gradient="main_grad")


def test_what_goes_wrong_in_the_function_is_said_to_be_its() -> None:
    tracker = Tracker(network(), gradient=lambda p: p.main_grad, diagnosis=None)
    with pytest.raises(InvalidTypeError, match=r"gradient raised, for a parameter: AttributeError: .*main_grad"):
        tracker.step()
    tracker.close()

"""What torch's own tests ask of its clip_grad_norm_, asked of ours: every order of a norm, and what is not finite."""

from __future__ import annotations

import itertools
import math
from math import inf, nan

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from pytracker import clip_grad_norm_

ORDERS = [0.5, 1.5, 2, 4, "inf"]
FOREACH = [False, True, None]


def linear_with_gradients(scale: float = 1.0) -> tuple[nn.Linear, list[torch.Tensor]]:
    model = nn.Linear(10, 10)
    gradients = [torch.arange(1.0, 101).view(10, 10) * scale, torch.full((10,), scale / 1000)]
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.grad = gradient.clone()
    return model, gradients


def norm_of(model: nn.Module, order: float | str) -> float:
    elements = torch.cat([p.grad.flatten() for p in model.parameters()]).double().abs()
    return elements.max().item() if order == "inf" else elements.pow(order).sum().pow(1 / order).item()


def ratios(model: nn.Module, gradients: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([(p.grad / g).flatten() for p, g in zip(model.parameters(), gradients, strict=True)])


@pytest.mark.parametrize("foreach", FOREACH)
@pytest.mark.parametrize("order", ORDERS)
def test_gradients_are_scaled_alike_down_to_the_limit(order, foreach: bool | None) -> None:
    model, gradients = linear_with_gradients()
    before = norm_of(model, order)
    norm = clip_grad_norm_(model.parameters(), 2, norm_type=order, foreach=foreach)
    assert norm.item() == pytest.approx(before, rel=1e-6)
    assert norm_of(model, order) == pytest.approx(2, rel=1e-6)
    scales = ratios(model, gradients)
    torch.testing.assert_close(scales, torch.full_like(scales, 2 / before))


@pytest.mark.parametrize("foreach", FOREACH)
@pytest.mark.parametrize("order", ORDERS)
def test_it_is_the_total_norm_and_then_the_clip_by_it(order, foreach: bool | None) -> None:
    ours, _ = linear_with_gradients()
    parts, gradients = linear_with_gradients()
    norm = clip_grad_norm_(ours.parameters(), 2, norm_type=order, foreach=foreach)
    total = get_total_norm(gradients, norm_type=order, foreach=foreach)
    clip_grads_with_norm_(parts.parameters(), 2, total, foreach=foreach)
    torch.testing.assert_close(norm, total)
    for a, b in zip(ours.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("foreach", FOREACH)
@pytest.mark.parametrize("order", ORDERS)
def test_small_gradients_stay_as_they_are_to_the_bit(order, foreach: bool | None) -> None:
    model, gradients = linear_with_gradients(scale=1e-5)
    before = norm_of(model, order)
    norm = clip_grad_norm_(model.parameters(), 20_000, norm_type=order, foreach=foreach)
    assert norm.item() == pytest.approx(before, rel=1e-6)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)


@pytest.mark.parametrize("foreach", FOREACH)
@pytest.mark.parametrize("order", ORDERS)
def test_a_single_tensor_is_as_good_as_a_list_of_it(order, foreach: bool | None) -> None:
    alone, listed = torch.randn(10, 10), torch.randn(10, 10)
    for tensor in (alone, listed):
        tensor.grad = torch.arange(1.0, 101).view(10, 10)
    clip_grad_norm_(alone, 2, norm_type=order, foreach=foreach)
    clip_grad_norm_([listed], 2, norm_type=order, foreach=foreach)
    assert torch.equal(alone.grad, listed.grad)


POSITIVE, NEGATIVE = [0.1, 1, 2, 3.5, inf], [-0.1, -1, -2, -3.5]
ALL = [*POSITIVE, *NEGATIVE, 0]


def overflowing(gradient: float, only_one: bool, prefixed: bool) -> list[float]:
    """Return the orders in which the norm is not finite, for ten elements of float64 of which one or all are given."""
    if math.isnan(gradient):
        return [*POSITIVE, *NEGATIVE]  # of order 0 the norm counts elements
    if math.isinf(gradient):
        return POSITIVE if only_one or prefixed else [*POSITIVE, *NEGATIVE]
    if abs(gradient) < 1e200:
        return []
    return [2, 3.5] if only_one or prefixed else [2, 3.5, -2, -3.5]


@pytest.mark.parametrize(("only_one", "prefixed"), list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("gradient", [inf, -inf, nan, 2e22, -2e22, 2e200, -2e200])
def test_a_norm_that_is_not_finite_is_an_error_where_one_was_asked_for(
    gradient: float, only_one: bool, prefixed: bool
) -> None:
    for order in ALL:
        values = torch.zeros(10, dtype=torch.float64) if only_one else torch.full((10,), gradient, dtype=torch.float64)
        values[1] = gradient
        for asked in (False, True):
            parameters = [nn.Parameter(torch.ones(1, dtype=torch.float64))] if prefixed else []
            parameters.append(nn.Parameter(torch.ones(10, dtype=torch.float64)))
            for parameter, given in zip(reversed(parameters), [values, torch.ones(1).double()], strict=False):
                parameter.grad = given.clone()
            if asked and order in overflowing(gradient, only_one, prefixed):
                with pytest.raises(RuntimeError, match=f"otal norm of order {float(order)} for gradients"):
                    clip_grad_norm_(parameters, 1, norm_type=order, error_if_nonfinite=True)
                torch.testing.assert_close(parameters[-1].grad, values, rtol=0, atol=0, equal_nan=True)
            else:
                clip_grad_norm_(parameters, 1, norm_type=order, error_if_nonfinite=asked)

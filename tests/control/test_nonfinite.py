"""locate_nonfinite and Tracker(on_nonfinite="locate"): the module that made the first NaN or Inf is named."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from pytracker import Tracker, locate_nonfinite
from pytracker.errors import InvalidTypeError, InvalidValueError


class Root(nn.Module):
    """Finite forward at zero, and not backward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - x.detach()).sqrt()


class Block(nn.Module):
    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(3, 3), middle, nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.first(x)
        return a + self.last(self.middle(a))  # a is the input of one module, and goes on beside it


def step_of(model: nn.Module, x: torch.Tensor):
    return lambda: model(x).square().sum().backward()


def test_a_step_that_is_finite_has_no_origin_and_is_as_it_was() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Block(nn.Dropout(0.5)), nn.Linear(3, 1))
    twin = copy.deepcopy(model)
    x = torch.randn(5, 3)
    state = torch.get_rng_state()
    assert locate_nonfinite(model, step_of(model, x)) is None
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    step_of(twin, x)()
    assert torch.equal(torch.get_rng_state(), after)
    for mine, others in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine.grad, others.grad)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any(parameter._backward_hooks for parameter in model.parameters())


def test_the_first_module_whose_output_is_not_finite_is_named_with_what_was_so_before() -> None:
    model = nn.Sequential(Block(nn.ReLU()), nn.Linear(3, 1))
    with torch.no_grad():
        model[0].last.weight[0, 0] = float("inf")
    origin = locate_nonfinite(model, step_of(model, torch.randn(5, 3).abs()))
    assert (origin.phase, origin.modules, origin.bad_inputs) == ("forward", ("0.last",), ())
    assert origin.bad_parameters == ("0.last.weight",)
    assert origin.nan + origin.inf > 0


def test_a_batch_that_is_not_finite_is_told_from_a_module_that_makes_nan() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    x = torch.ones(4, 3)
    x[1, 2] = float("nan")
    origin = locate_nonfinite(model, step_of(model, x))
    assert (origin.phase, origin.modules, origin.bad_inputs, origin.bad_parameters) == ("forward", ("0",), (0,), ())
    assert (origin.nan, origin.inf) == (2, 0)


@pytest.mark.parametrize("depth", [0, 2])
def test_the_module_whose_backward_makes_it_is_named_wherever_it_is(depth: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(3, 3) for _ in range(depth)], Block(Root()), nn.Linear(3, 1))
    origin = locate_nonfinite(model, step_of(model, torch.randn(5, 3)))
    assert (origin.phase, origin.modules) == ("backward", (f"{depth}.middle",))
    assert "what it was made from was finite" in str(origin)


def test_what_the_loss_makes_is_no_modules() -> None:
    model = nn.Linear(3, 1)
    x = torch.ones(2, 3)
    origin = locate_nonfinite(model, lambda: (model(x) - model(x).detach()).sum().sqrt().backward())
    assert (origin.phase, origin.modules) == ("backward", ())
    assert "comes from the loss" in str(origin)


def test_a_step_that_raises_for_what_was_found_returns_it_and_any_other_error_comes_through() -> None:
    model = nn.Linear(3, 1)

    def step(x: torch.Tensor) -> None:
        model(x)
        raise ValueError("the loss is not finite")

    assert locate_nonfinite(model, lambda: step(torch.full((1, 3), float("nan")))).modules == ("",)
    with pytest.raises(ValueError, match="the loss is not finite"):
        locate_nonfinite(model, lambda: step(torch.ones(1, 3)))
    assert not model._forward_hooks


def train(tracker: Tracker, model: nn.Module, batches: list[torch.Tensor]) -> None:
    for x in batches:
        model(x).square().mean().backward()
        tracker.step()
        model.zero_grad()


def test_a_tracker_names_the_module_in_the_step_after_it_was_seen_and_once(tmp_path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Block(Root()), nn.Linear(3, 1))
    found = []
    with Tracker(model, every=2, diagnosis=None, on_finding=found.append, on_nonfinite="locate") as tracker:
        train(tracker, model, [torch.randn(5, 3)] * 8)
        (finding,) = tracker.findings
    assert (finding.rule, finding.severity, finding.first_step) == ("nonfinite_origin", "critical", 2)
    assert "'0.middle' (Root)" in finding.evidence
    assert len(found) == 1
    assert not any(module._forward_hooks for module in model.modules())


def test_a_healthy_training_has_no_hook_on_any_step() -> None:
    model = nn.Linear(3, 1)
    with Tracker(model, every=1, diagnosis=None, on_nonfinite="locate") as tracker:
        for _ in range(4):
            train(tracker, model, [torch.randn(2, 3)])
            assert not model._forward_hooks
    assert tracker.findings == []


def test_a_batch_that_was_bad_once_leaves_no_finding_and_no_hook() -> None:
    model = nn.Linear(3, 1)
    bad = torch.full((2, 3), float("nan"))
    with Tracker(model, every=1, diagnosis=None, on_nonfinite="locate") as tracker:
        train(tracker, model, [torch.ones(2, 3), bad])
        assert model._forward_hooks
        train(tracker, model, [torch.ones(2, 3)])
        assert not model._forward_hooks
        train(tracker, model, [bad])
    assert tracker.findings == []
    assert not model._forward_hooks  # closed in between


def test_a_tensor_that_cannot_be_asked_is_passed_by() -> None:
    class Compressed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.to_sparse_csr()

    model = nn.Sequential(Compressed())
    assert locate_nonfinite(model, lambda: model(torch.eye(3))) is None


def test_what_cannot_be_searched_is_refused() -> None:
    weight = nn.Parameter(torch.ones(2))
    with pytest.raises(InvalidTypeError, match="on_nonfinite"):
        Tracker([weight], on_nonfinite="locate")
    with pytest.raises(InvalidValueError, match="on_nonfinite"):
        Tracker(nn.Linear(2, 2), on_nonfinite="find")
    with pytest.raises(InvalidTypeError, match="model"):
        locate_nonfinite([weight], lambda: None)
    with pytest.raises(InvalidTypeError, match="step_function"):
        locate_nonfinite(nn.Linear(2, 2), None)

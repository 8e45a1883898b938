"""What was looked at lives no longer, and can be changed no less, than what was not."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_module

import pytracker
from pytracker import reference
from pytracker.core import native


def model_with_gradients() -> torch.nn.Module:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    model(torch.ones(1, 2)).sum().backward()
    return model


LOOKS: dict[str, Callable[[torch.nn.Module], object]] = {
    "compute_gradient_stats": pytracker.compute_gradient_stats,
    "gradient_stats": pytracker.gradient_stats,
    "clip_grad_norm_ of a module": lambda model: pytracker.clip_grad_norm_(model, 0.1),
    "clip_grad_norm_ of a list": lambda model: pytracker.clip_grad_norm_(list(model.parameters()), 0.1),
    "clip_grad_norm_ of a generator": lambda model: pytracker.clip_grad_norm_(model.parameters(), 0.1),
    "gradient_stats of pairs": lambda model: pytracker.gradient_stats(model.named_parameters()),
    "the operator": lambda model: torch.ops.pytracker.gradient_moments([p.grad for p in model.parameters()]),
}


@pytest.fixture(params=["native", "reference"])
def core(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "reference":
        monkeypatch.setattr(native, "load", lambda: (None, "this test is of the reference"))
        monkeypatch.setattr(native, "_warn_once", lambda text: None)
    return request.param


@pytest.fixture
def swapping() -> object:
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_a_model_that_was_looked_at_dies_with_its_last_reference(look, core: str) -> None:
    model = model_with_gradients()
    kept = [look(model), look(model)]
    gone = [weakref.ref(p) for p in model.parameters()] + [weakref.ref(p.grad) for p in model.parameters()]
    del model
    gc.collect()
    assert all(reference() is None for reference in gone)
    assert kept


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_a_parameter_that_is_replaced_dies_though_its_model_was_looked_at(look, core: str) -> None:
    model = model_with_gradients()
    look(model)
    gone = weakref.ref(model[0].weight)
    model[0].weight = torch.nn.Parameter(torch.zeros(3, 2))
    gc.collect()
    assert gone() is None


@pytest.mark.usefixtures("swapping")
@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_a_model_can_be_converted_by_swapping_tensors_between_two_looks(look, core: str) -> None:
    model = model_with_gradients()
    look(model)
    model.to(torch.float64)
    assert model[0].weight.dtype == model[0].weight.grad.dtype == torch.float64
    expected = torch.stack([p.grad.norm() for p in model.parameters()])
    assert pytracker.gradient_stats(model).norms.tolist() == pytest.approx(expected.tolist())
    assert pytracker.compute_gradient_stats(model)["grad_norm"] == pytest.approx(expected.norm().item())


@pytest.mark.usefixtures("swapping")
def test_a_tracked_model_can_be_converted_by_swapping_tensors(core: str) -> None:
    model = model_with_gradients()
    with pytracker.Tracker(model, every=2, diagnosis=None) as tracker:
        tracker.step()
        model.to(torch.float64)
        for parameter in model.parameters():
            parameter.grad.mul_(2)
        tracker.step()
    first, second = tracker.history["grad_norm"]
    assert second == pytest.approx(2 * first)


def test_a_model_of_dtensors_can_be_converted_after_a_look(tmp_path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = distribute_module(torch.nn.Linear(2, 3), init_device_mesh("cpu", (1,)))
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        before = pytracker.compute_gradient_stats(model)
        pytracker.gradient_stats(model)
        model.to(torch.float64)
        assert pytracker.compute_gradient_stats(model) == pytest.approx(before)
    finally:
        dist.destroy_process_group()


def test_a_plan_that_has_let_go_of_its_parameters_refuses_to_read_them(core: str) -> None:
    model = model_with_gradients()
    plan = native.make_plan(list(model.parameters()), list("abcd"))
    plan.release()
    for use in (plan.reduce, lambda: plan.parameters):
        with pytest.raises(pytracker.InvalidValueError, match="let go of its parameters"):
            use()
    assert plan.hold_for(list(model.parameters()))
    assert len(plan.parameters) == 4


def test_the_reference_watches_as_the_native_core_does() -> None:
    model = model_with_gradients()
    watch = reference.ModuleWatch(model)
    plan = reference.Plan(list(model.parameters()), list("abcd"))
    assert watch.covers(plan)
    assert not watch.covers(reference.Plan([torch.nn.Parameter(torch.zeros(1))], ["other"]))


def test_pairs_are_planned_once_and_under_other_names_anew(core: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for kept in ("_pair_plans", "_list_plans"):  # of earlier tests, whose parameters may have had these addresses
        monkeypatch.setattr(f"pytracker.core.plans.{kept}", [])
    plans = []
    make_plan = native.make_plan
    monkeypatch.setattr(native, "make_plan", lambda *arguments: plans.append(make_plan(*arguments)) or plans[-1])
    model = model_with_gradients()
    pairs = list(model.named_parameters())
    first = [pytracker.compute_gradient_stats(pairs) for _ in range(3)]
    assert len(plans) == 1
    others = [(f"other.{name}", parameter) for name, parameter in pairs]
    assert pytracker.gradient_stats(others).names == [name for name, _ in others]
    assert [pytracker.gradient_stats(list(model.parameters())).names, pytracker.gradient_stats(pairs).names] == [
        [str(index) for index in range(len(pairs))],
        [name for name, _ in pairs],
    ]
    assert len(plans) == 3
    pairs[0][1].grad.mul_(2)
    assert pytracker.compute_gradient_stats(pairs)["grad_norm"] > first[0]["grad_norm"]

"""Gradients that are more, or less, than memory with strides: read right, missing, or refused with their name."""

from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

import pytracker
from pytracker import reference
from pytracker.columns import SUM, SUM_SQ, TOTALS, ZEROS
from pytracker.core import native
from pytracker.errors import ParameterError

PLANS = {"native": native.make_plan, "reference": lambda *given: reference.Plan(*given)}


def with_gradient(gradient: torch.Tensor) -> torch.nn.Parameter:
    parameter = torch.nn.Parameter(torch.zeros(gradient.shape, dtype=gradient.dtype))
    parameter.grad = gradient
    return parameter


def row_of(kind: str, parameter: torch.Tensor, source: str = "gradient") -> list[float]:
    (row,) = PLANS[kind]([parameter], ["w"], source).reduce()
    return row[TOTALS:].tolist()


@pytest.mark.parametrize("kind", PLANS)
@pytest.mark.parametrize("offset", [0, 3])
def test_a_gradient_whose_storage_was_freed_is_missing(kind: str, offset: int) -> None:
    parameter = with_gradient(torch.ones(12)[offset:])
    plan = PLANS[kind]([parameter], ["w"])
    assert plan.reduce()[0][TOTALS + SUM_SQ] == 12 - offset
    parameter.grad.untyped_storage().resize_(0)
    assert plan.reduce()[0][TOTALS:].isnan().all()


@pytest.mark.parametrize("strided", [False, True])
def test_a_gradient_with_less_memory_than_elements_is_refused(strided: bool) -> None:
    gradient = torch.ones(40)[::2] if strided else torch.ones(20)
    parameter = with_gradient(gradient)
    gradient.untyped_storage().resize_(64)
    with pytest.raises(ParameterError, match=r"the gradient of 'w' has 20 elements in a memory of 64 bytes"):
        row_of("native", parameter)


@pytest.mark.parametrize("kind", PLANS)
def test_a_zero_tensor_is_a_gradient_of_zeros(kind: str) -> None:
    parameter = torch.nn.Parameter(torch.zeros(5))
    parameter.grad = torch._efficientzerotensor((5,))
    assert row_of(kind, parameter) == [0, 0, 0, 5, 0, 0]
    assert pytracker.clip_grad_norm_([parameter], 1.0) == 0


@pytest.mark.parametrize("kind", PLANS)
def test_a_sparse_gradient_with_negated_values_is_read_and_clipped_right(kind: str) -> None:
    values = torch._neg_view(torch.tensor([3.0, 4.0]))
    gradient = torch.sparse_coo_tensor(torch.tensor([[0, 2]]), values, (4,), is_coalesced=True, check_invariants=True)
    parameter = with_gradient(gradient)
    row = row_of(kind, parameter)
    assert (row[SUM], row[SUM_SQ], row[ZEROS]) == (-7, 25, 2)
    pytracker.clip_grad_norm_([parameter], 1.0)
    assert parameter.grad.to_dense().tolist() == pytest.approx([-0.6, 0, -0.8, 0], rel=1e-5)


def test_clipping_a_lazy_clone_leaves_the_original_alone() -> None:
    original = torch.tensor([3.0, 4.0])
    parameter = with_gradient(torch._lazy_clone(original))
    pytracker.clip_grad_norm_([parameter], 1.0)
    assert original.tolist() == [3.0, 4.0]
    assert parameter.grad.tolist() == pytest.approx([0.6, 0.8], rel=1e-5)


@pytest.mark.parametrize("kind", PLANS)
def test_a_gradient_of_another_subclass_is_refused_by_its_name(kind: str) -> None:
    with FakeTensorMode():
        fake = torch.nn.Parameter(torch.zeros(2))
        fake.grad = torch.zeros(2)
    two = torch.nn.Parameter(TwoTensor(torch.ones(2), torch.ones(2)))
    two.grad = TwoTensor(torch.ones(2), torch.ones(2))
    for parameter, name in ((fake, "FakeTensor"), (two, "TwoTensor")):
        with pytest.raises(ParameterError, match=f"the gradient of 'w' is a {name}"):
            row_of(kind, parameter)


@pytest.mark.skipif(native.load()[0] is None, reason="torch's own functions see through a transform")
def test_a_wrapped_gradient_is_refused_by_its_name() -> None:
    said = []

    def inside(x: torch.Tensor) -> torch.Tensor:
        try:
            row_of("native", x, "tensor")
        except ParameterError as error:
            said.append(str(error))
        return x

    torch.func.vmap(inside)(torch.ones(3, 2))
    torch.func.functionalize(inside)(torch.ones(2))
    assert len(said) == 2
    assert all("'w'" in each for each in said)


FROZEN = {
    "int8": lambda: torch.ones(4, dtype=torch.int8),
    "uint8": lambda: torch.ones(4, dtype=torch.uint8),
    "bool": lambda: torch.ones(4, dtype=torch.bool),
    "fp8": lambda: torch.ones(4).to(torch.float8_e4m3fn),
    "sparse CSR": lambda: torch.eye(2).to_sparse_csr(),
    "mkldnn": lambda: torch.ones(4).to_mkldnn(),
    "a wrapper subclass": lambda: TwoTensor(torch.ones(4), torch.ones(4)),
    "freed": lambda: torch.ones(4),
    "meta": lambda: torch.ones(4, device="meta"),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "jagged": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:The PyTorch API of nested")
@pytest.mark.parametrize("core", PLANS)
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("make", FROZEN.values(), ids=FROZEN)
def test_a_frozen_weight_of_any_kind_is_no_hindrance(
    make, first: bool, core: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if core == "reference":
        monkeypatch.setattr(native, "load", lambda: (None, "this test is of the reference"))
        monkeypatch.setattr(native, "_warn_once", lambda text: None)
    frozen = torch.nn.Parameter(make(), requires_grad=False)
    model = torch.nn.Linear(2, 1)
    model.frozen = frozen
    if first:
        model._parameters = {"frozen": frozen, **model._parameters}
    if "freed" in request.node.name:
        model.frozen.untyped_storage().resize_(0)
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    assert pytracker.compute_gradient_stats(model) == {"grad_norm": 5.0, "grad_max": 5.0}
    with pytracker.Tracker(model, diagnosis=None) as tracker:
        tracker.step(loss=1.0)
    assert tracker.history["grad_norm"][:] == [5.0]
    norms = dict(
        zip(tracker.history.parameters.names, tracker.history.parameters.field("weight_norm")[-1], strict=True)
    )
    assert norms["weight"] == pytest.approx(model.weight.norm().item())
    assert math.isnan(norms["frozen"])
    pytracker.clip_grad_norm_(model, 1.0)
    assert model.weight.grad.norm().item() == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("kind", PLANS)
def test_a_model_that_has_no_data_at_all_is_missing_where_it_is_frozen(kind: str) -> None:
    frozen = torch.nn.Parameter(torch.ones(4, device="meta"), requires_grad=False)
    assert all(map(math.isnan, row_of(kind, frozen)))
    assert all(map(math.isnan, row_of(kind, frozen, "value")))
    with pytest.raises(ParameterError, match="'w' is on the meta device"):
        native.make_plan([torch.nn.Parameter(torch.ones(4, device="meta"))], ["w"])


@pytest.mark.parametrize("kind", PLANS)
def test_a_weight_that_cannot_be_read_is_missing_and_a_tensor_that_must_be_is_refused_as_such(kind: str) -> None:
    frozen = torch.ones(4, dtype=torch.int8)
    assert all(map(math.isnan, row_of(kind, frozen, "value")))
    with pytest.raises(ParameterError, match=r"^parameter 'w' has dtype"):
        row_of(kind, frozen, "tensor")

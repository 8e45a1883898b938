"""A recorded value may be any tensor of one element: it is read as torch reads it, or refused with its name."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

import pytracker
from pytracker import reference
from pytracker.core import native
from pytracker.errors import InvalidTypeError, InvalidValueError


def fake() -> torch.Tensor:
    with FakeTensorMode():
        return torch.tensor(2.0)


def freed() -> torch.Tensor:
    value = torch.tensor([2.0])
    value.untyped_storage().resize_(0)
    return value


READ: dict[str, tuple[Callable[[], torch.Tensor], float]] = {
    "the imaginary part of a conjugate": (lambda: torch.tensor(1 + 2j).conj().imag, -2.0),
    "a positive one": (lambda: torch.tensor(1 - 2j).conj().imag, 2.0),
    "a lazy negation": (lambda: torch._neg_view(torch.tensor(3.0)), -3.0),
    "a zero tensor": (lambda: torch._efficientzerotensor(()), 0.0),
    "an mkldnn tensor": (lambda: torch.tensor([3.0]).to_mkldnn(), 3.0),
    "a sparse tensor": (lambda: torch.tensor([3.0]).to_sparse(), 3.0),
    "a sparse CSR tensor": (lambda: torch.tensor([[3.0]]).to_sparse_csr(), 3.0),
    "a lazy clone": (lambda: torch._lazy_clone(torch.tensor(3.0)), 3.0),
    "fp8": (lambda: torch.tensor(2.0).to(torch.float8_e4m3fn), 2.0),
    "a large integer": (lambda: torch.tensor(2**60), 2.0**60),
    "one that requires a gradient": (lambda: torch.tensor(2.0, requires_grad=True) * 2, 4.0),
    "a part of another": (lambda: torch.arange(6.0)[4], 4.0),
}
REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "fake": (fake, "FakeTensor"),
    "a wrapper subclass": (lambda: TwoTensor(torch.tensor(1.0), torch.tensor(2.0)), "TwoTensor"),
    "freed": (freed, "freed"),
    "two elements": (lambda: torch.ones(2), "2 elements"),
    "no element": (lambda: torch.ones(0), "0 elements"),
    "complex": (lambda: torch.tensor(1j), "complex"),
    "bits": (lambda: torch.tensor(1, dtype=torch.uint8).view(torch.bits8), "cannot be read"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(1)]), "cannot be read"),
    "meta": (lambda: torch.tensor(1.0, device="meta"), "meta"),
    "a complex number": (lambda: 1 + 2j, "of type complex"),
    "a NumPy complex": (lambda: np.complex64(1 + 2j), "of type numpy.complex64|of type complex64"),
    "text": (lambda: "0.5", "of type str"),
    "a number without end": (lambda: 10**400, "of type int|a float can hold"),
}
MODULES = ["native", "reference"]


def log_of(module: str) -> tuple[object, object]:
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.ones(2)
    core = native.load()[0] if module == "native" else reference
    if core is None:
        pytest.skip(f"there is no native core: {native.load()[1]}")
    plan = core.Plan([parameter], ["w"])
    return native.make_step_log(plan, 4, 4), native.make_reader(plan, None, lambda groups: [], set())


def recorded(module: str, **scalars: object) -> tuple[list[float], float]:
    """Return the row's scalars, and its sum of squares."""
    log, reader = log_of(module)
    log.append(reader, 0, scalars)
    (rows,) = log.rows
    return rows[0, 13:17].tolist(), rows[0, 1].item()


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize(("make", "value"), READ.values(), ids=READ)
def test_a_value_is_the_one_that_torch_reads(make: Callable[[], torch.Tensor], value: float, module: str) -> None:
    scalars, squares = recorded(module, loss=make(), grad_scale=make() if value > 0 else None)
    assert scalars[0] == value
    assert squares == pytest.approx(2 / value**2 if value > 0 else 2)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested")
@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("name", ["loss", "grad_scale"])
@pytest.mark.parametrize(("make", "words"), REFUSED.values(), ids=REFUSED)
def test_what_has_no_value_is_refused_with_its_name(
    make: Callable[[], object], words: str, name: str, module: str
) -> None:
    with pytest.raises((InvalidValueError, InvalidTypeError), match=f"{name}.*({words})"):
        recorded(module, **{name: make()})


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("scale", [0.0, -0.0, -2.0, math.inf, -math.inf, math.nan])
def test_a_scale_that_is_not_finite_and_above_0_is_refused_as_a_number_and_as_a_tensor(
    scale: float, module: str
) -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.ones(2)
    for given in (scale, np.float32(scale), torch.tensor(scale), torch.tensor([scale], dtype=torch.bfloat16)):
        with pytest.raises(InvalidValueError, match=f"grad_scale' is {scale:g}; .* finite and above 0"):
            recorded(module, grad_scale=given)
        with pytest.raises(InvalidValueError, match=r"grad_scale.*finite.* above 0"):
            pytracker.gradient_stats([weight], grad_scale=given)
        if isinstance(given, torch.Tensor):
            with pytest.raises(InvalidValueError, match=r"grad_scale.* finite and above 0"):
                torch.ops.pytracker.gradient_moments([torch.ones(2)], given)


@pytest.mark.parametrize("module", MODULES)
def test_a_lazy_scale_is_read_before_it_is_judged(module: str) -> None:
    for given in (torch._efficientzerotensor(()), torch.tensor(1 + 2j).conj().imag, torch._neg_view(torch.ones(()))):
        with pytest.raises(InvalidValueError, match=r"grad_scale.* finite and above 0"):
            recorded(module, grad_scale=given)


def test_transforms_of_torch_are_seen_through_or_refused() -> None:
    log, reader = log_of("native")
    outcomes = []

    def seen(x: torch.Tensor) -> torch.Tensor:
        try:
            log.append(reader, 0, {"loss": x * 2})
        except InvalidValueError as error:
            outcomes.append(str(error))
        else:
            outcomes.append(log.rows[0][log.written - 1, 13].item())
        return x.sum()

    torch.func.vmap(seen)(torch.ones(3))
    torch.func.functionalize(seen)(torch.tensor(1.5))
    torch.func.grad(seen)(torch.tensor(2.5))
    assert len(outcomes) == 3
    assert "'loss'" in outcomes[0]
    assert all(
        outcome == value or "'loss'" in str(outcome) for outcome, value in zip(outcomes[1:], (3, 5), strict=True)
    )


def test_a_tracker_records_a_lazy_view_and_divides_by_one() -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.grad = torch.tensor([[6.0]])
    with pytracker.Tracker(model, diagnosis=None) as tracker:
        tracker.step(loss=torch.tensor(1 + 2j).conj().imag, grad_scale=torch.tensor(1 - 2j).conj().imag)
    assert tracker.history["loss"][:] == [-2.0]
    assert tracker.history["grad_norm"][:] == [3.0]

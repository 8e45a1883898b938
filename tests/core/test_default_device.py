"""Every tensor says where it lies, whatever torch.set_default_device says."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

import pytracker

PACKAGE = Path(pytracker.__file__).parent
FACTORIES = {"tensor", "zeros", "ones", "empty", "full", "arange", "linspace", "eye", "rand", "randn", "as_tensor"}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_tensor_that_is_made_says_where(path: Path) -> None:
    silent = [
        f"line {call.lineno}: {ast.unparse(call)}"
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and isinstance(call.func.value, ast.Name)
        and call.func.value.id == "torch"
        and call.func.attr in FACTORIES
        and not any(keyword.arg == "device" for keyword in call.keywords)
    ]
    assert not silent


@pytest.fixture
def meta_by_default() -> object:
    torch.set_default_device("meta")  # a tensor that doesn't say where it lies has no values then
    yield
    torch.set_default_device(None)


@pytest.mark.usefixtures("meta_by_default")
def test_all_works_where_another_device_is_the_default() -> None:
    model = torch.nn.Linear(2, 1, bias=False, device="cpu")
    model.weight.grad = torch.tensor([[3.0, -4.0]], device="cpu")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    stats = pytracker.gradient_stats(model, grad_scale=2.0)
    assert (stats.means.tolist(), stats.norms.tolist(), stats.rms.tolist()) == ([-0.25], [2.5], [3.125**0.5])
    assert pytracker.compute_gradient_stats(model) == {"grad_norm": 5.0, "grad_max": 5.0}
    meter = pytracker.GradientMeter(model)
    meter.update()
    assert meter.compute()["grad_norm"]["mean"] == 5.0
    losses = pytracker.AverageMeter()
    losses.update(torch.tensor(2.0, device="cpu"), n=3)
    assert losses.avg == 2.0
    with pytracker.Tracker(model, optimizer=optimizer, every=2, diagnosis=None) as tracker:
        for _ in range(3):
            tracker.step(loss=torch.tensor(1.5, device="cpu"), grad_scale=4.0)
    assert tracker.history["grad_norm"][:] == [1.25] * 3
    assert pytracker.clip_grad_norm_(model, 1.0) == 5.0
    assert pytracker.clip_grad_norm_([torch.nn.Parameter(torch.zeros(1, device="cpu"))], 1.0) == 0.0

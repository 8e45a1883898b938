"""What torch.set_default_device says is for the user's tensors: pytracker says of each of its own where it is."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import pytracker
from pytracker import reference

PACKAGE = Path(pytracker.__file__).parent
MAKERS = {"tensor", "as_tensor", "zeros", "ones", "empty", "full", "arange", "linspace", "eye", "rand", "randn"}


@pytest.fixture(autouse=True)
def tensors_without_data() -> Iterator[None]:
    """Make the default device one from which nothing can be read."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


def model_with_gradients() -> nn.Linear:
    model = nn.Linear(2, 1, device="cpu")
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    return model


def test_a_tracker_records_the_same() -> None:
    model = model_with_gradients()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytracker.Tracker(model, optimizer=optimizer, every=2) as tracker:
        for step in range(5):
            tracker.step(loss=float(step), grad_scale=0.5)
        assert tracker.epoch(val_loss=1.0)["loss"] == 2.0
    assert tracker.history["grad_norm"][:] == [27**0.5 * 2] * 5
    assert tracker.history["lr"][:] == [0.1] * 5


def test_meters_count_the_same() -> None:
    meter = pytracker.AverageMeter()
    meter.update(torch.tensor(2.0, device="cpu"), torch.tensor(3, device="cpu"))
    assert (meter.sum, meter.count) == (6.0, 3)
    gradients = pytracker.GradientMeter(model_with_gradients())
    gradients.update()
    assert gradients.compute()["grad_norm"]["mean"] == 27**0.5


def test_the_reference_gives_the_same() -> None:
    model = model_with_gradients()
    plan = reference.Plan(list(model.parameters()), ["weight", "bias"])
    for scale in (0.5, torch.tensor(0.5, device="cpu")):
        assert plan.reduce(scale)[0][1].item() == 27 * 4


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_tensor_that_is_made_is_told_where(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        if ast.unparse(node.func.value) == "torch" and node.func.attr in MAKERS:
            assert "device" in {keyword.arg for keyword in node.keywords}, f"line {node.lineno}: {ast.unparse(node)}"

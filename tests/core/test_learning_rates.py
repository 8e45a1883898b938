"""Learning rates are read on the host and take none of the user's scalars; `lr` is that of the first group."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pytracker import Tracker
from pytracker.core import native
from pytracker.errors import InvalidTypeError, InvalidValueError


def model_of(groups: int) -> torch.nn.Module:
    model = torch.nn.Sequential(*[torch.nn.Linear(1, 1, bias=False) for _ in range(groups)])
    for parameter in model.parameters():
        parameter.grad = torch.ones(1, 1)
    return model


def optimizer_of(model: torch.nn.Module, rates: list) -> torch.optim.Optimizer:
    groups = [{"params": [p], "lr": rate} for p, rate in zip(model.parameters(), rates, strict=True)]
    return torch.optim.SGD(groups, lr=1.0)


@pytest.fixture(params=["native", "reference"])
def core(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "reference":
        monkeypatch.setattr(native, "load", lambda: (None, "this test is of the reference"))
        monkeypatch.setattr(native, "_warn_once", lambda text: None)
    return request.param


@pytest.mark.parametrize("groups", [64, 200])
def test_many_groups_leave_all_scalars_to_the_user(groups: int, core: str) -> None:
    model = model_of(groups)
    optimizer = optimizer_of(model, [0.1 * (index + 1) for index in range(groups)])
    scalars = {f"value{index}": float(index) for index in range(64)}
    with Tracker(model, optimizer=optimizer, every=2, diagnosis=None) as tracker:
        for _ in range(3):
            tracker.step(**scalars)
    for index in range(groups):
        assert tracker.history[f"lr/{index}"][:] == [0.1 * (index + 1)] * 3
    assert tracker.history["value63"][:] == [63.0] * 3
    assert tracker.history["lr"][:] == [0.1] * 3


def test_lr_is_the_rate_of_the_first_group_whether_groups_agree_or_not(core: str) -> None:
    model = model_of(3)
    optimizer = optimizer_of(model, [0.1, 0.1, 0.1])
    with Tracker(model, optimizer=optimizer, every=5, diagnosis=None) as tracker:
        for rates in ([0.1] * 3, [0.2] * 3, [0.25, 0.3, 0.2], [0.4] * 3):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            tracker.step()
    assert tracker.history["lr/1"][:] == [0.1, 0.2, 0.3, 0.4]
    assert tracker.history["lr"][:] == tracker.history["lr/0"][:] == [0.1, 0.2, 0.25, 0.4]


@given(
    changes=st.lists(st.tuples(st.integers(0, 2), st.sampled_from([0.0, 0.5, -1.0, math.inf, math.nan])), max_size=12)
)
def test_every_change_of_a_rate_is_in_its_own_row(changes: list[tuple[int, float]]) -> None:
    model = model_of(3)
    optimizer = optimizer_of(model, [1.0, 2.0, 3.0])
    expected = []
    with Tracker(model, optimizer=optimizer, every=4, diagnosis=None) as tracker:
        for index, rate in [(0, 1.0), *changes]:
            optimizer.param_groups[index]["lr"] = rate
            expected.append([group["lr"] for group in optimizer.param_groups])
            tracker.step()
    got = [[*tracker.history[f"lr/{index}"]] for index in range(3)]
    np.testing.assert_array_equal(np.array(got).T, expected)


def test_a_rate_may_be_a_tensor_on_the_host(core: str) -> None:
    model = model_of(2)
    rate = torch.tensor(0.5, dtype=torch.float64)
    optimizer = optimizer_of(model, [0.25, 0.25])
    optimizer.param_groups[0]["lr"] = rate
    with Tracker(model, optimizer=optimizer, diagnosis=None) as tracker:
        tracker.step()
        rate.fill_(0.25)
        tracker.step()
    assert tracker.history["lr/0"][:] == [0.5, 0.25]
    assert tracker.history["lr"][:] == [0.5, 0.25]


def test_a_group_that_is_added_has_a_rate_from_then_on(core: str) -> None:
    model = model_of(2)
    first, second = model.parameters()
    optimizer = torch.optim.SGD([first], lr=0.1)
    with Tracker(model, optimizer=optimizer, diagnosis=None) as tracker:
        tracker.step()
        optimizer.add_param_group({"params": [second], "lr": 0.5})
        tracker.step()
        optimizer.param_groups[0]["lr"] = 0.2
        tracker.step()
    assert tracker.history["lr"][:] == [0.1, 0.1, 0.2]
    assert list(tracker.history["lr"].steps) == [0, 1, 2]
    for name, rates in (("lr/0", [0.1, 0.2]), ("lr/1", [0.5, 0.5])):
        assert tracker.history[name][:] == rates
        assert list(tracker.history[name].steps) == [1, 2]


def test_a_group_without_a_rate_is_missing(core: str) -> None:
    model = model_of(2)
    optimizer = optimizer_of(model, [0.1, 0.1])
    optimizer.param_groups[0]["lr"] = None
    with Tracker(model, optimizer=optimizer, diagnosis=None) as tracker:
        tracker.step()
    assert tracker.history["lr/1"][:] == [0.1]
    assert "lr/0" not in tracker.history
    assert tracker.history["lr"][:] == [0.1]


def test_a_rate_that_is_none_is_refused_by_its_name_and_keeps_its_name(core: str) -> None:
    model = model_of(2)
    optimizer = optimizer_of(model, [0.1, 0.1])
    with Tracker(model, optimizer=optimizer, diagnosis=None) as tracker:
        for name in ("lr", "lr/1"):
            with pytest.raises(InvalidValueError, match=f"'{name}' is recorded by pytracker itself"):
                tracker.step(**{name: 1.0})
        optimizer.param_groups[1]["lr"] = "high"
        with pytest.raises(InvalidTypeError, match="'lr/1' is 'high'"):
            tracker.step()

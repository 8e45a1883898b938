"""Learning rates that are tensors on the device, as capturable optimizers keep them, are scalars of the row."""

from __future__ import annotations

import warnings

import pytest
import torch
from cuda_helpers import with_gradient

import pytracker


def optimizer_of(rates: list) -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
    parameters = [with_gradient(torch.ones(2)) for _ in rates]
    optimizer = torch.optim.SGD([{"params": [each]} for each in parameters], lr=0.1)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    return parameters, optimizer


def on_device(rate: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(rate, dtype=dtype).to("cuda")


def test_rates_on_the_device_are_recorded_as_they_are_at_each_step_without_a_wait() -> None:
    shared, wide = on_device(0.5), on_device(0.25, torch.float64)
    parameters, optimizer = optimizer_of([shared, 0.125, shared, wide])
    with pytracker.Tracker(parameters, optimizer, every=2, seconds=1e6, diagnosis=None) as tracker:
        for step in range(5):
            shared.copy_(torch.tensor(0.5 + step))
            wide.copy_(torch.tensor(0.1 * step, dtype=torch.float64))
            tracker.step(loss=float(step))
    expected = [0.5 + step for step in range(5)]
    for name in ("lr", "lr/0", "lr/2"):
        assert tracker.history[name][:] == expected
    assert tracker.history["lr/1"][:] == [0.125] * 5
    assert tracker.history["lr/3"][:] == [0.1 * step for step in range(5)]
    assert tracker.history["loss"][:] == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_more_rates_on_the_device_than_there_is_room_for_leave_half_of_the_scalars_to_the_user() -> None:
    rates = [on_device(float(index)) for index in range(40)]
    parameters, optimizer = optimizer_of(rates)
    scalars = {f"value{index}": float(index) for index in range(32)}
    with pytracker.Tracker(parameters, optimizer, diagnosis=None) as tracker:
        with pytest.warns(
            RuntimeWarning, match="'lr/32' is not recorded: more than 32 are different tensors"
        ) as caught:
            tracker.step(**scalars)
        for _ in range(2):
            tracker.step(**scalars)
    assert len([each for each in caught if "is not recorded" in str(each.message)]) == 1
    for index in range(32):
        assert tracker.history[f"lr/{index}"][:] == [float(index)] * 3
        assert tracker.history[f"value{index}"][:] == [float(index)] * 3
    assert not any(f"lr/{index}" in tracker.history for index in range(32, 40))
    assert tracker.history["lr"][:] == [0.0] * 3


def test_one_rate_on_the_device_that_all_groups_share_takes_one_place() -> None:
    shared = on_device(0.5)
    parameters, optimizer = optimizer_of([shared] * 64)
    scalars = {f"value{index}": float(index) for index in range(63)}
    with warnings.catch_warnings(), pytracker.Tracker(parameters, optimizer, diagnosis=None) as tracker:
        warnings.simplefilter("error")
        tracker.step(**scalars)
    assert tracker.history["lr/63"][:] == tracker.history["lr"][:] == [0.5]
    assert tracker.history["value62"][:] == [62.0]

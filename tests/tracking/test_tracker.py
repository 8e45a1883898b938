"""The tracker: every step's exact values arrive, in order, whatever happens in between."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pytracker import Tracker
from pytracker.columns import COLUMNS, SUM_SQ, ZEROS


def small_model() -> nn.Module:
    return nn.ParameterDict({"a": nn.Parameter(torch.zeros(3)), "b": nn.Parameter(torch.zeros(2, 2))})


def set_gradients(model: nn.Module, step: int) -> None:
    """Give each step gradients of its own; `b` has one on every third step only."""
    model["a"].grad = torch.tensor([float(step), 0.0, -1.0])
    model["b"].grad = torch.full((2, 2), step + 0.5) if step % 3 == 0 else None


def assert_all_arrived(tracker: Tracker, steps: int, first: int = 0) -> None:
    history = tracker.history
    where = np.arange(first, first + steps)
    a = where.astype(float) ** 2 + 1
    b = np.where(where % 3 == 0, 4 * (where + 0.5) ** 2, 0.0)
    assert history["grad_norm"].steps.tolist() == where.tolist()
    assert history["grad_norm"].values == pytest.approx(np.sqrt(a + b), rel=1e-12)
    assert history["grad_max"].values == pytest.approx(np.sqrt(np.maximum(a, b)), rel=1e-12)
    assert history["loss"][:] == where.tolist()
    got_steps, rows = history.parameters.rows()
    assert got_steps.tolist() == where.tolist()
    assert rows.shape == (steps, 2, len(COLUMNS))
    assert rows[:, 0, SUM_SQ] == pytest.approx(a)
    assert np.isnan(rows[:, 1, ZEROS]).tolist() == (where % 3 != 0).tolist()
    intervals = history.parameters
    covered = [
        step
        for first, last in zip(intervals.first_step, intervals.last_step, strict=True)
        for step in range(first, last + 1)
    ]
    assert covered == where.tolist()


@given(every=st.integers(1, 12), steps=st.integers(0, 40))
def test_every_step_arrives_exactly_and_in_order(every: int, steps: int) -> None:
    model = small_model()
    with Tracker(model, every=every, diagnosis=None) as tracker:
        for step in range(steps):
            set_gradients(model, step)
            tracker.step(loss=torch.tensor(float(step)))
    assert_all_arrived(tracker, steps)


@given(changes=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 15)), min_size=1, max_size=5))
def test_nothing_is_lost_when_the_interval_changes(changes: list[tuple[int, int]]) -> None:
    model, step = small_model(), 0
    with Tracker(model, every=4, diagnosis=None) as tracker:
        for every, steps in changes:
            tracker.every = every
            for _ in range(steps):
                set_gradients(model, step)
                tracker.step(loss=step)
                step += 1
            if every % 2:
                tracker.flush()
    assert_all_arrived(tracker, step)


def test_an_exception_in_the_block_leaves_with_all_rows_safe() -> None:
    model = small_model()
    tracker = Tracker(model, every=50, diagnosis=None)

    def training() -> None:
        with tracker:
            for step in range(7):
                set_gradients(model, step)
                tracker.step(loss=step)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        training()
    assert_all_arrived(tracker, 7)


CHANGES: dict[str, Callable[[nn.Parameter], torch.Tensor | None]] = {
    "vanished": lambda p: None,
    "moved": lambda p: p.grad.clone(),
    "transposed": lambda p: torch.full((2, 2), 2.0).t(),
    "got gaps": lambda p: torch.full((2, 4), 2.0)[:, ::2],
    "became expanded": lambda p: torch.tensor([[2.0]]).expand(2, 2),
    "became sparse": lambda p: torch.full((2, 2), 2.0).to_sparse(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_gradient_that_changes_is_noticed_at_once(change) -> None:
    parameter = nn.Parameter(torch.zeros(2, 2))
    parameter.grad = torch.full((2, 2), 2.0)
    with Tracker([("w", parameter)], every=3, diagnosis=None) as tracker:
        for step in range(6):
            if step == 3:
                parameter.grad = change(parameter)
            tracker.step()
    expected = [4.0] * 3 + [math.nan if parameter.grad is None else 4.0] * 3
    assert tracker.history["grad_norm"][:] == pytest.approx(expected, abs=0, nan_ok=True)


def test_a_parameter_that_changes_its_dtype_is_followed() -> None:
    model = nn.Linear(3, 2)
    with Tracker(model, every=4, diagnosis=None) as tracker:
        for step in range(10):
            if step == 5:
                model.double()
            x = torch.ones(1, 3, dtype=model.weight.dtype)
            model(x).sum().backward()
            tracker.step()
            model.zero_grad()
    assert tracker.history["grad_norm"][:] == pytest.approx([math.sqrt(8)] * 10)


def test_scalars_may_come_late_stay_away_and_be_many() -> None:
    model = small_model()
    with Tracker(model, every=5, diagnosis=None) as tracker:
        for step in range(23):
            scalars = {f"s{k}": step * 100 + k for k in range(step)}  # up to 22: more than a log has room for at first
            if step % 4 == 0:
                scalars["rare"] = step
            tracker.step(**scalars)
    history = tracker.history
    assert history["rare"].steps.tolist() == list(range(0, 23, 4)) == history["rare"][:]
    for k in range(22):
        assert history[f"s{k}"].steps.tolist() == list(range(k + 1, 23))
        assert history[f"s{k}"][:] == [step * 100 + k for step in range(k + 1, 23)]
    assert len(history["grad_norm"]) == 23


def test_none_is_a_scalar_left_out() -> None:
    with Tracker(small_model(), every=2, diagnosis=None) as tracker:
        for step in range(4):
            tracker.step(loss=None if step == 1 else step)
    assert tracker.history["loss"].steps.tolist() == [0, 2, 3]


@pytest.mark.parametrize(
    "value",
    [
        3,
        3.0,
        True + 2,
        np.float32(3),
        np.int64(3),
        torch.tensor(3),
        torch.tensor([3.0]),
        torch.tensor(3, dtype=torch.bfloat16),
    ],
    ids=repr,
)
def test_any_number_is_a_scalar(value) -> None:
    with Tracker(small_model(), every=1, diagnosis=None) as tracker:
        tracker.step(x=value)
    assert tracker.history["x"][:] == [3.0]


def test_learning_rates_are_recorded_for_every_group() -> None:
    model = small_model()
    groups = [{"params": [model["a"]], "lr": 0.1, "name": "head"}, {"params": [model["b"]], "lr": torch.tensor(0.25)}]
    optimizer = torch.optim.SGD(groups)
    with Tracker(model, optimizer=optimizer, every=3, diagnosis=None) as tracker:
        for step in range(8):
            optimizer.param_groups[0]["lr"] = 0.1 * (step + 1)
            optimizer.param_groups[1]["lr"].mul_(0.5)
            tracker.step()
            if step == 4:
                optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr": 7.0, "name": "new"})
    history = tracker.history
    assert history["lr/head"][:] == pytest.approx([0.1 * (step + 1) for step in range(8)])
    assert history["lr/1"][:] == pytest.approx([0.25 * 0.5 ** (step + 1) for step in range(8)])
    assert (history["lr/new"].steps.tolist(), history["lr/new"][:]) == ([5, 6, 7], [7.0] * 3)
    assert [info.group for info in history.parameters.infos] == ["head", "1"]


@pytest.mark.parametrize("names", [("x", "x"), ("1", None), ("a\tb", "c")])
def test_groups_whose_names_do_not_tell_them_apart_are_named_by_index(names) -> None:
    model = small_model()
    groups = [{"params": [p], "lr": 0.5 + i} for i, p in enumerate(model.parameters())]
    for group, name in zip(groups, names, strict=True):
        group.update({} if name is None else {"name": name})
    with Tracker(model, optimizer=torch.optim.SGD(groups), every=2, diagnosis=None) as tracker:
        tracker.step()
    assert (tracker.history["lr/0"][:], tracker.history["lr/1"][:]) == ([0.5], [1.5])


def test_a_learning_rate_that_the_optimizer_finds_itself_is_left_out() -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with Tracker(model, optimizer=optimizer, every=2, diagnosis=None) as tracker:
        for rate in (None, 0.25, None):  # Adafactor's groups have None
            optimizer.param_groups[0]["lr"] = rate
            tracker.step()
    assert (tracker.history["lr"].steps.tolist(), tracker.history["lr"][:]) == ([1], [0.25])


def test_a_scheduler_and_a_loaded_optimizer_are_followed() -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    state = optimizer.state_dict()
    with Tracker(model, optimizer=optimizer, every=2, diagnosis=None) as tracker:
        for _ in range(4):
            tracker.step()
            optimizer.step()
            scheduler.step()
        optimizer.load_state_dict(state)
        tracker.step()
    assert tracker.history["lr"][:] == [1.0, 0.5, 0.25, 0.125, 1.0]


def test_a_grad_scale_divides_what_is_recorded() -> None:
    model = small_model()
    with Tracker(model, every=2, diagnosis=None) as tracker:
        for scale in (1.0, 8.0, torch.tensor(8.0)):
            model["a"].grad = torch.tensor([3.0, 4.0, 0.0]) * float(scale)
            tracker.step(grad_scale=scale)
    assert tracker.history["grad_norm"][:] == [5.0, 5.0, 5.0]
    assert "grad_scale" not in tracker.history


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_step_without_samples_adds_nothing_to_the_mean_of_the_epoch(loss: float) -> None:
    model = small_model()
    set_gradients(model, 0)
    with Tracker(model, diagnosis=None) as tracker:
        tracker.step(loss=2.0, n=3)
        tracker.step(loss=loss, n=0)
        assert tracker.epoch() == {"loss": 2.0}
    assert tracker.history["loss"][:] == pytest.approx([2.0, loss], nan_ok=True)


def test_an_epoch_returns_means_weighted_by_the_samples() -> None:
    with Tracker(small_model(), every=3, diagnosis=None) as tracker:
        for loss, n in ((1.0, 10), (3.0, 30), (5.0, 0)):
            tracker.step(n=n, loss=torch.tensor(loss), extra=loss if n else None)
        first = tracker.epoch(val_loss=torch.tensor(0.5))
        tracker.step(loss=9.0)
        second = tracker.epoch(val_loss=0.25)
    assert first == {"loss": 2.5, "extra": 2.5, "val_loss": 0.5}
    assert second == {"loss": 9.0, "val_loss": 0.25}
    assert (tracker.history["val_loss"].steps.tolist(), tracker.history["val_loss"][:]) == ([2, 3], [0.5, 0.25])
    assert tracker.history["epoch"][:] == [1, 2]


def test_a_checkpoint_goes_on_where_it_was_taken() -> None:
    model = small_model()
    tracker = Tracker(model, every=4, diagnosis=None)
    for step in range(10):
        if step == 6:
            state = tracker.state_dict()
        set_gradients(model, step)
        tracker.step(loss=-1.0 if step >= 6 else step)
    tracker.load_state_dict(state)
    for step in range(6, 15):
        set_gradients(model, step)
        tracker.step(loss=step)
    tracker.close()
    assert tracker.history["loss"][:] == list(range(15))
    assert tracker.history["grad_norm"].steps.tolist() == list(range(15))


def test_an_empty_model_records_its_scalars() -> None:
    with Tracker(nn.ReLU(), every=2, diagnosis=None) as tracker:
        for step in range(5):
            tracker.step(loss=step)
    assert tracker.history["loss"][:] == [0, 1, 2, 3, 4]
    assert tracker.history["grad_norm"][:] == [0.0] * 5


def test_the_weights_are_measured_at_the_start_and_at_each_epoch() -> None:
    parameter = nn.Parameter(torch.tensor([3.0, 4.0]))
    with Tracker([("w", parameter)], every=1, diagnosis=None) as tracker:
        parameter.grad = torch.ones(2)
        tracker.step()
        with torch.no_grad():
            parameter.mul_(2)
        tracker.epoch()
        tracker.step()
    assert tracker.history.parameters.field("weight_norm")[:, 0].tolist() == [5.0, 10.0]


def test_what_the_user_says_of_the_optimizer_counts_and_of_the_interval_does_not() -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Tracker(model, optimizer=optimizer, every=7, meta={"optimizer": "Lion", "every": 3}) as tracker:
        assert tracker.history.meta["optimizer"] == "Lion"
        assert tracker.history.meta["every"] == 7

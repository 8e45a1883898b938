"""What single steps add to the parameters, against copies in float64 that the test takes itself."""

from __future__ import annotations

import math
import sqlite3
import warnings
import weakref
from collections.abc import Callable
from contextlib import closing

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pytracker import Run, Tracker, load_run
from pytracker.cli import main
from pytracker.errors import InvalidTypeError, InvalidValueError
from pytracker.history import FIELDS
from pytracker.runfile import checksum

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, fused=True),
    "foreach": lambda parameters: torch.optim.Adam(parameters, lr=0.01, foreach=True),
}


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)


def backward(model: nn.Module) -> torch.Tensor:
    loss = model(torch.randn(4, 3, dtype=next(model.parameters()).dtype)).square().mean()
    loss.backward()
    return loss.detach()


def wide(parameters) -> list[torch.Tensor]:
    return [parameter.detach().double().clone() for parameter in parameters]


def moved(parameters, before: list[torch.Tensor]) -> list[float]:
    return [float((now - then).norm()) for now, then in zip(wide(parameters), before, strict=True)]


def sizes(parameters) -> list[float]:
    return [float(each.norm()) for each in wide(parameters)]


def updates_of(tracker: Tracker) -> np.ndarray:
    return tracker.history.parameters.field("update_norm")


@settings(deadline=None, max_examples=30)
@given(
    optimizer=st.sampled_from([*OPTIMIZERS]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    every=st.integers(1, 6),
    weights_every=st.integers(1, 9),
    steps=st.integers(1, 20),
    told=st.booleans(),
)
def test_updates_and_weights_are_those_of_the_latest_step_measured(optimizer, dtype, every, weights_every, steps, told):
    model = network(dtype)
    its = OPTIMIZERS[optimizer](model.parameters())
    began, updates, weights = sizes(model.parameters()), [], []
    with Tracker(model, its if told else None, every=every, weights_every=weights_every, diagnosis=None) as tracker:
        for _ in range(steps):
            before = wide(model.parameters())
            tracker.step(loss=backward(model))
            its.step()
            its.zero_grad()
            updates.append(moved(model.parameters(), before))
            weights.append(sizes(model.parameters()))
    parameters = tracker.history.parameters
    rounding = {torch.float64: 1e-6, torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype]
    known, newest = began, -1
    for index, last in enumerate(parameters.last_step.tolist()):
        measured = max((step for step in range(0, last, weights_every) if step > newest), default=None)
        expected = [math.nan] * 4 if measured is None else updates[measured]
        np.testing.assert_allclose(updates_of(tracker)[index], expected, rtol=rounding, atol=1e-9)
        newest = newest if measured is None else measured
        known = weights[measured] if measured is not None and index else known  # the first has those of the start
        np.testing.assert_allclose(parameters.field("weight_norm")[index], known, rtol=1e-6)


def test_without_weights_every_nothing_is_measured_and_nothing_stored(tmp_path):
    model = network()
    run = Run(tmp_path, name="run")
    with Tracker(model, run=run, every=2, diagnosis=None) as tracker:
        for _ in range(4):
            tracker.step(loss=backward(model))
    assert np.isnan(updates_of(tracker)).all()
    with closing(sqlite3.connect(tmp_path / "run" / "run.sqlite")) as connection:
        assert connection.execute("SELECT DISTINCT update_norm FROM intervals").fetchall() == [(None,)]


@pytest.mark.parametrize("how", ["the hook of an optimizer", "the next step"])
def test_a_step_that_a_grad_scaler_skips_has_added_nothing(how):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    told = optimizer if how == "the hook of an optimizer" else None
    with Tracker(model, told, every=3, weights_every=1, diagnosis=None, grad_scaler=scaler) as tracker:
        for step in range(3):
            scaler.scale(model(torch.randn(4, 3)).square().mean()).backward()
            if step == 1:
                model[0].weight.grad[0, 0] = math.inf
            tracker.step()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert updates_of(tracker).tolist() == [[0.0] * 4]


def test_a_step_that_a_clip_skips_has_added_nothing():
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    with Tracker(model, optimizer, every=2, weights_every=1, diagnosis=None) as tracker:
        for _ in range(2):
            backward(model)
            model[0].weight.grad[0, 0] = math.nan
            tracker.step(clip=1.0)
            optimizer.step()
            optimizer.zero_grad()
    assert updates_of(tracker).tolist() == [[0.0] * 4]


def test_what_is_not_trained_is_neither_copied_nor_measured(monkeypatch):
    model = network()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
    copied, began = [], sizes(model.parameters())
    copy = torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda to, what: (copied.extend(to), copy(to, what)))
    with Tracker(model, optimizer, every=2, weights_every=1, diagnosis=None) as tracker:
        for _ in range(2):
            tracker.step(loss=backward(model))
            optimizer.step()
    assert {tuple(each.shape) for each in copied} == {(2, 5), (2,)}
    assert np.isnan(updates_of(tracker)[0, :2]).all()
    assert (updates_of(tracker)[0, 2:] > 0).all()
    assert tracker.history.parameters.field("weight_norm")[0] == pytest.approx(began, rel=1e-6)


def test_the_copy_is_freed_when_the_optimizer_is_done(monkeypatch):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    made = []
    copy = torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda to, what: (made.extend(map(Alive, to)), copy(to, what)))
    with Tracker(model, optimizer, weights_every=1, diagnosis=None) as tracker:
        tracker.step(loss=backward(model))
        assert len(made) == 4
        assert all(each.is_alive for each in made)
        optimizer.step()
        assert not any(each.is_alive for each in made)


class Alive:
    """Tells whether a tensor's memory is held, without holding it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = weakref.ref(tensor)

    @property
    def is_alive(self) -> bool:
        return self._tensor() is not None


def test_the_steps_of_each_player_are_measured_by_themselves():
    players = {"G": network(), "D": network()}
    its = {name: torch.optim.SGD(model.parameters(), lr=0.1) for name, model in players.items()}
    updates: dict[str, list[list[float]]] = {"G": [], "D": []}
    with Tracker(players, its, every=12, weights_every=2, diagnosis=None) as tracker:
        for step in range(12):
            name = "D" if step % 3 else "G"
            before = wide(players[name].parameters())
            tracker.step(only=name, loss=backward(players[name]))
            its[name].step()
            its[name].zero_grad()
            updates[name].append(moved(players[name].parameters(), before))
    found = dict(zip(tracker.history.parameters.names, updates_of(tracker)[0].tolist(), strict=True))
    # Of D's eight steps the latest measured is its seventh, of the run the eleventh; G's own are of an earlier one.
    assert [found[f"D/{name}"] for name, _ in players["D"].named_parameters()] == pytest.approx(updates["D"][6], 1e-5)


def test_several_optimizers_of_one_model_are_done_when_the_next_step_comes():
    model = network()
    its = {"a": torch.optim.SGD(model[0].parameters(), lr=0.1), "b": torch.optim.SGD(model[2].parameters(), lr=0.2)}
    updates = []
    with Tracker(model, its, every=3, weights_every=1, diagnosis=None) as tracker:
        for _ in range(3):
            before = wide(model.parameters())
            tracker.step(loss=backward(model))
            for optimizer in its.values():
                optimizer.step()
                optimizer.zero_grad()
            updates.append(moved(model.parameters(), before))
    assert updates_of(tracker)[0] == pytest.approx(updates[1], rel=1e-6)


def test_an_optimizer_in_the_backward_is_measured_from_step_to_step():
    model = network()
    for parameter in model.parameters():
        optimizer = torch.optim.SGD([parameter], lr=0.1)

        def work(parameter: torch.Tensor, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.step()
            optimizer.zero_grad()

        parameter.register_post_accumulate_grad_hook(work)
    updates = []
    with Tracker(model, every=4, weights_every=2, diagnosis=None, in_backward=True) as tracker:
        for _ in range(4):
            before = wide(model.parameters())
            tracker.step(loss=backward(model))
            updates.append(moved(model.parameters(), before))
    assert updates_of(tracker)[0] == pytest.approx(updates[1], rel=1e-6)


def test_all_of_a_step_of_lbfgs_is_its_update():
    model = network(torch.float64)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=5)
    x, updates = torch.randn(8, 3, dtype=torch.float64), []
    with Tracker(model, optimizer, every=3, weights_every=1, diagnosis=None) as tracker:

        def closure():
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            tracker.step(loss=loss)
            return loss

        for _ in range(3):
            before = wide(model.parameters())
            optimizer.step(closure)
            updates.append(moved(model.parameters(), before))
    assert updates_of(tracker)[0] == pytest.approx(updates[1], rel=1e-6)


def test_a_failing_measurement_is_told_once_and_the_training_goes_on(monkeypatch):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def fail(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(torch, "_foreach_copy_", fail)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with Tracker(model, optimizer, every=2, weights_every=1, diagnosis=None) as tracker:
            for _ in range(4):
                tracker.step(loss=backward(model))
                optimizer.step()
    assert len([each for each in told if "not measured any more" in str(each.message)]) == 1
    assert len(tracker.history["loss"]) == 4
    assert np.isnan(updates_of(tracker)).all()


def test_a_parameter_that_becomes_another_in_its_step_stops_the_measuring_and_nothing_else():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Tracker(model, None, every=2, weights_every=1, diagnosis=None) as tracker:
        tracker.step(loss=backward(model))
        optimizer.step()
        with torch.no_grad():
            model[2].weight.data = torch.zeros(2, 7)
        model[2].weight.grad = None
        with pytest.warns(RuntimeWarning, match=r"shape \[2, 5\] has become another"):
            tracker.step(loss=1.0)
    assert len(tracker.history["loss"]) == 2


def test_the_optimizer_is_left_as_it_was():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = len(optimizer._optimizer_step_post_hooks)
    with Tracker(model, optimizer, weights_every=1, diagnosis=None):
        assert len(optimizer._optimizer_step_post_hooks) == before + 1
    assert len(optimizer._optimizer_step_post_hooks) == before


def test_a_tracker_that_cannot_be_made_leaves_the_optimizer_as_it_was(monkeypatch):
    model = network()
    optimizer = torch.optim.LBFGS(model.parameters())
    hooks = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
    monkeypatch.setattr(Tracker, "_measure_weights", lambda tracker: interrupted(all(hooks)))
    with pytest.raises(KeyboardInterrupt):
        Tracker(model, optimizer, weights_every=1)
    assert not any(hooks)


def interrupted(held: bool) -> None:
    raise KeyboardInterrupt if held else AssertionError("no hook was there to be removed")


@pytest.mark.parametrize(("value", "error"), [(0, InvalidValueError), (-3, InvalidValueError), ("5", InvalidTypeError)])
def test_what_is_no_number_of_steps_is_refused(value, error):
    with pytest.raises(error, match="weights_every"):
        Tracker(network(), weights_every=value)


def test_updates_are_on_disk_and_come_back_and_go_on_after_a_resume(tmp_path):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Tracker(
        model, optimizer, run=Run(tmp_path, name="run", resume=True), every=2, weights_every=1, diagnosis=None
    ) as tracker:
        for _ in range(4):
            tracker.step(loss=backward(model))
            optimizer.step()
        state = tracker.state_dict()
        tracker.step(loss=backward(model))
        optimizer.step()
        first = updates_of(tracker)[:2].copy()
    with Tracker(
        model, optimizer, run=Run(tmp_path, name="run", resume=True), every=2, weights_every=1, diagnosis=None
    ) as tracker:
        tracker.load_state_dict(state)
        for _ in range(4):
            tracker.step(loss=backward(model))
            optimizer.step()
    parameters = load_run(tmp_path / "run").history.parameters
    assert parameters.last_step.tolist() == [1, 3, 5, 7]
    np.testing.assert_array_equal(parameters.field("update_norm")[:2], first)
    assert (parameters.field("update_norm") > 0).all()
    shown = CliRunner().invoke(main, ["show", "run", "--dir", str(tmp_path)], env={"COLUMNS": "200"}).output
    ratio = float(parameters.field("update_norm")[-1, 0] / parameters.field("weight_norm")[-1, 0])
    assert "update / weight" in shown
    assert f"{ratio:.4g}" in next(line for line in shown.splitlines() if "0.weight" in line)


def test_a_file_of_an_older_version_has_no_updates_and_takes_none(tmp_path):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    file = tmp_path / "run" / "run.sqlite"
    with Tracker(model, run=Run(tmp_path, name="run", resume=True), every=2, diagnosis=None) as tracker:
        for _ in range(2):
            tracker.step(loss=backward(model))
        state = tracker.state_dict()
    columns = ", ".join(f"{name} BLOB" for name in FIELDS if name != "update_norm")
    names = ", ".join(["first_step", "last_step", *(name for name in FIELDS if name != "update_norm"), "checksum"])
    with closing(sqlite3.connect(file)) as connection:  # checksums count no column that the file lacks
        rows = connection.execute(f"SELECT {names} FROM intervals").fetchall()
        connection.execute("DROP TABLE intervals")
        kept = f"first_step INTEGER PRIMARY KEY, last_step INTEGER NOT NULL, {columns}, checksum INTEGER NOT NULL"
        connection.execute(f"CREATE TABLE intervals ({kept})")
        connection.execute("DROP TABLE archived_intervals")
        archived = f"first_step INTEGER NOT NULL, last_step INTEGER NOT NULL, {columns}, checksum INTEGER NOT NULL"
        connection.execute(f"CREATE TABLE archived_intervals (archive INTEGER NOT NULL, {archived})")
        for row in rows:
            values = (*row[:-1], checksum(*row[:-1]))
            connection.execute(f"INSERT INTO intervals VALUES ({', '.join('?' * len(values))})", values)
        connection.commit()
    assert len(load_run(tmp_path / "run").history.parameters) == 1
    with Tracker(
        model, optimizer, run=Run(tmp_path, name="run", resume=True), every=2, weights_every=1, diagnosis=None
    ) as tracker:
        tracker.load_state_dict(state)
        for _ in range(4):
            tracker.step(loss=backward(model))
            optimizer.step()
    found = load_run(tmp_path / "run").history.parameters
    assert found.last_step.tolist() == [1, 3, 5]
    assert np.isfinite(found.field("norm_mean")).all()
    assert np.isnan(found.field("update_norm")).all()

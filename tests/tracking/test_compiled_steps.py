"""A tracker inside a compiled training step: operators in its graph, with the numbers of the same step in Python."""

from __future__ import annotations

import contextlib
import gc

import numpy as np
import pytest
import torch
import torch._dynamo
from torch import nn
from torch._dynamo.utils import counters

import pytracker
from pytracker.errors import InvalidValueError

TRACES_BACKWARD = hasattr(torch._dynamo.config, "trace_autograd_ops")
SERIES = ("loss", "grad_norm", "grad_max", "grad_abs_max", "grad_zero_fraction")


@pytest.fixture(autouse=True)
def _anew():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def with_gradients(seed: int) -> nn.Module:
    model = network()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return model


def gradients_of(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.grad for parameter in model.parameters()]


def test_a_step_inside_a_compiled_function_is_not_compiled_again_on_each_call() -> None:
    model = nn.Linear(4, 1)
    with pytracker.Tracker(model, every=4, diagnosis=None) as tracker:

        @torch.compile(backend="eager")
        def train(x: torch.Tensor) -> torch.Tensor:
            loss = model(x).square().mean()
            loss.backward()
            tracker.step(loss=loss)
            return loss

        train(torch.ones(3, 4))
        train(torch.ones(3, 4))  # now there are gradients to add to
        after_second = counters["stats"]["unique_graphs"]
        for size in range(3, 12):
            train(torch.full((3, 4), float(size)))
    assert counters["stats"]["unique_graphs"] == after_second
    assert len(tracker.history["loss"]) == 11


@pytest.mark.skipif(not TRACES_BACKWARD, reason="this torch traces no backward")
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_a_whole_step_is_one_graph_and_has_the_numbers_of_python(backend: str) -> None:
    histories = []
    for compiled in (False, True):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with pytracker.Tracker(model, optimizer, every=3, diagnosis=None) as tracker:

            def train(x: torch.Tensor, model=model, tracker=tracker) -> torch.Tensor:
                loss = model(x).square().mean()
                loss.backward()
                tracker.step(loss=loss, samples=3)
                return loss.detach()

            how = torch._dynamo.config.patch(trace_autograd_ops=True) if compiled else contextlib.nullcontext()
            with how:
                step = torch.compile(train, fullgraph=True, backend=backend) if compiled else train
                for number in range(7):
                    optimizer.zero_grad()
                    step(torch.full((3, 4), float(number + 1)))
                    optimizer.step()
        histories.append(tracker.history)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    plain, compiled = histories
    for name in SERIES:
        assert compiled[name].values == pytest.approx(plain[name].values, rel=1e-4, abs=1e-12), name
    assert compiled["samples"][:] == [3.0] * 7
    np.testing.assert_allclose(compiled.parameters.norms()[1], plain.parameters.norms()[1], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("how", ["step", "clip"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_compiled_clip_is_torchs(backend: str, how: str, dtype: torch.dtype) -> None:
    model, reference = with_gradients(1).to(dtype), with_gradients(1).to(dtype)
    with pytracker.Tracker(model, every=2, diagnosis=None) as tracker:

        @torch.compile(fullgraph=True, backend=backend)
        def clipped(loss: torch.Tensor) -> torch.Tensor | None:
            if how == "step":
                tracker.step(loss=loss, clip=0.5)
                return None
            tracker.step(loss=loss)
            return tracker.clip(0.5)

        for number in range(4):
            for parameter, other in zip(model.parameters(), reference.parameters(), strict=True):
                parameter.grad.mul_(number + 1)
                other.grad.mul_(number + 1)
            norm = clipped(torch.tensor(float(number)))
            expected = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
            if norm is not None:
                assert norm.dtype == expected.dtype
                torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
            for ours, theirs in zip(gradients_of(model), gradients_of(reference), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
    assert counters["stats"]["unique_graphs"] == 1
    assert len(tracker.history["clip_factor"]) == 4
    assert tracker.history["clip_factor"].values.max() < 1


def test_gradients_that_the_graph_computes_are_recorded_and_clipped_where_they_are() -> None:
    model = network()
    with pytracker.Tracker(model, diagnosis=None) as tracker:

        @torch.compile(fullgraph=True, backend="aot_eager")
        def clipped(first: torch.Tensor) -> list[torch.Tensor]:
            gradients = [first * (place + 1) for place in range(4)]
            tracker.step(gradients=gradients, clip=1.0)
            return gradients

        found = clipped(torch.ones(5))
    whole = np.sqrt(5 * (1 + 4 + 9 + 16))
    assert tracker.history["grad_norm"][0] == pytest.approx(whole, rel=1e-6)
    for place, gradient in enumerate(found):
        assert gradient.tolist() == pytest.approx([(place + 1) / whole] * 5, rel=1e-5)


def test_players_and_micro_batches_go_into_the_graph_as_they_are_given() -> None:
    players = {"G": with_gradients(1), "D": with_gradients(2)}
    with pytracker.Tracker(players, diagnosis=None) as tracker:

        @torch.compile(fullgraph=True, backend="aot_eager")
        def step(loss: torch.Tensor) -> None:
            tracker.step(only="D", loss=loss, when=False)
            tracker.step(only="D", loss=loss * 3)
            tracker.step(only="G", loss=loss + 1)

        step(torch.tensor(2.0))
    expected = {
        name: float(torch.stack([g.double().norm() for g in gradients_of(each)]).norm())
        for name, each in players.items()
    }
    assert tracker.history["D/loss"][:] == [4.0]
    assert tracker.history["G/loss"][:] == [3.0]
    assert tracker.history["D/grad_norm"][:] == pytest.approx([expected["D"]], rel=1e-6)
    assert tracker.history["G/grad_norm"][:] == pytest.approx([expected["G"]], rel=1e-6)


def test_a_compiled_clip_is_of_those_whose_step_it_was() -> None:
    players = {"G": with_gradients(1), "D": with_gradients(2)}
    before = {name: [g.clone() for g in gradients_of(each)] for name, each in players.items()}
    with pytracker.Tracker(players, diagnosis=None) as tracker:

        @torch.compile(fullgraph=True, backend="aot_eager")
        def step() -> torch.Tensor:
            tracker.step(only="D")
            return tracker.clip(0.1)

        norm = step()
    expected = torch.stack([g.double().norm() for g in before["D"]]).norm()
    assert float(norm) == pytest.approx(float(expected), rel=1e-6)
    for ours, was in zip(gradients_of(players["G"]), before["G"], strict=True):
        assert torch.equal(ours, was)
    for ours, was in zip(gradients_of(players["D"]), before["D"], strict=True):
        torch.testing.assert_close(ours, was * float(0.1 / expected), rtol=1e-5, atol=1e-9)
    assert "D/clip_factor" in tracker.history


def test_gradients_elsewhere_and_those_read_in_the_backward_are_those_of_python() -> None:
    model = with_gradients(3)
    for parameter in model.parameters():
        parameter.main_grad, parameter.grad = parameter.grad, None
    with pytracker.Tracker(model, diagnosis=None, gradient=lambda p: p.main_grad) as tracker:
        torch.compile(lambda: tracker.step(loss=1.0), fullgraph=True, backend="aot_eager")()
    expected = torch.stack([p.main_grad.double().norm() for p in model.parameters()]).norm()
    assert tracker.history["grad_norm"][:] == pytest.approx([float(expected)], rel=1e-6)

    model = network()
    with pytracker.Tracker(model, diagnosis=None, in_backward=True) as tracker:
        model(torch.ones(2, 4)).sum().backward()
        torch.compile(lambda: tracker.step(loss=1.0), fullgraph=True, backend="aot_eager")()
    expected = torch.stack([g.double().norm() for g in gradients_of(model)]).norm()
    assert tracker.history["grad_norm"][:] == pytest.approx([float(expected)], rel=1e-6)


def test_parameters_without_a_gradient_are_missing() -> None:
    model = with_gradients(4)
    model[0].weight.grad = None
    with pytracker.Tracker(model, diagnosis=None) as tracker:
        torch.compile(lambda: tracker.step(), fullgraph=True, backend="aot_eager")()
    assert tracker.history.parameters.field("missing")[0].tolist() == [1.0, 0.0, 0.0, 0.0]


def test_a_rule_of_ones_own_breaks_the_graph_and_clips_all_the_same() -> None:
    model = with_gradients(5)
    with pytracker.Tracker(model, diagnosis=None) as tracker:
        rule = pytracker.ZClip()
        torch.compile(lambda: tracker.step(clip=rule), backend="eager")()
        torch.compile(lambda: tracker.step(clip="zclip"), fullgraph=True, backend="eager")()
    assert len(tracker.history["clip_factor"]) == 2


def test_what_is_wrong_is_told_when_the_graph_runs() -> None:
    model = with_gradients(6)
    tracker = pytracker.Tracker(model, diagnosis=None)
    step = torch.compile(lambda value: tracker.step(loss=value), fullgraph=True, backend="aot_eager")
    step(torch.tensor(1.0))
    with pytest.raises(InvalidValueError, match="with 2 elements"):
        step(torch.ones(2))
    tracker.close()
    with pytest.raises(pytracker.ClosedError):
        step(torch.tensor(1.0))
    assert tracker.history["loss"][:] == [1.0]


def arguments_of(tracker: pytracker.Tracker, model: nn.Module) -> tuple:
    graphs = tracker._in_graphs
    return graphs.state, [g.clone() for g in gradients_of(model)], [0, 1, 2, 3], graphs.handle


@pytest.mark.parametrize("name", ["tracker_step", "tracker_clipped_step", "tracker_clip"])
def test_the_operators_keep_torchs_rules(name: str) -> None:
    model = with_gradients(7)
    with pytracker.Tracker(model, diagnosis=None) as tracker:
        state, gradients, places, handle = arguments_of(tracker, model)
        step = (state, gradients, places, handle, "", "loss\0rate", [torch.tensor(1.0)], [0.5], 1.0, True, True)
        given = {
            "tracker_step": step,
            "tracker_clipped_step": (*step, 0.5, ""),
            "tracker_clip": (state, gradients, places, handle, 0.5, "", 2.0),
        }[name]
        tracker.step(gradients=gradients)
        torch.library.opcheck(getattr(torch.ops.pytracker, name).default, given)


def test_a_graph_keeps_no_tracker_alive_and_says_where_it_is_gone() -> None:
    model = with_gradients(8)
    tracker = pytracker.Tracker(model, diagnosis=None)
    given = (*arguments_of(tracker, model), "", "", [], [], 1.0, True, True)
    tracker.close()
    del tracker
    gc.collect()
    with pytest.raises(InvalidValueError, match="is gone"):
        torch.ops.pytracker.tracker_step(*given)


def test_a_compiled_optimizer_takes_the_factor_of_its_own_step_alone() -> None:
    model = with_gradients(9)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    step = torch.compile(lambda: optimizer.step(), backend="eager")
    with pytracker.Tracker(model, optimizer, weights_every=1, every=2, diagnosis=None) as tracker:
        for _ in range(2):
            tracker.step(clip=0.1)
            assert hasattr(optimizer, "grad_scale")
            step()
            assert not hasattr(optimizer, "grad_scale")
            assert not hasattr(optimizer, "found_inf")
    assert (tracker.history.parameters.field("update_norm")[0] > 0).all()

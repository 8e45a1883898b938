"""Optimizers that evaluate a closure several times: one row a step, or one an evaluation."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pytracker import Tracker, clip_grad_norm_
from pytracker.errors import InvalidValueError


class Fit:
    """A least-squares fit by L-BFGS, whose closures note what a row of theirs has to hold."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(5, 1, dtype=torch.float64)
        self.x, self.y = torch.randn(40, 5, dtype=torch.float64), torch.randn(40, 1, dtype=torch.float64).exp()
        self.optimizer = torch.optim.LBFGS(self.model.parameters(), lr=0.3, max_iter=5)
        self.seen: list[list[tuple[float, float]]] = []  # of each step, of each closure: loss and norm

    def step(self, tracker: Tracker, **options) -> float:
        self.seen.append([])

        def closure() -> torch.Tensor:
            self.optimizer.zero_grad()
            loss = (self.model(self.x) - self.y).abs().pow(1.5).mean()
            loss.backward()
            norm = torch.cat([p.grad.flatten() for p in self.model.parameters()]).norm()
            self.seen[-1].append((loss.item(), norm.item()))
            tracker.step(loss=loss, **options)
            return loss

        return self.optimizer.step(closure).item()


def test_the_row_of_a_step_is_of_its_first_closure_where_it_begins():
    fit = Fit()
    with Tracker(fit.model, fit.optimizer, diagnosis=None) as tracker:
        losses = [fit.step(tracker) for _ in range(4)]
    assert min(len(closures) for closures in fit.seen) > 1
    assert tracker.steps == 4
    assert tracker.history["loss"][:] == losses == [closures[0][0] for closures in fit.seen]
    assert tracker.history["grad_norm"][:] == pytest.approx([closures[0][1] for closures in fit.seen], rel=1e-12)


def test_each_closure_has_a_row_when_asked():
    fit = Fit()
    with Tracker(fit.model, fit.optimizer, diagnosis=None, each_closure=True) as tracker:
        for _ in range(3):
            fit.step(tracker)
    every = [closure for closures in fit.seen for closure in closures]
    assert tracker.history["loss"][:] == [loss for loss, _ in every]
    assert tracker.history["grad_norm"][:] == pytest.approx([norm for _, norm in every], rel=1e-12)


def test_a_step_after_the_optimizer_s_is_recorded_as_any():
    fit = Fit()
    with Tracker(fit.model, fit.optimizer, diagnosis=None) as tracker:
        fit.step(tracker)
        tracker.step(loss=7.0)
    assert tracker.history["loss"][-1] == 7.0
    assert tracker.steps == 2


def test_micro_batches_of_the_first_closure_make_its_row():
    fit, given = Fit(), iter(range(1, 100))

    def closure() -> float:
        fit.optimizer.zero_grad()
        (fit.model(fit.x) - fit.y).abs().pow(1.5).mean().backward()
        tracker.step(when=False, loss=float(next(given)))
        tracker.step(loss=float(next(given)))
        return 1.0

    with Tracker(fit.model, fit.optimizer, diagnosis=None) as tracker:
        fit.optimizer.step(closure)
    assert tracker.history["loss"][:] == [1.5]


def test_a_clip_in_a_closure_without_a_row_is_refused_before_it_can_be_forgotten():
    fit = Fit()
    with (
        Tracker(fit.model, fit.optimizer, diagnosis=None) as tracker,
        pytest.raises(InvalidValueError, match="each_cl"),
    ):
        fit.step(tracker, clip=1.0)
    fit = Fit()
    with Tracker(fit.model, fit.optimizer, diagnosis=None, each_closure=True) as tracker:
        fit.step(tracker, clip=0.1)
    assert len(tracker.history["clip_factor"]) == len(fit.seen[0])
    assert clip_grad_norm_(fit.model.parameters(), 1.0) <= 0.1001


def test_a_player_s_closures_are_its_own():
    fit, other = Fit(), nn.Linear(2, 1)
    optimizers = {"fit": fit.optimizer, "other": torch.optim.SGD(other.parameters(), 0.1)}
    with Tracker({"fit": fit.model, "other": other}, optimizers, diagnosis=None) as tracker:
        fit.step(tracker, only="fit")
        other(torch.ones(1, 2)).sum().backward()
        tracker.step(only="other")
        tracker.step(only="other")
    assert len(tracker.history["fit/loss"]) == 1
    assert len(tracker.history["other/grad_norm"]) == 2

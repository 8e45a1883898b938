"""What a tracker notes of the optimizer and the parameters, so that rules know it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pytracker import Tracker


class Wrapped:
    """An optimizer within another object, as accelerate's and Lightning's wrappers keep it."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    @property
    def param_groups(self):
        return self.optimizer.param_groups


class MyAdamW8bit(torch.optim.AdamW):
    """A subclass with a name of its own."""


def noted(model, optimizer):
    with Tracker(model, optimizer=optimizer, diagnosis=None) as tracker:
        return tracker.history.meta


@pytest.mark.parametrize(
    ("make", "name", "kind"),
    [
        (lambda p: torch.optim.SGD(p, 0.1), "SGD", "plain"),
        (lambda p: torch.optim.Adam(p, 0.1), "Adam", "adaptive"),
        (lambda p: torch.optim.RMSprop(p, 0.1), "RMSprop", "adaptive"),
        (lambda p: MyAdamW8bit(p, 0.1), "MyAdamW8bit", "adaptive"),
        (lambda p: torch.optim.Adagrad(p, 0.1), "Adagrad", ""),
    ],
)
def test_an_optimizer_is_known_by_what_it_is(make, name, kind):
    model = nn.Linear(2, 2)
    meta = noted(model, make(model.parameters()))
    assert (meta["optimizer"], meta["optimizer_kind"]) == (name, kind)


def test_a_wrapper_is_looked_through():
    from pytracker.tracking.series import facts_of_optimizer

    model = nn.Linear(2, 2)
    facts = facts_of_optimizer(Wrapped(Wrapped(torch.optim.SGD(model.parameters(), 0.1, momentum=0.9))))
    assert facts == {"optimizer": "SGD", "optimizer_kind": "plain", "momentum": 0.9}


def test_frozen_parameters_are_noted_as_ranges_of_their_places():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    assert noted(model, torch.optim.SGD(model[1].parameters(), 0.1))["frozen"] == [[0, 2], [5, 6]]

from __future__ import annotations

import numpy as np
import pytest
from histories import healthy_loss, usual_norms
from test_loss_rules import judge

from pytracker.history import History


def test_a_loss_that_never_changes_is_constant():
    finding = judge("constant", History(loss=[0.6931] * 200))
    assert (finding.severity, finding.first_step, finding.last_step) == ("critical", 0, 199)
    assert finding.numbers["value"] == 0.6931


def test_a_loss_that_stops_changing_is_constant_from_there():
    finding = judge("constant", History(loss=np.concatenate([healthy_loss(100), np.full(120, 2.3)])))
    assert (finding.severity, finding.first_step) == ("warning", 100)


def test_the_smallest_noise_is_not_constant():
    loss = np.full(200, 0.5)
    loss[::10] = np.nextafter(0.5, 1.0)
    assert judge("constant", History(loss=loss)) is None


def test_a_norm_that_clipping_holds_is_not_called_constant():
    history = History(loss=healthy_loss(200), grad_norm=[1.0] * 200)
    assert judge("constant", history) is not None
    history.meta["clip_threshold"] = 1.0
    assert judge("constant", history) is None


def test_a_scheduler_that_is_never_stepped_is_told():
    history = History(loss=healthy_loss(200), lr=[1e-3] * 200)
    assert judge("learning_rate", history) is None
    history.meta["scheduler"] = True
    assert "although a scheduler was given" in judge("learning_rate", history).evidence


def test_a_jump_is_located():
    rates = np.full(200, 1e-3)
    rates[120:] = 3e-2
    finding = judge("learning_rate", History(lr=rates))
    assert (finding.first_step, finding.numbers["before"], finding.numbers["after"]) == (120, 1e-3, 3e-2)


@pytest.mark.parametrize(
    "rates",
    [
        1e-3 * 0.1 ** (np.arange(300) // 100),
        1e-3 * np.minimum(1.0, np.arange(1, 301) / 100),
        1e-3 * (1.0 + np.cos(np.pi * (np.arange(300) % 100) / 100)),
        1e-3 * (1.0 + np.cos(np.pi * np.arange(300) / 300)),
    ],
    ids=["steps", "warmup", "restarts", "cosine"],
)
def test_usual_schedules_are_fine(rates):
    history = History(lr=rates)
    history.meta["scheduler"] = True
    assert judge("learning_rate", history) is None


def test_each_group_has_its_learning_rate_judged():
    history = History({"lr/body": usual_norms(200), "lr/head": np.where(np.arange(200) < 150, 1e-3, 1e-1)})
    assert "lr/head" in judge("learning_rate", history).evidence

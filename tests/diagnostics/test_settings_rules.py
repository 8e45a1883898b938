from __future__ import annotations

import numpy as np
import pytest
from histories import healthy_loss, usual_norms
from test_loss_rules import judge

from pytracker.diagnostics import RULES, diagnose
from pytracker.history import History


def test_a_loss_that_never_changes_is_constant():
    finding = judge("constant", History(loss=[0.6931] * 200))
    assert (finding.severity, finding.first_step, finding.last_step) == ("critical", 0, 199)
    assert finding.numbers["value"] == 0.6931


def test_a_loss_that_stops_changing_is_constant_from_there():
    finding = judge("constant", History(loss=np.concatenate([healthy_loss(100), np.full(120, 2.3)])))
    assert (finding.severity, finding.first_step) == ("warning", 100)


@pytest.mark.parametrize("first", [0, 100], ids=["from the start", "later"])
@pytest.mark.parametrize("again", [0.7, 0.3], ids=["the same", "another"])
@pytest.mark.parametrize("series", ["loss", "norm"])
def test_a_second_constant_episode_is_told_with_its_own_span(first, again, series):
    loss, norms = healthy_loss(600), usual_norms(600)
    loss[first : first + 60] = 0.7
    (loss if series == "loss" else norms)[500:580] = again
    finding = judge("constant", History(loss=loss, grad_norm=norms))
    assert (finding.first_step, finding.last_step) == (first, 579)
    if first == 0:
        assert "the loss is exactly 0.7 at every step from 0 to 59" in finding.evidence
    else:
        assert finding.severity == "warning"
        assert f"{series} is exactly {again} at every step from 500 to 579" in finding.evidence
        assert finding.numbers["steps"] == 80


def test_a_constant_norm_goes_on_after_a_constant_loss_with_its_own_span():
    loss, norms = healthy_loss(300), usual_norms(300)
    loss[100:200] = norms[150:] = 0.7
    finding = judge("constant", History(loss=loss, grad_norm=norms))
    start = int(finding.evidence.partition(" from ")[2].split()[0])
    assert finding.evidence.startswith("the gradient norm is exactly 0.7")
    assert 150 <= start <= 220


def test_a_constant_that_lasts_is_told_from_its_beginning():
    finding = judge("constant", History(loss=np.concatenate([healthy_loss(100), np.full(5000, 0.25)])))
    assert "from 100 to 5099" in finding.evidence


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


def restarts(cycle, steps=300):
    """Return warm restarts after a warm-up that ends at their highest rate."""
    after = 1e-3 * (1.0 + np.cos(np.pi * (np.arange(steps) % cycle) / cycle)) / 2.0 + 1e-6
    return np.concatenate([1e-3 * np.arange(1, 61) / 60, after])


@pytest.mark.parametrize("cycle", [20, 50, 100])
def test_a_warm_restart_in_the_look_that_sees_its_peak_first_is_fine(cycle):
    history = History(lr=restarts(cycle) + 1e-9)
    assert judge("learning_rate", history) is None
    assert not RULES["learning_rate"](history)
    assert diagnose(history, rules=["learning_rate"]) == []


def test_a_jump_after_a_warm_restart_in_the_same_look_is_told():
    rates = restarts(10)
    rates[75:] = 1e-1
    finding = judge("learning_rate", History(lr=rates))
    assert (finding.first_step, finding.numbers["after"]) == (75, 1e-1)


@pytest.mark.parametrize(
    "rates",
    [[np.nan] * 12 + [0.1] * 100, [np.inf] * 200, [1e308] * 200, [np.nan, 1e-3] * 100, [1e-3] * 100 + [np.inf] * 100],
    ids=["nan at first", "inf", "huge", "now and then", "inf at last"],
)
@pytest.mark.filterwarnings("error")
def test_rates_that_are_no_numbers_raise_no_warning_and_are_no_numbers_of_a_finding(rates):
    history = History(lr=rates)
    history.meta["scheduler"] = True
    for finding in (judge("learning_rate", history), *RULES["learning_rate"](history)):
        assert finding is None or finding.rule == "learning_rate"
        assert finding is None or np.isfinite(list(finding.numbers.values())).all()


def test_a_rate_that_is_recorded_for_its_group_and_as_the_first_is_judged_once():
    rates = np.where(np.arange(200) < 150, 1e-3, 1e-1)
    history = History({"lr/body": rates, "lr/head": [1e-3] * 200, "lr": rates})
    assert [finding.evidence.split()[0] for finding in RULES["learning_rate"](history)] == ["lr/body"]


def test_a_rate_from_before_there_were_groups_is_judged_with_theirs():
    history = History({"lr": np.where(np.arange(200) < 50, 1e-3, 1e-1)})
    for step in range(100, 200):
        for name in ("lr/0", "lr/1"):
            history[name].append(1e-1, step)
    assert [finding.evidence.split()[0] for finding in RULES["learning_rate"](history)] == ["lr"]


def test_each_group_has_its_learning_rate_judged():
    history = History({"lr/body": usual_norms(200), "lr/head": np.where(np.arange(200) < 150, 1e-3, 1e-1)})
    assert "lr/head" in judge("learning_rate", history).evidence

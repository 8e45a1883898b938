"""Losses that no laboratory made: signed, nearly gone, logged rarely, diverging for good; and findings taken back."""

from __future__ import annotations

import numpy as np
import pytest
from histories import healthy_loss, stuck_loss

from pytracker.diagnostics import Diagnosis, diagnose
from pytracker.history import History
from pytracker.tracking import InMemoryRun, LiveDiagnosis

RANDOM = np.random.default_rng(0)
STEPS = np.arange(400)


def alarms(history):
    return {finding.rule: finding for finding in diagnose(history) if finding.rank}


def by_epoch(**series):
    history = History(**series)
    history.meta["log"] = {"unit": "epoch"}
    return history


@pytest.mark.parametrize(
    "loss",
    [
        [0.0106, -0.02, -0.108, -0.137, -0.1622, -0.05] + [5e-5] * 44,
        0.002 - 8 * (1 - np.exp(-STEPS / 80)) + 2 * RANDOM.normal(size=400),
        0.01 * RANDOM.normal(size=400),
        1.5 - STEPS / 100 + 0.1 * RANDOM.normal(size=400),
    ],
    ids=["GRPO", "policy gradient", "around zero", "likelihood"],
)
def test_a_signed_loss_has_no_level_to_alarm_by(loss):
    assert alarms(History(loss=loss)) == {}
    assert "negative" in diagnose(History(loss=loss)).unjudged["loss_oscillating"]


@pytest.mark.parametrize("beside", ["reward", "train/episode_return", "d_loss", "critic_loss"])
def test_a_loss_that_is_not_meant_to_fall_is_not_asked_to(beside):
    history = History({"loss": stuck_loss(), beside: [1.0] * 3})
    findings = diagnose(history)
    assert not [finding for finding in findings if finding.rank]
    assert "loss_not_decreasing" in findings.unjudged


def test_a_divergence_that_stays_is_told_and_a_curriculum_is_not():
    fall = 3.7 + 7 * np.exp(-np.arange(600) / 80)
    loss = np.concatenate([fall, np.linspace(fall[-1], 6.9, 400), np.full(1000, 6.9)]) + 0.1 * RANDOM.normal(size=2000)
    finding = alarms(History(loss=loss))["loss_diverged"]
    assert 600 <= finding.first_step <= 1000
    assert finding.numbers["lost"] == pytest.approx(0.46, abs=0.03)
    harder = np.concatenate([2 * np.exp(-np.arange(300) / 60) + 0.1] * 3) * (1 + 0.03 * RANDOM.normal(size=900))
    assert alarms(History(loss=harder)) == {}


def test_a_loss_that_leaves_where_it_began_at_once_has_diverged_however_it_swings_up_there():
    # As of a network of 64 ReLUs on digits, SGD with a learning rate of 20.
    swinging = np.exp(np.random.default_rng(3).normal(np.log(25), 0.5, size=296))
    jumped = [2.33, 12.31, 501.08, 64.36, *swinging]
    found = diagnose(History(loss=jumped))
    assert [(each.rule, each.severity) for each in found if each.rank] == [("loss_diverged", "critical")]
    assert "rose from 2.33 at step 0" in found[0].evidence
    assert found[0].action.startswith("begin again")
    coming_back = [2.33, 12.31, *(12 * np.exp(-np.arange(298) / 200) * np.exp(RANDOM.normal(0, 0.1, size=298)))]
    assert "loss_diverged" not in alarms(History(loss=coming_back))


def test_a_blow_up_behind_a_huge_first_value_is_seen():
    loss = [36000, 1.07, 1, 0.95, 3.1, 850, 1.2, 0.92, *(0.9 + 0.02 * RANDOM.normal(size=60))]
    finding = alarms(History(loss=loss))["loss_oscillating"]
    assert "to 850 at step 5" in finding.evidence


def test_few_flat_evaluations_or_epochs_are_enough_to_see_that_nothing_falls():
    history = History(loss=0.693 + 5e-4 * RANDOM.normal(size=32))
    assert "loss_not_decreasing" not in alarms(history)
    history["val_loss"].extend(0.6931 + 2e-4 * RANDOM.normal(size=8), np.arange(3, 32, 4))
    assert "loss_not_decreasing" in alarms(history)
    assert "loss_not_decreasing" in alarms(by_epoch(loss=0.693 + 5e-4 * RANDOM.normal(size=28)))
    assert alarms(by_epoch(loss=healthy_loss(28, noise=0.005))) == {}


def test_overfitting_is_seen_in_five_evaluations_in_a_small_rise_and_in_a_noisy_one():
    gone = History(loss=0.3 * np.exp(-np.arange(200) / 15) + 1e-4)
    gone["val_loss"].extend([0.32, 0.36, 0.39, 0.41, 0.42], [39, 79, 119, 159, 199])
    assert "overfitting" in alarms(gone)
    epochs = np.arange(40)
    small = by_epoch(loss=1.4 * np.exp(-epochs / 20) + 0.1)
    small["val_loss"].extend(1.44 + 0.15 * np.clip((epochs - 5) / 35, 0, 1) + 0.005 * RANDOM.normal(size=40), epochs)
    assert [finding.severity for finding in diagnose(small) if finding.rule == "overfitting"] == ["info"]
    epochs = np.arange(50)
    rise = np.clip((epochs - 8) / 42, 0, 1)
    noisy = by_epoch(loss=0.6 * np.exp(-epochs / 30) + 0.1)
    noisy["val_loss"].extend(0.592 + 0.258 * rise + 0.08 * RANDOM.normal(size=50), epochs)
    noisy["val_accuracy"].extend(0.88 - 0.11 * rise + 0.005 * RANDOM.normal(size=50), epochs)
    assert "overfitting" in alarms(noisy)
    noisy["val_accuracy"] = 0.7 + 0.18 * rise
    assert "overfitting" not in alarms(noisy)  # it is overconfident, and as good as ever


def test_the_digits_of_a_rounded_log_are_neither_spikes_nor_a_constant():
    loss = np.round(1e-3 + np.exp(-np.arange(300) / 20), 4)
    assert alarms(History(loss=loss)) == {}
    loss[200] = 0.0015
    assert alarms(History(loss=loss)) == {}


def test_a_finding_that_the_training_disproves_is_withdrawn_told_and_kept():
    heard, run = [], InMemoryRun()
    live = LiveDiagnosis(Diagnosis(["loss_not_decreasing"]), run, heard.append)
    history, loss = History(), np.concatenate([stuck_loss(200), 2.3 * np.exp(-np.arange(400) / 60) + 0.1])
    for part in np.split(loss, 30):
        history["loss"].extend(part)
        live.evaluate_now(history)
    assert (heard[0].severity, heard[0].withdrawn) == ("warning", "")
    assert (heard[-1].severity, "the loss fell to" in heard[-1].withdrawn) == ("info", True)
    assert live.findings == []
    (kept,) = run.history.findings
    assert "It was warning" in kept["evidence"]

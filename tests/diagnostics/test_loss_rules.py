from __future__ import annotations

import numpy as np
import pytest
from histories import EVERY, healthy_loss, with_parameters

from pytracker.diagnostics import RULES, Diagnosis
from pytracker.history import History


def judge(name, history, **settings):
    """Run one rule as a Tracker does and return its finding, or None."""
    diagnosis = Diagnosis([name], settings={name: settings})
    end = history.last_step + 1
    for stop in [*range(EVERY, end, EVERY), end]:
        diagnosis.update(history, stop=stop)
    return diagnosis.findings[0] if diagnosis.findings else None


def noise(steps=400, scale=0.1, seed=3):
    return scale * np.random.default_rng(seed).standard_normal(steps)


def test_a_loss_that_stays_where_it_was_is_not_decreasing():
    finding = judge("loss_not_decreasing", History(loss=2.3 + noise()))
    assert finding.severity == "warning"
    assert finding.numbers["start"] == pytest.approx(2.3, abs=0.1)
    assert finding.numbers["low"] < 0 < finding.numbers["high"]


def test_a_rising_loss_is_not_decreasing():
    assert judge("loss_not_decreasing", History(loss=2.3 + noise() + np.arange(400) / 400)) is not None


def test_a_fast_fall_before_a_long_plateau_is_decreasing():
    steps = np.arange(2000)
    assert judge("loss_not_decreasing", History(loss=0.2 + 2.0 * np.exp(-steps / 20) + noise(2000, 0.02))) is None


def test_a_loss_that_is_not_finite_is_another_trouble():
    loss = 2.3 + noise()
    assert judge("loss_not_decreasing", History(loss=loss)) is not None
    loss[130:] = np.nan
    assert judge("loss_not_decreasing", History(loss=loss)) is None


def test_no_judgement_is_made_while_the_learning_rate_warms_up():
    history = History(loss=2.3 + noise(300), lr=np.linspace(1e-6, 1e-3, 300))
    assert judge("loss_not_decreasing", history) is None


def test_two_lucky_points_do_not_hide_a_flat_loss():
    loss = 2.3 + noise(scale=0.02)
    loss[[0, -1]] = [9.0, 0.1]
    assert judge("loss_not_decreasing", History(loss=loss)) is not None


@pytest.mark.parametrize(("fall", "said"), [(0.0, True), (0.05, True), (0.3, False)])
def test_a_falling_validation_loss_is_believed_where_batches_are_noisy(fall, said):
    history = History(loss=2.3 + noise(scale=0.5))
    evaluations = np.arange(9, 400, 20)
    history["val_loss"].extend(2.3 * (1.0 - fall * (1.0 - np.exp(-evaluations / 60.0))), evaluations)
    assert (judge("loss_not_decreasing", history) is not None) == said


def test_train_loss_is_read_where_there_is_no_loss():
    assert judge("loss_not_decreasing", History(train_loss=2.3 + noise())) is not None


def test_a_loss_that_swings_by_its_own_size_oscillates():
    swings = np.where(np.arange(400) % 2, 3.5, 0.5)
    finding = judge("loss_oscillating", History(loss=swings + noise()))
    assert finding.numbers["relative"] > 0.6


def test_many_direction_flips_of_small_noise_are_no_oscillation():
    flips = np.where(np.arange(400) % 2, 0.01, -0.01)
    assert judge("loss_oscillating", History(loss=healthy_loss(noise=0.0) + flips)) is None


def test_a_steep_fall_is_no_oscillation():
    assert judge("loss_oscillating", History(loss=1e-3 + 2.0 * np.exp(-np.arange(400) / 15))) is None


def test_the_same_noise_is_an_oscillation_when_steps_are_known_to_be_long():
    loss = 2.0 + noise(scale=0.5)
    history = with_parameters(History(loss=loss, lr=[0.5] * 400), np.ones((400, 6)), weight_norm=10.0)
    history.meta["optimizer"] = "Adam"  # 0.5 * sqrt(100) / 10: a step is half of the weights
    assert judge("loss_oscillating", History(loss=loss)) is None
    assert judge("loss_oscillating", history).numbers["update_ratio"] == pytest.approx(0.21, abs=0.01)


def test_a_loss_that_runs_away_to_nan_is_critical():
    loss = np.concatenate([healthy_loss(100), [1.0, 10.0, 1e4, 1e9], np.full(50, np.nan)])
    finding = judge("loss_oscillating", History(loss=loss))
    assert finding.severity == "critical"
    assert "1e+09" in finding.evidence


def test_a_loss_that_blows_up_at_once_and_recovers_is_told():
    loss = healthy_loss()
    loss[2:6] = [15.0, 80.0, 30.0, 9.0]
    assert judge("loss_oscillating", History(loss=loss)).last_step == 19


def test_a_spike_is_located_and_counted():
    loss = healthy_loss()
    loss[[150, 260]] += [30.0, 80.0]
    finding = judge("loss_spike", History(loss=loss))
    assert (finding.first_step, finding.last_step) == (150, 260)
    assert (finding.numbers["count"], finding.numbers["step"]) == (2, 260)
    assert finding.numbers["loss"] == loss[260]


def test_the_largest_spike_stays_the_evidence():
    loss = 1.0 + noise(scale=0.02)
    loss[[150, 260]] += [8.0, 3.0]
    assert judge("loss_spike", History(loss=loss)).numbers["step"] == 150


def test_the_noise_of_a_loss_near_zero_is_no_spike():
    loss = np.exp(np.random.default_rng(0).normal(-6.0, 1.5, 2000))  # some are 50 times the median
    assert judge("loss_spike", History(loss=loss)) is None


def test_negative_losses_spike_too():
    loss = -100.0 + noise()
    loss[200] = -10.0
    assert judge("loss_spike", History(loss=loss)).first_step == 200


@pytest.mark.parametrize(("rise", "spikes"), [(0.04, 0), (0.3, 1)])
def test_a_loss_that_reaches_zero_spikes_by_its_rise_beside_the_initial_loss(rise, spikes):
    loss = np.maximum(0.0, 1.0 - np.arange(300) / 50.0)
    loss[150:300:20] = 0.01
    loss[215] = rise
    finding = judge("loss_spike", History(loss=loss))
    assert (finding.numbers["count"] if finding else 0) == spikes
    assert finding is None or finding.numbers["z"] == pytest.approx(100 * rise, rel=0.03)


@pytest.mark.parametrize("rate", [np.nan, np.inf, 0.1])
def test_the_advice_names_the_learning_rate_where_it_is_a_number(rate):
    action = judge("loss_not_decreasing", History(loss=2.3 + noise(), lr=[rate] * 400)).action
    assert ("(now" in action) == np.isfinite(rate)


EXTREMES = [np.nan, np.inf, -np.inf, 0.0, 1.7e308, -1.7e308, 1e-300, 5e-324, 1.0, -1.0]


def extreme(random, steps):
    """Return a series of one of several kinds, with numbers at the ends of what there is."""
    values = [
        np.exp(random.normal(size=steps)),
        random.choice(EXTREMES, steps),
        random.choice(random.choice(EXTREMES, 3), steps),
        np.where(np.arange(steps) < random.integers(steps), random.choice(EXTREMES), random.choice(EXTREMES)),
        10.0 ** random.uniform(-300, 300, steps),
    ]
    return values[random.integers(len(values))]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("seed", range(40))
def test_no_rule_raises_warns_or_tells_a_number_that_is_none_whatever_is_recorded(seed):
    random = np.random.default_rng(seed)
    history = History({name: extreme(random, 150) for name in ("loss", "grad_norm", "lr", "val_loss")})
    history.meta.update(optimizer="SGD", scheduler=True, clip_threshold=1.0)
    with_parameters(history, np.exp(random.normal(size=(150, 6))), weight_norm=random.choice([10.0, 0.0, 1e-30]))
    diagnosis = Diagnosis()
    for stop in range(EVERY, 151, 26):
        diagnosis.update(history, stop=stop)
    assert not [finding.evidence for finding in diagnosis.findings if finding.rule.startswith("rule_failed")]
    assert all(np.isfinite(list(finding.numbers.values())).all() for finding in diagnosis.findings)


def overfit_history(rise, *, train=None):
    steps = np.arange(400)
    history = History(loss=2.0 * np.exp(-steps / 60.0) + 1e-3 if train is None else train)
    evaluations = np.arange(9, 400, 10)
    bottom = 1.0 + np.exp(-evaluations / 40.0)
    history["val_loss"].extend(bottom + rise * np.maximum(0, evaluations - 150) / 250.0, evaluations)
    return history


def test_validation_rising_while_training_falls_is_overfitting():
    finding = judge("overfitting", overfit_history(1.0))
    assert finding.severity == "warning"
    assert finding.numbers["best"] == pytest.approx(1.05, abs=0.05)
    assert 100 <= finding.numbers["best_step"] <= 180


def test_a_rise_that_is_small_beside_what_was_gained_is_information():
    history = overfit_history(0.25, train=20.0 * np.exp(-np.arange(400) / 60.0))
    assert judge("overfitting", history).severity == "info"


def test_a_rise_within_the_noise_of_the_evaluations_is_no_overfitting():
    history = overfit_history(0.5)
    assert judge("overfitting", history) is not None
    noisy = history["val_loss"].values + noise(len(history["val_loss"]), 0.4)
    history["val_loss"][:] = noisy.tolist()
    finding = judge("overfitting", history)
    assert finding is None or "stayed" in finding.evidence


def test_a_validation_loss_that_stays_is_no_overfitting():
    assert judge("overfitting", overfit_history(0.0)) is None


def test_both_losses_rising_is_no_overfitting():
    assert judge("overfitting", overfit_history(1.0, train=1.0 + np.arange(400) / 200.0)) is None


def test_a_validation_loss_named_otherwise_is_found():
    history = overfit_history(1.0)
    history["eval_loss"] = history["val_loss"]
    del history["val_loss"]
    assert judge("overfitting", history) is not None


@pytest.mark.parametrize("name", ["loss_not_decreasing", "loss_oscillating", "loss_spike", "overfitting"])
@pytest.mark.parametrize(
    "loss",
    [[np.nan] * 300, [np.inf, 1.0] * 150, [0.0] * 300, [-1.0] * 300, [1e308] * 300],
    ids=["nan", "inf at first", "zero", "negative", "huge"],
)
def test_a_rule_stands_any_loss(name, loss):
    history = History(loss=loss, val_loss=loss)
    RULES[name](history)
    judge(name, history)

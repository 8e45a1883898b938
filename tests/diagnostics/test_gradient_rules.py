from __future__ import annotations

import numpy as np
import pytest
from histories import healthy_loss, stuck_loss, usual_norms, with_parameters
from hypothesis import given, settings
from hypothesis import strategies as st
from test_loss_rules import judge

from pytracker.diagnostics import RULES, Diagnosis
from pytracker.history import History


def history_of(norms, loss=None):
    norms = np.asarray(norms, np.float64)
    return History(loss=healthy_loss(len(norms)) if loss is None else loss, grad_norm=norms)


def layered(levels, *, steps=200, loss=None, seed=0):
    """Return a history whose weight matrices have gradients of 10**levels, in order, with some noise."""
    random = np.random.default_rng(seed)
    norms = 10.0 ** np.asarray(levels) * random.lognormal(0.0, 0.1, (steps, len(levels)))
    history = with_parameters(History(loss=healthy_loss(steps) if loss is None else loss), norms)
    history["grad_norm"] = np.sqrt((norms**2).sum(axis=1))
    return history


def test_a_norm_that_grows_and_stays_large_explodes():
    norms = usual_norms()
    norms[200:] *= 50.0
    finding = judge("gradient_exploding", history_of(norms, stuck_loss()))
    assert (finding.severity, finding.first_step) == ("warning", 200)
    assert finding.numbers["ratio"] == pytest.approx(50.0, rel=0.3)
    assert finding.action.startswith("clip at 1.2")  # about the 90th percentile of lognormal(0, 0.2)


def test_a_norm_that_grows_while_the_loss_falls_is_information():
    steps = np.arange(400)
    likelihood = history_of(np.exp(steps / 50.0) * usual_norms(), 1.5 - steps / 80.0 + 0.05 * stuck_loss())
    for history in (history_of(usual_norms() * np.where(steps < 200, 1.0, 50.0)), likelihood):
        finding = judge("gradient_exploding", history)
        assert (finding.severity, finding.action) == ("info", "nothing while the loss falls")


def test_an_explosion_is_taken_back_where_the_loss_falls_after_all():
    norms = usual_norms(800)
    norms[100:] *= 50.0
    loss = np.concatenate([stuck_loss(300), 2.3 * np.exp(-np.arange(500) / 60.0) + 0.1])
    diagnosis, history = Diagnosis(["gradient_exploding"]), history_of(norms, loss)
    heard: list[str] = []
    for stop in range(20, 801, 20):
        heard += [finding.severity for finding in diagnosis.update(history, stop=stop)]
    assert (heard[0], heard[-1]) == ("warning", "info")


@settings(max_examples=25, deadline=None)
@given(st.floats(0.6, 1.0), st.integers(0, 1000))
def test_norms_of_sums_of_gradients_are_a_missing_zero_grad(agreement, seed):
    # The norm of a sum of k gradients: its root where they are orthogonal, k where they agree.
    noise = np.random.default_rng(seed).lognormal(0.0, 0.005, 200)
    norms = np.arange(1, 201) ** agreement * noise
    finding = judge("gradients_add_up", history_of(norms, stuck_loss(200)))
    assert (finding.severity, "zero_grad" in finding.action) == ("warning", True)


@pytest.mark.parametrize(
    "norms",
    [
        0.5 + np.arange(200) % 7,  # accumulated over 7 steps, as is meant
        usual_norms(200),
        np.exp(np.arange(200) / 20.0),  # a likelihood that gets better
        np.linspace(1.0, 6.0, 200),
    ],
    ids=["accumulation", "usual", "exponential", "slow"],
)
def test_norms_that_grow_otherwise_are_no_missing_zero_grad(norms):
    assert judge("gradients_add_up", history_of(norms, stuck_loss(200))) is None


def test_the_advice_is_to_clip_at_the_norms_from_before_the_explosion():
    norms = usual_norms(300)
    norms[60:] *= np.append(np.geomspace(1.0, 1e5, 40), np.full(200, 1e5))
    assert float(judge("gradient_exploding", history_of(norms, stuck_loss(300))).action.split()[2].rstrip(":")) < 3.0
    zeros = np.zeros(300)
    zeros[:2], zeros[250:] = [1.0, np.inf], 3000.0
    assert judge("gradient_exploding", history_of(zeros, stuck_loss(300))).action.startswith("clip at 1:")


def test_an_explosion_with_no_norm_before_it_is_clipped_at_no_number():
    finding = judge("gradient_exploding", history_of([1.0, 30.0, 1e4, np.nan] + [np.nan] * 60))
    assert finding.action == "clip the gradient; lower the learning rate 3- to 10-fold"


def test_an_explosion_begins_at_a_step_that_was_recorded():
    history = History(loss=healthy_loss(400))
    history["grad_norm"].extend([1.0] * 20 + [5000.0] * 20, 10 * np.arange(40))
    assert judge("gradient_exploding", history).first_step == 160  # of ten norms in a row the first, not step 250 - 9


def test_one_large_norm_is_no_explosion():
    norms = usual_norms()
    norms[200] = 1e5
    assert judge("gradient_exploding", history_of(norms)) is None


def test_norms_that_grow_until_they_are_not_finite_explode_critically():
    norms = np.concatenate([usual_norms(60), [30.0, 1e4, 1e20], np.full(40, np.nan)])
    finding = judge("gradient_exploding", history_of(norms))
    assert finding.severity == "critical"
    assert finding.first_step < 62 <= finding.last_step


def test_a_single_nan_among_usual_norms_is_no_explosion():
    norms = usual_norms()
    norms[200] = np.nan
    assert judge("gradient_exploding", history_of(norms)) is None


def test_a_gradient_out_of_proportion_from_the_start_explodes_on_any_scale_of_the_loss():
    for scale in (1e-6, 1.0, 1e6):
        history = with_parameters(History(loss=scale * healthy_loss()), scale * 1e4 * np.ones((400, 2)))
        history["grad_norm"] = scale * 1e4 * usual_norms()
        assert judge("gradient_exploding", history, largest=np.inf) is not None


@pytest.mark.parametrize("first", [None, np.nan, np.inf, 0.0], ids=["none", "nan", "inf", "zero"])
def test_without_a_loss_at_first_no_gradient_is_out_of_proportion(first):
    history = with_parameters(History(), 0.1 * np.ones((400, 2)))
    history["grad_norm"] = 0.1 * usual_norms()
    if first is not None:
        history["loss"] = np.concatenate([np.full(20, first), healthy_loss(380)])
    assert judge("gradient_exploding", history) is None
    finding = judge("gradient_exploding", history, largest=0.05)
    assert "loss" not in finding.evidence
    assert "loss" not in finding.numbers


def test_losses_of_zero_among_others_are_no_measure_of_the_gradient():
    loss = np.where(np.arange(400) % 3, 0.0, 1.0)
    history = with_parameters(History(loss=loss), 1e4 * np.ones((400, 2)))
    history["grad_norm"] = 1e4 * usual_norms()
    assert "with a loss of 1 and" in judge("gradient_exploding", history).evidence


def test_a_profile_that_grows_towards_the_input_explodes_with_depth():
    finding = judge("gradient_exploding", layered(np.linspace(3.0, -1.0, 10), loss=stuck_loss(200)))
    assert finding.parameters == ("layers.0.weight",)
    assert finding.numbers["decades"] == pytest.approx(4.0, abs=0.3)


def test_a_profile_that_falls_towards_the_input_vanishes():
    finding = judge("gradient_vanishing", layered(np.linspace(-6.0, -1.0, 10)))
    assert finding.numbers["decades"] == pytest.approx(5.0, abs=0.3)
    assert "layers.0.weight" in finding.parameters
    assert "layers.9.weight" not in finding.parameters


def test_one_small_layer_is_no_vanishing_profile():
    assert judge("gradient_vanishing", layered([0, 0, 0, -7, 0, 0, 0, 0])) is None


def test_a_norm_near_zero_with_the_loss_where_it_was_vanishes():
    stuck = 2.3 + 0.01 * np.random.default_rng(0).standard_normal(400)
    assert judge("gradient_vanishing", history_of(1e-9 * usual_norms(), stuck)) is not None
    falling = np.concatenate([usual_norms(40), 1e-5 * usual_norms(360)])
    assert judge("gradient_vanishing", history_of(falling, stuck)) is not None


@pytest.mark.parametrize(
    ("norms", "loss"),
    [
        ([1e-9] * 120, [0.0] * 5 + [1.0] * 115),
        ([0.0] * 20 + [1e-9] * 100, [1.0] * 120),
        ([1e-9] * 120, [1.0] * 20 + [np.inf] * 100),
    ],
    ids=["losses of zero at first", "norms of zero at first", "an infinite loss"],
)
def test_a_vanishing_norm_is_told_without_what_is_not_known(norms, loss):
    finding = judge("gradient_vanishing", history_of(norms, loss))
    assert finding.rule == "gradient_vanishing"
    assert "nan" not in finding.evidence
    assert "inf" not in finding.evidence
    assert np.isfinite(list(finding.numbers.values())).all()


def test_a_small_norm_at_the_end_of_a_converged_training_does_not_vanish():
    steps = np.arange(400)
    history = history_of(np.exp(-steps / 20.0), 1e-9 + 2.0 * np.exp(-steps / 20.0))
    assert judge("gradient_vanishing", history) is None


def test_exact_zeros_are_not_called_vanishing():
    assert judge("gradient_vanishing", history_of(np.zeros(400), np.full(400, 2.3))) is None


@pytest.mark.parametrize(
    ("share", "loss", "optimizer", "severity"),
    [
        (0.97, stuck_loss(), "SGD", "warning"),
        (0.97, stuck_loss(), "AdamW", "info"),  # its step has the same length whatever the norm
        (0.97, healthy_loss(), "SGD", "info"),  # a habit, and it doesn't hurt
        (0.7, stuck_loss(), "SGD", "info"),
        (0.2, stuck_loss(), "SGD", None),
    ],
)
def test_clipping_is_judged_by_how_often_it_happens_and_whether_it_hurts(share, loss, optimizer, severity):
    random = np.random.default_rng(0)
    norms = np.where(random.random(400) < share, 3.0, 0.5) * random.lognormal(0.0, 0.1, 400)
    history = history_of(norms, loss)
    history.meta["optimizer"] = optimizer
    history.meta["clip_threshold"] = 1.0
    finding = judge("always_clipped", history)
    assert (finding.severity if finding else None) == severity


def test_the_evidence_names_the_norms_that_are_clipped():
    history = history_of(np.random.default_rng(0).lognormal(np.log(8.3), 0.05, 400), stuck_loss())
    history.meta["clip_threshold"] = 1.0
    finding = judge("always_clipped", history)
    assert "the median norm is 8.29" in finding.evidence
    assert finding.numbers["p90"] == pytest.approx(8.3 * np.exp(0.05 * 1.28), rel=0.02)


def test_norms_recorded_after_clipping_are_recognised():
    history = history_of(np.full(400, 1.0 - 1e-6), stuck_loss())
    history.meta["clip_threshold"] = 1.0
    assert "before clipping" in judge("always_clipped", history).action


def test_without_a_threshold_nothing_is_said_of_clipping():
    assert judge("always_clipped", history_of(np.full(400, 5.0))) is None


@pytest.mark.parametrize("name", ["gradient_exploding", "gradient_vanishing", "always_clipped"])
@pytest.mark.parametrize(
    "norms", [[np.nan] * 300, [np.inf] * 300, [0.0] * 300, [1e308] * 300], ids=["nan", "inf", "zero", "huge"]
)
def test_a_rule_stands_any_norm(name, norms):
    history = history_of(norms)
    history.meta["clip_threshold"] = 1.0
    RULES[name](history)
    judge(name, history)

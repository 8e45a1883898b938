from __future__ import annotations

import numpy as np
import pytest
from histories import EVERY, healthy_loss, with_parameters
from hypothesis import given, settings
from hypothesis import strategies as st
from test_gradient_rules import layered
from test_loss_rules import judge

from pytracker.columns import INFS, NANS, SUM_SQ
from pytracker.diagnostics import Diagnosis
from pytracker.history import History, ParameterInfo, summarize


def poisoned(step, places, column, *, steps=200, count=6, loss=None, keep_rows=True):
    """Return a history in which the gradients of ``places`` have one NaN or Inf each at ``step``."""
    history = History(loss=healthy_loss(steps) if loss is None else loss)
    history.parameters.infos = [ParameterInfo(f"p{index}", (4, 4), "float32", "0", 16) for index in range(count)]
    rows = np.zeros((steps, count, 6))
    rows[:, :, SUM_SQ] = 1.0
    rows[step, places, column] = 1
    rows[step, places, SUM_SQ] = np.nan if column == NANS else np.inf
    for start in range(0, steps, EVERY):
        block, numbers = rows[start : start + EVERY], np.arange(start, min(steps, start + EVERY))
        if keep_rows:
            history.parameters.append_rows(numbers, block)
        history.parameters.append(summarize(numbers, block, history.parameters.numel))
    history["grad_norm"] = np.sqrt(rows[:, :, SUM_SQ].sum(axis=1))
    return history


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 199),
    st.sets(st.integers(0, 5), min_size=1),
    st.sampled_from([(NANS, "NaN"), (INFS, "Inf")]),
    st.booleans(),
)
def test_a_gradient_that_is_not_finite_is_located_to_the_step_and_the_parameter_nearest_to_the_loss(
    step, places, kind, keep_rows
):
    finding = judge("gradient_nonfinite", poisoned(step, sorted(places), kind[0], keep_rows=keep_rows))
    assert finding.first_step == step
    assert finding.parameters == tuple(f"p{place}" for place in sorted(places, reverse=True))
    assert f"{kind[1]} in the gradient of 'p{max(places)}'" in finding.evidence
    assert "the loss was finite" in finding.evidence
    assert finding.severity == "critical"


@pytest.mark.parametrize(
    ("nans", "infs", "exact", "within"),
    [(1, 5, "1 NaN and 5 Inf", "a NaN or Inf"), (0, 5, "5 Inf", "an Inf"), (2, 0, "2 NaN", "a NaN")],
)
def test_nan_and_inf_are_counted_apart(nans, infs, exact, within):
    for keep_rows, told in ((True, exact), (False, within)):
        history = History(loss=healthy_loss(EVERY))
        history.parameters.infos = [ParameterInfo("p", (4, 4), "float32", "0", 16)]
        rows = np.ones((EVERY, 1, 6)) * [0, 1, 0, 0, 0, 0]
        rows[5, 0, [SUM_SQ, NANS, INFS]] = [np.nan, nans, infs]
        if keep_rows:
            history.parameters.append_rows(np.arange(EVERY), rows)
        history.parameters.append(summarize(np.arange(EVERY), rows, history.parameters.numel))
        assert judge("gradient_nonfinite", history).evidence.startswith(f"{told} in the gradient of 'p' at step 5")


def test_the_finding_says_that_the_loss_was_not_finite():
    loss = healthy_loss(200)
    loss[50] = np.nan
    finding = judge("gradient_nonfinite", poisoned(50, list(range(6)), NANS, loss=loss))
    assert "the loss was not finite" in finding.evidence
    assert "loss itself" in finding.cause


def test_later_steps_grow_the_finding_and_do_not_move_its_origin():
    history = poisoned(50, [2], NANS)
    norms = history["grad_norm"][:]
    norms[51:] = [np.nan] * 149
    history["grad_norm"] = norms
    finding = judge("gradient_nonfinite", history)
    assert (finding.first_step, finding.last_step, finding.parameters) == (50, 199, ("p2",))


def test_without_parameters_the_total_norm_gives_the_step():
    norms = np.ones(200)
    norms[77] = np.inf
    finding = judge("gradient_nonfinite", History(loss=healthy_loss(200), grad_norm=norms))
    assert (finding.first_step, finding.parameters) == (77, ())


@pytest.mark.parametrize("steps", [[77], [77, 78, 79], [77, 150]], ids=str)
def test_it_lasts_until_the_last_step_that_is_not_finite(steps):
    norms = np.ones(200)
    norms[steps] = np.nan
    finding = judge("gradient_nonfinite", History(loss=healthy_loss(200), grad_norm=norms))
    assert (finding.first_step, finding.last_step) == (steps[0], steps[-1])
    assert finding.numbers.get("later_steps", 0) == len(steps) - 1


def test_finite_gradients_are_finite():
    assert judge("gradient_nonfinite", layered([0.0] * 6)) is None


def test_a_parameter_with_zero_gradients_is_dead():
    norms = np.ones((200, 6))
    norms[60:, [1, 2]] = 0.0
    finding = judge("dead_parameter", with_parameters(History(loss=healthy_loss(200)), norms))
    assert finding.parameters == ("layers.1.weight", "layers.2.weight")
    assert (finding.severity, finding.first_step, finding.last_step) == ("warning", 60, 199)


def test_a_second_dead_parameter_is_told_with_its_own_span():
    norms = np.ones((2000, 8))
    norms[0:100, 1] = norms[1900:, 5] = 0.0
    finding = judge("dead_parameter", with_parameters(History(loss=healthy_loss(2000)), norms))
    assert (finding.first_step, finding.last_step) == (0, 1999)
    assert "1 of 8 parameters (layers.5.weight) have had a zero gradient for 100 steps" in finding.evidence


def test_of_parameters_that_died_one_after_the_other_the_steps_are_those_that_all_were_dead():
    norms = np.ones((400, 6))
    norms[100:, 1] = norms[300:, 2] = 0.0
    finding = judge("dead_parameter", with_parameters(History(loss=healthy_loss(400)), norms))
    assert (finding.first_step, finding.numbers["dead"]) == (100, 2)
    assert finding.numbers["steps"] == 100


def test_a_parameter_that_was_not_dead_all_the_time_between_two_looks_is_told_anew():
    norms = np.ones((1000, 6))
    norms[:100, 1] = norms[600:, 1] = 0.0
    history, diagnosis = with_parameters(History(loss=healthy_loss(1000)), norms), Diagnosis(["dead_parameter"])
    for stop in (100, 1000):
        diagnosis.update(history, stop=stop)
    assert diagnosis.findings[0].numbers["steps"] <= 400


def test_a_frozen_parameter_is_told_from_its_beginning_however_seldom_it_is_looked_at():
    norms = np.ones((1000, 6))
    norms[:, 3] = np.nan
    history, diagnosis = with_parameters(History(loss=healthy_loss(1000)), norms), Diagnosis(["dead_parameter"])
    for stop in (60, 400, 1000):
        diagnosis.update(history, stop=stop)
    assert diagnosis.findings[0].numbers["steps"] == 1000


def test_a_parameter_that_is_zero_only_now_and_then_lives():
    norms = np.ones((200, 6))
    norms[:, 1] = np.arange(200) % 10 == 0
    assert judge("dead_parameter", with_parameters(History(loss=healthy_loss(200)), norms)) is None


def test_a_parameter_without_a_gradient_is_unused():
    norms = np.ones((200, 6))
    norms[:, 3] = np.nan
    finding = judge("dead_parameter", with_parameters(History(loss=healthy_loss(200)), norms))
    assert (finding.severity, finding.parameters) == ("info", ("layers.3.weight",))
    assert finding.cause.startswith("frozen (requires_grad=False), or not used")


def test_a_model_that_is_dead_as_a_whole_is_critical():
    finding = judge("dead_parameter", with_parameters(History(loss=[0.7] * 200), np.zeros((200, 6))))
    assert finding.severity == "critical"
    assert "loss doesn't depend on the model" in finding.cause


@pytest.mark.parametrize("level", [-3.0, 3.0])
def test_one_layer_far_from_the_others_is_out_of_line(level):
    finding = judge("layer_imbalance", layered([0, 0, level, 0, 0, 0]))
    assert finding.parameters == ("layers.2.weight",)
    assert finding.numbers["decades"] == pytest.approx(level, abs=0.2)


def test_a_smooth_profile_is_no_imbalance():
    assert judge("layer_imbalance", layered(np.linspace(-4, 4, 12))) is None


def test_layers_of_different_size_are_compared_by_element():
    norms = np.tile([1.0, 1.0, 1.0, 100.0], (200, 1))
    shapes = [(10, 10), (10, 10), (10, 10), (1000, 1000)]
    history = with_parameters(History(loss=healthy_loss(200)), norms, shapes=shapes)
    assert judge("layer_imbalance", history) is None


@pytest.mark.parametrize(
    ("optimizer", "lr", "severity"),
    [
        ("SGD", 5.0, "warning"),
        ("SGD", 0.01, None),
        ("Adam", 0.5, "warning"),
        ("AdamW", 1e-3, None),
        ("Adafactor", 5.0, None),
    ],
)
def test_the_update_ratio_follows_the_optimizer(optimizer, lr, severity):
    history = with_parameters(History(loss=healthy_loss(200), lr=[lr] * 200), np.ones((200, 6)), weight_norm=10.0)
    history.meta["optimizer"] = optimizer
    finding = judge("update_ratio", history)
    assert (finding.severity if finding else None) == severity
    if finding:
        assert finding.numbers["ratio"] == pytest.approx(lr * (1.0 if optimizer == "SGD" else 10.0) / 10.0, rel=1e-5)


def test_a_tiny_update_is_told_only_while_there_is_loss_to_reduce():
    def history(loss):
        made = with_parameters(History(loss=loss, lr=[1e-6] * 200), np.ones((200, 6)), weight_norm=10.0)
        made.meta["optimizer"] = "SGD"
        return made

    assert judge("update_ratio", history(np.full(200, 2.3))).severity == "info"
    assert judge("update_ratio", history(np.linspace(2.3, 0.1, 200)), low=1e-4).last_step < 120


def test_each_group_is_judged_by_its_own_learning_rate():
    history = with_parameters(History(loss=healthy_loss(200)), np.ones((200, 3)), weight_norm=10.0)
    history["lr/0"] = [5.0] * 200
    history["lr/head"] = [1e-3] * 200
    history.meta["optimizer"] = "SGD"
    assert judge("update_ratio", history).numbers["ratio"] == pytest.approx(0.5, rel=1e-5)

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from histories import EVERY, healthy_loss, stuck_loss, with_parameters
from hypothesis import given, settings
from hypothesis import strategies as st
from test_gradient_rules import layered
from test_loss_rules import judge

from pytracker.columns import INFS, NANS, SUM_SQ
from pytracker.diagnostics import Diagnosis
from pytracker.history import History, ParameterHistory, ParameterInfo, summarize


def poisoned(step, places, column, *, steps=200, count=6, loss=None, keep_rows=True, spoilt=False):
    """Return a history in which the gradients of ``places`` have one NaN or Inf each at ``step``.

    ``spoilt``: and all gradients of the steps after it, as where the optimizer has taken the step.
    """
    history = History(loss=healthy_loss(steps) if loss is None else loss)
    history.parameters.infos = [ParameterInfo(f"p{index}", (4, 4), "float32", "0", 16) for index in range(count)]
    rows = np.zeros((steps, count, 6))
    rows[:, :, SUM_SQ] = 1.0
    rows[step, places, column] = 1
    rows[step, places, SUM_SQ] = np.nan if column == NANS else np.inf
    if spoilt:
        rows[step + 1 :, :, [SUM_SQ, NANS]] = [np.nan, 16]
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
    history = poisoned(step, sorted(places), kind[0], keep_rows=keep_rows, spoilt=True)
    finding = judge("gradient_nonfinite", history)
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
    assert finding.severity == "warning"  # one bad batch, whose step was skipped


def test_steps_that_a_grad_scaler_skips_are_no_alarm():
    finding = judge("gradient_nonfinite", poisoned(2, [0, 1], INFS))
    assert (finding.severity, finding.first_step) == ("info", 2)
    assert "GradScaler" in finding.cause
    assert judge("gradient_nonfinite", poisoned(2, [0, 1], INFS, spoilt=True)).severity == "critical"


def test_steps_that_are_skipped_too_often_are_a_warning():
    norms = np.ones(400)
    norms[::8] = np.inf
    assert judge("gradient_nonfinite", History(loss=healthy_loss(), grad_norm=norms)).severity == "warning"


def recorded_as_skipped(bad, skipped, steps=100):
    norms, left_out = np.ones(steps), np.zeros(steps)
    norms[bad], left_out[skipped] = np.inf, 1.0
    return History(loss=healthy_loss(steps), grad_norm=norms, step_skipped=left_out)


def test_a_step_that_is_recorded_as_skipped_is_no_alarm_before_a_finite_one_has_come():
    assert judge("gradient_nonfinite", recorded_as_skipped([99], [99])).severity == "info"
    assert judge("gradient_nonfinite", recorded_as_skipped([90, 99], [90, 99])).severity == "info"
    assert judge("gradient_nonfinite", recorded_as_skipped([99], [])).severity == "critical"
    assert judge("gradient_nonfinite", recorded_as_skipped([90, 99], [90])).severity == "critical"


def test_twenty_skipped_steps_in_a_row_train_nothing():
    last = list(range(81, 100))
    assert judge("gradient_nonfinite", recorded_as_skipped(last, last)).severity == "info"
    last = list(range(80, 100))
    assert judge("gradient_nonfinite", recorded_as_skipped(last, last)).severity == "critical"


def test_a_step_that_was_taken_after_skipped_ones_is_told_in_words_of_its_own():
    history = recorded_as_skipped([5, 150], [5], steps=151)
    diagnosis = Diagnosis(["gradient_nonfinite"])
    (finding,) = diagnosis.update(history, stop=60)
    assert (finding.severity, finding.first_step) == ("info", 5)
    (finding,) = diagnosis.update(history)
    assert (finding.severity, finding.first_step, finding.last_step) == ("critical", 5, 150)
    assert "at step 150" in finding.evidence
    assert "GradScaler" not in finding.cause
    assert not diagnosis.withdrawn


def test_a_loss_of_zero_beside_a_gradient_that_is_not_finite_is_called_an_overflow():
    loss = healthy_loss(200)
    loss[50] = 0.0
    assert "overflow of float16" in judge("gradient_nonfinite", poisoned(50, [0], NANS, loss=loss)).evidence


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
    assert "the loss doesn't depend on the model" in finding.cause
    falls = judge("dead_parameter", with_parameters(History(loss=healthy_loss(200)), np.zeros((200, 6))))
    assert falls.cause.startswith("tracker.step() runs after optimizer.zero_grad()")


@pytest.mark.parametrize(
    ("frozen", "group", "severity"), [([], "0", "warning"), ([[3, 4]], "0", "info"), ([], "", "info")]
)
def test_a_trained_parameter_that_gets_no_gradient_is_a_detached_branch(frozen, group, severity):
    norms = np.ones((200, 6))
    norms[:, 3] = np.nan
    history = with_parameters(History(loss=healthy_loss(200)), norms)
    infos = history.parameters.infos
    history.parameters.infos = [*infos[:3], replace(infos[3], group=group), *infos[4:]]
    history.meta["frozen"] = frozen
    finding = judge("dead_parameter", history)
    assert finding.severity == severity
    assert ("detached" in finding.cause) == (severity == "warning")


def test_zeros_beside_multiples_of_the_smallest_float16_are_an_underflow():
    norms = np.full((200, 6), 3 * 2.0**-24 * 10.0)  # all 100 elements are 3 of the smallest
    norms[:, 1] = 0.0
    finding = judge("dead_parameter", with_parameters(History(loss=stuck_loss(200)), norms))
    assert "float16" in finding.cause
    norms[:, 2] *= 1.1
    assert "ReLU" in judge("dead_parameter", with_parameters(History(loss=stuck_loss(200)), norms)).cause


def left_out(places, steps=200, optimizer="Adam", loss=stuck_loss):
    history = with_parameters(History(loss=loss(steps)), np.random.default_rng(0).lognormal(size=(steps, 6)))
    infos = history.parameters.infos
    history.parameters.infos = [replace(info, group="" if index in places else "0") for index, info in enumerate(infos)]
    history.meta["optimizer"] = optimizer
    return judge("not_in_optimizer", history)


def test_a_parameter_with_a_gradient_that_is_in_no_group_is_named():
    finding = left_out({2, 4})
    assert (finding.severity, finding.parameters) == ("warning", ("layers.2.weight", "layers.4.weight"))
    assert left_out(set()) is None
    assert left_out({2}, optimizer=None) is None


def test_an_optimizer_of_a_copy_is_critical():
    finding = left_out(set(range(6)))
    assert finding.severity == "critical"
    assert "another model" in finding.cause
    assert left_out(set(range(6)), loss=healthy_loss) is None  # copies in another precision


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
    history = with_parameters(History(loss=stuck_loss(200), lr=[lr] * 200), np.ones((200, 6)), weight_norm=10.0)
    history.meta["optimizer"] = optimizer
    finding = judge("update_ratio", history)
    assert (finding.severity if finding else None) == severity
    if finding:
        # The drain is 20 steps long, within which the weights have grown as a random walk does.
        ratio = lr * (1.0 if optimizer == "SGD" else 10.0) / 10.0
        assert finding.numbers["ratio"] == pytest.approx(ratio / (1.0 + 19 * ratio**2) ** 0.5, rel=1e-3)


def test_long_steps_are_information_while_the_loss_falls():
    history = with_parameters(History(loss=healthy_loss(200), lr=[5.0] * 200), np.ones((200, 6)), weight_norm=10.0)
    history.meta["optimizer"] = "SGD"
    finding = judge("update_ratio", history)
    assert finding.severity == "info"
    assert "140" not in finding.action


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_the_advice_on_the_learning_rate_is_at_most_ten_fold(optimizer):
    history = with_parameters(History(loss=stuck_loss(200), lr=[500.0] * 200), np.ones((200, 6)), weight_norm=10.0)
    history.meta["optimizer"] = optimizer
    assert "3- to 10-fold" in judge("update_ratio", history).action


def test_the_step_of_a_clipped_gradient_is_as_long_as_clipping_leaves_it():
    # lr 0.05 * norm 3200 / weights of 10: 16 unclipped; clipped at 0.5, a four-hundredth.
    history = with_parameters(History(loss=stuck_loss(200), lr=[0.05] * 200), np.full((200, 4), 1600.0))
    history["grad_norm"] = np.full(200, 3200.0)
    history.meta.update(optimizer="SGD", clip_threshold=0.5)
    assert judge("update_ratio", history) is None
    history.meta["clip_threshold"] = 1e9
    assert judge("update_ratio", history).severity == "warning"


@pytest.mark.parametrize(("update", "severity"), [(2.0, "warning"), (0.01, None)])
def test_an_update_that_was_measured_counts_and_not_its_estimate(update, severity):
    history = History(loss=stuck_loss(200), lr=[5.0] * 200)  # of SGD, which would be 0.5 of the weights
    history = with_parameters(history, np.ones((200, 6)), weight_norm=10.0, update_norm=update)
    for optimizer in ("SGD", "Muon"):  # of the second there is no estimate
        history.meta["optimizer"] = optimizer
        finding = judge("update_ratio", history)
        assert (finding.severity if finding else None) == severity
        if finding:
            assert finding.numbers["ratio"] == pytest.approx(update / 10.0, rel=1e-3)


def test_an_update_that_was_measured_some_intervals_ago_counts():
    history = with_parameters(History(loss=stuck_loss(200)), np.ones((200, 6)), weight_norm=10.0)
    first = next(history.parameters.intervals())
    measured = ParameterHistory(history.parameters.infos)
    measured.append(replace(first, update_norm=np.full(6, 4.0, np.float32)))
    for interval in list(history.parameters.intervals())[1:]:
        measured.append(interval)
    history.parameters = measured
    assert judge("update_ratio", history).numbers["ratio"] == pytest.approx(0.4, rel=1e-3)


def test_weights_that_began_at_zero_say_nothing_of_the_step():
    history = with_parameters(History(loss=stuck_loss(200), lr=[0.1] * 200), np.ones((200, 2)), weight_norm=0.0)
    history.parameters = with_parameters(History(), np.ones((200, 2)), weight_norm=0.0).parameters
    history.meta["optimizer"] = "Adam"
    assert judge("update_ratio", history) is None


@pytest.mark.parametrize(("kind", "found"), [("adaptive", True), ("", False)])
def test_a_wrapped_optimizer_is_judged_by_what_it_is(kind, found):
    history = with_parameters(History(loss=stuck_loss(200), lr=[0.5] * 200), np.ones((200, 6)), weight_norm=10.0)
    history.meta.update(optimizer="AcceleratedOptimizer", optimizer_kind=kind)
    assert (judge("update_ratio", history) is not None) == found


def test_a_tiny_update_is_told_only_while_there_is_loss_to_reduce():
    def history(loss):
        made = with_parameters(History(loss=loss, lr=[1e-6] * 200), np.ones((200, 6)), weight_norm=10.0)
        made.meta["optimizer"] = "SGD"
        return made

    assert judge("update_ratio", history(np.full(200, 2.3))).severity == "info"
    assert judge("update_ratio", history(np.linspace(2.3, 0.1, 200)), low=1e-4).last_step < 120


@pytest.mark.parametrize("first", [None, 5.0])
def test_each_group_is_judged_by_its_own_learning_rate(first):
    history = with_parameters(History(loss=healthy_loss(200)), np.ones((200, 3)), weight_norm=10.0)
    history["lr/0"] = [5.0] * 200
    history["lr/head"] = [1e-3] * 200
    if first is not None:
        history["lr"] = [first] * 200
    history.meta["optimizer"] = "SGD"
    assert judge("update_ratio", history).numbers["ratio"] == pytest.approx(0.5 / (1.0 + 19 * 0.25) ** 0.5, rel=1e-3)

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from histories import healthy_loss, usual_norms, with_parameters

from pytracker import Run, load_run
from pytracker.diagnostics import RULES, Diagnosis, Finding, diagnose, rule
from pytracker.errors import InvalidTypeError, InvalidValueError
from pytracker.history import History, ParameterInfo, summarize
from pytracker.tracking import InMemoryRun, LiveDiagnosis


def spiky(steps=400, at=(200, 300)):
    loss = healthy_loss(steps)
    loss[[place for place in at if place < steps]] += 20.0
    return History(loss=loss)


def test_a_user_adds_a_rule_by_name_in_five_lines(scratch_rule):
    @rule("accuracy_low")
    def check(view, below=0.5):
        accuracy = view["accuracy"]
        if len(accuracy) >= 100 and accuracy.values[-1] < below:
            yield view.finding("warning", f"accuracy is {accuracy.values[-1]:.2f} after {len(accuracy)} steps")

    history = History(accuracy=[0.3] * 120)
    assert [(found.rule, found.evidence) for found in diagnose(history)] == [
        ("accuracy_low", "accuracy is 0.30 after 120 steps")
    ]
    assert diagnose(history, settings={"accuracy_low": {"below": 0.2}}) == []
    assert check(history)[0].last_step == 119


def test_one_trouble_is_one_finding_that_grows():
    diagnosis, history = Diagnosis(["loss_spike"]), spiky()
    seen = [diagnosis.update(history, stop=stop) for stop in range(20, 401, 20)]
    reported = [found for update in seen for found in update]
    assert [found.last_step for found in reported] == [200, 300]
    (finding,) = diagnosis.findings
    assert (finding.first_step, finding.last_step, finding.numbers["count"]) == (200, 300, 2)


def test_an_update_without_new_steps_reports_nothing():
    diagnosis, history = Diagnosis(), spiky()
    assert diagnosis.update(history)
    assert diagnosis.update(history) == []


def test_a_rule_that_raises_is_reported_once_and_the_others_go_on(scratch_rule):
    calls = []

    @rule
    def broken(view):
        calls.append(view.stop)
        raise ZeroDivisionError("one over nothing")

    diagnosis, history = Diagnosis(["broken", "loss_spike"]), spiky()
    for stop in range(20, 401, 20):
        diagnosis.update(history, stop=stop)
    assert calls == [20]
    assert diagnosis.rules == ["loss_spike"]
    failure = next(found for found in diagnosis.findings if found.rule == "rule_failed:broken")
    assert "ZeroDivisionError: one over nothing" in failure.evidence
    assert any(found.rule == "loss_spike" for found in diagnosis.findings)


class UnspeakableError(Exception):
    def __str__(self):
        raise ZeroDivisionError


def unspeakable(view):
    raise UnspeakableError


def unwritable(view):
    raise ValueError("\ud800")


class Odd(Finding):
    def __post_init__(self):
        pass

    def __eq__(self, other):
        raise ZeroDivisionError


GARBAGE = {
    "an array": lambda view: [view.finding("info", "x", first_step=0, last_step=0, numbers={"a": np.arange(3)})],
    "no parameters": lambda view: [view.finding("info", "x", parameters=None)],
    "no evidence": lambda view: [view.finding("info", None)],
    "a surrogate": lambda view: [view.finding("info", "\ud800")],
    "steps in reverse": lambda view: [view.finding("info", "x", first_step=10**9)],
    "None": lambda view: [None],
    "a text": lambda view: "abc",
    "an error that cannot be told": unspeakable,
    "an error that cannot be written": unwritable,
    "an odd finding": lambda view: [Odd("g", "info", 0, 2**70, "x")],
}


@pytest.mark.parametrize("what", GARBAGE)
def test_whatever_a_rule_gives_wrongly_is_a_failed_rule_and_the_run_keeps_that(what, scratch_rule, tmp_path):
    rule("g\ud800" if what == "an error that cannot be written" else "g")(GARBAGE[what])
    run = Run(tmp_path, name="a")
    judge = LiveDiagnosis(Diagnosis([list(RULES)[-1]]), run, [].append)
    for _ in range(3):
        run.log_many(np.arange(run.history.last_step + 1, run.history.last_step + 21), {"loss": np.ones(20)})
        judge.evaluate_now(run.history)
    run.finish()
    (finding,) = judge.findings
    assert (finding.rule[:13], finding.last_step) == ("rule_failed:g", 19)
    assert [Finding.from_dict(kept) for kept in load_run(run.path).findings] == [finding]


def test_a_finding_of_a_class_of_its_own_is_taken_as_a_finding(scratch_rule):
    rule("g")(lambda view: [Odd("g", "info", 0, 1, "x", parameters=["a"])])
    assert diagnose(spiky(120), rules=["g"]) == [Finding("g", "info", 0, 1, "x", ("a",))]


def test_a_finding_with_a_nan_does_not_grow_at_each_look(scratch_rule):
    rule("g")(lambda view: [view.finding("info", "x", first_step=0, last_step=0, numbers={"a": float("nan")})])
    diagnosis, history = Diagnosis(["g"]), spiky()
    assert [len(diagnosis.update(history, stop=stop)) for stop in (20, 40, 60)] == [1, 0, 0]


def test_online_and_after_the_fact_agree_on_what_and_where():
    history = with_parameters(spiky(), np.tile(usual_norms()[:, None], (1, 6)))
    history["grad_norm"] = usual_norms()
    history.meta["every"] = 20
    online = Diagnosis()
    for stop in range(20, 401, 20):
        online.update(history, stop=stop)
    assert [(found.rule, found.first_step, found.last_step) for found in diagnose(history)] == [
        (found.rule, found.first_step, found.last_step) for found in online.findings
    ]


@pytest.fixture
def looks(scratch_rule):
    """The looks of the rule ``witness``, as (since, stop)."""
    found = []

    @rule
    def witness(view):
        found.append((view.since, view.stop))
        return ()

    return found


def drained(ends, start=0, history=None):
    """Return a history of one parameter whose drains were at ``ends``."""
    history = History() if history is None else history
    history.parameters.infos = [ParameterInfo("weight", (2,), "float32", "", 2)]
    for end in ends:
        steps = np.arange(start, end)
        history["loss"].extend(np.ones(len(steps)), steps)
        history.parameters.append(summarize(steps, np.ones((len(steps), 1, 6)), [2]))
        start = end
    return history


def test_a_history_that_has_grown_by_much_is_looked_at_as_if_it_had_grown_bit_by_bit(looks):
    Diagnosis(["witness"]).update(spiky(190))
    assert looks == [(0, 50), (50, 100), (100, 150), (150, 190)]
    del looks[:]
    history, diagnosis = History(), Diagnosis(["witness"])
    diagnosis.update(history)
    history["loss"].extend(healthy_loss(190))
    diagnosis.update(history)
    assert looks == [(0, 50), (50, 100), (100, 150), (150, 190)]
    history["loss"].extend([1.0] * 20)
    diagnosis.update(history)
    assert looks[4:] == [(190, 200), (200, 210)]


def test_looks_are_taken_at_the_ends_of_intervals_however_long_these_are(looks):
    history = drained([50, 100, 130, 180, 230, 260, 390, 391])
    Diagnosis(["witness"]).update(history)
    assert [stop for _, stop in looks] == [50, 100, 130, 180, 230, 260, 390, 391]


def test_steps_without_an_interval_are_looked_at_as_if_drained_every_so_often_and_a_gap_is_not(looks):
    history = drained([20, 40])
    history.meta["every"] = 20
    history["loss"].extend([1.0] * 25)  # their intervals went with a truncation
    drained([85, 105], start=65, history=history)
    drained([225, 245], start=205, history=history)  # a training that goes on from a later checkpoint
    history["loss"].append(1.0)
    Diagnosis(["witness"]).update(history)
    assert [stop for _, stop in looks] == [20, 40, 60, 65, 85, 105, 225, 245, 246]


def test_the_first_50_ends_are_looked_at_and_later_only_those_that_are_2_per_cent_further(looks):
    ends = [*range(100, 2501, 50), *range(2501, 6001)]
    Diagnosis(["witness"]).update(drained(ends))
    stops = [stop for _, stop in looks]
    assert stops[:50] == ends[:50]
    later = np.array(stops[49:-1])
    assert np.array_equal(later[1:], later[:-1] + later[:-1] // 50)
    assert stops[-1] == 6000


def test_looks_at_other_places_do_not_move_those_that_are_due(looks):
    history = drained(range(1, 1001))
    Diagnosis(["witness"]).update(history)
    due = {stop for _, stop in looks}
    del looks[:]
    growing, diagnosis = History(), Diagnosis(["witness"])
    for end in range(1, 1001):
        drained([end], start=end - 1, history=growing)
        if end >= diagnosis.due or end % 7 == 0:
            diagnosis.update(growing)
    assert due - {stop for _, stop in looks} <= {1000}
    assert len(looks) > len(due)


def test_a_look_taken_again_sees_what_came_late_as_new_and_counts_nothing_twice(scratch_rule):
    @rule
    def seen(view):
        new = [name for name in ("loss", "val_loss") if view[name].index(view.since) < len(view[name])]
        count = int(view.previous.numbers["count"]) if view.previous else 0
        yield view.finding("info", f"{new} in look {count + 1}", first_step=0, numbers={"count": count + 1})

    history, diagnosis = drained([20]), Diagnosis(["seen"])
    diagnosis.update(history)
    drained([40], start=20, history=history)
    assert [found.evidence for found in diagnosis.update(history)] == ["['loss'] in look 2"]
    assert diagnosis.update(history, again=True) == []
    history["val_loss"].append(0.5, 39)
    assert diagnosis.update(history) == []
    (found,) = diagnosis.update(history, again=True)
    assert found.evidence == "['loss', 'val_loss'] in look 2"
    assert diagnosis.findings == [found] == diagnose(history, rules=["seen"])
    drained([60], start=40, history=history)
    diagnosis.update(history, again=True)  # not yet looked at: an ordinary look
    assert diagnosis.findings[0].evidence == "['loss'] in look 3"
    assert diagnosis.findings == diagnose(history, rules=["seen"])


def test_a_rule_that_fails_in_a_look_taken_again_or_no_longer_does_is_as_if_it_had_been_one_look(scratch_rule):
    @rule
    def needs_validation(view):
        return [view.finding("info", f"{view['val_loss'].values[-1]}")]

    @rule
    def needs_none(view):
        return [] if len(view["val_loss"]) == 0 else [None]

    names = ["needs_validation", "needs_none"]
    history, diagnosis = drained([20]), Diagnosis(names)
    assert [found.rule for found in diagnosis.update(history)] == ["rule_failed:needs_validation"]
    assert diagnosis.rules == ["needs_none"]
    history["val_loss"].append(0.5, 19)
    assert [found.rule for found in diagnosis.update(history, again=True)] == [
        "needs_validation",
        "rule_failed:needs_none",
    ]
    assert diagnosis.rules == ["needs_validation"]
    assert diagnosis.findings == diagnose(history, rules=names)


def test_a_look_taken_again_of_a_history_that_went_back_is_of_what_is_left(looks):
    history, diagnosis = drained([20, 40]), Diagnosis(["witness"])
    diagnosis.update(history)
    history.truncate(20)
    diagnosis.update(history, again=True)
    assert looks == [(0, 20), (20, 40), (0, 20)]


def test_a_judge_that_looks_again_tells_what_late_values_show_once():
    heard, values = [], healthy_loss(180)
    history, judge = History(), LiveDiagnosis(Diagnosis(["overfitting"]), InMemoryRun(), heard.append)
    for epoch, validation in enumerate([2.0, 1.2, 1.0, 1.3, 1.6, 1.9, 2.2, 2.5, 2.8]):
        history["loss"].extend(values[epoch * 20 : epoch * 20 + 20])
        judge.evaluate_now(history)
        history["val_loss"].append(validation, history.last_step)
        judge.evaluate_now(history)
        assert bool(heard) == (epoch > 6)  # the seventh evaluation is the first that is certain
        judge.evaluate_again(history)
    assert {(found.rule, found.first_step) for found in heard} == {("overfitting", 19)}
    assert [found.last_step for found in heard] == sorted(found.last_step for found in heard)
    judge.evaluate_again(history)
    assert judge.findings == heard[-1:] == diagnose(history, rules=["overfitting"])


def test_a_view_never_shows_a_rule_what_comes_later():
    history = spiky(at=(300,))
    diagnosis = Diagnosis()
    assert diagnosis.update(history, stop=300) == []
    assert diagnosis.update(history, stop=305) == []  # five losses say whether it was a single one
    assert [found.rule for found in diagnosis.update(history, stop=306)] == ["loss_spike"]


def test_a_healthy_training_has_no_finding():
    history = with_parameters(History(loss=healthy_loss()), np.tile(usual_norms()[:, None], (1, 6)))
    history["grad_norm"] = usual_norms()
    history["lr"] = np.linspace(1e-3, 1e-5, 400)
    history["val_loss"].extend(healthy_loss()[::20], np.arange(0, 400, 20))
    history.meta.update(optimizer="AdamW", scheduler=True, clip_threshold=10.0)
    assert diagnose(history) == []


@pytest.mark.parametrize(
    "history", [History(), History(loss=[]), History(loss=[1.0]), History(accuracy=[np.nan] * 300)]
)
def test_a_history_that_says_nothing_has_no_finding(history):
    assert diagnose(history) == []


def test_unknown_rules_and_settings_are_refused_by_name():
    with pytest.raises(InvalidValueError, match=r"'loss_spikes'.*loss_spike"):
        Diagnosis(["loss_spikes"])
    with pytest.raises(InvalidValueError, match=r"'sigma'.*z, window"):
        Diagnosis(settings={"loss_spike": {"sigma": 3}})
    with pytest.raises(InvalidValueError, match="'loss_spikes'"):
        Diagnosis(settings={"loss_spikes": {}})
    with pytest.raises(InvalidTypeError, match="int"):
        Diagnosis([3])


def test_all_the_rules_of_the_contract_exist_and_explain_every_setting():
    wanted = {"loss_not_decreasing", "loss_oscillating", "overfitting", "gradient_exploding", "gradient_vanishing"}
    wanted |= {"loss_spike", "gradient_nonfinite", "dead_parameter", "layer_imbalance", "update_ratio"}
    wanted |= {"always_clipped", "constant", "learning_rate"}
    assert wanted <= RULES.keys()
    for name in wanted:
        function = RULES[name].function
        for setting in list(function.__annotations__)[1:-1]:
            assert f"        {setting}:" in function.__doc__, f"{name}: {setting} isn't documented"


def test_diagnosing_needs_no_torch():
    code = "import sys, pytracker.diagnostics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    "noted", [None, 3, [], {"rules": "constant"}, {"settings": [1]}, {"settings": {"constant": 1}}]
)
def test_a_note_of_a_diagnosis_that_is_none_is_the_default(noted):
    assert Diagnosis.as_recorded(noted).changed == {}


def test_rules_and_settings_that_are_not_known_here_are_left_out_of_a_note():
    noted = {"rules": ["gone", "constant"], "settings": {"constant": {"steps": 7, "gone": 1}, "gone": {"steps": 1}}}
    assert Diagnosis.as_recorded(noted).changed == {"rules": ["constant"], "settings": {"constant": {"steps": 7}}}
    assert Diagnosis.as_recorded({"rules": []}).rules == []

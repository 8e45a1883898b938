"""The diagnosis beside a training: when it looks, whom it tells, and what it survives."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

from pytracker import Run, Tracker, diagnose, load_run
from pytracker.diagnostics import Diagnosis, Finding, rule
from pytracker.errors import ClosedError, InvalidTypeError
from pytracker.history import History

SPIKES = ["loss_spike"]


def model_with_gradients() -> nn.Module:
    model = nn.Linear(2, 1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    return model


def losses(steps: int, spikes: tuple[int, ...] = ()) -> np.ndarray:
    values = 1.0 + 0.01 * np.random.default_rng(0).standard_normal(steps)
    values[list(spikes)] += 30.0
    return values


def train(tracker: Tracker, values: np.ndarray) -> None:
    for value in values:
        tracker.step(loss=float(value))


def told(findings: list[Finding]) -> list[tuple[str, int, int]]:
    return [(finding.rule, finding.first_step, finding.last_step) for finding in findings]


def test_rules_are_asked_at_drains_and_at_no_other_step(scratch_rule) -> None:
    seen: list[int] = []

    @rule
    def witness(view):
        seen.append(view.stop)
        return ()

    with Tracker(model_with_gradients(), every=10, diagnosis=Diagnosis(["witness"])) as tracker:
        asked = []
        for _ in range(35):
            before = len(seen)
            tracker.step(loss=1.0)
            if len(seen) > before:
                asked.append(tracker.steps)
            time.sleep(0.001)  # so that the diagnosis stays within its share of the time
    assert seen == [10, 20, 30, 35]
    assert asked == [10, 20, 30]


def test_where_drains_come_fast_the_rules_look_at_several_at_once_but_never_less_than_diagnose_does(
    scratch_rule,
) -> None:
    seen: list[int] = []

    @rule
    def slow(view):
        seen.append(view.stop)
        time.sleep(0.005)
        return ()

    with Tracker(model_with_gradients(), every=2, diagnosis=Diagnosis(["slow"])) as tracker:
        train(tracker, losses(2000))
    online = seen[:]
    assert online[:50] == list(range(2, 101, 2))
    assert online[-1] == 2000
    del seen[:]
    diagnose(tracker.history, rules=["slow"])
    assert set(seen) <= set(online)
    assert len(online) < 300


def test_a_callback_hears_of_a_finding_when_it_is_new_and_when_it_grows() -> None:
    heard: list[Finding] = []
    with Tracker(model_with_gradients(), every=20, diagnosis=Diagnosis(SPIKES), on_finding=heard.append) as tracker:
        for part in np.split(losses(400, (200, 300)), 20):
            train(tracker, part)
            tracker.flush()  # a look, however fast the drains come
        assert told(heard) == [("loss_spike", 200, 200), ("loss_spike", 200, 300)]
    assert tracker.findings == [heard[-1]]


def test_a_callback_that_raises_is_logged_with_what_it_should_have_heard_and_the_training_goes_on(caplog) -> None:
    def page(finding: Finding) -> None:
        raise ConnectionError("no route to the pager")

    with Tracker(model_with_gradients(), every=20, diagnosis=Diagnosis(SPIKES), on_finding=page) as tracker:
        train(tracker, losses(400, (200,)))
    assert tracker.steps == 400
    assert told(tracker.findings) == [("loss_spike", 200, 200)]
    (record,) = caplog.records
    assert "on_finding raised ConnectionError: no route to the pager" in record.message
    assert "loss_spike, step 200" in record.message


def test_a_callback_that_always_raises_is_logged_once_for_each_trouble(caplog) -> None:
    def page(finding: Finding) -> None:
        raise ConnectionError(finding.last_step)

    with Tracker(model_with_gradients(), every=20, diagnosis=Diagnosis(SPIKES), on_finding=page) as tracker:
        for part in np.split(losses(400, (200, 300, 360)), 20):
            train(tracker, part)
            tracker.flush()
    assert [record.message.partition(";")[0] for record in caplog.records] == ["on_finding raised ConnectionError: 200"]


def test_a_callback_that_failed_once_is_asked_again() -> None:
    heard: list[Finding] = []

    def page(finding: Finding) -> None:
        heard.append(finding)
        if len(heard) == 1:
            raise TimeoutError

    with Tracker(model_with_gradients(), every=20, diagnosis=Diagnosis(SPIKES), on_finding=page) as tracker:
        train(tracker, losses(300, (200,)))
        tracker.flush()
        train(tracker, losses(100, (50,)))
    assert told(heard) == [("loss_spike", 200, 200), ("loss_spike", 200, 350)]


def test_a_callback_may_stop_the_training_with_ctrl_c() -> None:
    def stop(finding: Finding) -> None:
        raise KeyboardInterrupt

    tracker = Tracker(model_with_gradients(), every=500, diagnosis=Diagnosis(SPIKES), on_finding=stop)
    train(tracker, losses(400, (200,)))
    with pytest.raises(KeyboardInterrupt):
        tracker.flush()
    assert tracker.history["loss"].values[200] > 30


def test_a_callback_may_look_at_the_tracker_flush_and_close_it(tmp_path, scratch_rule) -> None:
    for name in ("first", "second"):
        rule(name)(lambda view: [view.finding("warning", "x")] if view.stop else [])

    def close(finding: Finding) -> None:
        assert finding in tracker.findings
        assert tracker.history.findings
        tracker.flush()
        tracker.close(error="stopped by an alarm")

    diagnosis = Diagnosis(["first", "second"])
    tracker = Tracker(
        model_with_gradients(), every=20, run=Run(tmp_path, name="a"), diagnosis=diagnosis, on_finding=close
    )
    train(tracker, losses(19))
    tracker.flush()
    with pytest.raises(ClosedError):
        tracker.step(loss=1.0)
    stored = load_run(tmp_path / "a")
    assert (stored.state, stored.error) == ("failed", "stopped by an alarm")
    assert {kept["rule"] for kept in stored.findings} == {"first", "second"}


def test_without_a_callback_a_finding_is_one_line_in_the_terminal() -> None:
    code = (
        "import torch, numpy as np\n"
        "from pytracker import Tracker\n"
        "from pytracker.diagnostics import Diagnosis\n"
        "values = 1 + 0.01 * np.random.default_rng(0).standard_normal(400); values[[200, 300]] += 30\n"
        "model = torch.nn.Linear(2, 1); model.weight.grad = torch.ones(1, 2)\n"
        "with Tracker(model, every=20, diagnosis=Diagnosis(['loss_spike'])) as tracker:\n"
        "    for value in values: tracker.step(loss=float(value))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    (line,) = done.stderr.splitlines()
    assert line.startswith("warning: loss_spike, step")
    assert "Likely cause: " in line
    assert "To do: look at the batch of step" in line


def test_a_finding_that_becomes_more_severe_is_logged_again(scratch_rule, caplog) -> None:
    @rule
    def worse(view):
        yield view.finding("critical" if view.stop > 20 else "warning", f"seen at {view.stop}")

    with Tracker(model_with_gradients(), every=10, diagnosis=Diagnosis(["worse"])) as tracker:
        for _ in range(5):
            train(tracker, losses(10))
            tracker.flush()
    assert [record.message.partition(":")[0] for record in caplog.records] == ["warning", "critical"]
    assert all(record.levelno == logging.WARNING and record.name == "pytracker" for record in caplog.records)


def test_what_is_found_is_in_the_run_while_the_training_goes_on(tmp_path) -> None:
    run = Run(tmp_path, name="a", flush_seconds=0.05)
    with Tracker(model_with_gradients(), every=20, run=run, diagnosis=Diagnosis(SPIKES)) as tracker:
        train(tracker, losses(300, (200, 290)))
        tracker.flush()
        run.flush()
        running = load_run(run.path)
        assert running.state == "running"
        (kept,) = running.findings
    (finding,) = tracker.findings
    assert Finding.from_dict(kept) == finding
    assert {"rule", "severity", "first_step", "last_step", "evidence", "parameters", "cause", "action"} <= kept.keys()
    assert (kept["first_step"], kept["last_step"], kept["numbers"]["count"]) == (200, 290, 2)


@pytest.mark.parametrize("what", ["raises", "a text", "a finding", "severity", "steps"])
def test_a_broken_rule_is_reported_and_off_and_everything_else_goes_on(scratch_rule, what, tmp_path) -> None:
    calls = []

    @rule
    def broken(view):
        calls.append(view.stop)
        if what == "raises":
            raise ZeroDivisionError("one over nothing")
        if what == "a text":
            return ["the loss is high"]
        if what == "a finding":
            return view.finding("warning", "no list")
        if what == "severity":
            return [view.finding("severe", "x")]
        return [Finding("broken", "warning", view.stop, "the end", "x")] * 2

    with Tracker(
        model_with_gradients(), every=20, run=Run(tmp_path, name="a"), diagnosis=Diagnosis(["broken", *SPIKES])
    ) as tracker:
        for part in np.split(losses(300, (200,)), 15):
            train(tracker, part)
            tracker.flush()
    assert calls == [20]
    assert [finding.rule for finding in tracker.findings] == ["loss_spike", "rule_failed:broken"]
    assert {kept["rule"] for kept in load_run(tmp_path / "a").findings} == {"loss_spike", "rule_failed:broken"}
    assert len(tracker.history["loss"]) == 300


def test_one_diagnosis_serves_one_training_after_the_other() -> None:
    diagnosis = Diagnosis(SPIKES)
    found = []
    for spike in (200, 250):
        with Tracker(model_with_gradients(), every=20, diagnosis=diagnosis) as tracker:
            train(tracker, losses(300, (spike,)))
        found.append(told(tracker.findings))
    assert found == [[("loss_spike", 200, 200)], [("loss_spike", 250, 250)]]


def test_one_diagnosis_serves_two_trainings_at_once(scratch_rule) -> None:
    looks = []

    @rule
    def witness(view):
        looks.append((view.since, view.stop))
        return ()

    diagnosis = Diagnosis(["witness", *SPIKES])
    first, second = (Tracker(model_with_gradients(), every=20, diagnosis=diagnosis) for _ in range(2))
    for ours, theirs in zip(np.split(losses(200, (150,)), 10), np.split(losses(200, (160,)), 10), strict=True):
        for tracker, values in ((first, ours), (second, theirs)):
            train(tracker, values)
            tracker.flush()
    assert looks == [(stop, stop + 20) for stop in range(0, 200, 20) for _ in "ab"]
    assert told(first.findings) == told(diagnosis.findings) == [("loss_spike", 150, 150)]
    assert told(second.findings) == [("loss_spike", 160, 160)]


def test_a_callback_that_is_no_function_is_refused() -> None:
    with pytest.raises(InvalidTypeError, match=r"on_finding is \[\], of type list; expected a function"):
        Tracker(model_with_gradients(), on_finding=[])  # type: ignore[arg-type]


def test_going_back_to_a_checkpoint_takes_back_what_was_found_after_it(tmp_path) -> None:
    heard: list[Finding] = []
    run = Run(tmp_path, name="a")
    with Tracker(
        model_with_gradients(), every=20, run=run, diagnosis=Diagnosis(SPIKES), on_finding=heard.append
    ) as tracker:
        train(tracker, losses(250, (100, 220)))
        tracker.flush()
        assert told(tracker.findings) == [("loss_spike", 100, 220)]
        tracker.load_state_dict({"steps": 210, "epochs": 0})
        train(tracker, losses(90))
        tracker.flush()
        assert told(tracker.findings) == [("loss_spike", 100, 100)]
        train(tracker, losses(60, (10,)))
    assert told(tracker.findings) == [("loss_spike", 100, 310)] == told(diagnose(tracker.history, rules=SPIKES))
    assert [(kept["rule"], kept["last_step"]) for kept in load_run(run.path).findings] == [("loss_spike", 310)]
    assert told(heard)[-1] == ("loss_spike", 100, 310)


def test_a_resumed_run_knows_what_was_found_and_does_not_tell_it_again(tmp_path) -> None:
    heard: list[Finding] = []

    def session(values: np.ndarray, from_step: int) -> Tracker:
        run = Run(tmp_path, name="a", resume=True)
        with Tracker(
            model_with_gradients(), every=20, run=run, diagnosis=Diagnosis(SPIKES), on_finding=heard.append
        ) as tracker:
            tracker.load_state_dict({"steps": from_step, "epochs": 0})
            train(tracker, values)
        return tracker

    session(losses(300, (200,)), 0)
    assert told(heard) == [("loss_spike", 200, 200)]
    assert told(session(losses(100), 290).findings) == [("loss_spike", 200, 200)]
    assert len(heard) == 1
    assert told(session(losses(100, (50,)), 390).findings) == [("loss_spike", 200, 440)]
    assert told(heard)[1:] == [("loss_spike", 200, 440)]


@cache
def training(case: str) -> tuple[History, list[Finding]]:
    """Train a small network for real, well or badly; return what was recorded, and what was found meanwhile."""
    torch.manual_seed(0)
    x = torch.randn(512, 8)
    y = (x[:, :1] * x[:, 1:2]).tanh()
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr={"too high": 0.5, "too low": 1e-9}.get(case, 3e-3))
    if case == "dead":
        nn.init.constant_(model[2].bias, -1e3)
    with Tracker(model, optimizer=optimizer, every=20) as tracker:
        for step in range(400):
            batch = torch.randint(0, 512, (32,))
            loss = nn.functional.mse_loss(model(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            if case == "nan" and step == 333:
                model[2].weight.grad[0, 0] = torch.nan
            tracker.step(loss=loss)
            optimizer.step()
    return tracker.history, tracker.findings


@pytest.mark.parametrize("case", ["well", "too high", "too low", "nan", "dead"])
def test_a_training_judged_online_and_after_the_fact_gets_the_same_findings(case) -> None:
    history, online = training(case)
    assert diagnose(history) == online
    rules = {finding.rule for finding in online if finding.severity != "info"}
    wanted = {"too high": "loss_oscillating", "too low": "loss_not_decreasing", "nan": "gradient_nonfinite"}
    if case == "well":
        assert not rules
    else:
        assert wanted.get(case, "dead_parameter") in rules


def test_the_validation_loss_of_the_last_epoch_is_judged_when_it_is_given() -> None:
    heard: list[Finding] = []
    values = (2 * np.exp(-np.arange(180) / 60) + 0.05) * losses(180)
    diagnosis = Diagnosis(["overfitting"])
    with Tracker(model_with_gradients(), every=10, diagnosis=diagnosis, on_finding=heard.append) as tracker:
        for part, validation in zip(np.split(values, 9), [2.0, 1.2, 1.0, 1.3, 1.6, 1.9, 2.2, 2.5, 2.8], strict=True):
            known = validation > 1.9  # the seventh evaluation is the first that is certain
            train(tracker, part)
            assert bool(heard) == (known and tracker.steps > 140)
            tracker.epoch(val_loss=validation)
        assert told(heard)[-1] == ("overfitting", 19, 179)
    assert tracker.findings == heard[-1:] == diagnose(tracker.history, rules=["overfitting"])


@pytest.mark.parametrize("seed", range(6))
def test_drains_at_any_step_are_looked_at_by_diagnose_as_they_were_online(seed, tmp_path) -> None:
    random = np.random.default_rng(seed)
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    bad = int(random.integers(100, 300))
    with Tracker(model, every=int(random.choice([10, 20, 50])), run=Run(tmp_path, name="a")) as tracker:
        for step in range(400):
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, float(random.lognormal()))
            if step == bad:
                model[1].weight.grad[0, 0] = torch.nan
            tracker.step(loss=1.0 + 0.1 * random.normal())
            if random.random() < 0.01:
                tracker.flush()
    nonfinite = next(each for each in tracker.findings if each.rule == "gradient_nonfinite")
    assert (nonfinite.first_step, nonfinite.parameters) == (bad, ("1.weight",))
    assert diagnose(tracker.history) == tracker.findings
    assert told(diagnose(load_run(tmp_path / "a").history)) == told(tracker.findings)


def test_a_finding_says_all_that_the_contract_asks_for() -> None:
    (finding,) = (each for each in training("nan")[1] if each.rule == "gradient_nonfinite")
    assert (finding.severity, finding.first_step) == ("critical", 333)
    assert finding.last_step >= 399 - 1
    assert finding.parameters[0] == "2.weight"
    assert "1 NaN in the gradient of '2.weight'" in finding.evidence
    assert "at step 333; the loss was finite" in finding.evidence
    assert finding.cause
    assert "step 333" in finding.action

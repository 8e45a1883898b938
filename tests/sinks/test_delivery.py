"""Delivery: a sink is given everything, once and in order, and can neither stop nor slow a training."""

from __future__ import annotations

import itertools
import re
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from recording import RecordingSink, crash, train
from torch import nn

import pytracker
from pytracker import InvalidTypeError, InvalidValueError, Run, Tracker
from pytracker.sinks import Sinks, mirrors, mirrors_of
from pytracker.tracking import InMemoryRun

QUICK = {"pause": 0.001, "longest_pause": 0.002}


def mirrored(sink: object, **options: object) -> Sinks:
    """Return the sinks of a run in memory, begun."""
    sinks = Sinks([sink], **{**QUICK, **options})
    sinks.begin(InMemoryRun())
    return sinks


def give(sinks: Sinks, steps: range) -> None:
    """Give each step by itself, with one value."""
    for step in steps:
        series = {"loss": (np.array([0]), np.array([step / 7]))}
        sinks.write(np.array([step]), series, np.empty((1, 0, 6)))


def test_each_step_comes_once_in_order_with_all_its_values_whatever_else_comes_late() -> None:
    model, sink = nn.Linear(3, 1), RecordingSink()
    with Tracker(model, every=4, diagnosis=None, sinks=[sink]) as tracker:
        train(tracker, model, range(6))
        tracker.epoch(val_loss=0.75)
        train(tracker, model, range(6, 11))
    steps = [step for step, _, _ in sink.steps]
    assert steps == list(range(11))
    for name, series in tracker.history.items():
        late = [(step, values[name]) for step, values in sink.of("late") if name in values]
        got = [(step, values[name]) for step, _, values in sink.steps if name in values] + late
        assert got == list(zip(series.steps.tolist(), series[:], strict=True))
    assert sink.of("late") == [(5, {"val_loss": 0.75, "epoch": 1.0})]
    assert [call[0] for call in sink.calls[:2]] == ["open", "write"]
    assert sink.calls[-1] == ("close", None)
    assert sink.of("parameters") == [(0, 3), (4, 5), (6, 7), (8, 10)] or sink.of("parameters")[0] == (0, 3)


def test_the_time_of_a_step_is_when_it_was_recorded_and_not_when_it_was_delivered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = itertools.count(1000.0, 0.5)
    monkeypatch.setattr(mirrors, "time", SimpleNamespace(time=lambda: next(clock), monotonic=time.monotonic))
    model, sink = nn.Linear(3, 1), RecordingSink()
    with Tracker(model, every=5, diagnosis=None, sinks=[sink]) as tracker:
        train(tracker, model, range(5))
    assert [when for _, when, _ in sink.steps] == [1000.0, 1000.5, 1001.0, 1001.5, 1002.0]


def test_a_training_does_not_wait_for_a_sink() -> None:
    done = threading.Event()

    class Slow(RecordingSink):
        def write(self, rows: object) -> None:
            assert done.wait(60)
            super().write(rows)

    model, slow, other = nn.Linear(3, 1), Slow(), RecordingSink()
    with Tracker(model, every=2, diagnosis=None, sinks=[slow, other]) as tracker:
        train(tracker, model, range(10))
        tracker.epoch()
        assert slow.of("write") == []
        done.set()  # only now: whoever had waited for the sink would wait still
    assert [step for step, _, _ in slow.steps] == [step for step, _, _ in other.steps] == list(range(10))


def test_a_sink_that_is_away_for_a_while_misses_nothing_and_gets_nothing_twice(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Away(RecordingSink):
        tries = 0

        def _fails(self) -> None:
            self.tries += 1
            if self.tries % 4:
                raise ConnectionError("no route to host")

        def open(self, info: object) -> dict[str, object]:
            self._fails()
            return super().open(info)

        def write(self, rows: object) -> None:
            self._fails()
            super().write(rows)

    sink = Away()
    sinks = mirrored(sink)
    give(sinks, range(5))
    sinks.close()
    assert [step for step, _, _ in sink.steps] == list(range(5))
    assert sink.tries == 4 * 6
    assert "Away" in caplog.text
    assert "no route to host" in caplog.text


def test_what_the_tool_refuses_is_given_up_and_counted_and_the_rest_arrives() -> None:
    class Picky(RecordingSink):
        tries = 0

        def write(self, rows: object) -> None:
            if next(iter(rows))[0] == 2:
                self.tries += 1
                raise ValueError("2 is not allowed")
            super().write(rows)

    sink = Picky()
    sinks = mirrored(sink, tries=3)
    give(sinks, range(5))
    with pytest.warns(RuntimeWarning, match=r"Picky lost 1 values of steps 2 to 2: ValueError: 2 is not allowed"):
        sinks.close()
    assert [step for step, _, _ in sink.steps] == [0, 1, 3, 4]
    assert sink.tries == 3


def test_what_waits_is_bounded_and_what_is_given_up_is_counted() -> None:
    taken, go_on = threading.Event(), threading.Event()

    class Stuck(RecordingSink):
        def open(self, info: object) -> dict[str, object]:
            taken.set()
            assert go_on.wait(60)
            return super().open(info)

    sink = Stuck()
    sinks = mirrored(sink, limit=3)
    give(sinks, range(10))
    assert taken.wait(60)
    go_on.set()
    with pytest.warns(RuntimeWarning, match=r"Stuck lost 7 values of steps 0 to 6: it was too slow"):
        sinks.close()
    assert [step for step, _, _ in sink.steps] == [7, 8, 9]


def test_a_sink_that_always_fails_is_closed_and_what_it_missed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(RecordingSink):
        def open(self, info: object) -> dict[str, object]:
            raise PermissionError("may not")

    monkeypatch.setattr(mirrors, "CLOSE_TIMEOUT", 0.05)
    sink = Broken()
    sinks = mirrored(sink)
    give(sinks, range(5))
    with pytest.warns(RuntimeWarning, match=r"Broken lost 5 values of steps 0 to 4: PermissionError: may not"):
        sinks.close("the training broke")
    assert sink.calls == [("close", "the training broke")]


def test_a_sink_that_hangs_holds_up_neither_the_end_nor_other_sinks(monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()

    class Hanging(RecordingSink):
        def write(self, rows: object) -> None:
            go_on.wait()

    monkeypatch.setattr(mirrors, "CLOSE_TIMEOUT", 0.05)
    hanging, other = Hanging(), RecordingSink()
    sinks = Sinks([hanging, other], **QUICK)
    sinks.begin(InMemoryRun())
    give(sinks, range(2))
    with pytest.warns(RuntimeWarning, match=r"Hanging lost .* did not return"):
        sinks.close()
    assert [step for step, _, _ in other.steps] == [0, 1]
    assert other.calls[-1] == ("close", None)
    go_on.set()


def test_a_crash_is_told_to_every_sink_with_all_that_came_before() -> None:
    model, sink = nn.Linear(3, 1), RecordingSink()
    with pytest.raises(ZeroDivisionError):
        crash(Tracker(model, diagnosis=None, sinks=[sink]), model)
    assert [step for step, _, _ in sink.steps] == [0, 1, 2]
    assert sink.calls[-1] == ("close", "ZeroDivisionError: by design")


def test_a_sink_learns_what_run_it_mirrors_and_how_far_it_had_come_when_it_is_resumed(tmp_path: Path) -> None:
    model, first, again = nn.Linear(3, 1), RecordingSink(), RecordingSink()
    with Tracker(model, run=Run(tmp_path, name="a", config={"lr": 1}), diagnosis=None, sinks=[first]) as tracker:
        train(tracker, model, range(5))
        state = tracker.state_dict()
        train(tracker, model, range(5, 8))
    run = Run(tmp_path, name="a", resume=True)
    with Tracker(model, run=run, diagnosis=None, sinks=[again], meta={"seed": 3}) as tracker:
        tracker.load_state_dict(state)
        train(tracker, model, range(5, 9))
    before, after = first.info, again.info
    assert (before.name, before.directory, before.config) == ("a", tmp_path / "a", {"lr": 1})
    assert (before.first_step, before.recorded, before.remembered) == (0, 0, {})
    assert [info.name for info in before.parameters] == ["weight", "bias"]
    assert (after.first_step, after.recorded, after.remembered) == (5, 8, {"id": "first"})
    assert after.meta["seed"] == 3
    assert [step for step, _, _ in again.steps] == [5, 6, 7, 8]


def test_a_training_that_goes_back_tells_before_the_steps_come_again() -> None:
    model, sink = nn.Linear(3, 1), RecordingSink()
    with Tracker(model, diagnosis=None, sinks=[sink]) as tracker:
        train(tracker, model, range(5))
        state = tracker.state_dict()
        train(tracker, model, range(5, 8))
        tracker.load_state_dict(state)
        train(tracker, model, range(5, 7))
    writes = [[step for step, _, _ in call[1]] if call[0] == "write" else call for call in sink.calls]
    place = writes.index(("truncate", 5))
    assert [step for call in writes[:place] if isinstance(call, list) for step in call] == list(range(8))
    assert [step for call in writes[place:] if isinstance(call, list) for step in call] == [5, 6]


def test_findings_arrive_as_they_are_kept() -> None:
    model, sink = nn.Linear(3, 1), RecordingSink()
    with Tracker(model, every=4, sinks=[sink], on_finding=lambda finding: None) as tracker:
        for step in range(8):
            model.weight.grad = model.weight.detach() * float("nan" if step == 5 else 1)
            tracker.step(loss=1.0 - step / 100)
    assert {rule for (rule,) in sink.of("finding")} >= {finding.rule for finding in tracker.findings} != set()


def test_nothing_is_made_on_ranks_other_than_the_first() -> None:
    def fail() -> RecordingSink:
        raise AssertionError("made")

    mirrors_of([fail, RecordingSink()], is_first=False).close()
    sink = RecordingSink()
    made = mirrors_of([lambda: sink], is_first=True)
    made.begin(InMemoryRun())
    made.close()
    assert sink.calls == [("open", 0), ("close", None)]


def test_a_function_that_is_no_maker_of_sinks_is_named() -> None:
    with pytest.warns(RuntimeWarning, match="<built-in function print> returned None: .* is called without arguments"):
        mirrors_of([print], is_first=True).close()


def test_a_function_that_cannot_make_its_sink_is_told_and_left_out() -> None:
    def fail() -> RecordingSink:
        raise OSError("no key")

    with pytest.warns(RuntimeWarning, match="could not be made.*no key"):
        tracker = Tracker([], diagnosis=None, sinks=[fail])
    tracker.step(loss=1.0)
    tracker.close()
    assert tracker.history["loss"] == [1.0]


class OldSink:
    def write(self, steps: object, series: object) -> None: ...


class WrongLate(RecordingSink):
    def late(self) -> None: ...


@pytest.mark.parametrize(
    ("sinks", "error", "named"),
    [
        ("tensorboard", InvalidTypeError, "tensorboard"),
        ([3], InvalidTypeError, "3"),
        (["tensorbord"], InvalidValueError, "tensorbord"),
        ([OldSink()], InvalidTypeError, "OldSink.write"),
        ([WrongLate()], InvalidTypeError, "WrongLate.late"),
    ],
)
def test_what_is_no_sink_is_refused_by_name_before_anything_is_opened(
    sinks: object, error: type[Exception], named: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=re.escape(named)):
        Tracker([], run=tmp_path / "runs", sinks=sinks)
    assert not (tmp_path / "runs").exists()


def test_a_tool_that_is_not_installed_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from pytracker.sinks import TensorBoardSink, extras

    monkeypatch.setattr(extras, "find_spec", lambda package: None)
    with pytest.raises(pytracker.MissingExtraError, match=r"pip install 'pytracker\[tensorboard\]'"):
        TensorBoardSink()
    with pytest.raises(pytracker.MissingExtraError, match="tensorboard"):
        Tracker([], sinks=["tensorboard"])

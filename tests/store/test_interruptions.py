"""^C at every line: whatever it interrupts, each row is there once, the series are of one length, and nothing hangs.

``sys.settrace`` raises KeyboardInterrupt at the n-th line that the store and the history run, for each n. The lines of
threads of their own go on undisturbed, as with a real ^C.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import pytracker
from pytracker.history import ParameterInfo, Recorder, summarize
from pytracker.store import Run, load_run

HOME = str(Path(pytracker.__file__).parent)
ROWS = np.random.default_rng(0).random((5, 2, 6))
INTERVAL = summarize(np.arange(3, 8), ROWS, [2, 3])
INFOS = [ParameterInfo("a", (2,), "float32", "", 2), ParameterInfo("b", (3,), "float32", "", 3)]


class Interrupting:
    """Raises KeyboardInterrupt at one line of pytracker's that the block runs; ``lines`` counts them."""

    def __init__(self, at: int | None) -> None:
        self.at, self.lines, self.where = at, 0, ""

    def __enter__(self):
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_):
        sys.settrace(None)

    def _trace(self, frame, event, _):
        if not frame.f_code.co_filename.startswith(HOME):
            return None
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                self.where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                sys.settrace(None)
                raise KeyboardInterrupt
        return self._trace


def begin(run, infos=INFOS):
    run.set_parameters(infos)
    for step in range(3):
        run.log(step, loss=float(step), accuracy=0.5, new=1.0)


CALLS = {
    "log": lambda run: run.log(3, loss=3.0, accuracy=0.5, new=1.0, newer=2.0),
    "log_many": lambda run: run.log_many(np.arange(3, 8), {"loss": np.arange(3.0, 8), "accuracy": np.ones(5)}),
    "log_rows": lambda run: run.log_rows(np.arange(3, 8), ROWS),
    "log_interval": lambda run: run.log_interval(INTERVAL),
    "log_finding": lambda run: run.log_finding({"rule": "spike", "first_step": 1, "parameters": ["a"]}),
    "set_meta": lambda run: run.set_meta(optimizer="SGD", every=50),
    "set_parameters": lambda run: run.set_parameters(INFOS),
    "truncate": lambda run: run.truncate(2),
    "flush": lambda run: run.flush(),
    "finish": lambda run: run.finish(),
}


def lines_of(call, make):
    run = make()
    with Interrupting(None) as count:
        call(run)
    run.finish()
    return count.lines


def assert_whole(history, name):
    """What was begun before is there; what the interrupted call says is there whole, or not at all."""
    kept = 2 if name == "truncate" and len(history["loss"]) == 2 else 3
    steps = history["loss"].steps.tolist()
    if name in ("log", "log_many"):
        assert steps in ([0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6, 7])
        assert history["accuracy"].steps.tolist() == steps
        if name == "log":
            assert len(history["newer"]) == (len(steps) > 3)
    else:
        assert steps == list(range(kept))
        assert {len(history[each]) for each in ("loss", "accuracy", "new")} == {kept}
    assert history["loss"].values.tolist() == [float(step) for step in steps]
    parameters = history.parameters
    for field in ("norm_last", "abs_max", "nans"):
        assert parameters.field(field).shape == (len(parameters), len(parameters.infos))
    assert parameters.rows()[0].tolist() in ([], [3, 4, 5, 6, 7])


@pytest.mark.parametrize("name", CALLS)
def test_an_interruption_at_any_line_leaves_each_row_once_and_nothing_hanging(tmp_path, monkeypatch, name):
    call, count = CALLS[name], 0

    def make():
        nonlocal count
        count += 1
        run = Run(tmp_path, name=f"run{count}", flush_seconds=0.05)
        if name == "set_parameters":
            begin(run, ())
        else:
            begin(run)
        return run

    monkeypatch.setattr("pytracker.store.writer.collect", lambda *_, **__: {})  # it asks git, which takes its time
    lines = lines_of(call, make)
    assert lines > 5
    for at in range(1, lines + 1):
        run = make()
        with contextlib.suppress(KeyboardInterrupt), Interrupting(at) as interruption:
            call(run)
        where = f"line {at} of {lines}: {interruption.where}"
        if run.state == "running" and not run._ending:
            assert_whole(run.history, name)
            run.log(100, after=1.0)
        run.finish()
        assert run.state == "finished", where
        stored = load_run(run.path)
        assert stored.state == "finished", where
        assert_whole(stored.history, name)
        if name not in ("finish",):
            assert stored.history["after"] == [1.0], where
        assert {key: each[:] for key, each in stored.history.items()} == {
            key: each[:] for key, each in run.history.items()
        }, where
        np.testing.assert_array_equal(stored.history.parameters.first_step, run.history.parameters.first_step)
        np.testing.assert_array_equal(stored.history.parameters.rows()[0], run.history.parameters.rows()[0])


@pytest.mark.parametrize("name", ["log_many", "log_rows", "log_interval", "log_finding", "set_meta"])
def test_a_call_that_was_interrupted_can_be_made_again_and_counts_once(name):
    call = CALLS[name]
    expected = Recorder()
    begin(expected)
    with Interrupting(None) as count:
        call(expected)
    for at in range(1, count.lines + 1):
        recorder = Recorder()
        begin(recorder)
        with contextlib.suppress(KeyboardInterrupt), Interrupting(at):
            call(recorder)
        call(recorder)
        assert recorder.history == expected.history
        assert recorder.history.findings == expected.history.findings
        assert recorder.history.meta == expected.history.meta
        parameters, others = recorder.history.parameters, expected.history.parameters
        assert len(parameters) == len(others)
        np.testing.assert_array_equal(parameters.norms()[0], others.norms()[0])
        np.testing.assert_array_equal(parameters.field("norm_mean"), others.field("norm_mean"))


def test_threads_that_log_into_one_run_keep_its_series_aligned_and_lose_nothing(tmp_path):
    sys.setswitchinterval(1e-6)
    try:
        with Run(tmp_path, name="one") as run:
            start = threading.Barrier(6)

            def work(number):
                start.wait()
                for step in range(200):
                    run.log(step, **{f"own/{number}": float(step), f"twin/{number}": -float(step)})
                    with run._lock:  # a step that all share: each takes the next one
                        after = run.history.last_step + 1 if step % 10 == 0 else None
                        if after is not None:
                            run.log(after + 200, shared=float(number), also=1.0)

            threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    finally:
        sys.setswitchinterval(0.005)
    for history in (run.history, load_run(run.path).history):
        for number in range(6):
            assert history[f"own/{number}"] == [float(step) for step in range(200)]
            assert history[f"twin/{number}"].steps.tolist() == list(range(200))
        assert len(history["shared"]) == len(history["also"]) == 120
        np.testing.assert_array_equal(history["shared"].steps, history["also"].steps)


def test_a_hook_that_raises_is_warned_of_and_the_run_finishes(tmp_path):
    run = Run(tmp_path, name="one")
    run.before_finish(lambda error: run.log(1, late=1.0))
    run.before_finish(lambda error: 1 / 0)
    run.before_finish(lambda error: run.log(2, late=2.0))
    with pytest.warns(RuntimeWarning, match="before its end failed: ZeroDivisionError"):
        run.finish()
    stored = load_run(run.path)
    assert (stored.state, stored.history["late"][:]) == ("finished", [1.0, 2.0])

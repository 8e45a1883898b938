"""A tracker that nobody closes: a program that ends loses nothing, and what a dropped one loses is told."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref

import pytest
import torch

from pytracker import Run, Tracker, list_runs, load_run
from pytracker.errors import ClosedError

SCRIPT = """
import os, sys, torch, pytracker
layer = torch.nn.Linear(2, 1)
tracker = pytracker.Tracker(layer, run=sys.argv[1], diagnosis=None, every=50)
for step in range(70):
    layer(torch.ones(1, 2)).sum().backward()
    tracker.step(loss=step)
"""


def run_script(end: str, folder) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", SCRIPT + end, str(folder)], capture_output=True, text=True)


def only_run(folder):
    (found,) = list_runs(folder)
    return load_run(found.path)


def test_a_program_that_ends_without_close_loses_no_step(tmp_path):
    done = run_script("", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    run = only_run(tmp_path)
    assert (run.state, run.error) == ("finished", None)
    assert run.history["loss"][:] == list(range(70))


def test_a_program_that_ends_with_an_error_loses_no_step_and_notes_it(tmp_path):
    done = run_script("raise ValueError('the 70th')", tmp_path)
    assert done.returncode == 1
    run = only_run(tmp_path)
    assert (run.state, run.error) == ("failed", "ValueError: the 70th")
    assert run.history["loss"][:] == list(range(70))


@pytest.mark.parametrize("error", [None, "out of memory"])
def test_a_run_that_is_finished_first_closes_its_tracker(tmp_path, error):
    run = Run(tmp_path)
    layer = torch.nn.Linear(2, 1)
    tracker = Tracker(layer, run=run, diagnosis=None, every=50)
    for step in range(70):
        layer(torch.ones(1, 2)).sum().backward()
        tracker.step(loss=step)
    run.finish() if error is None else run.finish("failed", error=error)
    with pytest.raises(ClosedError):
        tracker.step()
    kept = only_run(tmp_path)
    assert (kept.state, kept.error) == ("finished" if error is None else "failed", error)
    assert kept.history["loss"][:] == list(range(70))


def test_a_fork_that_ends_leaves_the_tracker_to_its_parent(tmp_path):
    done = run_script("if os.fork() == 0: sys.exit()\nos.wait()\ntracker.step(loss=70)\ntracker.close()", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert only_run(tmp_path).history["loss"][:] == list(range(71))


def test_what_is_lost_with_a_tracker_that_was_dropped_is_told():
    def train(steps: int, *, close: bool = False) -> None:
        layer = torch.nn.Linear(2, 1)
        tracker = Tracker(layer, diagnosis=None, every=5)
        layer(torch.ones(1, 2)).sum().backward()
        for _ in range(steps):
            tracker.step()
        if close:
            tracker.close()

    train(12)
    with pytest.warns(RuntimeWarning, match=r"dropped without close\(\), and with it the last 2 of its 12 steps"):
        gc.collect()
    train(10)  # all of them have arrived
    train(12, close=True)
    gc.collect()


def test_a_tracker_is_not_kept_until_the_program_ends():
    for close in (True, False):
        tracker = Tracker(torch.nn.Linear(2, 1), diagnosis=None)
        if close:
            tracker.close()
        there = weakref.ref(tracker)
        del tracker
        gc.collect()
        assert there() is None

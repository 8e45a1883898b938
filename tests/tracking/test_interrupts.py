"""Ctrl-C at every line of step, drain, flush, close and finish: all rows but the last step's are there, once.

The suite tries every seventh place. All of them:

    PYTRACKER_EVERY_PLACE=1 python -m pytest tests/tracking/test_interrupts.py
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import pytracker

PACKAGE = str(Path(pytracker.__file__).parent)
STEPS, EVERY = 7, 3
Place = tuple[str, int]


def training(folder: Path, done: list[Any]) -> None:
    """A training of a few steps. ``done`` gets the run, the tracker, and each step that has returned."""
    run = pytracker.Run(folder, name="run")
    layer = torch.nn.Linear(2, 1)
    tracker = pytracker.Tracker(layer, run=run, every=EVERY, seconds=1e6, close_on_signal=False)
    done += [run, tracker]
    with tracker:
        for step in range(STEPS):
            layer.weight.grad = torch.full((1, 2), float(step + 1))
            tracker.step(loss=float(step))
            done.append(step)
        tracker.flush()


def traced(visit: Callable[[Place], None]) -> Callable[..., Any]:
    """Return a trace function that calls ``visit`` at each line of the package."""

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            visit((frame.f_code.co_filename, frame.f_lineno))
        return trace

    return trace


def places(folder: Path) -> list[Place]:
    """Return the lines that a training runs through once its tracker is made."""
    seen: dict[Place, None] = {}
    done: list[Any] = []
    sys.settrace(traced(lambda place: seen.setdefault(place) if done else None))
    try:
        training(folder, done)
    finally:
        sys.settrace(None)
    return list(seen)


def interrupted(folder: Path, place: Place) -> list[Any]:
    """Train with a Ctrl-C at the second visit of a place, or the first where there is no other; never hang."""
    done: list[Any] = []
    visits = 0

    def visit(here: Place) -> None:
        nonlocal visits
        visits += bool(done) and here == place
        if done and here == place and (visits == 2 or (visits == 1 and len(done) >= STEPS + 2)):
            sys.settrace(None)
            raise KeyboardInterrupt

    def train() -> None:
        sys.settrace(traced(visit))
        try:
            with contextlib.suppress(KeyboardInterrupt):
                training(folder, done)
        finally:
            sys.settrace(None)
        with contextlib.suppress(Exception):  # as at the end of the program
            done[1].close()
            done[0].finish()

    thread = threading.Thread(target=train, daemon=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        thread.start()
        thread.join(120)
    assert not thread.is_alive(), f"hangs after an interrupt at {place}"
    return done


def test_rows_survive_an_interrupt_at_any_line(tmp_path: Path) -> None:
    everywhere = places(tmp_path / "plain")
    assert len(everywhere) > 200
    step = 1 if os.environ.get("PYTRACKER_EVERY_PLACE") else 7
    lost = []
    for number, place in enumerate(everywhere[::step]):
        folder = tmp_path / str(number)
        done = interrupted(folder, place)
        steps = done[2:]
        stored = pytracker.load_run(folder / "run")
        try:
            for history in (done[0].history, stored.history):
                arrived = history["loss"].steps.tolist()
                assert arrived == list(range(len(arrived)))
                assert len(arrived) >= len(steps)
                assert history["loss"][:] == [float(each) for each in arrived]
                assert history["grad_norm"].steps.tolist() == arrived
                assert history["grad_norm"][:] == pytest.approx([math.sqrt(2) * (each + 1) for each in arrived])
                assert history.parameters.last_step.tolist()[-1:] == arrived[-1:]
        except AssertionError as problem:
            lost.append(f"{place[0].removeprefix(PACKAGE)}:{place[1]} {type(problem).__name__}: {problem}"[:300])
    assert not lost, f"{len(lost)} of {len(everywhere[::step])}:\n" + "\n".join(lost)

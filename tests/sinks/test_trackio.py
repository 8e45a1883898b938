"""trackio, read back with its own storage and API."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("trackio", reason="trackio is not installed: pip install 'pytracker[trackio]'")

PROGRAM = """
from pathlib import Path
import trackio
from trackio.sqlite_storage import SQLiteStorage
from recording import crash, train
from torch import nn
from pytracker import Run, Tracker

model = nn.Linear(3, 1)
run = Run("runs", name="a", config={"lr": 0.1})
with Tracker(model, run=run, every=3, diagnosis=None, sinks=["trackio"]) as tracker:
    train(tracker, model, range(5))
    early = tracker.state_dict()
    train(tracker, model, range(5, 8))
    tracker.epoch(val_loss=float("inf"))
    end = tracker.state_dict()
first = tracker.history
for state, steps in ((end, range(8, 10)), (early, range(5, 7))):
    with Tracker(model, run=Run("runs", name="a", resume=True), diagnosis=None, sinks=["trackio"]) as tracker:
        tracker.load_state_dict(state)
        train(tracker, model, steps)

def read(run, name):
    return [(log["step"], log[name]) for log in SQLiteStorage.get_logs("pytracker", run) if name in log]

for name, series in first.items():
    got = [(step, value) for step, value in sorted(read("a", name)) if step < 8]
    assert got == list(zip(series.steps.tolist(), series[:], strict=True)), (name, got)
assert [step for step, _ in sorted(read("a", "loss"))] == list(range(10))
assert [step for step, _ in sorted(read("a-from-5", "loss"))] == [5, 6]
(config,) = [run.config for run in trackio.Api().runs("pytracker") if run.name == "a"]
assert config["lr"] == 0.1, config

tracker = Tracker(model, run=Run("runs", name="b"), every=1, sinks=["trackio"], on_finding=lambda finding: None)
for _ in range(3):
    model.weight.grad = model.weight.detach() * float("nan")
    tracker.step(loss=1.0)
try:
    crash(tracker, model)
except ZeroDivisionError:
    pass
alerts = {alert["title"]: alert["text"] for alert in trackio.Api().alerts("pytracker", "b")}
assert alerts.pop("the training failed") == "ZeroDivisionError: by design"
assert set(alerts) == {f"pytracker: {finding.rule}" for finding in tracker.findings} != set()
"""


def test_values_and_steps_are_the_tracker_s_through_resumes_and_a_crash(tmp_path: Path) -> None:
    """In a process of its own: trackio reads where it keeps things when it is imported."""
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parent.parent)])
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio"), "PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr

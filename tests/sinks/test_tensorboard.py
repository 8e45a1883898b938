"""TensorBoard, read back with its own reader."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from recording import crash, train
from torch import nn

from pytracker import Run, Tracker
from pytracker.sinks import TensorBoardSink, mirrors

pytest.importorskip("tensorboard", reason="tensorboard is not installed: pip install 'pytracker[tensorboard]'")


def read(folder: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0, "tensors": 0}).Reload()


def test_values_steps_and_times_are_the_tracker_s_through_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count(1000.0, 0.5)
    monkeypatch.setattr(mirrors, "time", SimpleNamespace(time=lambda: next(clock), monotonic=time.monotonic))
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    with Tracker(model, run=Run(tmp_path, name="a", config={"lr": 0.1}), every=3, sinks=["tensorboard"]) as tracker:
        train(tracker, model, range(5))
        state = tracker.state_dict()
        train(tracker, model, range(5, 8))
    sink = TensorBoardSink(per_parameter="norm", depth=1)
    with Tracker(model, run=Run(tmp_path, name="a", resume=True), sinks=[sink]) as tracker:
        tracker.load_state_dict(state)
        train(tracker, model, range(5, 7))
        tracker.epoch(val_loss=0.25)
    seen = read(tmp_path / "a")
    for name, series in tracker.history.items():
        events = seen.Scalars(name)
        assert [event.step for event in events] == series.steps.tolist()
        np.testing.assert_array_equal([event.value for event in events], series.values.astype(np.float32))
    times = [event.wall_time for event in seen.Scalars("loss")]
    assert times == sorted(times)
    assert times[:5] == [1000.0, 1000.5, 1001.0, 1001.5, 1002.0]
    assert [event.step for event in seen.Scalars("grad_norm/0")] == [5, 6]
    norms = tracker.history.parameters.field("norm_mean")[-1]
    histogram = seen.Histograms("parameters/norm_mean")[-1].histogram_value
    assert (histogram.num, histogram.min, histogram.max) == (4, norms.min(), norms.max())
    assert "lr" in seen.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()


def test_a_finding_is_a_text_at_its_step(tmp_path: Path) -> None:
    model = nn.Linear(3, 1)
    with Tracker(model, sinks=[TensorBoardSink(tmp_path)], on_finding=lambda finding: None) as tracker:
        for step in range(8):
            model.weight.grad = model.weight.detach() * float("nan" if step == 5 else 1)
            tracker.step(loss=1.0)
    (finding, *_) = tracker.findings
    text = read(tmp_path).Tensors(f"findings/{finding.rule}/text_summary")[-1]
    assert text.step == finding.last_step
    assert text.tensor_proto.string_val[0].decode() == str(finding)


def test_what_came_before_a_crash_is_in_the_files(tmp_path: Path) -> None:
    model = nn.Linear(3, 1)
    with pytest.raises(ZeroDivisionError):
        crash(Tracker(model, diagnosis=None, sinks=[TensorBoardSink(tmp_path)]), model)
    assert [event.step for event in read(tmp_path).Scalars("loss")] == [0, 1, 2]

"""MLflow on SQLite, read back with its own client."""

from __future__ import annotations

import itertools
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from recording import crash, train
from torch import nn

from pytracker import Run, Tracker
from pytracker.sinks import MLflowSink, mirrors

pytest.importorskip("mlflow", reason="mlflow is not installed: pip install 'pytracker[mlflow]'")


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a database that all tests share: its tables take seconds to make."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


def client(uri: str):
    from mlflow import MlflowClient

    return MlflowClient(uri)


def read(uri: str, experiment: str) -> dict:
    """Return the runs of an experiment by name."""
    found = client(uri).get_experiment_by_name(experiment)
    return {run.info.run_name: run for run in client(uri).search_runs([found.experiment_id])}


def test_values_steps_and_times_are_the_tracker_s_also_through_a_server_that_was_away(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    whole, tries = MlflowClient.log_batch, itertools.count()

    def away(*arguments: object, **named: object) -> None:
        if next(tries) in (1, 2, 4):
            raise ConnectionError("503")
        whole(*arguments, **named)

    monkeypatch.setattr(MlflowClient, "log_batch", away)
    monkeypatch.setattr("pytracker.sinks.mlflow._BATCH", 7)  # several requests a call
    clock = itertools.count(1000.0, 0.5)
    monkeypatch.setattr(mirrors, "time", SimpleNamespace(time=lambda: next(clock), monotonic=time.monotonic))
    model, run = nn.Linear(3, 1), Run(tmp_path, name="a", config={"lr": 0.1})
    sink = MLflowSink("values", tracking_uri=uri, per_parameter="norm")
    with Tracker(model, run=run, every=3, diagnosis=None, sinks=[sink]) as tracker:
        train(tracker, model, range(4))
        tracker.epoch(val_loss=math.inf, accuracy=math.nan)
        train(tracker, model, range(4, 8))
    kept = read(uri, "values")["a"]
    for name, series in tracker.history.items():
        found = sorted(client(uri).get_metric_history(kept.info.run_id, name), key=lambda metric: metric.step)
        assert [metric.step for metric in found] == series.steps.tolist()
        if name not in ("val_loss", "accuracy"):
            assert [metric.value for metric in found] == series[:]
    times = {metric.step: metric.timestamp for metric in client(uri).get_metric_history(kept.info.run_id, "loss")}
    assert [times[step] for step in range(4)] == [1000_000, 1000_500, 1001_000, 1001_500]
    (infinite,) = client(uri).get_metric_history(kept.info.run_id, "val_loss")
    (nan,) = client(uri).get_metric_history(kept.info.run_id, "accuracy")
    assert (infinite.value, math.isnan(nan.value)) == (sys.float_info.max, True)
    assert kept.data.tags["pytracker.nonfinite.val_loss"] == "inf at step 3"
    assert kept.data.tags["pytracker.nonfinite.accuracy"] == "nan at step 3"
    assert kept.data.params["lr"] == "0.1"
    assert kept.info.status == "FINISHED"
    assert len(client(uri).get_metric_history(kept.info.run_id, "grad_norm/weight")) == 8


def test_a_resumed_training_continues_its_run_and_one_that_goes_back_begins_another(uri: str, tmp_path: Path) -> None:
    model = nn.Linear(3, 1)

    def sink() -> MLflowSink:
        return MLflowSink("resumed", tracking_uri=uri)

    with Tracker(model, run=Run(tmp_path, name="a"), diagnosis=None, sinks=[sink]) as tracker:
        train(tracker, model, range(5))
        early = tracker.state_dict()
        train(tracker, model, range(5, 8))
        end = tracker.state_dict()
    for state, steps in ((end, range(8, 10)), (early, range(5, 7))):
        with Tracker(model, run=Run(tmp_path, name="a", resume=True), diagnosis=None, sinks=[sink]) as tracker:
            tracker.load_state_dict(state)
            train(tracker, model, steps)
    runs = read(uri, "resumed")
    steps = {
        name: sorted(metric.step for metric in client(uri).get_metric_history(run.info.run_id, "loss"))
        for name, run in runs.items()
    }
    assert steps == {"a": list(range(10)), "a-from-5": [5, 6]}
    assert runs["a-from-5"].data.tags["pytracker.continues"] == runs["a"].info.run_id


def test_a_crash_ends_the_run_as_failed_and_findings_are_tags(uri: str) -> None:
    model = nn.Linear(3, 1)
    sink = MLflowSink("crash", tracking_uri=uri)
    tracker = Tracker(model, every=1, sinks=[sink], on_finding=lambda finding: None)
    for _ in range(3):
        model.weight.grad = model.weight.detach() * float("nan")
        tracker.step(loss=1.0)
    with pytest.raises(ZeroDivisionError):
        crash(tracker, model)
    (kept,) = read(uri, "crash").values()
    assert kept.info.status == "FAILED"
    assert kept.data.tags["pytracker.error"] == "ZeroDivisionError: by design"
    for finding in tracker.findings:
        assert kept.data.tags[f"pytracker.finding.{finding.rule}"] == str(finding)

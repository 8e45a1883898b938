"""W&B offline, read back from the file that `wandb sync` uploads."""

from __future__ import annotations

import itertools
import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from recording import crash, train
from torch import nn

from pytracker import Run, Tracker
from pytracker.sinks import WandbSink, mirrors

wandb = pytest.importorskip("wandb", reason="wandb is not installed: pip install 'pytracker[wandb]'")


def options(folder: Path) -> dict[str, object]:
    settings = wandb.Settings(console="off", silent=True)
    return {"dir": str(folder), "mode": "offline", "settings": settings}


def records(path: Path) -> Iterator[object]:
    """Yield the records of a .wandb file: a log in LevelDB's format, of W&B's own messages."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, message = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, size, kind = struct.unpack("<IHB", data[place : place + 7])
        message += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(message)
            message = b""
            yield record


def by_kind(path: Path) -> dict[str, list]:
    """Return the records of a run that has ended; W&B's service may write the last ones after `finish` has returned."""
    end = time.monotonic() + 120
    while True:
        found: dict[str, list] = {}
        for record in records(path):
            kind = record.WhichOneof("record_type")
            found.setdefault(kind, []).append(getattr(record, kind))
        if "exit" in found or time.monotonic() > end:
            return found
        time.sleep(0.05)


def read(folder: Path) -> dict[str, dict[str, list]]:
    """Return what each W&B run holds, by its name."""
    runs: dict[str, dict[str, list]] = {}
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        found = by_kind(path)
        run = found["run"][0]
        values = runs.setdefault(run.display_name, {"history": [], "alert": [], "exit": [], "run": []})
        for kind in values:
            values[kind] += found.get(kind, [])
    return runs


def values_of(run: dict[str, list], name: str) -> list[tuple[int, float, float]]:
    """Return (step, time, value) of a series."""
    rows = [{item.nested_key[0]: json.loads(item.value_json) for item in row.item} for row in run["history"]]
    return [(row["step"], row["_timestamp"], row[name]) for row in rows if name in row]


def test_values_steps_and_times_are_the_tracker_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(1000.0, 0.5)
    monkeypatch.setattr(mirrors, "time", SimpleNamespace(time=lambda: next(clock), monotonic=time.monotonic))
    model = nn.Linear(3, 1)
    run = Run(tmp_path / "runs", name="a", config={"lr": 0.1})
    with Tracker(model, run=run, every=3, diagnosis=None, sinks=[WandbSink(**options(tmp_path))]) as tracker:
        train(tracker, model, range(4))
        tracker.epoch(val_loss=float("inf"))
        train(tracker, model, range(4, 8))
    (kept,) = read(tmp_path).values()
    for name, series in tracker.history.items():
        got = [(step, value) for step, _, value in values_of(kept, name)]
        assert got == list(zip(series.steps.tolist(), series[:], strict=True))
    assert [when for _, when, _ in values_of(kept, "loss")[:4]] == [1000.0, 1000.5, 1001.0, 1001.5]
    assert kept["exit"][-1].exit_code == 0
    assert {update.key: json.loads(update.value_json) for update in kept["run"][0].config.update}["lr"] == 0.1


def test_a_resumed_training_continues_its_run_and_one_that_goes_back_begins_another(tmp_path: Path) -> None:
    model = nn.Linear(3, 1)
    with Tracker(
        model, run=Run(tmp_path / "runs", name="a"), diagnosis=None, sinks=[WandbSink(**options(tmp_path))]
    ) as tracker:
        train(tracker, model, range(5))
        early = tracker.state_dict()
        train(tracker, model, range(5, 8))
        end = tracker.state_dict()
    for state, steps in ((end, range(8, 10)), (early, range(5, 7))):
        run = Run(tmp_path / "runs", name="a", resume=True)
        with Tracker(model, run=run, diagnosis=None, sinks=[WandbSink(**options(tmp_path))]) as tracker:
            tracker.load_state_dict(state)
            train(tracker, model, steps)
    runs = read(tmp_path)
    assert {name: [step for step, _, _ in values_of(run, "loss")] for name, run in runs.items()} == {
        "a": list(range(10)),
        "a-from-5": [5, 6],
    }
    assert len({record.run_id for record in runs["a"]["run"]}) == 1
    assert {record.run_group for run in runs.values() for record in run["run"]} == {"a"}


def test_a_finding_is_an_alert_and_a_crash_ends_the_run_as_failed(tmp_path: Path) -> None:
    model = nn.Linear(3, 1)
    tracker = Tracker(
        model, every=1, sinks=[WandbSink(project="x", **options(tmp_path))], on_finding=lambda finding: None
    )
    for _ in range(3):
        model.weight.grad = model.weight.detach() * float("nan")
        tracker.step(loss=1.0)
    with pytest.raises(ZeroDivisionError):
        crash(tracker, model)
    (kept,) = read(tmp_path).values()
    titles = [alert.title for alert in kept["alert"]]
    assert titles == [f"pytracker: {finding.rule}" for finding in tracker.findings]
    assert kept["exit"][-1].exit_code == 1
    assert kept["run"][0].project == "x"


def test_a_run_that_the_user_opened_gets_the_values_and_stays_open(tmp_path: Path) -> None:
    model = nn.Linear(3, 1)
    with wandb.init(project="mine", name="mine", **options(tmp_path)) as mine:
        with Tracker(model, diagnosis=None, sinks=[WandbSink(run=mine)]) as tracker:
            train(tracker, model, range(3))
        mine.log({"own": 1.0})
    (kept,) = read(tmp_path).values()
    assert [step for step, _, _ in values_of(kept, "loss")] == [0, 1, 2]
    assert any(item.nested_key[0] == "own" for row in kept["history"] for item in row.item)

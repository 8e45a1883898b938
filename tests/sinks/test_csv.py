"""The CSV sink: what the tracker recorded is what the file says."""

from __future__ import annotations

import csv
from pathlib import Path

import torch
from torch import nn

from pytracker import Tracker
from pytracker.sinks import CSVSink


def test_every_exact_value_arrives_in_order_also_of_a_series_that_comes_late(tmp_path: Path) -> None:
    model = nn.Linear(3, 1)
    path = tmp_path / "new" / "training.csv"
    with Tracker(model, every=4, diagnosis=None, sinks=[CSVSink(path)]) as tracker:
        for step in range(11):
            model.weight.grad = torch.full((1, 3), step / 7)
            tracker.step(loss=1 / (step + 1), late=step if step > 5 else None)
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    names = {line["name"] for line in lines}
    assert {"loss", "late", "grad_norm"} <= names
    for name in names:
        got = [(int(line["step"]), float(line["value"])) for line in lines if line["name"] == name]
        recorded = tracker.history[name]
        assert got == list(zip(recorded.steps.tolist(), recorded[:], strict=True))


def test_a_second_sink_continues_the_file_under_one_header(tmp_path: Path) -> None:
    for step in range(2):
        with Tracker([], diagnosis=None, sinks=[CSVSink(tmp_path / "a.csv")]) as tracker:
            tracker.step(loss=step)
    assert (tmp_path / "a.csv").read_text().count("step,name,value") == 1

"""The CSV sink: what the tracker recorded is what the file says."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from recording import train
from torch import nn

from pytracker import InvalidTypeError, InvalidValueError, Run, Tracker
from pytracker.sinks import CSVSink


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def series(path: Path, name: str) -> list[tuple[int, float]]:
    return [(int(line["step"]), float(line["value"])) for line in read(path) if line["name"] == name]


def test_every_exact_value_arrives_in_order_also_of_a_series_that_comes_late(tmp_path: Path) -> None:
    model, path = nn.Linear(3, 1), tmp_path / "new" / "training.csv"
    with Tracker(model, every=4, diagnosis=None, sinks=[CSVSink(path)]) as tracker:
        train(tracker, model, range(11))
        tracker.epoch(val_loss=1 / 3)
    assert {line["name"] for line in read(path)} == {*tracker.history} >= {"loss", "rare", "grad_norm", "val_loss"}
    for name, recorded in tracker.history.items():
        assert series(path, name) == list(zip(recorded.steps.tolist(), recorded[:], strict=True))


def test_a_resumed_training_replaces_the_steps_that_it_records_again(tmp_path: Path) -> None:
    model, path = nn.Linear(3, 1), tmp_path / "a.csv"
    with Tracker(model, run=Run(tmp_path, name="a"), diagnosis=None, sinks=[CSVSink(path)]) as tracker:
        train(tracker, model, range(5))
        state = tracker.state_dict()
        train(tracker, model, range(5, 8))
    with path.open("a") as file:
        file.write("8,lo")  # the process was killed while it wrote
    run = Run(tmp_path, name="a", resume=True)
    with Tracker(model, run=run, diagnosis=None, sinks=[CSVSink(path)]) as tracker:
        tracker.load_state_dict(state)
        train(tracker, model, range(5, 7))
    assert path.read_text().count("step,name") == 1
    assert series(path, "loss") == [(step, 1 / (step + 1)) for step in range(7)]


def test_the_file_of_another_training_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    for value in (1.0, 2.0, 3.0):
        with Tracker([], diagnosis=None, sinks=[CSVSink(path)]) as tracker:
            tracker.step(loss=value)
    kept = [series(tmp_path / name, "loss") for name in ("a.1.csv", "a.2.csv", "a.csv")]
    assert kept == [[(0, 1.0)], [(0, 2.0)], [(0, 3.0)]]


@pytest.mark.parametrize("statistic", ["norm", "abs_max", "zero_fraction", "nonfinite"])
@pytest.mark.parametrize("depth", [None, 1, 2])
def test_values_of_layers_are_those_of_all_their_gradients(statistic: str, depth: int | None, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4)), nn.Linear(4, 2))
    groups = {
        None: {name: [name] for name, _ in model.named_parameters()},
        1: {"0": ["0.0.weight", "0.0.bias", "0.1.weight", "0.1.bias"], "1": ["1.weight", "1.bias"]},
        2: {"0.0": ["0.0.weight", "0.0.bias"], "0.1": ["0.1.weight", "0.1.bias"], "1": ["1.weight", "1.bias"]},
    }[depth]
    expected: dict[str, list[float]] = {name: [] for name in groups}
    path = tmp_path / "a.csv"
    parameters = dict(model.named_parameters())
    with Tracker(model, diagnosis=None, sinks=[CSVSink(path, per_parameter=statistic, depth=depth)]) as tracker:
        for step in range(4):
            for name, parameter in parameters.items():
                gradient = generator.normal(size=tuple(parameter.shape)).astype(np.float32)
                gradient[generator.random(gradient.shape) < 0.3] = 0
                if step == 2 and statistic == "nonfinite" and name.endswith("bias"):
                    gradient[0] = np.inf
                missing = step == 3 and name.startswith("0.1")
                parameter.grad = None if missing else parameter.new_tensor(gradient)
            for group, members in groups.items():
                there = [parameters[name].grad for name in members if parameters[name].grad is not None]
                values = np.concatenate([each.numpy().astype(np.float64).ravel() for each in there] or [[np.nan]])
                expected[group].append(
                    {
                        "norm": np.linalg.norm(values),
                        "abs_max": np.abs(values).max(),
                        "zero_fraction": np.mean(values == 0) if there else np.nan,
                        "nonfinite": np.sum(~np.isfinite(values)) if there else np.nan,
                    }[statistic]
                )
            tracker.step()
    for group, values in expected.items():
        got = [value for _, value in series(path, f"grad_{statistic}/{group}")]
        np.testing.assert_allclose(got, values, rtol=1e-7)


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"per_parameter": "mean"}, InvalidValueError, "mean"),
        ({"per_parameter": "norm", "depth": 0}, InvalidValueError, "depth"),
        ({"per_parameter": "norm", "depth": "2"}, InvalidTypeError, "depth"),
    ],
)
def test_a_statistic_or_depth_that_there_is_not_is_refused(
    options: dict[str, object], error: type[Exception], named: str
) -> None:
    with pytest.raises(error, match=named):
        CSVSink("a.csv", **options)

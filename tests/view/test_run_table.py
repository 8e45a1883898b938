"""Which runs a list shows, in which order."""

from __future__ import annotations

import pytest

from pytracker.errors import InvalidValueError
from pytracker.store import Run, list_runs
from pytracker.view import annotate_run, select_runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs")
    for index in range(12):
        config = {"lr": [1e-3, 1e-2][index % 2], "model": {"name": f"net-{index % 3}"}, "depth": index}
        with Run(directory, name=f"run-{index:02d}", config=config) as run:
            for step in range(index + 1):
                run.log(step, val_loss=1.0 / (index + 1) + step, accuracy=index / 12)
        annotate_run(run.path, add=["even"] if index % 2 == 0 else ["odd", "paper"])
    with Run(directory, name="empty", config={}):
        pass
    return list_runs(directory)


def names(found):
    return [int(run.name[4:]) if run.name != "empty" else None for run in found]


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("lr=1e-3", {0, 2, 4, 6, 8, 10}),
        ("lr=0.0010", {0, 2, 4, 6, 8, 10}),
        ("lr!=1e-3", {1, 3, 5, 7, 9, 11, None}),
        ("val_loss<0.2", {5, 6, 7, 8, 9, 10, 11}),
        ("accuracy>=0.75", {9, 10, 11}),
        ("model.name=net-1", {1, 4, 7, 10}),
        ("tags=paper", {1, 3, 5, 7, 9, 11}),
        ("tags!=paper", {0, 2, 4, 6, 8, 10, None}),
        ("steps>10", {10, 11}),
        ("depth<=1", {0, 1}),
        ("state=finished", {*range(12), None}),
    ],
)
def test_a_condition_keeps_the_runs_that_meet_it(runs, condition, expected):
    assert set(names(select_runs(runs, where=[condition]))) == expected


def test_several_conditions_hold_together(runs):
    assert names(select_runs(runs, where=["lr=1e-3", "depth>5", "tags=even"], sort="depth")) == [6, 8, 10]


@pytest.mark.parametrize(
    ("sort", "expected"),
    [
        ("val_loss", [11, 10, 9]),
        ("-val_loss", [0, 1, 2]),
        ("accuracy", [11, 10, 9]),
        ("depth", [0, 1, 2]),
        ("-steps", [11, 10, 9]),
        ("last:val_loss", [0, 1, 2]),
    ],
)
def test_a_metric_is_sorted_by_its_best_value_and_the_best_comes_first(runs, sort, expected):
    assert names(select_runs(runs, sort=sort, limit=3)) == expected
    assert names(select_runs(runs, sort=sort))[-1] is None


def test_a_condition_that_means_nothing_is_named(runs):
    with pytest.raises(InvalidValueError, match=r"expected a condition such as lr=1e-3 or val_loss<0.5, got 'lr'"):
        select_runs(runs, where=["lr"])
    with pytest.raises(InvalidValueError, match=r"sort: no run has 'learning'; there are run, state, .*lr"):
        select_runs(runs, sort="learning")
    assert select_runs([], where=["lr=1"], sort="lr") == []

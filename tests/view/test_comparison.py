"""Runs side by side, against answers worked out by hand."""

from __future__ import annotations

import pytest

from pytracker.errors import InvalidValueError
from pytracker.store import Run
from pytracker.view import compare
from pytracker.view.comparison import flatten
from pytracker.view.metric_names import goal, headline, split, subject


@pytest.fixture
def runs(tmp_path):
    curves = {"a": ([4.0, 2.0, 1.0, 3.0], [0.1, 0.9, 0.2, 0.3]), "b": ([4.0, 3.0, 2.0, 2.5], [0.1, 0.2, 0.8, 0.8])}
    paths = []
    for name, (losses, accuracies) in curves.items():
        with Run(tmp_path, name=name, config={"lr": len(paths), "model": {"depth": 3}}) as run:
            run._started -= 100  # the first step comes at 100 s
            for step, (loss, accuracy) in enumerate(zip(losses, accuracies, strict=True)):
                run.log(10 * step, loss=loss, val_accuracy=accuracy, lr=0.1)
                run._started -= 10  # and each other one 10 s later
            if name == "a":
                run.log(100, only_a=1.0)
        paths.append(run.path)
    return paths


def test_best_last_and_their_steps(runs):
    comparison = compare(runs)
    assert comparison.names == ["a", "b"]
    assert comparison.last_steps == [100, 30]
    loss, accuracy = comparison.metrics["loss"], comparison.metrics["val_accuracy"]
    assert [(each.best, each.best_step, each.last, each.last_step) for each in loss] == [
        (1, 20, 3, 30),
        (2, 20, 2.5, 30),
    ]
    assert [(each.best, each.best_step) for each in accuracy] == [(0.9, 10), (0.8, 20)]
    assert comparison.metrics["lr"][0].best is None
    assert comparison.metrics["only_a"][1] is None


def test_by_default_the_threshold_is_the_level_that_all_runs_reached(runs):
    reach = {each.metric: each for each in compare(runs).reach}
    assert (reach["loss"].threshold, reach["loss"].steps) == (2.0, [10, 20])
    assert reach["loss"].seconds == pytest.approx([110, 120], abs=1)
    assert (reach["val_accuracy"].threshold, reach["val_accuracy"].steps) == (0.8, [10, 20])


def test_a_threshold_that_was_never_reached_says_none(runs):
    (reach,) = compare(runs, thresholds={"loss": 1.5}).reach
    assert (reach.steps, reach.seconds[1]) == ([20, None], None)
    with pytest.raises(InvalidValueError, match="no run has a metric 'accuracy'; there are loss"):
        compare(runs, thresholds={"accuracy": 1.5})
    with pytest.raises(InvalidValueError, match="whether 'lr' should rise or fall"):
        compare(runs, thresholds={"lr": 1.5})
    with pytest.raises(InvalidValueError, match="no runs were given"):
        compare([])


def test_only_differing_config_keys_are_listed(runs):
    assert compare(runs).config == {"lr": [0, 1]}
    assert compare(runs[:1]).config == {}


def test_speed_is_steps_over_the_seconds_of_the_clock(runs):
    assert compare(runs).steps_per_second[1] == pytest.approx(1.0, abs=0.02)


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path):
    for folder in ("x", "y"):
        with Run(tmp_path / folder, name="same"):
            pass
    assert compare([tmp_path / "x" / "same", tmp_path / "y" / "same"]).names == [
        str(tmp_path / "x" / "same"),
        str(tmp_path / "y" / "same"),
    ]


def test_flatten_keeps_what_is_no_mapping():
    assert flatten({"a": {"b": [1, 2], "c": {}}, "d": None}) == {"a.b": [1, 2], "d": None}
    assert flatten("text") == {"config": "text"}


@pytest.mark.parametrize(
    ("name", "aim", "part", "about"),
    [
        ("train_loss", "min", "train", "loss"),
        ("val/acc", "max", "val", "acc"),
        ("eval.topOne.accuracy", "max", "val", "topOne.accuracy"),
        ("validation_perplexity", "min", "val", "perplexity"),
        ("grad_norm", None, "train", "grad_norm"),
        ("lr", None, "train", "lr"),
        ("train", None, "train", "train"),
    ],
)
def test_names_say_what_is_good_and_where_it_is_measured(name, aim, part, about):
    assert (goal(name), split(name), subject(name)) == (aim, part, about)


def test_the_headline_is_a_validation_loss_if_there_is_one():
    assert headline(["loss", "lr", "val_accuracy", "val_loss"]) == "val_loss"
    assert headline(["loss", "val_accuracy"]) == "val_accuracy"
    assert headline(["lr", "grad_norm"]) is None

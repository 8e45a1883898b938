"""Going on with a run: no curve is doubled, and nothing is thrown away."""

from __future__ import annotations

import sqlite3

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytracker.errors import InvalidValueError
from pytracker.history import summarize
from pytracker.store import Run, load_run


def log_steps(run, steps, value):
    for step in steps:
        run.log(step, loss=value)


def archived(path, table="archived_metrics"):
    connection = sqlite3.connect(path / "run.sqlite")
    rows = connection.execute(f"SELECT * FROM {table}").fetchall()
    connection.close()
    return rows


def test_the_first_step_of_a_resumed_run_archives_what_it_repeats(tmp_path):
    with Run(tmp_path, name="one", config={"lr": 1}) as run:
        log_steps(run, range(10), 1.0)
    with Run(tmp_path, name="one", resume=True) as run:
        assert run.config == {"lr": 1}
        assert len(run.history["loss"]) == 10
        log_steps(run, range(6, 12), 2.0)
    stored = load_run(run.path)
    assert stored.history["loss"].steps.tolist() == list(range(12))
    assert stored.history["loss"] == [1.0] * 6 + [2.0] * 6
    assert run.history == stored.history
    assert [(step, value) for _, _, step, value in archived(run.path)] == [(step, 1.0) for step in range(6, 10)]
    assert stored.archived_points == 4
    assert [session.state for session in stored.sessions] == ["finished", "finished"]


def test_going_on_where_it_ended_archives_nothing(tmp_path):
    with Run(tmp_path, name="one") as run:
        log_steps(run, range(5), 1.0)
    with Run(tmp_path, name="one", resume=True) as run:
        log_steps(run, range(5, 8), 1.0)
    assert load_run(run.path).history["loss"].steps.tolist() == list(range(8))
    assert archived(run.path, "archives") == []


def test_a_run_can_be_resumed_again_and_again(tmp_path):
    with Run(tmp_path, name="one") as run:
        log_steps(run, range(10), 0.0)
    for attempt, start in enumerate((8, 4, 6), 1):
        with Run(tmp_path, name="one", resume=True) as run:
            log_steps(run, range(start, 10), float(attempt))
    assert load_run(run.path).history["loss"] == [0.0] * 4 + [2.0] * 2 + [3.0] * 4
    assert len(archived(run.path)) == 2 + 6 + 4


def test_resume_begins_a_run_that_does_not_exist(tmp_path):
    with Run(tmp_path, name="one", resume=True) as run:
        log_steps(run, range(3), 1.0)
    assert load_run(run.path).history["loss"] == [1.0] * 3
    with pytest.raises(InvalidValueError, match="resume: say which run to go on with"):
        Run(tmp_path, resume=True)


def test_intervals_rows_and_findings_are_truncated_too(tmp_path, infos):
    numel = [info.numel for info in infos]

    def record(run, firsts):
        run.set_parameters(infos)
        for first in firsts:
            steps = np.arange(first, first + 5)
            run.log_rows(steps, np.ones((5, 3, 6)) * first)
            run.log_interval(summarize(steps, np.ones((5, 3, 6)), numel))

    with Run(tmp_path, name="one", every_step=True) as run:
        record(run, (0, 5, 10))
        for first_step in (3, 12):
            run.log_finding({"rule": "spike", "first_step": first_step, "parameters": []})
    with Run(tmp_path, name="one", resume=True, every_step=True) as run:
        record(run, (7, 12))
    parameters = load_run(run.path).history.parameters
    assert parameters.first_step.tolist() == [0, 7, 12]
    assert parameters.rows()[0].tolist() == list(range(17))
    assert [finding["first_step"] for finding in load_run(run.path).findings] == [3]
    assert [row[1] for row in archived(run.path, "archived_intervals")] == [5, 10]
    blocks = archived(run.path, "archived_exact_rows")
    assert [(first, last, count) for _, first, last, count, *_ in blocks] == [(7, 9, 3), (10, 14, 5)]
    assert len(archived(run.path, "archived_findings")) == 1


def test_truncate_goes_back_within_a_run(tmp_path):
    with Run(tmp_path) as run:
        log_steps(run, range(10), 1.0)
        run.truncate(4)
        log_steps(run, range(4, 6), 2.0)
    stored = load_run(run.path)
    assert stored.history["loss"] == [1.0] * 4 + [2.0] * 2
    assert (stored.summaries["loss"].maximum, stored.summaries["loss"].count) == (2.0, 6)


def test_a_series_that_is_truncated_whole_disappears(tmp_path):
    with Run(tmp_path) as run:
        log_steps(run, range(3), 1.0)
        run.log(5, late=1.0)
        run.truncate(4)
    assert list(load_run(run.path).history) == ["loss"]


def test_training_time_goes_on_from_the_step_kept(tmp_path):
    with Run(tmp_path, name="one") as run:
        run._started -= 100.0  # as if it had trained for 100 s
        log_steps(run, range(3), 1.0)
    with Run(tmp_path, name="one", resume=True) as run:
        log_steps(run, range(3, 5), 1.0)
    assert 100.0 < load_run(run.path).seconds < 110.0


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(1, 6)), min_size=1, max_size=5))
def test_any_chain_of_resumes_leaves_each_step_once(tmp_path_factory, sessions):
    directory = tmp_path_factory.mktemp("runs")
    expected: dict[int, float] = {}
    for attempt, (start, count) in enumerate(sessions):
        with Run(directory, name="one", resume=True) as run:
            log_steps(run, range(start, start + count), float(attempt))
        expected = {step: value for step, value in expected.items() if step < start}
        expected.update(dict.fromkeys(range(start, start + count), float(attempt)))
    loss = load_run(directory / "one").history["loss"]
    assert dict(zip(loss.steps.tolist(), loss, strict=True)) == expected
    assert len(loss) == len(expected)

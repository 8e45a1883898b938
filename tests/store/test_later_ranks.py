"""Where every rank makes the same run, one is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytracker import Run, list_runs
from pytracker.errors import InvalidTypeError, InvalidValueError
from pytracker.tracking import opened


@pytest.fixture
def rank_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a launcher tells it, before torch.distributed begins."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")


def test_a_later_rank_opens_nothing_and_says_once_that_what_is_logged_there_is_not_kept(rank_one, tmp_path) -> None:
    with Run(tmp_path / "runs", name="one", config={"lr": 0.1}) as run:
        with pytest.warns(RuntimeWarning, match=r"run 'one' .* this is rank 1: .* every_rank=True"):
            run.log(0, loss=1.0)
        run.log(1, loss=0.5)
        run.flush()
        assert run.history["loss"][:] == [1.0, 0.5]
    assert run.path == tmp_path / "runs" / "one"
    assert (run.state, run.dropped_points) == ("finished", 0)
    assert not (tmp_path / "runs").exists()


def test_what_the_first_rank_refuses_a_later_one_refuses_too(rank_one, tmp_path) -> None:
    with pytest.raises(InvalidValueError, match="name"):
        Run(tmp_path, name="a/b")
    with pytest.raises(InvalidTypeError, match="directory"):
        Run(5)
    with pytest.raises(InvalidValueError, match="config"):
        Run(tmp_path, config={"n": 10**5000})


def test_a_rank_can_have_a_run_of_its_own(rank_one, tmp_path) -> None:
    with Run(tmp_path, name="rank-1", every_rank=True) as run:
        run.log(0, loss=1.0)
    assert [each.name for each in list_runs(tmp_path)] == ["rank-1"]


def test_a_tracker_that_records_on_a_later_rank_opens_its_run(rank_one, tmp_path: Path) -> None:
    spare = Run(tmp_path, name="stage", config={"lr": 0.1})  # as of a pipeline's second stage
    run = opened(spare)
    run.log(0, loss=1.0)
    spare.finish()
    (stored,) = list_runs(tmp_path)
    assert (stored.name, stored.state, stored.config) == ("stage", "finished", {"lr": 0.1})


@pytest.mark.parametrize(("rank", "world"), [("0", "2"), ("1", "1"), ("1", ""), ("x", "2"), ("-1", "2")])
def test_without_a_later_rank_the_run_is_opened(rank, world, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    Run(tmp_path, name="one").finish()
    assert len(list_runs(tmp_path)) == 1

"""A file that is deleted or replaced while it is written is noticed, and begun again with what is in memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import warnings

import numpy as np
import pytest

from pytracker.history import summarize
from pytracker.store import Run, check_run, load_run

ROWS = np.random.default_rng(0).random((5, 3, 6))


def train(run, infos, first=0, steps=100):
    run.set_parameters(infos)
    for step in range(first, first + steps):
        run.log(step, loss=float(step), accuracy=0.5)
    run.log_rows(np.arange(first, first + 5), ROWS)
    run.log_interval(summarize(np.arange(first, first + 5), ROWS, [info.numel for info in infos]))
    run.set_meta(optimizer="SGD")
    run.log_finding({"rule": "spike", "severity": "warning", "first_step": 1, "parameters": ["a"]})


def assert_whole(run, steps=200):
    stored = load_run(run.path)
    assert stored.history["loss"].values.tolist() == [float(step) for step in range(steps)]
    assert stored.history["accuracy"].steps.tolist() == list(range(steps))
    assert stored.summaries["loss"].count == steps
    assert len(stored.history.parameters) == 2
    np.testing.assert_array_equal(stored.history.parameters.norms()[0], [0, 1, 2, 3, 4, 100, 101, 102, 103, 104])
    assert (stored.meta, stored.config, stored.state) == ({"optimizer": "SGD"}, {"lr": 0.1}, "finished")
    assert len(stored.findings) == 1
    assert {"command", "host"} <= set(stored.facts)
    assert check_run(run.path) == []


LOSSES = {
    "the folder": lambda run: shutil.rmtree(run.path),
    "all runs": lambda run: shutil.rmtree(run.directory),
    "the file": lambda run: os.unlink(run.path / "run.sqlite"),
    "the file and its log": lambda run: [path.unlink() for path in run.path.glob("run.sqlite*")],
}


@pytest.mark.parametrize("lose", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("noticed", ["flush", "finish"])
def test_a_deleted_file_is_noticed_said_and_begun_again_with_everything(tmp_path, infos, lose, noticed):
    run = Run(tmp_path / "runs", name="one", config={"lr": 0.1}, flush_seconds=1e5)
    train(run, infos)
    run.flush()
    lose(run)
    train(run, infos, first=100)
    with pytest.warns(RuntimeWarning, match="its file was deleted or replaced .* begun again"):
        getattr(run, noticed)()
    run.finish()
    assert_whole(run)


def test_a_file_that_is_deleted_twice_is_begun_twice_and_a_resumed_one_too(tmp_path, infos):
    with Run(tmp_path, name="one", config={"lr": 0.1}) as run:
        train(run, infos)
    with Run(tmp_path, name="one", resume=True) as run:
        for steps in (0, 100):
            shutil.rmtree(run.path)
            if steps:
                train(run, infos, first=100)
            with pytest.warns(RuntimeWarning, match="begun again"):
                run.flush()
    assert_whole(run)


def test_another_runs_file_in_its_place_is_left_alone_and_nothing_is_lost(tmp_path, infos):
    with Run(tmp_path, name="other") as other:
        other.log(0, loss=9.0)
    run = Run(tmp_path, name="one", config={"lr": 0.1}, flush_seconds=0.1)
    train(run, infos)
    run.flush()
    for path in run.path.glob("run.sqlite*"):
        path.unlink()
    shutil.copy(other.path / "run.sqlite", run.path / "run.sqlite")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(OSError, match="another run's"):
            run.flush()
    assert any("begun again" in str(warning.message) for warning in caught)
    assert load_run(run.path).history["loss"] == [9.0]
    (run.path / "run.sqlite").unlink()
    train(run, infos, first=100)
    run.flush()
    run.finish()
    assert_whole(run)


def test_a_folder_that_is_moved_goes_on_being_written(tmp_path, infos):
    run = Run(tmp_path, name="one", config={"lr": 0.1})
    train(run, infos)
    run.flush()
    run.path.rename(tmp_path / "elsewhere")
    train(run, infos, first=100)
    run.finish()
    stored = load_run(tmp_path / "elsewhere")
    assert (len(stored.history["loss"]), stored.state) == (200, "finished")


def test_a_relative_directory_stays_where_it_was_when_the_program_goes_elsewhere(tmp_path, infos, monkeypatch):
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path)
    run = Run("runs", name="one", config={"lr": 0.1})
    train(run, infos)
    monkeypatch.chdir("there")
    run._writer.order(run._file.close, 5)  # as after an error: the next pass opens it by its path
    train(run, infos, first=100)
    run.finish()
    assert run.path == tmp_path / "runs" / "one"
    assert not (tmp_path / "there" / "runs").exists()
    assert_whole(run)


def test_a_disk_that_comes_back_as_another_device_is_written_as_if_nothing_had_been(tmp_path, infos):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    run = Run(disk, name="one", config={"lr": 0.1}, flush_seconds=0.1)
    train(run, infos)
    run.flush()
    run._writer.order(run._file.close, 5)
    shutil.copytree(run.path, tmp_path / "copy")
    run._file.release()
    subprocess.run(["umount", "-l", disk], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", disk], check=True)
    try:
        shutil.copytree(tmp_path / "copy", run.path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            train(run, infos, first=100)
            run.finish()
        assert_whole(run)
    finally:
        subprocess.run(["umount", "-l", disk], check=True)

"""Files of every kind: damaged, strangers', from the future, copied, on network mounts."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pytracker.errors import RunFormatError, RunNotFoundError, StoreError
from pytracker.history import summarize
from pytracker.runfile.schema import filesystem_of, journal_mode_for
from pytracker.store import Run, list_runs, load_run


def make_damaged(folder, kind):
    """Make a run and spoil its file; return the reason that a reader should hear."""
    with Run(folder, name=kind) as run:
        for step in range(2000):
            run.log(step, loss=1.0)
    file = run.path / "run.sqlite"
    if kind == "text":
        file.write_text("this is not a database, and it is longer than a header of one hundred bytes would be" * 4)
        return "damaged or not a run"
    if kind == "empty":
        file.write_bytes(b"")
        return "not a run"
    if kind == "cut":
        file.write_bytes(file.read_bytes()[:9000])
        return "damaged or not a run"
    connection = sqlite3.connect(file, isolation_level=None)
    if kind == "stranger":
        file.unlink()
        connection = sqlite3.connect(file, isolation_level=None)
        connection.execute("CREATE TABLE photos (id)")
        reason = "an SQLite file, and not a run of pytracker"
    else:
        connection.execute("UPDATE run SET readable_by = 9")
        connection.execute("PRAGMA user_version = 10")
        reason = r"written by a newer pytracker \(format 10"
    connection.close()
    return reason


@pytest.mark.parametrize("kind", ["text", "empty", "cut", "stranger", "newer"])
def test_a_bad_file_is_explained_and_the_others_are_listed(tmp_path, kind):
    with Run(tmp_path, name="good") as run:
        run.log(0, loss=1.0)
    reason = make_damaged(tmp_path, kind)
    with pytest.raises(RunFormatError, match=reason):
        load_run(tmp_path / kind)
    good, bad = list_runs(tmp_path)
    assert (good.name, good.state) == ("good", "finished")
    assert (bad.name, bad.state) == (kind, "unreadable")
    assert "run.sqlite" in bad.error
    with pytest.raises(RunFormatError):
        _ = bad.history


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_whatever_bytes_are_spoiled_the_run_is_read_or_refused_and_the_others_are_listed(tmp_path, infos, data):
    source = tmp_path / "whole" / "run.sqlite"
    if not source.exists():
        with Run(tmp_path, name="whole", config={"lr": 0.1}) as run:
            run.set_parameters(infos)
            for step in range(300):
                run.log(step, loss=1.0 / (step + 1), accuracy=0.5)
            run.log_interval(summarize([0], np.ones((1, 3, 6)), [info.numel for info in infos]))
            run.log_finding({"rule": "spike", "first_step": 1, "parameters": []})
    spoiled = bytearray(source.read_bytes())
    for _ in range(data.draw(st.integers(1, 30))):
        place = data.draw(st.integers(0, len(spoiled) - 1))
        size = data.draw(st.sampled_from([1, 4, 200]))
        spoiled[place : place + size] = data.draw(st.binary(min_size=1, max_size=1)) * len(
            spoiled[place : place + size]
        )
    (tmp_path / "spoiled").mkdir(exist_ok=True)
    (tmp_path / "spoiled" / "run.sqlite").write_bytes(spoiled)
    assert {run.name for run in list_runs(tmp_path)} == {"whole", "spoiled"}
    with contextlib.suppress(StoreError):
        load_run(tmp_path / "spoiled").load_history(parameters=True)


def test_resuming_a_strangers_file_is_refused_and_leaves_it_alone(tmp_path):
    make_damaged(tmp_path, "stranger")
    before = (tmp_path / "stranger" / "run.sqlite").read_bytes()
    with pytest.raises(RunFormatError, match="not a run of pytracker"):
        Run(tmp_path, name="stranger", resume=True)
    assert (tmp_path / "stranger" / "run.sqlite").read_bytes() == before


def test_a_file_with_tables_and_columns_from_the_future_is_read(tmp_path):
    with Run(tmp_path, name="one") as run:
        run.log(0, loss=1.0)
    connection = sqlite3.connect(run.path / "run.sqlite", isolation_level=None)
    connection.execute("ALTER TABLE run ADD COLUMN mood TEXT")
    connection.execute("ALTER TABLE sessions ADD COLUMN weather TEXT")
    connection.execute("CREATE TABLE samples (id)")
    connection.execute("PRAGMA user_version = 2")
    connection.close()
    assert load_run(run.path).history["loss"] == [1.0]


def test_a_missing_run_is_named(tmp_path):
    with pytest.raises(RunNotFoundError, match=r"there is no run at .*nowhere: .* does not exist"):
        load_run(tmp_path / "nowhere")


def test_a_finished_run_is_one_file_that_can_be_copied(tmp_path):
    with Run(tmp_path, name="one") as run:
        run.log(0, loss=1.0)
    assert sorted(path.name for path in run.path.iterdir()) == ["run.lock", "run.sqlite"]
    shutil.copy(run.path / "run.sqlite", tmp_path / "copy.sqlite")
    assert load_run(tmp_path / "copy.sqlite").history["loss"] == [1.0]


def test_a_run_killed_within_a_transaction_of_the_rollback_journal_is_read_as_it_was_before(tmp_path):
    with Run(tmp_path, name="one") as run:
        run.log_many(range(20_000), {"loss": range(20_000)})
    writer = sqlite3.connect(run.path / "run.sqlite", isolation_level=None)
    writer.executescript(
        "PRAGMA journal_mode = TRUNCATE; PRAGMA cache_size = 5; BEGIN; UPDATE batches SET points = '{}';"
    )
    shutil.copytree(run.path, tmp_path / "killed")  # what the disk holds at this moment: half a transaction
    writer.close()
    assert (tmp_path / "killed" / "run.sqlite-journal").stat().st_size > 0
    assert load_run(tmp_path / "killed").history["loss"].values.tolist() == list(range(20_000))


def test_network_file_systems_get_the_rollback_journal(tmp_path, monkeypatch):
    mounts = tmp_path / "mounts"
    mounts.write_text(
        "/dev/sda1 / ext4 rw 0 0\nserver:/home /home nfs4 rw 0 0\n/dev/sdb /home/fast\\040disk xfs rw 0 0\n"
        "none /over ext4 rw 0 0\nserver:/over /over nfs rw 0 0\n"
    )
    kinds = {"/home/me/runs": "nfs4", "/home/fast disk/runs": "xfs", "/homes": "ext4", "/": "ext4", "/over/x": "nfs"}
    assert {path: filesystem_of(Path(path), mounts) for path in kinds} == kinds
    assert filesystem_of(Path("/"), tmp_path / "nowhere") == ""
    assert journal_mode_for(tmp_path) == "WAL"
    monkeypatch.setattr("pytracker.runfile.schema.filesystem_of", lambda path: "nfs4")
    with Run(tmp_path, name="one", flush_seconds=0.1) as run:
        run.log(0, loss=1.0)
        run.flush()
        assert not (run.path / "run.sqlite-wal").exists()
        assert load_run(run.path).history["loss"] == [1.0]
    assert load_run(run.path).facts["journal_mode"] == "TRUNCATE"

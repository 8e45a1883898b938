"""The store when things go wrong: kills, full disks, lost folders, second writers, forks, damaged files."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import resource
import signal
import sqlite3
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest

from pytracker.errors import ClosedError, RunFormatError, RunLockedError, RunNotFoundError, StoreError
from pytracker.history import ParameterInfo, summarize
from pytracker.store import Run, RunLock, load_run

TRAINING = """
import os, sys, time
from pytracker.store import Run
run = Run(sys.argv[1], name="one", flush_seconds=float(sys.argv[2]))
journal = os.open(sys.argv[3], os.O_WRONLY | os.O_CREAT)
for step in range(10**9):
    run.log(step, loss=1.0 / (step + 1), accuracy=0.5)
    os.pwrite(journal, f"{step} {time.monotonic()}\\n".ljust(40).encode(), 40 * step)
    time.sleep(0.0005)
"""


def start_training(tmp_path, flush_seconds):
    arguments = [str(tmp_path), str(flush_seconds), str(tmp_path / "journal")]
    return subprocess.Popen([sys.executable, "-c", TRAINING, *arguments])


def wait_for(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it didn't happen in time"
        time.sleep(0.01)


def last_step(path):
    """The last step on disk; -1 for a run that is still being made."""
    try:
        return load_run(path).last_step
    except StoreError:
        return -1


@pytest.mark.parametrize("attempt", range(3))
def test_a_killed_writer_leaves_a_readable_run_that_holds_what_is_older_than_flush_seconds(tmp_path, attempt):
    flush_seconds = 0.6
    training = start_training(tmp_path, flush_seconds)
    wait_for((tmp_path / "journal").exists)
    time.sleep(random.Random(attempt).uniform(0.7, 1.6))
    killed_at = time.monotonic()
    training.send_signal(signal.SIGKILL)
    training.wait()
    logged = [line.split() for line in (tmp_path / "journal").read_text().splitlines() if len(line.split()) == 2]
    old = [int(step) for step, at in logged if float(at) < killed_at - flush_seconds]
    stored = load_run(tmp_path / "one")
    steps = stored.history["loss"].steps
    assert len(old) > 10
    assert steps.tolist() == list(range(len(steps)))
    assert steps[-1] >= old[-1]
    assert stored.history["loss"].values.tolist() == [1.0 / (step + 1) for step in steps.tolist()]
    assert stored.state == "interrupted"


RESUMES = """
import sys
from pytracker.store import Run
print("ready", flush=True)
while True:  # begin, go back 20 steps, write, finish, and again
    with Run(sys.argv[1], name="one", resume=True, flush_seconds=0.02) as run:
        first = max(0, run.history.last_step - 20)
        for step in range(first, first + 60):
            run.log(step, loss=float(step))
"""


@pytest.mark.parametrize("attempt", range(6))
def test_a_kill_while_a_run_begins_truncates_or_finishes_leaves_no_doubled_or_missing_step(tmp_path, attempt):
    training = subprocess.Popen([sys.executable, "-c", RESUMES, str(tmp_path)], stdout=subprocess.PIPE)
    with training:
        training.stdout.readline()
        time.sleep(random.Random(attempt).uniform(0, 0.02 if attempt < 2 else 0.5))
        training.kill()
    with contextlib.suppress(RunNotFoundError, RunFormatError):  # killed before there was a run
        loss = load_run(tmp_path / "one").history["loss"]
        assert loss == list(range(len(loss)))
        assert loss.steps.tolist() == list(range(len(loss)))
    with Run(tmp_path, name="one", resume=True) as run:
        run.log(10**6, loss=1.0)
    assert load_run(run.path).state == "finished"


def test_a_running_run_is_read_while_it_is_written_and_can_be_resumed_once_killed(tmp_path):
    training = start_training(tmp_path, 0.1)
    try:
        wait_for(lambda: last_step(tmp_path / "one") > 50)
        assert load_run(tmp_path / "one").state == "running"
        with pytest.raises(RunLockedError, match=f"run 'one' is being written by process {training.pid} on .*since"):
            Run(tmp_path, name="one", resume=True)
    finally:
        training.kill()
        training.wait()
    last = load_run(tmp_path / "one").last_step
    with Run(tmp_path, name="one", resume=True) as run:
        run.log(last + 1, loss=0.0)
    stored = load_run(run.path)
    assert stored.last_step == last + 1
    assert [session.state for session in stored.sessions] == ["running", "finished"]
    assert stored.state == "finished"


def test_a_run_that_is_opened_again_in_its_process_closes_the_earlier_one(tmp_path):
    first = Run(tmp_path, name="one")
    first.log(0, loss=1.0)
    with pytest.warns(RuntimeWarning, match="run 'one' was still open in this process"):
        second = Run(tmp_path, name="one", resume=True)
    with pytest.raises(ClosedError, match="run 'one' is finished"):
        first.log(1, loss=9.0)
    with pytest.raises(RunLockedError, match="run 'one' is being written by process"):
        RunLock(second.path, "one")
    second.log(1, loss=2.0)
    second.finish()
    assert load_run(second.path).history["loss"] == [1.0, 2.0]


def test_a_fork_neither_writes_nor_keeps_the_lock(tmp_path):
    run = Run(tmp_path, name="one")
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:  # a data loader's worker, which outlives the training
        try:
            run.log(0, loss=9.0)
        except ClosedError as error:
            os.write(write_end, str(error).encode())
        os.close(write_end)
        time.sleep(30)
        os._exit(0)
    try:
        os.close(write_end)
        assert f"belongs to process {os.getpid()}" in os.read(read_end, 1000).decode()
        run.log(0, loss=1.0)
        run.finish()
        with Run(tmp_path, name="one", resume=True) as again:
            again.log(1, loss=2.0)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(read_end)
    assert load_run(run.path).history["loss"] == [1.0, 2.0]


@contextlib.contextmanager
def tiny_disk(path, megabytes):
    """A file system of its own, really full when it is full."""
    path.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", path], capture_output=True)
    if done.returncode:
        pytest.skip("mounting a file system needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def log_until(run, condition, step=0):
    """Log as a training would, and return the first step that was not logged."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it didn't happen in time"
        for _ in range(500):
            run.log(step, loss=float(step), accuracy=0.5)
            step += 1
        time.sleep(0.005)
    return step


def assert_whole(run, steps):
    stored = load_run(run.path)
    assert stored.history["loss"].steps.tolist() == list(range(steps))
    assert stored.history["loss"].values.tolist() == list(range(steps))
    assert (stored.dropped_points, stored.state) == (0, "finished")


def test_a_full_disk_costs_a_warning_and_no_value(tmp_path):
    with tiny_disk(tmp_path / "disk", 4):
        ballast = tmp_path / "disk" / "ballast"
        ballast.write_bytes(b"x" * 3_000_000)
        run = Run(tmp_path / "disk", name="one", flush_seconds=0.1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step = log_until(run, lambda: run._writer._failures >= 3)
            ballast.unlink()
            step = log_until(run, lambda: not run._writer.last_error, step)
            run.finish()
        (warning,) = caught
        assert re.search(r"can't be written to .*disk.*full.*The training goes on", str(warning.message))
        assert_whole(run, step)


def test_a_disk_that_turns_read_only_costs_a_warning_and_no_value(tmp_path):
    with tiny_disk(tmp_path / "disk", 20):
        run = Run(tmp_path / "disk", name="one", flush_seconds=0.1)
        step = log_until(run, lambda: len(run.history["loss"]) > 1000)
        run.flush()
        run._writer.order(run._file.close, 5)  # an open file would keep the file system writable
        run._file._lock._file.close()
        subprocess.run(["mount", "-o", "remount,ro", tmp_path / "disk"], check=True)
        with pytest.warns(RuntimeWarning, match="can't be written to .*The training goes on"):
            step = log_until(run, lambda: run._writer._failures >= 2, step)
        subprocess.run(["mount", "-o", "remount,rw", tmp_path / "disk"], check=True)
        run._file._lock._file = open(run.path / "run.lock", "ab+", buffering=0)  # noqa: SIM115 - as the lock does
        step = log_until(run, lambda: not run._writer.last_error, step)
        run.finish()
        assert_whole(run, step)


def test_a_file_that_cannot_grow_costs_a_warning_and_no_value(tmp_path):
    """RLIMIT_FSIZE makes a write fail as a device would, for any user."""
    run = Run(tmp_path, name="one", flush_seconds=0.1)
    step = log_until(run, lambda: len(run.history["loss"]) > 1000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.warns(RuntimeWarning, match="can't be written"):
            step = log_until(run, lambda: run._writer._failures >= 2, step)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    step = log_until(run, lambda: not run._writer.last_error, step)
    run.finish()
    assert_whole(run, step)


def test_a_lost_mount_costs_a_warning_and_no_value(tmp_path):
    (tmp_path / "runs").mkdir()
    run = Run(tmp_path / "runs", name="one", flush_seconds=0.1)
    step = log_until(run, lambda: len(run.history["loss"]) > 1000)
    run.flush()
    run._writer.order(run._file.close, 5)  # as the writer does itself at the first error of a stale handle
    (tmp_path / "runs").rename(tmp_path / "gone")
    (tmp_path / "runs").write_text("a mount point whose server is away")
    with pytest.warns(RuntimeWarning, match="can't be written"):
        step = log_until(run, lambda: run._writer._failures >= 2, step)
    (tmp_path / "runs").unlink()
    (tmp_path / "gone").rename(tmp_path / "runs")
    step = log_until(run, lambda: not run._writer.last_error, step)
    run.finish()
    assert_whole(run, step)


def test_a_folder_that_cannot_be_made_yet_is_made_when_it_can(tmp_path):
    blocked = tmp_path / "runs"
    blocked.write_text("in the way")
    with pytest.warns(RuntimeWarning, match="The training goes on"):
        run = Run(blocked, name="one", flush_seconds=0.1)
    run.log(0, loss=0.0)
    blocked.unlink()
    wait_for(lambda: not run._writer.last_error)
    run.finish()
    assert_whole(run, 1)


def test_memory_is_bounded_while_the_disk_fails_and_blobs_go_first(tmp_path):
    blocked = tmp_path / "runs"
    blocked.write_text("in the way")
    infos = [ParameterInfo(f"p{index}", (1,), "float32", "", 1) for index in range(100)]
    with pytest.warns(RuntimeWarning, match="The training goes on"):
        run = Run(blocked, name="one", flush_seconds=0.1, max_pending_bytes=60_000)
    run.set_parameters(infos)
    for step in range(100):
        run.log_interval(summarize([step], np.ones((1, 100, 6)), np.ones(100)))
        run.log(step, loss=float(step))
    assert run.dropped_blobs > 50
    assert run.dropped_points == 0
    for step in range(100, 1000):
        run.log(step, loss=float(step))
    assert run.dropped_blobs == 100
    assert run.dropped_points > 0
    blocked.unlink()
    wait_for(lambda: not run._writer.last_error)
    run.finish()
    stored = load_run(run.path)
    assert stored.dropped_points == run.dropped_points
    assert stored.dropped_blobs == run.dropped_blobs
    assert stored.history["loss"].steps.tolist() == list(range(run.dropped_points, 1000))
    assert stored.parameters == infos


def test_finish_gives_up_after_its_timeout_and_says_what_is_lost(tmp_path):
    blocked = tmp_path / "runs"
    blocked.write_text("in the way")
    with pytest.warns(RuntimeWarning, match="The training goes on"):
        run = Run(blocked, name="one", flush_seconds=0.1)
    run.log(0, loss=1.0, accuracy=0.5)
    with pytest.raises(StoreError, match="run 'one' could not be flushed"):
        run.flush()
    with pytest.warns(RuntimeWarning, match="run 'one': 2 values could not be written"):
        run.finish(timeout=0.3)


def test_warnings_as_errors_do_not_stop_the_writer(tmp_path, capfd):
    blocked = tmp_path / "runs"
    blocked.write_text("in the way")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = Run(blocked, name="one", flush_seconds=0.1)
    run.log(0, loss=0.0)
    blocked.unlink()
    wait_for(lambda: not run._writer.last_error)
    run.finish()
    assert_whole(run, 1)
    assert "The training goes on" in capfd.readouterr().err


def test_a_reader_in_the_way_does_not_keep_a_run_from_finishing(tmp_path):
    run = Run(tmp_path, name="one", flush_seconds=0.1)
    run.log(0, loss=1.0)
    run.flush()
    reader = sqlite3.connect(run.path / "run.sqlite", isolation_level=None)
    reader.execute("BEGIN")
    assert reader.execute("SELECT count(*) FROM metrics").fetchone() == (1,)
    run.log(1, loss=0.5)
    run.finish()
    reader.close()
    stored = load_run(run.path)
    assert (stored.state, stored.history["loss"][:]) == ("finished", [1.0, 0.5])


def test_a_killed_run_on_a_read_only_disk_is_read_whole(tmp_path):
    with tiny_disk(tmp_path / "disk", 20):
        training = start_training(tmp_path / "disk", 0.1)
        wait_for(lambda: last_step(tmp_path / "disk" / "one") > 50)
        training.kill()
        training.wait()
        whole = load_run(tmp_path / "disk" / "one").last_step
        (tmp_path / "disk" / "one" / "run.sqlite-shm").unlink(missing_ok=True)
        subprocess.run(["mount", "-o", "remount,ro", tmp_path / "disk"], check=True)
        stored = load_run(tmp_path / "disk" / "one")
        assert (stored.last_step, stored.state) == (whole, "interrupted")
        assert stored.history["loss"].steps.tolist() == list(range(whole + 1))


def test_a_lock_file_says_who_holds_it(tmp_path):
    with Run(tmp_path, name="one") as run:
        holder = json.loads((run.path / "run.lock").read_text())
    assert holder["pid"] == os.getpid()

"""What a tracker does while a training lives: the clock, threads, signals, checkpoints, groups that change."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from pytracker import Run, Tracker, load_run
from pytracker.errors import InvalidValueError, ParameterError

NAMES = ("grad_norm", "loss")


def train(tracker: Tracker, parameter: nn.Parameter, steps: int) -> None:
    for _ in range(steps):
        parameter.grad = torch.full_like(parameter, float(tracker.steps + 1))
        tracker.step(loss=float(tracker.steps))


@pytest.fixture
def weight() -> nn.Parameter:
    return nn.Parameter(torch.zeros(1))


def test_a_drain_comes_when_its_seconds_are_over_whatever_every_is(weight, monkeypatch) -> None:
    now = [100.0]
    monkeypatch.setattr("pytracker.core.device_log.time.monotonic", lambda: now[0])
    with Tracker([("w", weight)], every=1000, seconds=2.0, diagnosis=None) as tracker:
        train(tracker, weight, 3)
        assert "loss" not in tracker.history
        now[0] += 2.0
        train(tracker, weight, 1)
        assert tracker.history["loss"][:] == [0, 1, 2, 3]
        train(tracker, weight, 2)
        assert len(tracker.history["loss"]) == 4
        now[0] += 2.0
        train(tracker, weight, 1)
        assert tracker.history["loss"].steps.tolist() == list(range(7))


def test_two_threads_that_step_one_tracker_lose_no_step(weight) -> None:
    weight.grad = torch.ones(1)
    with Tracker([("w", weight)], every=7, diagnosis=None) as tracker:
        threads = [
            threading.Thread(target=lambda: [tracker.step(loss=1.0) for _ in range(200)], daemon=True) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    for name in NAMES:
        assert tracker.history[name].steps.tolist() == list(range(800))


SIGNALLED = """
import os, signal, sys, torch, pytracker
{before}
weight = torch.nn.Parameter(torch.zeros(1))
tracker = pytracker.Tracker([weight], run=pytracker.Run(sys.argv[1], name="run"), every=1000, diagnosis=None{argument})
for step in range(5):
    weight.grad = torch.full((1,), float(step))
    tracker.step(loss=float(step))
os.kill(os.getpid(), signal.{name})
print("went on")
"""


def signalled(folder: Path, name: str, before: str = "", argument: str = "") -> subprocess.CompletedProcess[str]:
    code = SIGNALLED.format(name=name, before=before, argument=argument)
    return subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True)


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_that_would_kill_ends_the_program_as_ctrl_c_does(name, tmp_path) -> None:
    default = f"signal.signal(signal.{name}, signal.SIG_DFL)"  # nohup would have it ignored
    done = signalled(tmp_path, name, before=default)
    assert (done.returncode, done.stdout) == (128 + getattr(signal, name), "")
    run = load_run(tmp_path / "run")
    assert run.history["loss"][:] == [0, 1, 2, 3, 4]
    assert (run.state, run.error) == ("failed", f"ended by {name}")


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_a_signal_that_the_program_handles_is_left_to_it(tmp_path) -> None:
    done = signalled(tmp_path, "SIGTERM", before="signal.signal(signal.SIGTERM, lambda *_: print('mine'))")
    assert (done.returncode, done.stdout) == (0, "mine\nwent on\n")
    assert load_run(tmp_path / "run").history["loss"][:] == [0, 1, 2, 3, 4]


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_signals_can_be_left_as_they_are(tmp_path) -> None:
    done = signalled(tmp_path, "SIGTERM", argument=", close_on_signal=False")
    assert done.returncode == -signal.SIGTERM


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("before", ["tracker.close()", "pid = os.fork()\nif pid: sys.exit(os.waitpid(pid, 0)[1])"])
def test_a_signal_is_as_it_was_where_nothing_is_left_to_close_and_in_a_fork(before, tmp_path) -> None:
    code = SIGNALLED.format(name="SIGTERM", before="", argument="").replace("os.kill(", f"{before}\nos.kill(", 1)
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM if "close" in before else signal.SIGTERM, "")
    run = load_run(tmp_path / "run")
    assert run.history["loss"][:] == [0, 1, 2, 3, 4]


KILLED = """
import os, signal, sys, torch, pytracker
weight = torch.nn.Parameter(torch.zeros(1))
tracker = pytracker.Tracker([weight], run=pytracker.Run(sys.argv[1], name="run"), every=1000, diagnosis=None)
for step in range(31):
    weight.grad = torch.full((1,), float(step))
    if step == 20:
        state = tracker.state_dict()
    tracker.step(loss=float(step))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_checkpoint_brings_home_what_it_counts(weight, tmp_path) -> None:
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True)
    assert load_run(tmp_path / "run").history["loss"][:20] == [float(step) for step in range(20)]
    run = Run(tmp_path, name="run", resume=True)
    with Tracker([("0", weight)], run=run, diagnosis=None) as tracker:
        tracker.load_state_dict({"steps": 20, "epochs": 0})
        train(tracker, weight, 5)
    assert load_run(tmp_path / "run").history["loss"].steps.tolist() == list(range(25))


def test_a_training_that_goes_on_logs_nothing_into_a_series_of_its_steps(weight) -> None:
    with Tracker([("w", weight)], diagnosis=None) as tracker:
        train(tracker, weight, 5)
        tracker.log(val_loss=1.0)
    state = json.loads(json.dumps(tracker.state_dict()))
    with Tracker([("w", weight)], diagnosis=None) as tracker:
        tracker.load_state_dict(state)
        with pytest.raises(InvalidValueError, match="'loss' is recorded on each step already"):
            tracker.log(loss=9.0)
        tracker.log(val_loss=2.0)
        train(tracker, weight, 1)
    assert tracker.history["loss"].steps.tolist() == [5]
    assert tracker.history["val_loss"].steps.tolist() == [4]


@pytest.mark.parametrize(
    "state", [{"steps": -5, "epochs": 0}, {"steps": 2.5, "epochs": 0}, {"steps": 3, "epochs": "1"}]
)
def test_a_state_with_impossible_numbers_is_refused_by_name(state, weight) -> None:
    with (
        Tracker([("w", weight)], diagnosis=None) as tracker,
        pytest.raises((ValueError, TypeError), match=r"state\['(steps|epochs)'\] is"),
    ):
        tracker.load_state_dict(state)


def test_metrics_are_recorded_in_the_middle_of_an_epoch_and_at_its_end_under_one_name(weight) -> None:
    with Tracker([("w", weight)], every=10, diagnosis=None) as tracker:
        train(tracker, weight, 4)
        tracker.log(val_loss=0.5)
        train(tracker, weight, 3)
        means = tracker.epoch(val_loss=0.25)
        assert not tracker.closed
    assert tracker.closed
    assert tracker.history["val_loss"].steps.tolist() == [3, 6]
    assert tracker.history["val_loss"][:] == [0.5, 0.25]
    assert means == {"loss": 3.0, "val_loss": 0.25}
    assert tracker.history["epoch"][:] == [1.0]


def test_a_name_of_each_step_is_refused_by_log(weight) -> None:
    with Tracker([("w", weight)], diagnosis=None) as tracker:
        train(tracker, weight, 1)
        with pytest.raises(ValueError, match="'loss' is recorded on each step already"):
            tracker.log(loss=1.0)


def test_a_parameter_that_the_optimizer_has_exchanged_is_noticed_and_not_read_for_ever() -> None:
    old = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([old], lr=0.1)
    tracker = Tracker([("points", old)], optimizer, every=2, diagnosis=None)
    train(tracker, old, 2)
    optimizer.param_groups[0]["params"][0] = nn.Parameter(torch.zeros(3))  # densification
    train(tracker, old, 1)
    with pytest.raises(ParameterError, match="1 in the place of 'points'"):
        train(tracker, old, 1)
    tracker.close()
    assert len(tracker.history["grad_norm"]) == 4


def test_a_parameter_that_joins_a_group_later_is_noted_there(tmp_path) -> None:
    body, head = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([body], lr=0.1)
    with pytest.warns(RuntimeWarning, match="in no group"):
        tracker = Tracker(
            [("body", body), ("head", head)], optimizer, run=Run(tmp_path, name="r"), every=2, seconds=1e6
        )
    with tracker:
        assert [info.group for info in tracker.history.parameters.infos] == ["0", ""]
        train(tracker, body, 2)
        optimizer.add_param_group({"params": [head], "lr": 0.01})
        train(tracker, body, 2)
        assert [info.group for info in tracker.history.parameters.infos] == ["0", "1"]
    assert [info.group for info in load_run(tmp_path / "r").history.parameters.infos] == ["0", "1"]
    assert len(tracker.history.parameters) == 2


def test_parameters_that_join_the_optimizer_untracked_are_told() -> None:
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    with Tracker([("w", weight)], optimizer, every=1, diagnosis=None) as tracker:
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
        with pytest.warns(RuntimeWarning, match="1 parameters more than before, and they are not tracked"):
            train(tracker, weight, 1)


@pytest.mark.parametrize(
    ("attribute", "value", "said"),
    [
        ("main_grad", torch.ones(1), "Megatron.*give gradient=lambda p: p.main_grad"),
        ("ds_tensor", torch.ones(1), "ZeRO-3"),
    ],
)
def test_the_total_of_no_gradient_is_nan_and_the_warning_says_where_gradients_are(
    attribute, value, said, weight
) -> None:
    setattr(weight, attribute, value)
    with Tracker([("w", weight)], every=2, diagnosis=None) as tracker:
        tracker.step(loss=1.0)
        with pytest.warns(RuntimeWarning, match=f"no parameter had a gradient in steps 0 to 1; .*{said}") as caught:
            tracker.step(loss=1.0)
    assert caught[0].filename == __file__
    for name in ("grad_norm", "grad_max", "grad_abs_max", "grad_nonfinite", "grad_zero_fraction"):
        assert tracker.history[name].values == pytest.approx([float("nan")] * 2, nan_ok=True)
    assert tracker.history["loss"][:] == [1.0, 1.0]


def test_an_optimizer_in_the_backward_is_recognised(weight) -> None:
    weight.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    with Tracker([("w", weight)], every=1, diagnosis=None) as tracker:
        weight.sum().backward()
        with pytest.warns(RuntimeWarning, match="register_post_accumulate_grad_hook"):
            tracker.step()


def test_a_step_that_repeats_the_one_before_is_told_once(weight) -> None:
    with Tracker([("w", weight)], every=4, diagnosis=None) as tracker:
        weight.grad = torch.ones(1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(8):
                tracker.step(loss=0.5)
    (warning,) = caught
    assert "steps 0 and 1 have the same gradients and values" in str(warning.message)


def test_a_run_that_refuses_rows_is_told_once_and_the_training_goes_on(weight, tmp_path, monkeypatch) -> None:
    run = Run(tmp_path, name="r")

    def refuse(steps, metrics):
        raise OSError("the disk is gone")

    with Tracker([("w", weight)], run=run, every=1, diagnosis=None) as tracker:
        monkeypatch.setattr(run, "log_many", refuse)
        with pytest.warns(RuntimeWarning, match="the run could not take what was recorded.*the disk is gone") as caught:
            train(tracker, weight, 3)
        monkeypatch.undo()
        train(tracker, weight, 2)
    assert len(caught) == 1
    assert tracker.history["loss"].steps.tolist() == [3, 4]


def test_a_cell_that_makes_its_tracker_again_closes_the_earlier_one_and_says_so(weight, tmp_path) -> None:
    run = Run(tmp_path, name="cell")
    earlier = Tracker([("w", weight)], run=run, every=10, diagnosis=None)
    train(earlier, weight, 4)
    with pytest.warns(RuntimeWarning, match="run 'cell' had a tracker") as caught:
        tracker = Tracker([("w", weight)], run=run, every=10, diagnosis=None)
    assert caught[0].filename == __file__
    assert earlier.closed
    assert run.state == "running"
    with tracker:
        train(tracker, weight, 2)
    stored = load_run(run.path)
    assert (stored.state, stored.history["loss"][:]) == ("finished", [0.0, 1.0])


def test_a_cell_that_opens_its_run_again_finishes_the_earlier_one_and_says_so(weight, tmp_path) -> None:
    Run(tmp_path, name="cell").finish()
    earlier = Tracker([("w", weight)], run=Run(tmp_path, name="cell", resume=True), every=10, diagnosis=None)
    train(earlier, weight, 4)
    with pytest.warns(RuntimeWarning, match="run 'cell' was still open in this process"):
        run = Run(tmp_path, name="cell", resume=True)
    assert earlier.closed
    assert run.history["loss"][:] == [0.0, 1.0, 2.0, 3.0]
    with Tracker([("w", weight)], run=run, diagnosis=None) as tracker:
        tracker.load_state_dict(earlier.state_dict())
        train(tracker, weight, 1)
    assert load_run(run.path).history["loss"].steps.tolist() == [0, 1, 2, 3, 4]


def test_a_warning_of_a_drain_within_step_points_at_the_users_line(weight) -> None:
    with (
        Tracker([("w", weight)], every=1, diagnosis=None) as tracker,
        pytest.warns(RuntimeWarning, match="no parameter had a gradient in step 0") as caught,
    ):
        tracker.step(loss=1.0)
    assert caught[0].filename == __file__


def test_steps_without_a_gradient_are_no_finding_of_nonfinite_gradients(weight) -> None:
    tracker = Tracker([("w", weight)], every=2)
    tracker.step(loss=1.0)
    with pytest.warns(RuntimeWarning, match="no parameter had a gradient"):
        tracker.step(loss=1.0)
    train(tracker, weight, 4)
    tracker.close()
    assert not [finding for finding in tracker.findings if finding.rule == "gradient_nonfinite"]


def test_drains_that_are_interrupted_again_and_again_let_no_row_be_written_over(weight, monkeypatch) -> None:
    tracker = Tracker([("w", weight)], every=3, diagnosis=None)

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pytracker.core.device_log.unpack", interrupted)
        for _ in range(9):
            with contextlib.suppress(KeyboardInterrupt):
                train(tracker, weight, 1)
    train(tracker, weight, 2)
    tracker.close()
    arrived = tracker.history["loss"].steps.tolist()
    assert tracker.history["loss"][:] == [float(step) for step in arrived]
    assert arrived[:3] == [0, 1, 2]
    assert arrived[-2:] == [9, 10]


def test_a_parameter_whose_name_is_no_utf8_is_tracked() -> None:
    model = nn.Module()
    model.register_parameter("bias\udce9", nn.Parameter(torch.zeros(3)))
    with Tracker(model, every=1, diagnosis=None) as tracker:
        train(tracker, model._parameters["bias\udce9"], 2)
    assert len(tracker.history["grad_norm"]) == 2

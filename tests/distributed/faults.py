"""Cases of test_faults.py: what is wrong on one rank is told on the others, and what was recorded is kept."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
import time
import warnings
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from disagreeing import fill_gradients
from hooks import until_merged, waits_forbidden
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from waiting import train_two_more_steps

import pytracker
from pytracker.collectives.testing import collectives as counted_collectives
from pytracker.columns import COLUMNS
from pytracker.errors import InvalidTypeError, LayoutError, ParameterError, RankMismatchError


def nonfinite(rank: int, world: int) -> None:
    model = fully_shard(nn.Linear(5, 7).double())
    with pytest.raises(LayoutError, match="use a Tracker instead"):
        pytracker.GradientMeter(model)
    with pytracker.Tracker(model, every=2, diagnosis=None) as tracker:
        for step in range(4):
            model(torch.ones(2, 5, dtype=torch.float64)).sum().backward()
            if rank == world - 1 and step == 2:
                model.weight.grad._local_tensor.view(-1)[0] = float("nan")
                model.weight.grad._local_tensor.view(-1)[1] = float("inf")
            tracker.step()
            model.zero_grad()
    if rank:
        assert not len(tracker.history.parameters.names)  # what is merged is on the first rank
        return
    _, rows = tracker.history.parameters.rows()
    assert rows.shape == (4, 2, len(COLUMNS))
    assert rows[:, 0, 4:].tolist() == [[0, 0], [0, 0], [1, 1], [0, 0]]
    assert np.isnan(rows[2, 0, 1:3]).all()
    assert tracker.history["grad_nonfinite"][:] == [0, 0, 2, 0]


def mismatch(rank: int, world: int) -> None:
    model = fully_shard(nn.Linear(4, 4))
    with pytest.raises(RankMismatchError, match=r"different `every`: 3 on ranks \[0\], 4 on ranks \[1"):
        pytracker.Tracker(model, every=3 + rank, diagnosis=None)
    plain = nn.Linear(4, 4 + rank)
    with pytest.raises(RankMismatchError, match=r"'weight' is float32 \[4, 4\] on ranks \[0\], float32 \[5, 4\]"):
        pytracker.Tracker(plain, diagnosis=None, process_group=dist.group.WORLD)
    tracker = pytracker.Tracker(model, every=5, diagnosis=None, on_rank_fault="raise")
    model(torch.ones(1, 4)).sum().backward()
    for _ in range(3 + rank):
        tracker.step()
    with pytest.raises(RankMismatchError, match=r"different numbers of steps: 3 on ranks \[0\], 4 on ranks \[1"):
        tracker.close()
    assert "grad_norm" not in tracker.history


def step_and_close(tracker: pytracker.Tracker) -> None:
    tracker.step(loss=3)
    tracker.close()


def step_twice_and_flush(tracker: pytracker.Tracker) -> None:
    train_two_more_steps(tracker)
    tracker.flush()


def train_until(rank: int, leave: int, folder: str, end_of_leaver) -> None:
    """Train on all ranks; rank ``leave`` goes away at step 3. The others are told at the next drain or at close."""
    model = fully_shard(nn.Linear(4, 4))
    model(torch.ones(1, 4)).sum().backward()
    tracker = pytracker.Tracker(model, every=2, run=folder, diagnosis=None, on_rank_fault="raise", rank_timeout=10.0)
    for step in range(3):
        tracker.step(loss=step)
    until_merged(tracker)
    dist.barrier()
    if rank == leave:
        return end_of_leaver(tracker)
    what = "drain 2, steps 2 to 3" if rank == 0 else ""  # another has handed its rows over, and waits for no one's
    with pytest.raises(RankMismatchError, match=rf"{what}.*of 3 ranks: no answer from ranks \[{leave}\]"):
        step_and_close(tracker)
    with waits_forbidden():  # nobody again
        tracker.close()
    if rank == 0:
        (path,) = Path(folder).iterdir()
        history = pytracker.load_run(path).history
        assert history["grad_norm"].steps.tolist() == [0, 1]
        assert history["loss"][:] == [0, 1, 2, 3]  # the scalars need no other rank


def refused_after(rank: int, world: int, folder: str) -> None:
    """After a fault in a step every further call says so at once, and close ends the run without another word."""
    model = fully_shard(nn.Linear(4, 4))
    model(torch.ones(1, 4)).sum().backward()
    tracker = pytracker.Tracker(model, every=2, run=folder, diagnosis=None, on_rank_fault="raise", rank_timeout=60.0)
    if rank:
        tracker._steps = 7
    tracker.step()
    with pytest.raises(RankMismatchError, match="at drain 1 the ranks have recorded different steps"):
        step_twice_and_flush(tracker)  # the first rank finds it, and says so to those that wait
    with waits_forbidden():
        for again in (tracker.step, tracker.step, tracker.flush, tracker.epoch):
            with pytest.raises(
                RankMismatchError, match=r"no longer work together; close it.*First fault: .*at drain 1"
            ):
                again()
        tracker.close()
    if rank == 0:
        (path,) = Path(folder).iterdir()
        run = pytracker.load_run(path)
        assert (run.state, run.error[:41]) == ("failed", "RankMismatchError: at drain 1 the ranks h")
    dist.barrier()


def whole_rows_survive(rank: int, world: int, asked: str, fault: str) -> None:
    """Under DDP every rank has whole rows: all are kept, whatever becomes of the others and what was asked of them."""
    model = nn.parallel.DistributedDataParallel(nn.Linear(4, 4))
    asked_for = {asked: pytracker.GradientNoiseScale(model, 4) if asked == "noise_scale" else True}
    tracker = pytracker.Tracker(model, every=4, diagnosis=None, on_rank_fault="raise", rank_timeout=60.0, **asked_for)
    first = tracker._steps = 10 if rank and fault == "other_steps" else 0
    told = []
    for _ in range(15):
        model(torch.ones(1, 4)).sum().backward()
        told += told_by(lambda: tracker.step(loss=1.0))
        model.zero_grad()
    if fault == "other_steps":
        told += told_by(tracker.close)
        assert told, "nobody was told"
    else:
        with waits_forbidden():
            tracker.close(error="a fault elsewhere in the training")
        assert not told
    for name in ("grad_norm", "loss"):
        assert tracker.history[name].steps.tolist() == list(range(first, tracker.steps)), (name, tracker.history[name])
    dist.barrier()


def told_by(call: Callable[[], None]) -> list[RankMismatchError]:
    try:
        call()
    except RankMismatchError as error:
        return [error]
    return []


def raises(rank: int, world: int, folder: str) -> None:
    """A rank that leaves the block with an exception waits for nobody."""

    def end(tracker: pytracker.Tracker) -> None:
        with waits_forbidden(), pytest.raises(ZeroDivisionError), tracker:
            raise ZeroDivisionError

    train_until(rank, 1, folder, end)


def two_trackers(rank: int, world: int, inner_size: str) -> None:
    """One rank leaves the inner of two trackers by an exception: the other is told, and the outer one is right."""
    outer, inner = fully_shard(nn.Linear(4, 4)), fully_shard(nn.Linear(int(inner_size), 4))
    with pytracker.Tracker(outer, every=4, diagnosis=None, on_rank_fault="raise", rank_timeout=60.0) as tracker:
        with (
            pytest.raises(RankMismatchError if rank else ZeroDivisionError, match=None if rank == 0 else "has left"),
            pytracker.Tracker(inner, every=4, diagnosis=None, on_rank_fault="raise", rank_timeout=60.0) as other,
        ):
            train_both(rank, other, inner)
        for _ in range(10):
            fill_gradients(outer, 1.0)
            tracker.step()
    if rank == 0:
        assert tracker.history["grad_norm"][:] == [pytest.approx(20**0.5)] * 10


def train_both(rank: int, tracker: pytracker.Tracker, model: nn.Module) -> None:
    for step in range(4):
        fill_gradients(model, 100.0)
        if rank == 0 and step == 2:
            raise ZeroDivisionError
        tracker.step()
    tracker.close()


def retried(rank: int, world: int, wrapper: str) -> None:
    """A rank that raises and makes a new tracker at once meets those that come from the old one later."""
    model = fully_shard(nn.Linear(4, 4)) if wrapper == "fsdp2" else nn.parallel.DistributedDataParallel(nn.Linear(4, 4))
    for attempt in range(2):
        tracker = pytracker.Tracker(
            model,
            every=4,
            diagnosis=None,
            on_rank_fault="raise",
            rank_timeout=60.0,
            check_replicas=wrapper == "check_replicas",
        )
        for step in range(10):
            fill_gradients(model, 1.0)
            tracker.step()
            if attempt == 0 and rank == 0 and step == 5:
                break
        if attempt == 0 and rank == 0:
            tracker.close(error="a bad batch on this rank")
        elif attempt == 0:
            with pytest.raises(RankMismatchError, match=r"no answer from ranks \[0\].*rank 0 has left the tracker"):
                tracker.close()
        else:
            tracker.close()
    assert len(tracker.history.get("grad_norm", ())) == (10 if wrapper == "check_replicas" or rank == 0 else 0)
    dist.barrier()


def changed(rank: int, world: int) -> None:
    """A model that changes on all ranks alike is noticed at the same step on all, however late they come."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    arguments = {
        "every": 2,
        "diagnosis": None,
        "rank_timeout": 60.0,
        "on_rank_fault": "raise",
        "process_group": dist.group.WORLD,
    }
    tracker = pytracker.Tracker(model, **arguments)
    for step in range(12):
        if step == 5:
            model[1] = nn.Linear(4, 3)
            with torch.no_grad():
                model[1].weight.fill_(1.0)
                model[1].bias.fill_(1.0)
        fill_gradients(model, 1.0)
        if step == 5:
            with pytest.raises(ParameterError, match="the model's parameters have changed"):
                tracker.step()
            time.sleep(0.2 * rank)
            tracker.close()
            assert len(tracker.history.get("grad_norm", ())) == (0 if rank else 6)
            tracker = pytracker.Tracker(model, **arguments)
        else:
            tracker.step()
    tracker.close()
    assert len(tracker.history.get("grad_norm", ())) == (0 if rank else 6)


def scalars_of_one(rank: int, world: int) -> None:
    """A rank may give more scalars than a log has room for at first: that is no drain of its own."""
    model = fully_shard(nn.Linear(4, 4))
    with pytracker.Tracker(model, every=8, diagnosis=None) as tracker:
        for step in range(10):
            fill_gradients(model, 1.0)
            tracker.step(**{f"metric{index}": step for index in range(1 if rank else 40)})
    if rank == 0:
        assert tracker.history["grad_norm"][:] == [pytest.approx(20**0.5)] * 10
    assert len([name for name in tracker.history if name.startswith("metric")]) == (1 if rank else 40)


def interrupted(rank: int, world: int, folder: str) -> None:
    """^C while close waits for a rank: whole rows are kept, and the run is marked as failed."""
    model = nn.parallel.DistributedDataParallel(nn.Linear(4, 4))
    tracker = pytracker.Tracker(
        model, run=folder, every=50, diagnosis=None, on_rank_fault="raise", rank_timeout=60.0, check_replicas=True
    )
    for _ in range(10):
        fill_gradients(model, 1.0)
        tracker.step()
    if rank == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it from its start
        pid = os.getpid()
        threading.Timer(0.5, lambda: os.kill(pid, signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            tracker.close()
        assert len(tracker.history["grad_norm"]) == 10
        (path,) = Path(folder).iterdir()
        run = pytracker.load_run(path)
        assert (run.state, run.error, len(run.history["grad_norm"])) == ("failed", "KeyboardInterrupt", 10)
        dist.barrier()
    else:
        dist.barrier()
        with pytest.raises(RankMismatchError, match="rank 0 has left the tracker"):
            tracker.close()
        assert len(tracker.history["grad_norm"]) == 10


def whole_root(rank: int, world: int) -> None:
    """After a forward FSDP2's root holds whole parameters: neither a change of the model, nor what is tracked."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    fully_shard(model[0])
    model = fully_shard(model)
    x = torch.ones(2, 4)
    with torch.no_grad():
        model(x)
    with pytracker.Tracker(model, every=2, diagnosis=None) as tracker:
        for _ in range(2):
            for _ in range(3):
                model(x).sum().backward()
                tracker.step()
                model.zero_grad()
            with torch.no_grad():
                loss = model(x).sum().item()
            tracker.epoch(val_loss=loss)
    if rank == 0:
        assert len(tracker.history["grad_norm"]) == 6
        assert min(tracker.history["grad_norm"]) > 0


def killed(rank: int, world: int, folder: str) -> None:
    train_until(rank, 2, folder, lambda tracker: os.kill(os.getpid(), signal.SIGKILL))


def stalled(rank: int, world: int, folder: str) -> None:
    """A rank that is alive but does not come until the others have given it up."""
    train_until(rank, 2, folder, lambda tracker: None)
    dist.barrier()


def partly_present(rank: int, world: int) -> None:
    """A shard without a gradient where others have one makes the whole missing, and is named: not a smaller norm."""
    model = fully_shard(nn.Linear(4, 4))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytracker.Tracker(model, every=2, diagnosis=None) as tracker:
            for step in range(6):
                model(torch.ones(1, 4)).sum().backward()
                if rank == 1 and step == 3:
                    model.weight.grad = None
                tracker.step()
                model.zero_grad()
    if rank == 0:
        _, rows = tracker.history.parameters.rows()
        assert np.isnan(rows[:, 0]).all(axis=1).tolist() == [False, False, False, True, False, False]
        assert not np.isnan(rows[:, 1]).any()
        (told,) = [str(each.message) for each in caught if "on others" in str(each.message)]
        assert "at step 3 the gradient of 'weight' is there on some of the ranks" in told


def unreduced(rank: int, world: int) -> None:
    """FSDP1 leaves whole local gradients in no_sync: they are refused, and what comes after is right."""
    for original in (True, False):
        model = FullyShardedDataParallel(nn.Linear(4, 3), use_orig_params=original, device_id=torch.device("cpu"))
        with pytracker.Tracker(model, every=1, diagnosis=None) as tracker:
            with model.no_sync():
                model(torch.ones(1, 4)).sum().backward()
                with pytest.raises(ParameterError, match=r"it is not reduced yet.*outside of no_sync"):
                    tracker.step()
            model(torch.ones(1, 4)).sum().backward()
            tracker.step()
        if rank == 0:
            np.testing.assert_allclose(tracker.history["grad_norm"][:], [np.sqrt(4 * 3 + 3) * 2])


def unreduced_by_ddp(rank: int, world: int) -> None:
    """DDP leaves a rank's own gradients in no_sync: they are recorded, and a warning says once whose they are."""
    model = nn.parallel.DistributedDataParallel(nn.Linear(4, 3))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytracker.Tracker(model, every=2, diagnosis=None) as tracker:
            for step in range(6):
                with model.no_sync() if step in (2, 3) else contextlib.nullcontext():
                    model(torch.ones(1, 4)).sum().backward()
                    tracker.step(loss=step)
    told = [str(each.message) for each in caught if "no_sync" in str(each.message)]
    assert len(told) == 1, told
    assert told[0].startswith("step 2 is made within no_sync()"), told
    if rank == 0:
        assert len(tracker.history["grad_norm"]) == 6


def unreduced_by_fsdp2(rank: int, world: int) -> None:
    """FSDP2 without gradient sync keeps the gradients apart: a warning says once that .grad is of an earlier step."""
    model = fully_shard(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytracker.Tracker(model, every=2, diagnosis=None) as tracker:
            for step in range(6):
                model.set_requires_gradient_sync(step not in (2, 3))
                model(torch.ones(1, 4)).sum().backward()
                tracker.step(loss=step, when=step not in (4,))
    told = [str(each.message) for each in caught if "gradient sync" in str(each.message)]
    assert len(told) == 1, told
    assert told[0].startswith("step 2 is made without gradient sync"), told


def refused(rank: int, world: int) -> None:
    """Parameters that do not tell their layout are refused, and the message says what to give."""
    for original in (True, False):
        model = FullyShardedDataParallel(nn.Linear(4, 4), use_orig_params=original, device_id=torch.device("cpu"))
        with pytest.raises(LayoutError, match="give the model instead of its parameters"):
            pytracker.Tracker(model.parameters())
        with pytest.raises(LayoutError, match=re.escape("model.clip_grad_norm_(max_norm, norm_type)")):
            pytracker.clip_grad_norm_(model, 1.0)


def cannot_open(rank: int, world: int) -> None:
    """What fails on the first rank after all have come is said there, and the others are told that it left."""
    model = fully_shard(nn.Linear(4, 4))
    expected, message = (RankMismatchError, "rank 0 has left the tracker") if rank else (InvalidTypeError, "run is 3")
    with pytest.raises(expected, match=message):
        pytracker.Tracker(model, run=3, diagnosis=None, on_rank_fault="raise", rank_timeout=60.0)
    dist.barrier()


def first_writes(rank: int, world: int, folder: str) -> None:
    """One run on disk, one rank that judges and feeds the sinks, whatever is given on the others."""

    class Counting:
        written = 0

        def write(self, rows):
            self.written += len(rows)

        def close(self, error):
            self.written += 1000

    def of_a_folder(folder: str) -> str:
        return folder

    def made_alike(folder: str) -> pytracker.Run:
        return pytracker.Run(folder, name="one", config={"lr": 0.1})

    wraps = (nn.parallel.DistributedDataParallel, fully_shard)
    for number, (wrap, given) in enumerate(product(wraps, (of_a_folder, made_alike))):
        sink, told = Counting(), []
        model = wrap(nn.Linear(4, 4))
        run = given(f"{folder}/{number}")
        with pytracker.Tracker(model, every=5, run=run, sinks=[sink], on_finding=told.append) as tracker:
            for _ in range(60):
                model(torch.full((1, 4), float("nan"))).sum().backward()
                tracker.step(loss=float("nan"))
        dist.barrier()
        (stored,) = pytracker.list_runs(f"{folder}/{number}")
        assert (stored.state, stored.load_history(parameters=False).last_step) == ("finished", 59)
        assert (sink.written > 1000) == (rank == 0)
        assert bool(told) == bool(tracker.findings) == (rank == 0)


def collectives(rank: int, world: int) -> None:
    """No collective on a step, two at each drain of few bytes; none at all under DDP."""
    for wrap, a_drain in ((fully_shard, 2), (nn.parallel.DistributedDataParallel, 0)):
        model = wrap(nn.Linear(8, 8))
        tracker = pytracker.Tracker(model, every=4, diagnosis=None)
        model(torch.ones(1, 8)).sum().backward()
        per_step = []
        for _ in range(12):
            until_merged(tracker)
            with counted_collectives() as counted:
                tracker.step()
            per_step.append(len(counted))
        tracker.close()
        assert per_step == [0, 0, 0, a_drain] * 3, per_step

"""Attacks on runs while they are recorded, and on their files: how many of each, and what was lost.

    python -m benchmarks.robustness [--scale 1.0] [--seed 0] [NAME ...]

Trainings are processes of their own (forked), real but for their gradients: at step s every element of the gradient is
s + 1, so that each recorded value is known. What is lost that should not be, or is misstated, ends it with status 1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

import pytracker
from pytracker.errors import PytrackerError
from pytracker.store import check_run

ELEMENTS = 12
COST = 4.0  # seconds that a kill may cost: two until a drain, and two until that is on disk
SLACK = 2.0  # seconds more, on a machine that others use too


def train(
    folder: Path,
    steps: int,
    *,
    pause: float = 0.0,
    checkpoint: Path | None = None,
    during: Callable[[int, pytracker.Run], None] = lambda step, run: None,
    **options: Any,
) -> None:
    """Train to ``steps``, going on from a checkpoint where there is one, and note in a file when each was taken."""
    torch.set_num_threads(1)
    model = torch.nn.Linear(ELEMENTS, 1, bias=False)
    model.weight.grad = torch.ones_like(model.weight)
    run = pytracker.Run(folder, name="run", resume=True, **options)
    with pytracker.Tracker(model, run=run, diagnosis=None) as tracker, open(folder / "taken", "a") as taken:
        if checkpoint is not None and checkpoint.exists():
            tracker.load_state_dict(json.loads(checkpoint.read_text()))
        for step in range(tracker.steps, steps):
            model.weight.grad.fill_(step + 1)
            tracker.step(loss=1 / (step + 1))
            taken.write(f"{step} {time.time()}\n")
            taken.flush()
            during(step, run)
            if checkpoint is not None and step % 40 == 39:
                part = checkpoint.with_suffix(".part")
                part.write_text(json.dumps(tracker.state_dict()))
                part.replace(checkpoint)
            time.sleep(pause)


def forked(work: Callable[[], None], quiet: bool = True) -> int:
    """Begin ``work`` in a process of its own and return its number; it ends with status 0 where that ends well."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if quiet:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        warnings.simplefilter("ignore")
        work()
        status = 0
    except BaseException as error:
        if not quiet:
            print(f"  {type(error).__name__}: {error}", file=sys.stderr)
    finally:
        os._exit(status)


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def rows_of(folder: Path) -> tuple[list[int], str]:
    """Return the steps of a run whose every value is right, and its state; complain where one is not."""
    path = folder / "run"
    damage = check_run(path)
    assert not damage, damage
    run = pytracker.load_run(path)
    history = run.history
    steps = history["loss"].steps.tolist() if "loss" in history else []
    norms = history.get("grad_norm")
    assert (norms.steps.tolist() if norms is not None else []) == steps, "series of different lengths"
    assert all(value == 1 / (step + 1) for step, value in zip(steps, history["loss"][:] if steps else [], strict=True))
    for step, value in zip(steps, norms[:] if norms is not None else [], strict=True):
        assert abs(value / ((step + 1) * ELEMENTS**0.5) - 1) < 1e-12, (step, value)
    assert steps == list(range(len(steps))), "a step is missing, or there twice"
    return steps, run.state


def taken_before(folder: Path, moment: float) -> int:
    """Return how many steps had been taken at a moment."""
    lines = (folder / "taken").read_text().splitlines() if (folder / "taken").exists() else []
    whole = [line.split() for line in lines if line.count(".") == 1 and line.endswith(line.strip())]
    return max((int(step) + 1 for step, at in whole if float(at) <= moment), default=0)


def kills(folder: Path, number: int, chance: random.Random) -> str:
    """Kill -9 at a random moment of a training."""
    for index in range(number):
        place = folder / str(index)
        place.mkdir()
        child = forked(lambda place=place: train(place, 100_000, pause=0.002))
        time.sleep(chance.uniform(0.02, 5.0))
        killed = time.time()
        os.kill(child, signal.SIGKILL)
        ended(child)
        if not (place / "run" / "run.sqlite").exists():
            continue  # before there was a file
        steps, state = rows_of(place) if holds_a_run(place) else ([], "interrupted")
        assert state == "interrupted", state
        missing = taken_before(place, killed - COST - SLACK) - len(steps)
        assert missing <= 0, f"{missing} steps that were older than {COST + SLACK} s"
    return f"each file whole; what was recorded more than {COST:g} s before (and {SLACK:g} s of slack) is there"


def slow_steps(folder: Path, number: int, chance: random.Random) -> str:
    """Steps of a quarter of a second, killed after eleven seconds: one process, and two ranks that merge."""
    told = []
    for ranks in (1, 2):
        place = folder / str(ranks)
        place.mkdir()
        works = [lambda rank=rank, ranks=ranks, place=place: train_rank(rank, ranks, place) for rank in range(ranks)]
        children = [forked(work) for work in works]
        while not (place / "taken").exists():
            time.sleep(0.01)
        time.sleep(11)
        for child in children:
            os.kill(child, signal.SIGKILL)
        for child in children:
            ended(child)
        taken = taken_before(place, time.time())
        history = pytracker.load_run(place / "run").history
        steps = history["grad_norm"].steps.tolist() if "grad_norm" in history else []
        assert steps == history["loss"].steps.tolist() == list(range(len(steps)))
        assert (taken - len(steps)) * 0.25 <= COST + SLACK, (taken, len(steps))
        told.append(f"{len(steps)} of {taken} steps on {ranks} rank{'s' if ranks > 1 else ''}")
    return " and ".join(told)


def train_rank(rank: int, ranks: int, place: Path) -> None:
    """Train as one of some ranks under FSDP2."""
    from torch import distributed as dist
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    model: Any = torch.nn.Linear(ELEMENTS, 2, bias=False)
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{place}/store", rank=rank, world_size=ranks)
        model = fully_shard(model)
    run = pytracker.Run(place, name="run") if rank == 0 else None
    tracker = pytracker.Tracker(model, run=run, diagnosis=None)
    with open(place / "taken", "a") as taken:
        for step in range(10_000):
            model(torch.full((1, ELEMENTS), 1.0 + step)).sum().backward()
            tracker.step(loss=1.0)
            if rank == 0:
                taken.write(f"{step} {time.time()}\n")
                taken.flush()
            model.zero_grad()
            time.sleep(0.25)


def holds_a_run(place: Path) -> bool:
    """Tell whether a training came as far as making its file."""
    try:
        pytracker.load_run(place / "run")
    except PytrackerError as error:
        if "killed as it began" not in str(error):
            raise
        return False
    return True


def resumes(folder: Path, number: int, chance: random.Random) -> str:
    """A training that is killed again and again, and goes on from its last checkpoint."""
    killed = 0
    for index in range(number):
        place = folder / str(index)
        place.mkdir()
        work = lambda place=place: train(place, 600, pause=0.001, checkpoint=place / "checkpoint")  # noqa: E731
        for _ in range(chance.randrange(1, 5)):
            child = forked(work)
            time.sleep(chance.uniform(0.05, 0.8))
            os.kill(child, signal.SIGKILL)
            killed += ended(child) != 0
        assert ended(forked(work, quiet=False)) == 0
        steps, state = rows_of(place)
        assert (len(steps), state) == (600, "finished"), (len(steps), state)
    return f"{killed} kills; every step of every training there, once, exact"


def interrupts(folder: Path, number: int, chance: random.Random) -> str:
    """Storms of SIGINT, as of somebody who leans on Ctrl-C, and SIGTERM."""
    for index in range(number):
        place = folder / str(index)
        place.mkdir()
        child = forked(lambda place=place: train(place, 100_000, pause=0.001))
        time.sleep(chance.uniform(0.3, 1.0))
        for _ in range(chance.randrange(1, 6)):
            os.kill(child, chance.choice([signal.SIGINT, signal.SIGINT, signal.SIGTERM]))
            time.sleep(chance.choice([0.0, 0.001, 0.01, 0.1]))
        hanging = threading.Timer(60, os.kill, (child, signal.SIGKILL))
        hanging.start()
        code = ended(child)
        hanging.cancel()
        assert code != -signal.SIGKILL, "it hung"
        if not (place / "run" / "run.sqlite").exists() or not holds_a_run(place):
            continue  # before there was anything
        steps, state = rows_of(place)
        lost = taken_before(place, time.time()) - len(steps)
        assert state in ("failed", "interrupted"), state
        if state == "failed":
            assert lost <= 1, f"{lost} steps lost by a training that closed"
    return "no hang; a run that closed lost no row but that of the step that was struck"


def removals(folder: Path, number: int, chance: random.Random) -> str:
    """The run's folder, or the one around it, removed, the file unlinked, or a directory put in its place."""
    for index in range(number):
        place = folder / str(index) / "runs"
        place.mkdir(parents=True)
        at, kind = chance.randrange(1, 250), index % 4

        def during(step: int, run: pytracker.Run, at: int = at, kind: int = kind) -> None:
            file = run.path / "run.sqlite"
            if step != at:
                return
            if kind == 0:
                shutil.rmtree(run.path, ignore_errors=True)
            elif kind == 1:
                file.unlink(missing_ok=True)
            elif kind == 2:
                shutil.rmtree(run.path.parent, ignore_errors=True)
            else:
                file.unlink(missing_ok=True)
                file.mkdir()
                threading.Timer(0.3, file.rmdir).start()  # its owner notices

        work = lambda place=place, during=during: train(  # noqa: E731
            place, 300, pause=0.002, during=during, flush_seconds=0.2
        )
        assert ended(forked(work, quiet=False)) == 0
        steps, state = rows_of(place)
        assert (len(steps), state) == (300, "finished"), (kind, len(steps), state)
    return "every value of every run there"


def full_disks(folder: Path, number: int, chance: random.Random) -> str:
    """A disk that is full for some of the time (a tmpfs of 1 MiB)."""
    for index in range(number):
        place = folder / str(index)
        place.mkdir()
        mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", place], check=False)
        if mount.returncode:
            return "left out: a tmpfs can't be mounted here"
        try:
            begin, end = sorted(chance.sample(range(10, 390), 2))

            def during(step: int, run: pytracker.Run, begin: int = begin, end: int = end, place: Path = place) -> None:
                filler = place / "filler"
                if step == begin:
                    with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
                        while True:
                            file.write(bytes(4096))
                if step == end:
                    filler.unlink()

            log = folder / f"log{index}"
            log.mkdir()
            work = lambda place=place, during=during: train(  # noqa: E731
                place, 400, pause=0.002, during=during, flush_seconds=0.1
            )
            (place / "taken").symlink_to(log / "taken")
            assert ended(forked(work, quiet=False)) == 0
            steps, state = rows_of(place)
            assert (len(steps), state) == (400, "finished"), (len(steps), state)
        finally:
            subprocess.run(["umount", "-l", place], check=True)
    return "every value of every run there"


def second_writers(folder: Path, number: int, chance: random.Random) -> str:
    """A second process that wants to write the run, and one that changes its directory."""
    for index in range(number):
        place = folder / str(index)
        place.mkdir()

        def during(step: int, run: pytracker.Run) -> None:
            os.chdir(chance.choice(["/", str(folder), tempfile.gettempdir()]))

        def relative(place: Path = place, during: Any = during) -> None:
            os.chdir(place)
            train(Path("."), 200, pause=0.003, during=during, flush_seconds=0.1)

        def second(place: Path = place) -> None:
            try:
                pytracker.Run(place, name="run", resume=True)
            except pytracker.RunLockedError:
                return
            raise AssertionError("two writers")

        first = forked(relative, quiet=False)
        while not (place / "run" / "run.sqlite").exists():
            time.sleep(0.01)
        time.sleep(0.1)
        assert ended(forked(second, quiet=False)) == 0
        assert ended(first) == 0
        steps, state = rows_of(place)
        assert (len(steps), state) == (200, "finished"), (len(steps), state)
    return "the second refused, every value of the first there"


def threads(folder: Path, number: int, chance: random.Random) -> str:
    """Threads that step one tracker, and log into one run."""
    for index in range(number):
        model = torch.nn.Linear(ELEMENTS, 1, bias=False)
        model.weight.grad = torch.ones_like(model.weight)
        run = pytracker.Run(folder, name=str(index))

        def work(tracker: pytracker.Tracker, run: pytracker.Run = run) -> None:
            for step in range(100):
                tracker.step(loss=1 / (step + 1))
                run.log(10**9, extra=1.0)

        with pytracker.Tracker(model, run=run, diagnosis=None) as tracker:
            workers = [threading.Thread(target=work, args=(tracker,)) for _ in range(8)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
        history = pytracker.load_run(run.path).history
        assert history["loss"].steps.tolist() == history["grad_norm"].steps.tolist() == list(range(800))
        assert len(history["extra"]) == 800
        assert check_run(run.path) == []
    return "8 threads each, 800 of 800 steps and values"


def flips(folder: Path, number: int, chance: random.Random) -> str:
    """One bit flipped anywhere in a run's file: found by a check, or it changes nothing that the file says."""
    train(folder, 300)
    file = folder / "run" / "run.sqlite"
    whole = file.read_bytes()

    def contents() -> list[Any]:
        with closing(sqlite3.connect(file)) as connection:
            connection.text_factory = bytes
            tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
            return [connection.execute(f"SELECT * FROM {name.decode()}").fetchall() for name in sorted(tables)]

    before, harmless = contents(), 0
    for _ in range(number):
        place = chance.randrange(len(whole))
        flipped = bytearray(whole)
        flipped[place] ^= 1 << chance.randrange(8)
        file.write_bytes(flipped)
        try:
            found = check_run(file)
        except PytrackerError as error:
            found = [str(error)]
        if not found:
            assert contents() == before, f"the bit at {place} changes the file, and is not found"
            harmless += 1
    file.write_bytes(whole)
    return f"{number - harmless} found, {harmless} change nothing that the file says, 0 unnoticed"


ATTACKS: dict[str, tuple[Callable[[Path, int, random.Random], str], int]] = {
    "kills": (kills, 60),
    "slow steps": (slow_steps, 1),
    "resumes": (resumes, 20),
    "interrupts": (interrupts, 40),
    "removals": (removals, 30),
    "full disks": (full_disks, 10),
    "second writers": (second_writers, 5),
    "threads": (threads, 5),
    "flips": (flips, 5000),
}


def main() -> None:
    """Run the attacks and print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"which: {', '.join(ATTACKS)}; all by default")
    parser.add_argument("--scale", type=float, default=1.0, help="times as many of each")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print("| attack | how many | seconds | what came of it |\n|---|---|---|---|", flush=True)
    failed = False
    for name in options.names or ATTACKS:
        attack, number = ATTACKS[name]
        number = max(1, int(number * options.scale))
        with tempfile.TemporaryDirectory() as folder:
            begin = time.monotonic()
            try:
                told = attack(Path(folder), number, random.Random(options.seed))
            except (AssertionError, PytrackerError) as error:
                told, failed = f"**failed**: {error}", True
            print(f"| {name} | {number} | {time.monotonic() - begin:.0f} | {told} |", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()

"""What recording costs: `log` beside other trackers, a million points, kills, and a run of 10,000 parameters.

    python -m benchmarks.record [--out docs/results] [--only log,points,kill,start,scale]

Each part checks its result before it reports a time. trackio and TensorBoard are measured where they are installed.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import random
import re
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from importlib import metadata
from pathlib import Path

import numpy as np

from pytracker.history import FIELDS, Interval, ParameterInfo
from pytracker.store import Run, load_run

METRICS = [f"metric_{index}" for index in range(10)]
Row = tuple[str, ...]


def values_at(step: int) -> dict[str, float]:
    return {name: step + index / 10 for index, name in enumerate(METRICS)}


def time_calls(log: Callable[[int, dict[str, float]], None], count: int, pause: float) -> list[float]:
    """Return microseconds of each call. ``pause`` seconds of work in between stand for the training step."""
    taken = []
    gc.disable()
    for step in range(count):
        values = values_at(step)
        begin = time.perf_counter_ns()
        log(step, values)
        taken.append((time.perf_counter_ns() - begin) / 1e3)
        until = time.perf_counter() + pause
        while time.perf_counter() < until:
            pass
    gc.enable()
    return taken


@contextmanager
def pytracker_log(folder: Path) -> Iterator[Callable[[int, dict[str, float]], None]]:
    with Run(folder, name="one") as run:
        yield lambda step, values: run.log(step, **values)
    assert len(load_run(run.path).history[METRICS[9]]) == run.history.last_step + 1


@contextmanager
def trackio_log(folder: Path) -> Iterator[Callable[[int, dict[str, float]], None]]:
    os.environ |= {"TRACKIO_DIR": str(folder), "HF_HUB_OFFLINE": "1"}
    import trackio

    trackio.init(project="benchmark", name="one")
    yield lambda step, values: trackio.log(values, step=step)
    trackio.finish()


@contextmanager
def tensorboard_log(folder: Path) -> Iterator[Callable[[int, dict[str, float]], None]]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder))

    def log(step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    yield log
    writer.close()


def log_cost() -> Iterator[Row]:
    """The training thread's share of one step with 10 metrics: microseconds, with 1 ms of other work between calls."""
    yield ("contender", "calls", "median us", "99 % us", "largest us")
    contenders = {
        ("Run.log", "pytracker"): pytracker_log,
        ("trackio.log", "trackio"): trackio_log,
        ("SummaryWriter.add_scalar, 10 calls", "tensorboard"): tensorboard_log,
    }
    for (name, package), contender in contenders.items():
        try:
            with tempfile.TemporaryDirectory() as folder, contender(Path(folder)) as log:
                time_calls(log, 100, 0.001)
                taken = np.array(time_calls(lambda step, values, log=log: log(step + 100, values), 3000, 0.001))
        except ImportError as error:
            yield (name, f"not measured: {error}", "", "", "")
            continue
        name = f"{name} ({package} {metadata.version(package)})"
        yield (name, "3000", *(f"{value:.1f}" for value in (np.median(taken), np.percentile(taken, 99), taken.max())))


def million_points() -> Iterator[Row]:
    """100,000 steps of 10 metrics, written as fast as the loop goes, then read back."""
    yield ("what", "seconds")
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        with Run(folder, name="one") as run:
            for step in range(100_000):
                run.log(step, **values_at(step))
            logged = time.perf_counter() - begin
        written = time.perf_counter() - begin
        loads = []
        for _ in range(5):
            begin = time.perf_counter()
            history = load_run(run.path).history
            loads.append(time.perf_counter() - begin)
        assert history == run.history
        assert sum(map(len, history.values())) == 1_000_000
        size = (run.path / "run.sqlite").stat().st_size
    yield ("100,000 calls of log", f"{logged:.2f}")
    yield ("until everything is on disk and the run finished", f"{written:.2f}")
    yield ("load_run(path).history, median of 5", f"{statistics.median(loads):.2f}")
    yield ("size of the file", f"{size / 1e6:.1f} MB")


KILLED = """
import os, sys, time
from pytracker.store import Run
run = Run(sys.argv[1], name="one")
journal = os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT)
for step in range(10**9):
    run.log(step, loss=float(step))
    os.pwrite(journal, f"{step} {time.monotonic()}\\n".ljust(40).encode(), 40 * step)
    time.sleep(0.0002)
"""


def kills(count: int = 20) -> Iterator[Row]:
    """A kill -9 at random moments of a run with the default flush_seconds of 2: how old was the oldest step lost?"""
    yield ("what", "seconds")
    ages, generator = [], random.Random(0)
    for _ in range(count):
        with tempfile.TemporaryDirectory() as folder:
            journal = Path(folder) / "journal"
            training = subprocess.Popen([sys.executable, "-c", KILLED, folder, str(journal)])
            while not journal.exists():
                time.sleep(0.01)
            time.sleep(generator.uniform(2.2, 4.5))
            moment = time.monotonic()
            training.send_signal(signal.SIGKILL)
            training.wait()
            stored = load_run(Path(folder) / "one")
            assert stored.state == "interrupted"
            steps = stored.history["loss"].steps
            assert np.array_equal(steps, np.arange(len(steps)))
            logged = [line.split() for line in journal.read_text().splitlines() if len(line.split()) == 2]
            lost = [float(at) for step, at in logged if int(step) >= len(steps)]
            ages.append(moment - min(lost, default=moment))
    yield (f"oldest step lost in {count} kills, before the kill: median", f"{statistics.median(ages):.2f}")
    yield ("largest", f"{max(ages):.2f}")


def starts() -> Iterator[Row]:
    """New processes, median of 7."""
    yield ("command", "seconds", "torch imported")
    with tempfile.TemporaryDirectory() as folder:
        for index in range(10):
            with Run(folder, name=f"run {index}") as run:
                run.log(0, loss=1.0)
        check = "; import sys; print('torch' in sys.modules)"
        commands = {
            "python -c 'pass'": ["-c", "pass" + check],
            "import pytracker.store": ["-c", "import pytracker.store" + check],
            "pytracker --help": ["-m", "pytracker", "--help"],
            "pytracker list, 10 runs": ["-m", "pytracker", "list", folder],
        }
        for name, command in commands.items():
            taken = []
            for _ in range(7):
                begin = time.perf_counter()
                done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True)
                taken.append(time.perf_counter() - begin)
            imported = done.stdout.strip() if "-c" in command else ""
            yield (name, f"{statistics.median(taken):.3f}", imported)


def scale(parameters: int = 10_000, every: int = 50) -> Iterator[Row]:
    """10,000 parameters, drained every 50 steps, 8 series, for 1,000 to 100,000 steps; as fast as the disk goes."""
    yield (
        "steps",
        "intervals",
        "log_interval, median us",
        "written s",
        "for each interval ms",
        "file MB",
        "header ms",
        "load s",
        "peak MB",
    )
    for steps in (1_000, 10_000, 100_000):
        script = f"from benchmarks.record import one_scale; print(*one_scale({parameters}, {steps}, {every}), sep='|')"
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        yield tuple(done.stdout.strip().split("|"))


def made_up_interval(generator: np.random.Generator, first: int, every: int, count: int) -> Interval:
    noise = generator.lognormal(-3, 2, size=(5, count)).astype(np.float32)
    nothing = {
        name: np.full(count, FIELDS[name], np.float32)
        for name in FIELDS
        if name not in ("norm_last", "norm_mean", "norm_max", "abs_max", "zero_fraction", "first_nonfinite")
    }
    return Interval(
        first, first + every - 1, noise[0], noise[1], noise[2], noise[3], noise[4] / (1 + noise[4]),
        first_nonfinite=np.full(count, -1), **nothing,
    )  # fmt: skip


def one_scale(parameters: int, steps: int, every: int) -> Row:
    """One run of the scale table, in a process of its own, so that its peak of memory is its own."""
    infos = [ParameterInfo(f"layers.{index}.weight", (64,), "float32", "0", 64) for index in range(parameters)]
    generator, taken, names = np.random.default_rng(0), [], METRICS[:8]
    intervals = [made_up_interval(generator, 0, every, parameters) for _ in range(8)]
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        with Run(folder, name="one") as run:
            run.set_parameters(infos)
            for index, first in enumerate(range(0, steps, every)):
                made = intervals[index % len(intervals)]
                interval = Interval(**{**vars(made), "first_step": first, "last_step": first + every - 1})
                start = time.perf_counter_ns()
                run.log_interval(interval)
                taken.append((time.perf_counter_ns() - start) / 1e3)
                at = np.arange(first, first + every)
                run.log_many(at, dict.fromkeys(names, at * 0.5))
                if index % 50 == 49:
                    run.flush()  # a training takes longer than the disk; this loop doesn't
        written = time.perf_counter() - begin
        assert run.dropped_blobs == 0
        peak = int(re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[0]) / 1e3
        size = (run.path / "run.sqlite").stat().st_size / 1e6
        loads = []
        for _ in range(3):
            begin = time.perf_counter()
            stored = load_run(run.path)
            header = time.perf_counter() - begin
            begin = time.perf_counter()
            history = stored.history
            loads.append(time.perf_counter() - begin)
        assert len(history.parameters) == steps // every
        assert len(history[names[-1]]) == steps
        np.testing.assert_array_equal(history.parameters.field("norm_max")[-1], interval.norm_max)
    each = written / (steps // every) * 1e3
    return (
        f"{steps:,}", f"{steps // every:,}", f"{statistics.median(taken):.0f}", f"{written:.2f}", f"{each:.2f}",
        f"{size:.1f}", f"{header * 1e3:.1f}", f"{statistics.median(loads):.2f}", f"{peak:.0f}",
    )  # fmt: skip


PARTS = {"log": log_cost, "points": million_points, "kill": kills, "start": starts, "scale": scale}


def markdown(title: str, rows: list[Row]) -> str:
    lines = [f"## {title}", "", *("| " + " | ".join(row) + " |" for row in rows)]
    lines.insert(3, "| " + " | ".join("---" for _ in rows[0]) + " |")
    return "\n".join(lines) + "\n"


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    processor = models[0] if models else platform.machine()
    versions = f"Python {platform.python_version()}, numpy {np.__version__}, SQLite {sqlite3.sqlite_version}"
    load = os.getloadavg()[0]
    return f"{datetime.now():%Y-%m-%d %H:%M}, {os.cpu_count()} cores of {processor}, {versions}; load {load:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write a dated Markdown file into this folder")
    parser.add_argument("--only", default=",".join(PARTS), help="parts to run, by commas")
    options = parser.parse_args()
    texts = ["# Recording: what it costs\n", f"`python -m benchmarks.record`, {machine()}.\n"]
    for name in options.only.split(","):
        texts.append(markdown(PARTS[name].__doc__ or name, list(PARTS[name]())))
        print(texts[-1], flush=True)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        path = options.out / f"{datetime.now():%Y-%m-%d}-record.md"
        path.write_text("\n".join(texts))
        print(path)


if __name__ == "__main__":
    main()

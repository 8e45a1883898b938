"""What looking at runs costs: compare, diagnose and report of long runs, a list of many, an export of parameters.

    python -m benchmarks.view [--folder FOLDER] [--steps 200000] [--parameters 300] [--runs 2000]

Records the runs once into FOLDER (minutes), then measures each verb in a process of its own: the median wall time of
three, its CPU time, and the most memory that it had. Each verb's output is checked before a time is printed.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from pytracker.history import ParameterInfo, summarize
from pytracker.store import Run

EVERY = 50


def record_long(folder: Path, name: str, lr: float, steps: int, parameters: int) -> None:
    if (folder / name).exists():
        return
    random = np.random.default_rng(0)
    numel = np.full(parameters, 16)
    noise = random.normal(scale=0.1, size=steps)
    with Run(folder, name=name, config={"lr": lr}) as run:
        run.set_parameters([ParameterInfo(f"layer{i}.weight", (16,), "float32", "", 16) for i in range(parameters)])
        run.set_meta(every=EVERY)
        for step in range(steps):
            trend = 2 * math.exp(-3 * step / steps)
            run.log(step, loss=trend + noise[step], lr=lr, grad_norm=1 + noise[step], grad_max=0.5)
            if step % 1000 == 999:
                run.log(step, val_loss=trend, val_accuracy=step / steps, epoch=step // 1000)
            if step % EVERY == EVERY - 1:
                rows = np.abs(random.normal(size=(EVERY, parameters, 6)))
                rows[:, :, 3:] = 0
                run.log_interval(summarize(np.arange(step - EVERY + 1, step + 1), rows, numel))


def record_many(folder: Path, runs: int) -> None:
    for index in range(runs):
        if not (folder / f"run-{index:04d}").exists():
            config = {"lr": 1e-3 * (index % 5 + 1), "depth": index % 3}
            with Run(folder, name=f"run-{index:04d}", config=config) as run:
                for step in range(3):
                    run.log(step, loss=1 / (step + 1), val_accuracy=0.5)


def record(long: Path, many: Path, steps: int, parameters: int, runs: int) -> None:
    for name, lr in (("a", 0.1), ("b", 0.2)):
        record_long(long, name, lr, steps, parameters)
    record_many(many, runs)


def measure(arguments: list[str], expected: str) -> tuple[float, float, float]:
    """Return wall seconds, CPU seconds and MiB of `pytracker ARGUMENTS`; medians of three."""
    costs = []
    for _ in range(3):
        with tempfile.TemporaryFile() as output:
            begin = time.perf_counter()
            child = subprocess.Popen([sys.executable, "-m", "pytracker", *arguments], stdout=output)
            _, status, usage = os.wait4(child.pid, 0)
            elapsed = time.perf_counter() - begin
            child.returncode = os.waitstatus_to_exitcode(status)
            output.seek(0)
            assert child.returncode == 0, arguments
            assert expected.encode() in output.read(2**20), arguments
        costs.append((elapsed, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024))
    wall, cpu, memory = (statistics.median(column) for column in zip(*costs, strict=True))
    return wall, cpu, memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/pytracker-view"))
    parser.add_argument("--steps", type=int, default=200_000)
    parser.add_argument("--parameters", type=int, default=300)
    parser.add_argument("--runs", type=int, default=2000)
    given = parser.parse_args()
    long, many, scratch = (given.folder / name for name in ("long", "many", "out"))
    scratch.mkdir(parents=True, exist_ok=True)
    # In a process of its own: a verb is said to have had at least the memory that this one has.
    recorder = multiprocessing.get_context("spawn").Process(
        target=record, args=(long, many, given.steps, given.parameters, given.runs)
    )
    recorder.start()
    recorder.join()
    assert recorder.exitcode == 0
    folder = ["--dir", str(long)]
    verbs = [
        (["compare", "a", "b", *folder], "best loss"),
        (["diagnose", "a", *folder], "indings"),
        (["report", "a", *folder, "-o", str(scratch / "one.html")], "one.html"),
        (["report", "a", "b", *folder, "-o", str(scratch / "two.html")], "two.html"),
        (["list", str(many)], "run-"),
        (["export", "a", *folder, "--parameters"], "first_step,last_step,parameter"),
    ]
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print(f"{given.steps:,} steps, {given.parameters} parameters, {given.runs:,} runs\n")
    print("| verb | wall | CPU | memory |\n| --- | --- | --- | --- |")
    for arguments, expected in verbs:
        wall, cpu, memory = measure(arguments, expected)
        shown = " ".join(word for word in arguments if not word.startswith(("/", "--dir", "-o")))
        print(f"| {shown} | {wall:.2f} s | {cpu:.2f} s | {memory:.0f} MiB |", flush=True)
    print(f"\nthe report of one run: {(scratch / 'one.html').stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()

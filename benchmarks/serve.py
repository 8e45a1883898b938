"""What the live page costs: a thousand finished runs and ten that grow, asked for as a browser asks.

    python -m benchmarks.serve [--finished 1000] [--running 10] [--rounds 60]

Records the finished runs into a folder of its own, lets one process write the running ones, starts `pytracker serve`,
and asks each second, as the page does, for what has changed and for the curves of the runs that changed. Prints how
long an answer takes at first and later, the server's CPU time for a round, and its memory early and late: what grows
with the rounds would grow for as long as a browser is left open.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import multiprocessing.synchronize
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from pytracker.store import Run

STEPS_A_SECOND = 100


def record_finished(folder: Path, count: int) -> None:
    for index in range(count):
        with Run(folder, name=f"done-{index:04d}", config={"lr": 1e-3 * (index % 5 + 1)}) as run:
            run.log_many(range(100), {"loss": [1 / (step + 1) for step in range(100)]})


def write_running(folder: Path, count: int, done: multiprocessing.synchronize.Event) -> None:
    runs = [Run(folder, name=f"live-{index}") for index in range(count)]
    step = 0
    while not done.wait(1 / STEPS_A_SECOND):
        for run in runs:
            run.log(step, loss=1 / (step + 1), grad_norm=1.0, grad_max=0.5, lr=0.1)
        step += 1
    for run in runs:
        run.finish()


def memory_and_cpu(pid: int) -> tuple[float, float]:
    """Return resident MiB and CPU seconds of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def get(address: str) -> bytes:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(address, timeout=120) as answer:
        return bytes(answer.read())


def poll(address: str, version: int) -> tuple[int, float, int]:
    """Ask once; return the new version, the seconds that it took, and how many runs' curves were brought."""
    begin = time.perf_counter()
    changes = json.loads(get(f"{address}api/runs?since={version}"))
    changed = [run["id"] for run in changes["runs"] if run["state"] == "running"]
    for name in changed:
        json.loads(get(f"{address}api/runs/{name}"))
    return changes["version"], time.perf_counter() - begin, len(changed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--finished", type=int, default=1000)
    parser.add_argument("--running", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=60)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        record_finished(folder, given.finished)
        done = multiprocessing.get_context("spawn").Event()
        writer = multiprocessing.get_context("spawn").Process(target=write_running, args=(folder, given.running, done))
        writer.start()
        command = [sys.executable, "-m", "pytracker", "serve", str(folder), "--port", "0"]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        try:
            assert server.stdout is not None
            found = re.search(r"http://\S+", server.stdout.readline())
            assert found is not None
            version, first, _ = poll(found[0], 0)
            took, early = [], (0.0, 0.0)
            for number in range(given.rounds):
                time.sleep(1.0)
                version, seconds, changed = poll(found[0], version)
                assert changed <= given.running
                took.append(seconds)
                if number == given.rounds // 3:
                    early = memory_and_cpu(server.pid)
            late = memory_and_cpu(server.pid)
        finally:
            done.set()
            server.terminate()
            server.wait(60)
            writer.join(120)
        rounds = given.rounds - given.rounds // 3 - 1
        print(f"{given.finished:,} finished runs, {given.running} running, load {os.getloadavg()[0]:.1f}")
        print(
            f"the first answer {first:.2f} s; of {given.rounds} later ones the median {statistics.median(took):.2f} s, "
        )
        print(f"the longest {max(took):.2f} s; CPU of the server a round {(late[1] - early[1]) / rounds:.2f} s")
        print(f"memory of the server after a third of the rounds {early[0]:.0f} MiB, at the end {late[0]:.0f} MiB")


if __name__ == "__main__":
    main()

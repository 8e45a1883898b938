"""Train everything, judge it as a Tracker would, print the figures and write them down.

Run with ``python -m benchmarks.diagnosis``. The figures are those of the half on which no threshold was set; ``--half
tune`` shows the other one, and writes nothing.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from .cases import all_cases
from .score import text_report, train_and_judge

RESULTS = Path("docs/results")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--half", choices=["test", "tune"], default="test")
    parser.add_argument("--only", default="", help="only trainings whose name holds this")
    arguments = parser.parse_args()
    begin = time.monotonic()
    cases = [case for case in all_cases() if case.half == arguments.half and arguments.only in case.name]
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:  # which tells where a process has died
        report = text_report(list(pool.map(train_and_judge, cases, chunksize=3)))
    which = "no threshold was set" if arguments.half == "test" else "thresholds were set"
    head = (
        f"# Diagnosis, {datetime.date.today()}\n\n"
        f"Command: `python -m benchmarks.diagnosis`. {len(cases)} trainings of the half on which {which}, "
        f"recorded by a Tracker, judged at each drain; {time.monotonic() - begin:.0f} s on {os.cpu_count()} cores of "
        f"{platform.machine()}, torch {torch.__version__}.\n\n"
    )
    print(head + report)
    if arguments.half == "test" and not arguments.only:
        (RESULTS / f"{datetime.date.today()}-diagnosis.md").write_text(head + report, encoding="utf-8")


if __name__ == "__main__":
    main()

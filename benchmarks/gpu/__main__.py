"""Times the CUDA back end on a GPU, beside what torch, apex and Transformer Engine offer, where they are installed.

python -m benchmarks.gpu docs/results           all of it, about 4 minutes; writes <date>-gpu-<card>.md as it goes
python -m benchmarks.gpu --quick docs/results   the most telling part, under 2 minutes

It needs a GPU, torch and a built pytracker (`make gpu-bench` builds one), and no network. Results are checked against a
float64 norm before anything is timed. Before each timed call the L2 cache is written over, as a backward pass does;
that write also keeps the device busy while the host enqueues, so that the time between two events is that of the
device, and holds gaps only where a contender cannot enqueue as fast as it runs.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path

import torch

import pytracker
from benchmarks.gpu import card, passes, trainings
from benchmarks.gpu.timing import REPEATS, flusher
from pytracker.core import cuda, native


class Report:
    """A Markdown file that holds each line as soon as it was measured, and the terminal that shows it."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", encoding="utf-8")

    def say(self, text: str = "") -> None:
        """Write a line."""
        print(text, flush=True)
        self._file.write(text + "\n")
        self._file.flush()

    def table(self, header: tuple[str, ...], lines: Iterable[tuple[str, ...]]) -> None:
        """Write a table, a line at a time."""
        self.say("| " + " | ".join(header) + " |")
        self.say("|" + " --- |" * len(header))
        for line in lines:
            self.say("| " + " | ".join(line) + " |")
        self.say()


def reason_to_refuse() -> str:
    """Return why figures from here would mean nothing, or nothing."""
    if not torch.cuda.is_available():
        return "there is no CUDA device here"
    name = torch.cuda.get_device_name()
    if "cudasim" in name:
        return f"{name} is a simulator, whose times mean nothing"
    core, why = native.load()
    if core is None:
        return f"pytracker runs without its native core: {why}"
    why = cuda.reason_without_kernels(torch.cuda.current_device())
    return f"pytracker reads gradients by plain torch here: {why}" if why else ""


def main() -> None:
    """Read the command line; run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="where the Markdown file goes")
    parser.add_argument("--quick", action="store_true", help="the most telling part, under 2 minutes")
    arguments = parser.parse_args()
    reason = reason_to_refuse()
    if reason:
        sys.exit(f"nothing is timed: {reason}")
    begin, now = time.monotonic(), datetime.now(timezone.utc)
    name = torch.cuda.get_device_name()
    report = Report(arguments.folder / f"{now:%Y-%m-%d}-gpu-{name.replace(' ', '-').lower()}.md")
    card.warm_up()
    copy, read = card.copy_rate(), card.read_rate()
    report.say(f"# GPU benchmarks on {name}, {now:%Y-%m-%d %H:%M} UTC\n")
    report.say(
        f"Command: `python -m benchmarks.gpu{' --quick' if arguments.quick else ''}`. Card, warm: {card.state()}. "
        f"CUDA {torch.version.cuda}, torch {torch.__version__}, pytracker {pytracker.__version__}; kernels: "
        f"{cuda.used(torch.cuda.current_device())}. A copy on the device reads and writes {copy / 1e9:.0f} GB/s; a "
        f"kernel that only reads gets {read / 1e9:.0f} GB/s, the read limit.\n"
    )
    report.say("## Passes over gradients\n")
    report.say(
        "Median, mean and best: between two events on the device, after the L2 cache has been written over. Host: "
        f"until the call returns, on an idle device. GB/s: bytes of gradients over the median. Up to {REPEATS} calls. "
        "Norms were checked against float64 first; torch, apex and Transformer Engine compute the norms only, "
        "pytracker all six columns.\n"
    )
    flush = flusher()
    report.table(passes.HEADER, passes.compare(flush, read, quick=arguments.quick))
    report.say("## Values that a slow path might be made for\n")
    report.table(passes.HEADER, passes.special_values(flush, read))
    report.say(f"## Small model, {passes.IN_A_GRAPH} passes in one CUDA graph\n")
    report.table(("8 parameters, fp32", "a pass, median", "best"), passes.in_graphs(flush))
    report.say("## Training steps\n")
    report.say(
        "Wall time of whole steps, the device's work included; medians of rounds in each of which all take their turn. "
        "More than with nothing: the median of the differences within a round.\n"
    )
    rounds, steps = (3, 10) if arguments.quick else (5, 20)
    for make in (trainings.train_gpt2, trainings.train_resnet50):
        report.table(trainings.HEADER, trainings.compare(make, rounds, steps))
        torch.cuda.empty_cache()
    report.say(f"All of it took {time.monotonic() - begin:.0f} s.")


if __name__ == "__main__":
    main()

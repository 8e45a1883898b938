"""Turns the JSON of a benchmark run into one table on the terminal and a dated Markdown file.

python -m benchmarks.table build/benchmarks.json docs/results
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import pytracker


@dataclass(frozen=True)
class Timing:
    """All rounds of one contender on one workload, in seconds for each call."""

    rounds: tuple[float, ...]
    bytes: int
    tensors: int

    @property
    def median(self) -> float:
        return median(self.rounds)

    @property
    def best(self) -> float:
        return min(self.rounds)

    @property
    def gigabytes_per_second(self) -> float:
        return self.bytes / self.median / 1e9


Key = tuple[str, str, str]  # workload, dtype, contender


@dataclass(frozen=True)
class Goal:
    """A figure that was promised: by medians and by minima, what it must reach, and whether more is better."""

    text: str
    by_median: float
    by_minimum: float
    bound: float
    unit: str = "x"
    at_least: bool = True

    @property
    def asked(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.bound:g} {self.unit}"

    @property
    def verdict(self) -> str:
        if (self.by_median >= self.bound) if self.at_least else (self.by_median <= self.bound):
            return "reached"
        return f"missed by {abs(self.by_median - self.bound) / self.bound:.0%}"


def load(path: Path) -> dict[Key, Timing]:
    """Join the rounds of all passes."""
    rounds: dict[Key, list[float]] = defaultdict(list)
    extra: dict[Key, dict[str, Any]] = {}
    for benchmark in json.loads(path.read_text(encoding="utf-8"))["benchmarks"]:
        info = benchmark["extra_info"]
        key = (info["workload"], info["dtype"], info["contender"])
        rounds[key] += benchmark["stats"]["data"]
        extra[key] = info
    return {key: Timing(tuple(data), extra[key]["bytes"], extra[key]["tensors"]) for key, data in rounds.items()}


def goals(timings: dict[Key, Timing]) -> list[Goal]:
    """Return the goals of the CPU back end."""
    large, many, few, small = "one tensor of 1e8", "10,000 tensors of 64", "100 tensors of 64", "MLP, 8 parameters"

    def both(formula: Callable[[Callable[..., float]], float]) -> tuple[float, float]:
        """Apply a formula to the medians and to the minima."""
        return (
            formula(lambda workload, contender, dtype="fp32": timings[workload, dtype, contender].median),
            formula(lambda workload, contender, dtype="fp32": timings[workload, dtype, contender].best),
        )

    def faster(workload: str, contender: str, than: str) -> tuple[float, float]:
        return both(lambda seconds: seconds(workload, than) / seconds(workload, contender))

    bf16 = both(lambda seconds: seconds(large, "gradient_stats") / seconds(large, "gradient_stats", "bf16") / 2)
    each = both(lambda s: (s(many, "gradient_stats") / 10_000 - s(few, "gradient_stats") / 100) * 1e9)
    loop, drop_in = "original loop", "compute_gradient_stats"
    return [
        Goal("one tensor of 1e8: bytes/s of torch.sum", *faster(large, "gradient_stats", "torch.sum of each"), 1.0),
        Goal("one tensor of 1e8: over get_total_norm", *faster(large, "gradient_stats", "get_total_norm + item"), 2.0),
        Goal("ResNet-50: over the loop", *faster("ResNet-50", drop_in, loop), 2.2),
        Goal("10,000 tensors: over the loop", *faster(many, drop_in, loop), 100),
        Goal("small MLP: over the loop", *faster(small, drop_in, loop), 20),
        Goal("small MLP: Tracker.step over 2 norm().item()", *faster(small, "Tracker.step", "2 x norm(2).item()"), 1.0),
        Goal("one tensor of 1e8: bytes/s of bf16 over fp32", *bf16, 0.5),
        Goal("each of 10,000 tensors over each of 100", *each, 60, "ns", at_least=False),
    ]


def duration(seconds: float) -> str:
    """Write a duration with three digits.

    >>> duration(0.0123), duration(4.56e-5)
    ('12.3 ms', '45.6 us')
    """
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"


def rows(timings: dict[Key, Timing]) -> list[tuple[str, ...]]:
    """Return the table's lines: names, then median, minimum, GB/s, and how much faster than the loop."""
    lines = []
    for (workload, dtype, contender), timing in timings.items():
        loop = timings[workload, dtype, "original loop"].median
        speed = f"{timing.gigabytes_per_second:.1f}" if timing.bytes >= 1e6 else ""
        lines.append(
            (
                workload,
                dtype,
                contender,
                duration(timing.median),
                duration(timing.best),
                speed,
                f"{loop / timing.median:.3g}",
            )
        )
    return lines


HEADER = ("workload", "dtype", "contender", "median", "minimum", "GB/s", "times the loop's speed")


def markdown(header: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    """Return a Markdown table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ("---",) * len(header), *lines])


def machine() -> str:
    """Name the processor and what runs on it."""
    described = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return (
        f"{described[1] if described else platform.processor()}, {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}; Linux {platform.release()}; Python {platform.python_version()}, "
        f"torch {torch.__version__}, pytracker {pytracker.__version__}"
    )


def main(source: str, folder: str) -> None:
    """Print the table and the goals, and write both to `<folder>/<date>-cpu.md`."""
    timings = load(Path(source))
    now = datetime.now(timezone.utc)
    verdicts = [
        (goal.text, f"{goal.by_median:.3g} {goal.unit}", f"{goal.by_minimum:.3g} {goal.unit}", goal.asked, goal.verdict)
        for goal in goals(timings)
    ]
    goal_header = ("goal (fp32)", "by medians", "by minima", "to reach", "verdict (medians)")
    console = Console(width=None if sys.stdout.isatty() else 140)
    for title, header, lines in [("Every contender", HEADER, rows(timings)), ("Goals", goal_header, verdicts)]:
        table = Table(*header, title=title)
        for line in lines:
            table.add_row(*line)
        console.print(table)
    text = [
        f"# CPU benchmarks, {now:%Y-%m-%d %H:%M} UTC",
        f"Machine: {machine()}. Load average at the end: {os.getloadavg()[1]:.1f} (about 1 is its own).",
        "Command: `make bench`. Contenders take turns, pass by pass; a line joins the rounds of all passes. Each "
        "result is checked against a float64 norm before it is timed. GB/s: bytes of gradients over the median.",
        "## Goals",
        markdown(goal_header, verdicts),
        "## Every contender",
        markdown(HEADER, rows(timings)),
    ]
    path = Path(folder) / f"{now:%Y-%m-%d}-cpu.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(text) + "\n", encoding="utf-8")
    console.print(f"written to {path}")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Watching and clipping together, beside torch's clip alone: `python -m benchmarks.clipping [--device cuda]`.

All contenders of one workload take turns, round by round, so a machine whose speed drifts does so for all of them. Each
time is the median over the rounds; on a CUDA device it includes the device's work. Norms are checked before the clock
starts.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
import warnings
from collections.abc import Callable, Iterator

import torch

import pytracker
from benchmarks.workloads import DTYPES, WORKLOADS, Model, exact_norm

Call = Callable[[], object]
Bounds = Iterator[float]


def torch_clip(model: torch.nn.Module, bounds: Bounds) -> tuple[Call, Call]:
    """torch.nn.utils.clip_grad_norm_, and no record of anything."""
    parameters = list(model.parameters())
    return lambda: torch.nn.utils.clip_grad_norm_(parameters, next(bounds)), lambda: None


def within_the_step(model: torch.nn.Module, bounds: Bounds) -> tuple[Call, Call]:
    """tracker.step(clip=bound): every statistic of every parameter recorded, and the clip."""
    tracker = pytracker.Tracker(model, diagnosis=None, every=50)
    return lambda: tracker.step(loss=1.0, clip=next(bounds)), tracker.close


def after_the_step(model: torch.nn.Module, bounds: Bounds) -> tuple[Call, Call]:
    """The same by tracker.step() and tracker.clip(bound)."""
    tracker = pytracker.Tracker(model, diagnosis=None, every=50)

    def call() -> None:
        tracker.step(loss=1.0)
        tracker.clip(next(bounds))

    return call, tracker.close


def by_the_optimizer(model: torch.nn.Module, bounds: Bounds) -> tuple[Call, Call]:
    """tracker.step(clip=bound) with a fused optimizer, which gets the factor; its own step is not timed."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, fused=True)
    tracker = pytracker.Tracker(model, optimizer, diagnosis=None, every=50)
    return lambda: tracker.step(loss=1.0, clip=next(bounds)), tracker.close


CONTENDERS = {
    "torch clip alone": torch_clip,
    "step(clip=)": within_the_step,
    "step, then clip": after_the_step,
    "step(clip=), fused optimizer": by_the_optimizer,
}


def far_above(norm: float) -> Bounds:
    """Yield bounds that are never reached."""
    return itertools.repeat(1e3 * norm)


def ever_lower(norm: float) -> Bounds:
    """Yield bounds below what the one before has left, so that each call scales."""
    return (norm * 0.9999**count for count in itertools.count(1))


CASES = {"no clip is due": far_above, "every step is clipped": ever_lower}


def check(model: torch.nn.Module, norm: float) -> None:
    """Make sure that the factor is that of the exact norm."""
    with pytracker.Tracker(model, diagnosis=None) as tracker:
        tracker.step(clip=1e3 * norm)
    found = tracker.history["grad_norm"][0]
    assert abs(found - norm) <= 1e-6 * norm, (found, norm)


def measure(
    model: torch.nn.Module, bounds: Bounds, rounds: int, calls: int, device: str
) -> Iterator[tuple[str, float]]:
    """Yield the median time of a call of each contender, in seconds."""

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    prepared = {name: prepare(model, bounds) for name, prepare in CONTENDERS.items()}
    times: dict[str, list[float]] = {name: [] for name in prepared}
    for count in range(rounds + 1):  # the first round is a warm-up
        for name, (call, _) in prepared.items():
            wait()
            begin = time.perf_counter()
            for _ in range(calls):
                call()
            wait()
            if count:
                times[name].append((time.perf_counter() - begin) / calls)
    for _, end in prepared.values():
        end()
    yield from ((name, statistics.median(values)) for name, values in times.items())


def main() -> None:
    """Print a table, and how many times as fast as torch's clip alone each way is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--workload", action="append", choices=list(WORKLOADS))
    options = parser.parse_args()
    warnings.filterwarnings("ignore", "steps .* have the same gradients")  # they do
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}; torch {torch.__version__}")
    for workload in options.workload or [each for each in WORKLOADS if each != "one tensor of 1e8"]:
        for dtype_name, dtype in DTYPES.items():
            for case, bounds_of in CASES.items():
                model = Model(WORKLOADS[workload], dtype)
                norm = exact_norm(model)
                if options.device == "cuda":
                    gradients = [p.grad for p in model.parameters()]
                    model = model.cuda()
                    for p, gradient in zip(model.parameters(), gradients, strict=True):
                        p.grad = gradient.cuda()
                check(model, norm)
                elements = sum(p.numel() for p in model.parameters())
                calls = max(1, min(200, 20_000_000 // max(elements, 1)))
                print(f"\n{workload}, {dtype_name}, {case}")
                alone = 0.0
                for contender, seconds in measure(model, bounds_of(norm), options.rounds, calls, options.device):
                    alone = alone or seconds
                    print(f"  {contender:32}{seconds * 1e6:12.1f} us {alone / seconds:8.2f} x")


if __name__ == "__main__":
    main()

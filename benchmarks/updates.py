"""A step whose update is measured, beside the same by hand: `python -m benchmarks.updates [--device cuda]`.

Contenders take turns, round by round, each with a fused SGD of its own over the same gradients. Times are medians of
`tracker.step` (or what stands in for it) and `optimizer.step` together; on a CUDA device they include its work. What is
measured is compared with float64 before the clock starts.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Callable

import torch

import pytracker
from benchmarks.turns import Call, in_turn, nothing
from benchmarks.workloads import DTYPES, WORKLOADS, Model

RATE = 1e-3


def optimizer_of(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=RATE, fused=True)


def alone(model: torch.nn.Module) -> tuple[Call, Call]:
    """Step the optimizer, and look at nothing."""
    return optimizer_of(model).step, lambda: None


def by_hand(model: torch.nn.Module) -> tuple[Call, Call]:
    """Clone each parameter, and take two norms of each after the step, as logging callbacks do."""
    optimizer, parameters = optimizer_of(model), list(model.parameters())

    def call() -> list[tuple[float, float]]:
        before = [parameter.detach().clone() for parameter in parameters]
        optimizer.step()
        pairs = zip(parameters, before, strict=True)
        return [((now.detach() - then).norm().item(), now.detach().norm().item()) for now, then in pairs]

    return call, lambda: None


def tracked(model: torch.nn.Module, weights_every: int | None = None) -> tuple[Call, Call]:
    """Record the gradients, and where that is said what each step adds to the parameters."""
    optimizer = optimizer_of(model)
    tracker = pytracker.Tracker(model, optimizer, diagnosis=None, every=50, weights_every=weights_every)

    def call() -> None:
        tracker.step(loss=1.0)
        optimizer.step()

    return call, tracker.close


CONTENDERS: dict[str, Callable[[torch.nn.Module], tuple[Call, Call]]] = {
    "the optimizer alone": alone,
    "clones and norms by hand": by_hand,
    "Tracker": tracked,
    "Tracker(weights_every=1)": lambda model: tracked(model, 1),
}


def check(model: torch.nn.Module) -> None:
    """Make sure that the updates are those of the gradients."""
    optimizer = optimizer_of(model)
    with pytracker.Tracker(model, optimizer, diagnosis=None, every=2, weights_every=1) as tracker:
        before = [parameter.detach().double() for parameter in model.parameters()]
        tracker.step()
        optimizer.step()
        moved = [
            float((now.detach().double() - then).norm()) for now, then in zip(model.parameters(), before, strict=True)
        ]
        tracker.step()
    for found, expected in zip(tracker.history.parameters.field("update_norm")[0].tolist(), moved, strict=True):
        assert abs(found - expected) <= 4e-3 * expected, (found, expected)


def main() -> None:
    """Print a table: of each contender the time, and what it adds to the optimizer alone."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--workload", action="append", choices=list(WORKLOADS))
    options = parser.parse_args()
    warnings.filterwarnings("ignore", "steps .* have the same gradients")  # they do
    wait = torch.cuda.synchronize if options.device == "cuda" else nothing
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}; torch {torch.__version__}")
    for workload in options.workload or [each for each in WORKLOADS if each != "one tensor of 1e8"]:
        for dtype_name, dtype in DTYPES.items():
            model = Model(WORKLOADS[workload], dtype).to(options.device)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, dtype=torch.float32, device=options.device).to(dtype)
            check(model)
            calls = max(1, min(200, 20_000_000 // sum(p.numel() for p in model.parameters())))
            prepared = {name: prepare(model) for name, prepare in CONTENDERS.items()}
            times = in_turn({name: call for name, (call, _) in prepared.items()}, options.rounds, calls, wait=wait)
            for _, end in prepared.values():
                end()
            print(f"\n{workload}, {dtype_name}")
            least = statistics.median(times["the optimizer alone"])
            for name, values in times.items():
                seconds = statistics.median(values)
                print(f"  {name:28}{seconds * 1e6:12.1f} us   +{(seconds - least) * 1e6:12.1f} us")


if __name__ == "__main__":
    main()

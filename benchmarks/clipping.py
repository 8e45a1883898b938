"""Watching and clipping together, beside torch's clip alone: `python -m benchmarks.clipping [--device cuda]`.

All contenders of one workload take turns. Each time is the median over the rounds; on a CUDA device it includes the
device's work. Norms are checked before the clock starts. On a CPU two ranks come besides, whose gradients are DTensors
as FSDP2 makes them: new ones on each call. Written to `<out>/<date>-clipping.md`, or `-clipping-cuda.md`.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import pytracker
from benchmarks.table import machine, markdown
from benchmarks.turns import Call, in_turn, nothing
from benchmarks.workloads import DTYPES, WORKLOADS, Model, Shape, exact_norm

Bounds = Iterator[float]
SHARDED: dict[str, list[Shape]] = {"GPT-2 124M": WORKLOADS["GPT-2 124M"], "3,000 tensors of 64": [(64,)] * 3000}
RANKS = 2
HEADER = ("workload", "dtype", "case", "contender", "time", "times as fast as torch's clip")
Row = tuple[str, ...]


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
    if tracker.history.parameters:  # of ranks that merge, the first has it
        found = tracker.history["grad_norm"][0]
        assert abs(found - norm) <= 1e-6 * norm, (found, norm)


def measure(
    model: torch.nn.Module, bounds: Bounds, rounds: int, number: int, wait: Call = nothing, before: Call = nothing
) -> Iterator[tuple[str, str, str]]:
    """Yield each contender with its median time, and how many times as fast as the first it is."""
    prepared = {name: prepare(model, bounds) for name, prepare in CONTENDERS.items()}
    calls = {name: call for name, (call, _) in prepared.items()}
    times = in_turn(calls, rounds, number, wait=wait, before=before)
    for _, end in prepared.values():
        end()
    medians = {name: statistics.median(values) for name, values in times.items()}
    alone = next(iter(medians.values()))
    for name, seconds in medians.items():
        yield name, f"{seconds * 1e6:,.1f} us", f"{alone / seconds:.2f}"


def on_one_device(device: str, rounds: int, workloads: list[str]) -> Iterator[Row]:
    """Yield the rows of whole gradients."""
    wait = torch.cuda.synchronize if device == "cuda" else nothing
    for workload, (dtype_name, dtype), (case, bounds_of) in itertools.product(workloads, DTYPES.items(), CASES.items()):
        model = Model(WORKLOADS[workload], dtype)
        norm = exact_norm(model)
        if device == "cuda":
            gradients = [p.grad for p in model.parameters()]
            model = model.cuda()
            for p, gradient in zip(model.parameters(), gradients, strict=True):
                p.grad = gradient.cuda()
        check(model, norm)
        number = max(1, min(200, 20_000_000 // max(sum(p.numel() for p in model.parameters()), 1)))
        for row in measure(model, bounds_of(norm), rounds, number, wait):
            yield workload, dtype_name, case, *row


class Pieces(torch.nn.Module):
    """Parameters that are DTensors, each spread over all ranks, and without a gradient."""

    def __init__(self, whole: Model) -> None:
        super().__init__()
        mesh = init_device_mesh("cpu", (RANKS,))
        self.gradients = []
        for name, parameter in whole.named_parameters():
            self.register_parameter(name, torch.nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(0)])))
            self.gradients.append(distribute_tensor(parameter.grad, mesh, [Shard(0)]).to_local())

    def backward(self) -> None:
        """Give each parameter a new gradient, as FSDP2 does: a DTensor of the parameter's own layout."""
        for parameter, gradient in zip(self.parameters(), self.gradients, strict=True):
            parameter.grad = DTensor(gradient.clone(), parameter._spec, requires_grad=False)


def on_this_rank(rank: int, store: str, rounds: int) -> Iterator[Row]:
    """Yield the rows of sharded gradients, measured on one of several ranks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    for (workload, shapes), (case, bounds_of) in itertools.product(SHARDED.items(), CASES.items()):
        whole = Model(shapes, torch.float32)
        norm = exact_norm(whole)
        model = Pieces(whole)
        model.backward()
        check(model, norm)
        for row in measure(model, bounds_of(norm), rounds, 1, before=partial(renew, model)):
            yield f"{workload}, {RANKS} ranks", "fp32", case, *row
    dist.destroy_process_group()


def renew(model: Pieces) -> None:
    """Make new gradients, and wait for the other ranks."""
    model.backward()
    dist.barrier()


def on_ranks(rounds: int) -> Iterator[Row]:
    """Run the ranks; yield the rows of the first."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.clipping", "--folder", folder, "--rounds", str(rounds), "--rank"]
        ranks = [subprocess.Popen([*command, str(rank)]) for rank in range(RANKS)]
        if any(codes := [rank.wait() for rank in ranks]):
            raise RuntimeError(f"ranks ended with {codes}; what they say is above")
        for line in (Path(folder) / "rows").read_text(encoding="utf-8").splitlines():
            yield tuple(line.split("\t"))


def main() -> None:
    """Print a table, and write it down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--workload", action="append", choices=list(WORKLOADS))
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", "steps .* have the same gradients")  # they do
    if options.rank is not None:
        rows = list(on_this_rank(options.rank, f"{options.folder}/store", options.rounds))
        if options.rank == 0:
            text = "\n".join("\t".join(row) for row in rows)
            (Path(options.folder) / "rows").write_text(text, encoding="utf-8")
        return
    load = os.getloadavg()[0]
    workloads = options.workload or [each for each in WORKLOADS if each != "one tensor of 1e8"]
    found = on_one_device(options.device, options.rounds, workloads)
    table = []
    for row in itertools.chain(found, on_ranks(options.rounds) if options.device == "cpu" else ()):
        table.append(row)
        print(*row, sep="  ", flush=True)
    cuda = options.device == "cuda"
    now = datetime.now(timezone.utc)
    text = [
        f"# Watching and clipping, {now:%Y-%m-%d}",
        f"Command: `{' '.join(['python -m benchmarks.clipping', *sys.argv[1:]])}`. "
        f"{torch.cuda.get_device_name() if cuda else machine()}; the load average was {load:.1f} before it began. "
        f"Medians of {options.rounds} rounds, in which the contenders take turns. torch's clip records nothing; ours "
        "record every statistic of every parameter. Where each step is clipped, the gradients of a fused optimizer "
        "are scaled by its own step, which is not timed. On ranks (gloo, one thread each) gradients are new DTensors "
        "on each call.",
        markdown(HEADER, table),
    ]
    path = options.out / f"{now:%Y-%m-%d}-clipping{'-cuda' if cuda else ''}.md"
    path.write_text("\n\n".join(text) + "\n", encoding="utf-8")
    print(f"written to {path}")


if __name__ == "__main__":
    main()

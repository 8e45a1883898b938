"""What gradient norms cost a training of several ranks: pytracker beside the naive way, torch's own, and none at all.

    python -m benchmarks.distributed [--out docs/results] [--worlds 1,2,4,8] [--parameters]

An MLP under FSDP2, with gloo on local processes. All ways are first checked to find the same norms; then their calls
of collectives are counted over an interval; then whole training steps are timed, in rounds that take turns.
``--parameters`` measures instead what 10,000 parameters cost: to make the tracker, on a step, and at a drain.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pytracker import Tracker
from pytracker.collectives.testing import collectives

LAYERS, WIDTH, BATCH, EVERY, ROUNDS = 12, 256, 32, 20, 5
MANY, MANY_EVERY = 10_000, 50


class Collectives(TorchDispatchMode):
    """Counts collectives, and the bytes of the tensors that this rank hands to them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its own collectives come by on their way down
        name = func.name()
        if name.partition("::")[0] in ("c10d", "_c10d_functional") and "wait" not in name:
            self.calls += 1
            self.bytes += sum(leaf.nbytes for leaf in tree_leaves(args) if isinstance(leaf, Tensor))
        return func(*args, **(kwargs or {}))


def parameters_of(model: nn.Module) -> list[Any]:
    return [parameter for parameter in model.parameters() if parameter.grad is not None]


class Nothing:
    """No logging."""

    def __init__(self, model: nn.Module) -> None:
        self.norms: list[float] = []

    def step(self) -> None:
        pass

    def close(self) -> None:
        pass


class Naive(Nothing):
    """The loop that is copied everywhere, made right for shards: for each parameter one all-reduce and one wait."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.model = model

    def step(self) -> None:
        total = 0.0
        for parameter in parameters_of(self.model):
            squared = parameter.grad.to_local().norm(2) ** 2
            dist.all_reduce(squared)
            total += squared.item()
        self.norms.append(total**0.5)


class TorchTotal(Naive):
    """torch's own get_total_norm over DTensors: one number for the whole model."""

    def step(self) -> None:
        norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters_of(self.model)])
        self.norms.append(norm.full_tensor().item())


class Pytracker(Nothing):
    """Every statistic of every parameter and step."""

    def __init__(self, model: nn.Module) -> None:
        self.tracker = Tracker(model, every=EVERY, diagnosis=None)

    def step(self) -> None:
        self.tracker.step()

    def close(self) -> None:
        self.tracker.close()
        self.norms = self.tracker.history.get("grad_norm", [])[:]


WAYS: dict[str, Callable[[nn.Module], Any]] = {
    "nothing": Nothing,
    "pytracker: norms, maxima, counts of all": Pytracker,
    "get_total_norm().item(): one norm": TorchTotal,
    "all_reduce and .item() each: norms of all": Naive,
}


def make_model(world: int) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*(layer for _ in range(LAYERS) for layer in (nn.Linear(WIDTH, WIDTH), nn.Tanh())))
    mesh = init_device_mesh("cpu", (world,))
    for layer in [*model[::8], model]:
        fully_shard(layer, mesh=mesh)
    return model


def train(model: nn.Module, steps: int, log: Callable[[], None]) -> float:
    """Return the seconds that some steps take. The weights never change, so that every way sees the same gradients."""
    x = torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(dist.get_rank()))
    dist.barrier()
    begin = time.perf_counter()
    for _ in range(steps):
        model(x).square().mean().backward()
        log()
        model.zero_grad()
    return time.perf_counter() - begin


def work(rank: int, world: int, store: str) -> dict[str, Any]:
    """Measure all ways on this rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    model = make_model(world)
    result: dict[str, Any] = {name: {"rounds": []} for name in WAYS}
    for name, way in WAYS.items():  # check and count
        contender, counted = way(model), Collectives()

        def counting(contender: Any = contender, counted: Collectives = counted) -> None:
            with counted:
                contender.step()

        with collectives() as ours:  # which torch doesn't know
            train(model, EVERY, counting)
        contender.close()
        calls, size = counted.calls + len(ours), counted.bytes + sum(ours)
        result[name] |= {"norms": contender.norms, "calls": calls / EVERY, "bytes": size / EVERY}
    expected = result["all_reduce and .item() each: norms of all"]["norms"]
    for name in list(WAYS)[1:]:
        norms = result[name].pop("norms")
        if rank == 0:  # where pytracker merges
            torch.testing.assert_close(torch.tensor(norms), torch.tensor(expected), rtol=1e-5, atol=0)
    contenders = {name: way(model) for name, way in WAYS.items()}
    for turn in range(ROUNDS + 1):
        for name, contender in contenders.items():
            seconds = train(model, EVERY, contender.step)
            if turn:  # the first warms up
                result[name]["rounds"].append(1e3 * seconds / EVERY)
    for contender in contenders.values():
        contender.close()
    dist.destroy_process_group()
    return result


def many_parameters(rank: int, world: int, store: str) -> dict[str, Any]:
    """Measure a tracker of 10,000 parameters that are spread over the ranks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    parameters = [(f"layers.{index}.weight", nn.Parameter(torch.ones(4))) for index in range(MANY)]
    for _, parameter in parameters:
        parameter.grad = torch.ones(4)
    begin = time.perf_counter()
    tracker = Tracker(parameters, every=MANY_EVERY, diagnosis=None, process_group=dist.group.WORLD)
    made = time.perf_counter() - begin
    calls = []  # wall and CPU of the training's thread
    for _ in range(6 * MANY_EVERY):
        begin, worked = time.perf_counter(), time.thread_time()
        tracker.step()
        calls.append((1e3 * (time.perf_counter() - begin), 1e3 * (time.thread_time() - worked)))
        time.sleep(0.01)  # of training, while which the collectives go on
    tracker.close()
    assert rank or tracker.history["grad_norm"][-1] == (4 * MANY) ** 0.5
    dist.destroy_process_group()
    intervals = [calls[begin : begin + MANY_EVERY] for begin in range(2 * MANY_EVERY, len(calls), MANY_EVERY)]
    wall, cpu = ([max(call[which] for call in interval) for interval in intervals] for which in (0, 1))
    usual = statistics.median(call for call, _ in calls)
    return {"made": made, "step": usual, "wall": statistics.median(wall), "cpu": statistics.median(cpu)}


def launch(world: int, *more: str) -> dict[str, Any]:
    """Run ``world`` ranks; return what the first measured."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "benchmarks.distributed",
                    "--rank",
                    f"{rank}/{world}",
                    "--folder",
                    folder,
                    *more,
                ],
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
            for rank in range(world)
        ]
        codes = [rank.wait() for rank in ranks]
        if any(codes):
            raise RuntimeError(f"ranks ended with {codes}; what they say is above")
        measured: dict[str, Any] = json.loads((Path(folder) / "result.json").read_text())
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--worlds", default="1,2,4,8")
    parser.add_argument("--parameters", action="store_true", help="measure 10,000 parameters on so many ranks instead")
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        rank, world = map(int, arguments.rank.split("/"))
        measure = many_parameters if arguments.parameters else work
        result = measure(rank, world, f"{arguments.folder}/store")
        if rank == 0:
            (Path(arguments.folder) / "result.json").write_text(json.dumps(result))
        return
    if arguments.parameters:
        for world in map(int, arguments.worlds.split(",")):
            found = launch(world, "--parameters")
            print(
                f"{MANY:,} parameters on {world} ranks, a drain every {MANY_EVERY} steps: {found['made']:.2f} s to "
                f"make the tracker; {found['step']:.2f} ms a step; the slowest step of an interval "
                f"{found['wall']:.0f} ms, of which its thread works {found['cpu']:.0f} ms (medians, first rank)"
            )
        return
    load = os.getloadavg()[1]
    report([(world, launch(world)) for world in map(int, arguments.worlds.split(","))], load, arguments.out)


def report(results: list[tuple[int, dict[str, Any]]], load: float, out: Path) -> None:
    """Print a table, and write it down, with the load of the machine before the first process began."""
    columns = ["processes", "way", "collectives a step", "bytes a step", "ms a step", "more than nothing, ms"]
    rows = []
    for world, result in results:
        base = result["nothing"]["rounds"]
        for name, measured in result.items():
            more = [mine - none for mine, none in zip(measured["rounds"], base, strict=True)]
            rows.append(
                [
                    str(world),
                    name,
                    f"{measured['calls']:g}",
                    f"{measured['bytes']:,.0f}",
                    f"{statistics.median(measured['rounds']):.2f}",
                    "" if name == "nothing" else f"{statistics.median(more):.2f}",
                ]
            )
    table = Table(*columns)
    for row in rows:
        table.add_row(*row)
    Console(width=140).print(table)
    lines = [
        f"# Several ranks, {datetime.now():%Y-%m-%d}",
        "",
        f"`python -m benchmarks.distributed`, torch {torch.__version__}, gloo, {os.cpu_count()} cores of "
        f"{platform.machine()}, one thread a process; the load average was {load:.1f} before it began. More processes "
        "than cores take turns, so their times say what logging adds here and not how it scales; the counts hold "
        "anywhere. The last column is the median of differences within rounds: where it is below zero, or less than a "
        "tenth of a step, it is not to be told from the noise of the machine.",
        "",
        f"FSDP2 over an MLP of {2 * LAYERS} parameters, {LAYERS * (WIDTH + 1) * WIDTH:,} elements, fp32; drained "
        f"each {EVERY} steps. Whole training steps, medians of {ROUNDS} rounds of {EVERY} steps in which all take "
        "turns. Bytes are those of the tensors that a rank hands to collectives for logging. Before the timing, "
        "all ways had found the same norms of the model on every step, within 1e-5.",
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
        *["| " + " | ".join(row) + " |" for row in rows],
    ]
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{datetime.now():%Y-%m-%d}-distributed.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"written to {path}")


if __name__ == "__main__":
    main()

"""Cases of test_parallelism.py: trainings in which ranks keep different parameters, or gradients of different ones."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import torch
import torch.distributed as dist
from layouts import EVERY, RATE, STEPS, Network, batch, check, expected_rows
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.distributed.tensor import DTensor, Partial
from torch.nn.parallel import DistributedDataParallel

import pytracker
from pytracker.columns import SUM_SQ, ZEROS


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


class Stage(nn.Module):
    """Some layers of a network, under the names that they have there."""

    def __init__(self, network: Network, names: list[str]) -> None:
        super().__init__()
        for name in names:
            setattr(self, name, getattr(network, name))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name, layer in self.named_children():
            x = layer(x).relu() if name == "first" else layer(x)
        return x


CUTS = {
    2: [["first"], ["second", "norm", "last"]],
    3: [["first"], ["second"], ["norm", "last"]],
    4: [["first"], ["second"], ["norm"], ["last"]],
}
MICRO = 4


def pipeline(rank: int, world: int, schedule: str, beside: str = "alone") -> None:
    """torch's own pipelining: two or three stages, each of one rank, or of two that train with DDP or FSDP2."""
    torch.manual_seed(0)
    reference = Network().double()
    copies = 1 if beside == "alone" else 2
    mesh = init_device_mesh("cpu", (world // copies, copies), mesh_dim_names=("stage", "data"))
    number, reader = mesh.get_coordinate()
    stages = world // copies
    layers = Stage(copy.deepcopy(reference), CUTS[stages][number])
    if beside == "ddp":
        layers = DistributedDataParallel(layers, process_group=mesh.get_group("data"))
    elif beside == "fsdp2":
        fully_shard(layers, mesh=mesh["data"])
    stage = PipelineStage(layers, number, stages, torch.device("cpu"), group=mesh.get_group("stage"))
    kind = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}[schedule]
    run = kind(stage, MICRO, loss_fn=lambda output, target: output.square().mean())
    optimizer = torch.optim.SGD(layers.parameters(), lr=RATE)
    names, expected, _, weights = expected_rows(reference, copies, 1)
    group = None if beside == "fsdp2" else dist.group.WORLD
    with pytracker.Tracker(layers, optimizer=optimizer, every=EVERY, diagnosis=None, process_group=group) as tracker:
        for step in range(STEPS):
            x = batch(step, reader)
            run.step(*([x] if number == 0 else []), **({"target": x} if number == stages - 1 else {}))
            tracker.step()
            optimizer.step()
            optimizer.zero_grad()
    if len(tracker.history.parameters.names) or rank == 0:
        check(tracker.history, shapes_of(reference), names, expected, weights)


def interleaved(rank: int, world: int, kind: str) -> None:
    """Two ranks have two stages each, as torchtitan's model_parts: a list of modules, or a ModuleList."""
    torch.manual_seed(0)
    reference = Network().double()
    numbers = range(rank, 2 * world, world)
    parts = [Stage(copy.deepcopy(reference), CUTS[2 * world][number]) for number in numbers]
    stages = [
        PipelineStage(part, number, 2 * world, torch.device("cpu")) for part, number in zip(parts, numbers, strict=True)
    ]
    run = ScheduleInterleaved1F1B(stages, MICRO, loss_fn=lambda output, target: output.square().mean())
    optimizer = torch.optim.SGD([each for part in parts for each in part.parameters()], lr=RATE)
    names, expected, _, weights = expected_rows(reference, 1, 1)
    target = {"list": parts, "module_list": nn.ModuleList(parts)}[kind]
    with pytracker.Tracker(
        target, optimizer=optimizer, every=EVERY, diagnosis=None, process_group=dist.group.WORLD
    ) as tracker:
        for step in range(STEPS):
            x = batch(step, 0)
            run.step(*([x] if rank == 0 else []), **({"target": x} if rank == world - 1 else {}))
            tracker.step()
            optimizer.step()
            optimizer.zero_grad()
    if rank == 0:
        check(tracker.history, shapes_of(reference), names, expected, weights)


def joined(rank: int, world: int, batches: str, compared: str) -> None:
    """torch's Join: a rank without batches goes on answering the others. The first rank has what its own steps give."""
    torch.manual_seed(0)
    reference = Network().double()
    counts = [int(count) for count in batches.split("+")]
    model = DistributedDataParallel(copy.deepcopy(reference))
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytracker.Tracker(
            model, optimizer, every=EVERY, diagnosis=None, check_replicas=compared == "compared", rank_timeout=10.0
        ) as tracker:
            with Join([model]):
                for step in range(counts[rank]):
                    model(batch(step, rank)).square().mean().backward()
                    tracker.step(loss=step)
                    optimizer.step()
                    optimizer.zero_grad()
            dist.barrier()
    told = [str(each.message) for each in caught if "no longer work together" in str(each.message)]
    assert len(told) == (compared == "compared" and counts[0] != counts[1]), told
    if rank:
        return
    copies = [copy.deepcopy(reference) for _ in range(world)]
    expected = []
    for step in range(counts[0]):
        there = [number for number in range(world) if step < counts[number]]
        for each in copies:
            each.zero_grad()
        for number in there:
            copies[number](batch(step, number)).square().mean().backward()
        for each in copies:
            each.load_state_dict(copies[0].state_dict())
        grads = [[parameter.grad for parameter in copies[number].parameters()] for number in there]
        means = [sum(pieces) / world for pieces in zip(*grads, strict=True)]  # by all ranks, as Join does by default
        expected.append(sum(mean.square().sum().item() for mean in means) ** 0.5)
        with torch.no_grad():
            for each in copies:
                for parameter, mean in zip(each.parameters(), means, strict=True):
                    parameter -= RATE * mean
    assert tracker.history["loss"][:] == list(range(counts[0]))
    np.testing.assert_allclose(tracker.history["grad_norm"].values, expected, rtol=1e-6)


def searched_by_one(rank: int, world: int) -> None:
    """One rank alone looks for NaN among DTensors: the others are not asked."""
    mesh = init_device_mesh("cpu", (world,))
    model = nn.Identity()
    value = DTensor.from_local(torch.full((2, 2), float("nan")), mesh, [Partial()])
    if rank == 0:
        origin = pytracker.locate_nonfinite(model, lambda: model(value))
        assert (origin.phase, origin.nan, origin.bad_inputs) == ("forward", 4, (0,))
    dist.barrier()


def zero_optimizer(rank: int, world: int) -> None:
    """torch's ZeroRedundancyOptimizer: DDP's gradients, and an optimizer whose state is spread."""
    torch.manual_seed(0)
    reference = Network().double()
    model = DistributedDataParallel(copy.deepcopy(reference))
    optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=torch.optim.SGD, lr=RATE)
    names, expected, _, weights = expected_rows(reference, world, 1)
    with pytracker.Tracker(model, optimizer=optimizer, every=EVERY, diagnosis=None) as tracker:
        for step in range(STEPS):
            model(batch(step, rank)).square().mean().backward()
            tracker.step()
            optimizer.step()
            optimizer.zero_grad()
    if len(tracker.history.parameters.names) or rank == 0:
        check(tracker.history, shapes_of(reference), names, expected, weights)
    assert tracker.history["lr"][:] == [RATE] * STEPS


def zero(rank: int, world: int) -> None:
    """The second stage of ZeRO: each gradient is reduced to one rank, which alone keeps it and updates the weight."""
    torch.manual_seed(0)
    reference = Network().double()
    model = copy.deepcopy(reference)
    names, expected, _, weights = expected_rows(reference, world, 1)
    with pytracker.Tracker(model, every=EVERY, diagnosis=None, process_group=dist.group.WORLD) as tracker:
        for step in range(STEPS):
            model(batch(step, rank)).square().mean().backward()
            for index, parameter in enumerate(model.parameters()):
                parameter.grad /= world
                dist.reduce(parameter.grad, index % world)
                if index % world != rank:
                    parameter.grad = None
            tracker.step()
            with torch.no_grad():
                for index, parameter in enumerate(model.parameters()):
                    if parameter.grad is not None:
                        parameter -= RATE * parameter.grad
                    dist.broadcast(parameter, index % world)
            model.zero_grad()
    if len(tracker.history.parameters.names) or rank == 0:
        check(tracker.history, shapes_of(reference), names, expected, weights)


def kept(rank: int, world: int) -> None:
    """Some gradients are on one rank, one is on none, and one is on all."""
    parameters = nn.ParameterDict({name: nn.Parameter(torch.zeros(4, dtype=torch.float64)) for name in "abcd"})
    with pytracker.Tracker(parameters, every=EVERY, diagnosis=None, process_group=dist.group.WORLD) as tracker:
        for step in range(STEPS):
            for index, parameter in enumerate(parameters.values()):
                here = index % world == rank or index == 3
                parameter.grad = torch.full_like(parameter, step + index) if here and index != 2 else None
            tracker.step()
    if rank:
        return
    _, rows = tracker.history.parameters.rows()
    by_name = {name: rows[:, tracker.history.parameters.names.index(name)] for name in "abcd"}
    for name, index in (("a", 0), ("b", 1), ("d", 3)):
        np.testing.assert_allclose(by_name[name][:, SUM_SQ], [4 * (step + index) ** 2 for step in range(STEPS)])
    assert np.isnan(by_name["c"][:, ZEROS]).all()

"""Cases of test_parallelism.py: a model in float64, trained under each layout, has the statistics of one rank."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import pytracker
from pytracker.columns import SUM_SQ, ZEROS

STEPS, EVERY, RATE, SCALE = 7, 3, 0.05, 1024.0


class Network(nn.Module):
    """Odd sizes, so that shards are uneven, and a bias of one element, so that some ranks have none of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 12)
        self.second = nn.Linear(12, 5)
        self.norm = nn.LayerNorm(5)
        self.last = nn.Linear(5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(self.second(self.first(x).relu())))


def batch(number: int, reader: int) -> torch.Tensor:
    return torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(100 * number + reader))


def ddp(model: Network, world: int) -> nn.Module:
    return DistributedDataParallel(model)


def compiled_ddp(model: Network, world: int) -> nn.Module:
    model.first = torch.compile(model.first, backend="eager")  # the names have two wrappers, and the numbers none
    return DistributedDataParallel(model)


def fsdp2(model: Network, world: int) -> nn.Module:
    fully_shard(model.first)
    return fully_shard(model)


def hsdp(model: Network, world: int) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
    return fully_shard(model, mesh=mesh)


def fsdp1(model: Network, world: int, strategy: str, original: bool) -> nn.Module:
    mesh = None
    if strategy == "HYBRID_SHARD":
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
    wrap = partial(
        FullyShardedDataParallel,
        device_id=torch.device("cpu"),
        device_mesh=mesh,
        sharding_strategy=ShardingStrategy[strategy],
        use_orig_params=original,
    )
    model.first = wrap(model.first)
    return wrap(model)


PLAN = {"first": ColwiseParallel(), "second": RowwiseParallel()}


def tensor_parallel(model: Network, world: int) -> nn.Module:
    return parallelize_module(model, init_device_mesh("cpu", (world,)), PLAN)


def sequence_parallel(model: Network, world: int) -> nn.Module:
    """The last layers see a part of the batch on each rank: gradients of replicated parameters are partial sums."""
    plan = {
        "first": ColwiseParallel(),
        "second": RowwiseParallel(output_layouts=Shard(0)),
        "norm": SequenceParallel(sequence_dim=0),
        "last": SequenceParallel(sequence_dim=0),
    }
    parallelize_module(model, init_device_mesh("cpu", (world,)), plan)
    model.register_forward_hook(lambda module, inputs, output: output.full_tensor())
    return model


def tp_fsdp(model: Network, world: int) -> nn.Module:
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("data", "tensor"))
    parallelize_module(model, mesh["tensor"], PLAN)
    for layer in (model.norm, model.last):  # what is not tensor parallel is replicated over that dimension
        parallelize_module(layer, mesh["tensor"], {})
    return fully_shard(model, mesh=mesh["data"])


LAYOUTS: dict[str, Callable[[Network, int], nn.Module]] = {
    "ddp": ddp,
    "compiled_ddp": compiled_ddp,
    "fsdp2": fsdp2,
    "hsdp": hsdp,
    "tensor_parallel": tensor_parallel,
    "sequence_parallel": sequence_parallel,
    "tp_fsdp": tp_fsdp,
    **{
        f"fsdp1_{strategy}_{'original' if original else 'flat'}": partial(fsdp1, strategy=strategy, original=original)
        for strategy in ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD")
        for original in (True, False)
    },
}


def readers_of(layout: str, world: int) -> int:
    """Return how many different batches the ranks read: those of a tensor parallel group share theirs."""
    return {"tensor_parallel": 1, "sequence_parallel": 1, "tp_fsdp": world // 2}.get(layout, world)


def expected_rows(reference: nn.Module, readers: int, micro: int) -> tuple[list[str], np.ndarray, list[float]]:
    """Return the moments of each parameter at each step, of the same training on one rank, by numpy."""
    names, rows = [name for name, _ in reference.named_parameters()], []
    weights = [float(p.detach().norm()) for p in reference.parameters()]
    for step in range(STEPS):
        reference.zero_grad()
        losses = [
            reference(batch(step * micro + part, reader)).square().mean()
            for part in range(micro)
            for reader in range(readers)
        ]
        torch.stack(losses).mean().backward()
        gradients = [p.grad.numpy() for p in reference.parameters()]
        rows.append([[g.sum(), (g**2).sum(), np.abs(g).max(), (g == 0).sum(), 0, 0] for g in gradients])
        with torch.no_grad():
            for p in reference.parameters():
                p -= RATE * p.grad
    return names, np.array(rows, float), weights


def unreduced(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Return the context in which backward does not reduce the gradients over the ranks."""
    if hasattr(model, "no_sync"):
        return model.no_sync()

    @contextlib.contextmanager
    def without_sync():
        model.set_requires_gradient_sync(False)
        yield
        model.set_requires_gradient_sync(True)

    return without_sync()


def compare(rank: int, world: int, layout: str, way: str = "plain") -> None:
    """Train, track and compare; ``way`` is one of plain, accumulate, scaled (tracked before unscale_) and unscaled."""
    micro = 2 if way == "accumulate" else 1
    torch.manual_seed(0)
    reference = Network().double()
    model = LAYOUTS[layout](copy.deepcopy(reference), world)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, enabled=way in ("scaled", "unscaled"))
    readers = readers_of(layout, world)
    names, expected, weights = expected_rows(reference, readers, micro)

    with pytracker.Tracker(model, optimizer=optimizer, every=EVERY, diagnosis=None) as tracker:
        for step in range(STEPS):
            for part in range(micro):
                with unreduced(model) if part + 1 < micro else contextlib.nullcontext():
                    loss = model(batch(step * micro + part, rank * readers // world)).square().mean() / micro
                    scaler.scale(loss).backward()
            if way == "scaled":
                tracker.step(loss=loss.detach(), grad_scale=scaler.get_scale())
            else:
                scaler.unscale_(optimizer)
                tracker.step(loss=loss.detach())
                stats = pytracker.compute_gradient_stats(model)
                np.testing.assert_allclose(stats["grad_norm"], np.sqrt(expected[step, :, SUM_SQ].sum()), rtol=1e-6)
                np.testing.assert_allclose(stats["grad_max"], np.sqrt(expected[step, :, SUM_SQ].max()), rtol=1e-6)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    history = tracker.history
    assert sorted(history.parameters.names) == sorted(names)  # those of the model, without any wrapper's
    order = [history.parameters.names.index(name) for name in names]
    shapes = {info.name: info.shape for info in history.parameters.infos}
    assert shapes == {name: tuple(p.shape) for name, p in reference.named_parameters()}
    steps, rows = history.parameters.rows()
    assert steps.tolist() == list(range(STEPS))
    np.testing.assert_allclose(rows[:, order], expected, rtol=1e-6, atol=1e-12)
    norms = np.sqrt(expected[:, :, SUM_SQ].sum(axis=1))
    np.testing.assert_allclose(history["grad_norm"].values, norms, rtol=1e-6)
    np.testing.assert_allclose(history["grad_max"].values, np.sqrt(expected[:, :, SUM_SQ].max(axis=1)), rtol=1e-6)
    np.testing.assert_allclose(history.parameters.field("weight_norm")[0, order], weights, rtol=1e-6)


def pipeline(rank: int, world: int) -> None:
    """Each rank has a stage of its own; the numbers are those of all stages."""
    stage = nn.Linear(3, 2).double()
    with pytracker.Tracker(
        [(f"stage{rank}.{name}", p) for name, p in stage.named_parameters()],
        every=EVERY,
        diagnosis=None,
        process_group=dist.group.WORLD,
    ) as tracker:
        for step in range(STEPS):
            for p in stage.parameters():
                p.grad = torch.full_like(p, rank + step + 1.0)
            tracker.step()
    assert len(tracker.history.parameters.names) == 2 * world
    expected = [np.sqrt(8 * sum((r + step + 1.0) ** 2 for r in range(world))) for step in range(STEPS)]
    np.testing.assert_allclose(tracker.history["grad_norm"].values, expected, rtol=1e-12)


def zero(rank: int, world: int) -> None:
    """Only one rank keeps the gradient of each parameter, as a ZeRO optimizer leaves it; some are kept by all."""
    parameters = nn.ParameterDict({name: nn.Parameter(torch.zeros(4, dtype=torch.float64)) for name in "abcd"})
    with pytracker.Tracker(parameters, every=EVERY, diagnosis=None, process_group=dist.group.WORLD) as tracker:
        for step in range(STEPS):
            for index, parameter in enumerate(parameters.values()):
                kept = index % world == rank or index == 3
                parameter.grad = torch.full_like(parameter, step + index) if kept and index != 2 else None
            tracker.step()
    _, rows = tracker.history.parameters.rows()
    by_name = {name: rows[:, tracker.history.parameters.names.index(name)] for name in "abcd"}
    for name, index in (("a", 0), ("b", 1), ("d", 3)):
        np.testing.assert_allclose(by_name[name][:, SUM_SQ], [4 * (step + index) ** 2 for step in range(STEPS)])
    assert np.isnan(by_name["c"][:, ZEROS]).all()

"""Cases of test_parallelism.py: a model in float64, trained under each layout, has the statistics of one rank."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable
from functools import partial
from itertools import product

import numpy as np
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import pytracker
from pytracker.columns import ABS_MAX, COLUMNS, EXTRAS, SUM_SQ, ZEROS

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


def inner_ddp(model: Network, world: int) -> nn.Module:
    """Each layer is wrapped by itself, somewhere inside the model, one by a class derived from torch's."""

    class Derived(DistributedDataParallel):
        pass

    model.first, model.second, model.norm = (Derived(layer) for layer in (model.first, model.second, model.norm))
    model.last = DistributedDataParallel(model.last)
    return model


def compiled_ddp(model: Network, world: int) -> nn.Module:
    model.first = torch.compile(model.first, backend="eager")  # the names have two wrappers, and the numbers none
    return DistributedDataParallel(model)


def fsdp2(model: Network, world: int) -> nn.Module:
    fully_shard(model.first)
    return fully_shard(model)


def fsdp2_columns(model: Network, world: int) -> nn.Module:
    """Matrices are cut by columns where torch can: into shards that are not contiguous in the whole."""

    def placement(parameter: nn.Parameter) -> Shard | None:
        return Shard(1) if parameter.ndim == 2 and parameter.shape[1] % world == 0 else None

    return fully_shard(model, shard_placement_fn=placement)


def hsdp(model: Network, world: int) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
    return fully_shard(model, mesh=mesh)


def replicated_in(layer: nn.Module, mesh: DeviceMesh) -> None:
    """Make the parameters of a layer DTensors that every rank of the mesh has, and compute with them."""
    distribute_module(
        layer,
        mesh,
        input_fn=lambda module, inputs, mesh: tuple(DTensor.from_local(x, mesh, [Replicate()]) for x in inputs),
        output_fn=lambda module, output, mesh: output.to_local(),
    )


def fsdp1(model: Network, world: int, strategy: str, original: bool, whole: bool = False) -> nn.Module:
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
    if not whole:
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


def tp_fsdp(model: Network, world: int, mixed: bool = False) -> nn.Module:
    """What is not tensor parallel is replicated over that dimension; or, mixed, no tensor of it but of the other."""
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("data", "tensor"))
    parallelize_module(model, mesh["tensor"], PLAN)
    if mixed:
        fully_shard(model.norm, mesh=mesh["data"])
        fully_shard(model.last, mesh=mesh["data"])
    else:
        replicated_in(model.norm, mesh["tensor"])
        replicated_in(model.last, mesh["tensor"])
    return fully_shard(model, mesh=mesh["data"])


def tp_hsdp(model: Network, world: int) -> nn.Module:
    """A mesh of three dimensions: copies of shards of columns."""
    mesh = init_device_mesh("cpu", (2, world // 4, 2), mesh_dim_names=("copy", "data", "tensor"))
    parallelize_module(model, mesh["tensor"], PLAN)
    replicated_in(model.norm, mesh["tensor"])
    replicated_in(model.last, mesh["tensor"])
    return fully_shard(model, mesh=mesh["copy", "data"])


LAYOUTS: dict[str, Callable[[Network, int], nn.Module]] = {
    "ddp": ddp,
    "inner_ddp": inner_ddp,
    "compiled_ddp": compiled_ddp,
    "fsdp2": fsdp2,
    "fsdp2_columns": fsdp2_columns,
    "fsdp2_whole": lambda model, world: fully_shard(model),
    "fsdp1_whole_original": partial(fsdp1, strategy="FULL_SHARD", original=True, whole=True),
    "fsdp1_whole_flat": partial(fsdp1, strategy="FULL_SHARD", original=False, whole=True),
    "hsdp": hsdp,
    "tensor_parallel": tensor_parallel,
    "sequence_parallel": sequence_parallel,
    "tp_fsdp": tp_fsdp,
    "tp_fsdp_mixed": partial(tp_fsdp, mixed=True),
    "tp_hsdp": tp_hsdp,
    **{
        f"fsdp1_{strategy}_{'original' if original else 'flat'}": partial(fsdp1, strategy=strategy, original=original)
        for strategy in ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD")
        for original in (True, False)
    },
}


def readers_of(layout: str, world: int) -> int:
    """Return how many different batches the ranks read: those of a tensor parallel group share theirs."""
    if layout.startswith("tp_"):
        return world // 2
    return 1 if layout in ("tensor_parallel", "sequence_parallel") else world


def expected_rows(
    reference: nn.Module, readers: int, micro: int, scale: float = 1.0
) -> tuple[list[str], np.ndarray, np.ndarray, list[float]]:
    """Return moments and further columns of each parameter at each step, of the same training on one rank, by numpy.

    The gradients lie in memory multiplied by ``scale``.
    """
    names, rows, further = [name for name, _ in reference.named_parameters()], [], []
    weights = [float(p.detach().norm()) for p in reference.parameters()]
    for step in range(STEPS):
        reference.zero_grad()
        losses = [
            reference(batch(step * micro + part, reader)).square().mean()
            for part in range(micro)
            for reader in range(readers)
        ]
        torch.stack(losses).mean().backward()
        rows.append([moments(p.grad) for p in reference.parameters()])
        further.append([extras(p.grad, scale) for p in reference.parameters()])
        with torch.no_grad():
            for p in reference.parameters():
                if p.grad is not None:
                    p -= RATE * p.grad
    return names, np.array(rows, float), np.array(further, float), weights


def moments(gradient: torch.Tensor | None) -> list[float]:
    if gradient is None:
        return [math.nan] * len(COLUMNS)
    g = gradient.numpy()
    return [g.sum(), (g**2).sum(), np.abs(g).max(), (g == 0).sum(), 0, 0]


def extras(gradient: torch.Tensor | None, scale: float) -> list[float]:
    if gradient is None:
        return [math.nan] * len(EXTRAS)
    size = np.abs(gradient.numpy())
    subnormal = [((size > 0) & (size * scale < 2.0**power)).sum() for power in (-126, -14, -6)]
    return [size.sum(), *subnormal, *((size * scale >= 2.0**power).sum() for power in (126, 14, 7))]


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
    """Train, track and compare.

    ``way`` is one of plain, accumulate, scaled (tracked before unscale_), unscaled, tied (two layers share a weight)
    and frozen (one layer is not trained).
    """
    micro = 2 if way == "accumulate" else 1
    torch.manual_seed(0)
    reference = Network().double()
    if way == "tied":
        reference.second = nn.Linear(12, 6).double()
        reference.norm, reference.last = nn.LayerNorm(6).double(), nn.Linear(6, 12).double()
        reference.last.weight = reference.first.weight
    if way == "frozen":
        reference.second.requires_grad_(False)
    model = LAYOUTS[layout](copy.deepcopy(reference), world)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, enabled=way in ("scaled", "unscaled"))
    readers = readers_of(layout, world)
    in_memory = SCALE if way == "scaled" else 1.0
    names, expected, further, weights = expected_rows(reference, readers, micro, in_memory)
    asked = {"weights_every": 1, "columns": ("l1", "exponents")}

    with pytracker.Tracker(model, optimizer=optimizer, every=EVERY, diagnosis=None, **asked) as tracker:
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
                np.testing.assert_allclose(stats["grad_norm"], np.sqrt(np.nansum(expected[step, :, SUM_SQ])), 1e-6)
                np.testing.assert_allclose(stats["grad_max"], np.sqrt(np.nanmax(expected[step, :, SUM_SQ])), 1e-6)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    shapes = {name: tuple(p.shape) for name, p in reference.named_parameters()}
    if len(tracker.history.parameters.names) or rank == 0:  # DDP's are on every rank, merged ones on the first
        check(tracker.history, shapes, names, expected, weights)
        check_updates(tracker.history, names, expected)
        check_extras(tracker.history, names, further, [math.prod(shapes[name]) for name in names])


def check_extras(history: pytracker.History, names: list[str], further: np.ndarray, elements: list[int]) -> None:
    """Compare the further columns: their series, and their means over the steps of an interval."""
    order = [history.parameters.names.index(name) for name in names]
    there = np.where(np.isnan(further[0, :, 0]), 0, elements)
    first, last = history.parameters.first_step, history.parameters.last_step
    for column, name in enumerate(EXTRAS):
        shares = column > 0
        series, field = (f"grad_{name}_fraction", f"{name}_fraction") if shares else ("grad_l1", "l1_mean")
        whole = np.nansum(further[:, :, column], axis=1) / (there.sum() if shares else 1)
        np.testing.assert_allclose(history[series].values, whole, rtol=1e-6, err_msg=series)
        each = further[:, :, column] / (elements if shares else 1)
        means = [each[begin : end + 1].mean(axis=0) for begin, end in zip(first, last, strict=True)]
        np.testing.assert_allclose(history.parameters.field(field)[:, order], means, rtol=1e-6, err_msg=field)


def check_updates(history: pytracker.History, names: list[str], expected: np.ndarray) -> None:
    """Compare what steps of plain SGD have added with the gradients: of each interval the last step but one counts.

    What came before is on the host with the interval's last row.
    """
    order = [history.parameters.names.index(name) for name in names]
    measured = [last - 1 for last in history.parameters.last_step.tolist()]
    updates = RATE * np.sqrt(expected[measured, :, SUM_SQ])
    np.testing.assert_allclose(history.parameters.field("update_norm")[:, order], updates, rtol=1e-6)


def check(
    history: pytracker.History, shapes: dict[str, tuple], names: list[str], expected: np.ndarray, weights: list[float]
) -> None:
    """Compare what was recorded with the moments of one rank, per parameter and total, and the norms of the weights."""
    assert sorted(history.parameters.names) == sorted(names)  # those of the model, without any wrapper's
    order = [history.parameters.names.index(name) for name in names]
    assert {info.name: info.shape for info in history.parameters.infos} == shapes
    steps, rows = history.parameters.rows()
    assert steps.tolist() == list(range(STEPS))
    np.testing.assert_allclose(rows[:, order], expected, rtol=1e-6, atol=1e-12)
    elements = np.array([math.prod(shapes[name]) for name in names]) * ~np.isnan(expected[0, :, ZEROS])
    totals = {
        "grad_norm": np.sqrt(np.nansum(expected[:, :, SUM_SQ], axis=1)),
        "grad_max": np.sqrt(np.nanmax(expected[:, :, SUM_SQ], axis=1)),
        "grad_abs_max": np.nanmax(expected[:, :, ABS_MAX], axis=1),
        "grad_zero_fraction": np.nansum(expected[:, :, ZEROS], axis=1) / elements.sum(),
        "grad_nonfinite": np.zeros(len(expected)),
    }
    for name, values in totals.items():
        np.testing.assert_allclose(history[name].values, values, rtol=1e-6, err_msg=name)
    np.testing.assert_allclose(history.parameters.field("weight_norm")[0, order], weights, rtol=1e-6)


KINDS = ("dense", "missing", "transposed", "gapped", "partial")


def local_gradient(kind: str, generator: torch.Generator) -> torch.Tensor:
    """Return the values of a gradient's piece, [4, 6], laid out in memory as ``kind`` says."""
    values = torch.randn(4, 6, dtype=torch.float64, generator=generator)
    if kind == "transposed":
        return values.t().contiguous().t()
    if kind == "gapped":
        return torch.stack([values, values], dim=2)[..., 0]
    return values


def changing(rank: int, world: int) -> None:
    """The gradients of DTensors change in every way from one step to the next: each is read as it is then."""
    mesh = init_device_mesh("cpu", (world,))
    generator = torch.Generator().manual_seed(rank)
    pieces = [DTensor.from_local(local_gradient("dense", generator), mesh, [Shard(0)]) for _ in range(3)]
    parameters = [(f"p{index}", nn.Parameter(piece)) for index, piece in enumerate(pieces)]
    changes = [kind for pair in product(KINDS, KINDS) for kind in pair]
    expected = []
    with pytracker.Tracker(parameters, every=7, diagnosis=None) as tracker:
        for step in range(len(changes)):
            for index, (_, parameter) in enumerate(parameters):
                kind = changes[(step + 5 * index) % len(changes)]
                parameter.grad = None
                if kind == "partial":  # a sum over ranks, of the whole parameter
                    whole = torch.cat([local_gradient("dense", generator) for _ in range(world)])
                    parameter.grad = DTensor.from_local(whole, mesh, [Partial()])
                elif kind != "missing":
                    parameter.grad = DTensor.from_local(local_gradient(kind, generator), mesh, [Shard(0)])
            gradients = [parameter.grad for _, parameter in parameters]
            whole = [torch.zeros(1) if grad is None else grad.full_tensor() for grad in gradients]
            tracker.step()
            missing = [gradient is None for gradient in gradients]
            expected.append(np.where(missing, np.nan, [gradient.square().sum().item() for gradient in whole]))
    if rank == 0:
        _, rows = tracker.history.parameters.rows()
        np.testing.assert_allclose(rows[:, :, SUM_SQ], expected, rtol=1e-12)

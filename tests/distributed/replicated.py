"""Cases of test_replicas.py: ranks that should hold equal gradients or weights, of which one drifts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import pytracker
from pytracker.errors import RankMismatchError

STEPS, EVERY = 10, 3


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))


def hsdp(model: nn.Sequential, world: int) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
    return fully_shard(model, mesh=mesh)


def tensor_parallel(model: nn.Sequential, world: int) -> nn.Module:
    return parallelize_module(
        model, init_device_mesh("cpu", (world,)), {"0": ColwiseParallel(), "2": RowwiseParallel()}
    )


def ddp(model: nn.Sequential, world: int) -> nn.Module:
    return DistributedDataParallel(model)


LAYOUTS = {"ddp": ddp, "hsdp": hsdp, "fsdp2": lambda model, world: fully_shard(model), "tp": tensor_parallel}
OWN_DATA = {"ddp", "hsdp", "fsdp2"}


def train(rank: int, world: int, layout: str, spoil=lambda step, model: None, epoch_at: int | None = None):
    model = LAYOUTS[layout](network(), world)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytracker.Tracker(model, every=EVERY, diagnosis=None, check_replicas=True) as tracker:
        for step in range(STEPS):
            seed = 10 * step + (rank if layout in OWN_DATA else 0)
            model(torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))).square().mean().backward()
            spoil(step, model)
            tracker.step()
            optimizer.step()
            optimizer.zero_grad()
            if step == epoch_at:
                tracker.epoch()
    return tracker


def alike(rank: int, world: int, layout: str) -> None:
    assert train(rank, world, layout, epoch_at=4).findings == []


def gradient(rank: int, world: int, layout: str, who: str) -> None:
    """Spoil one gradient on one rank, from step 4 on."""

    def spoil(step: int, model: nn.Module) -> None:
        if rank == int(who) and step >= 4:
            gradients = {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
            local = getattr(gradients["2.bias"], "_local_tensor", gradients["2.bias"])
            local.mul_(1.5)

    findings = train(rank, world, layout, spoil).findings
    if rank != 0:
        assert findings == []  # the first rank judges
        return
    (finding,) = findings
    assert (finding.rule, finding.severity, finding.first_step) == ("replica_drift", "critical", 4)
    assert finding.parameters == ("2.bias",)
    assert finding.numbers["rank"] == int(who)
    assert f"on rank {who} and" in finding.evidence
    assert ("no value has a majority" in finding.cause) == (layout in ("tp", "hsdp"))  # of two copies
    np.testing.assert_allclose(finding.numbers["norm"], 1.5 * finding.numbers["usual_norm"], rtol=1e-5)


def nan(rank: int, world: int) -> None:
    """A NaN on one rank alone is a drift; on all of them it is none of the replicas' business."""

    def spoil(step: int, model: nn.Module) -> None:
        if step >= 6:
            model.module[0].bias.grad[0] = float("nan")

    assert train(rank, world, "ddp", spoil).findings == []
    tracker = train(rank, world, "ddp", spoil if rank == 1 else lambda step, model: None)
    if rank == 0:
        (finding,) = tracker.findings
        assert (finding.first_step, finding.numbers["rank"]) == (6, 1)
        assert np.isnan(finding.numbers["norm"])


def weights(rank: int, world: int) -> None:
    """Weights that differ although the gradients are reduced alike, as after a checkpoint loaded on one rank only."""

    def spoil(step: int, model: nn.Module) -> None:
        if step == 3 and rank == 2:
            with torch.no_grad():
                model.module[0].weight.add_(0.01)

    tracker = train(rank, world, "ddp", spoil, epoch_at=5)
    if rank == 0:
        (finding,) = tracker.findings
        assert finding.evidence.startswith("the parameter 0.weight has norm")
        assert (finding.first_step, finding.numbers["rank"]) == (5, 2)
        assert finding.to_dict() in tracker.history.findings


def other_steps(rank: int, world: int) -> None:
    """Ranks that record other steps are not compared, but told."""
    model = ddp(network(), world)
    tracker = pytracker.Tracker(model, every=EVERY, diagnosis=None, check_replicas=True, on_rank_fault="raise")
    model(torch.ones(1, 6)).sum().backward()
    if rank == 1:
        tracker._steps = 2
    for _ in range(2 * EVERY - 1):
        tracker.step()
    with pytest.raises(RankMismatchError, match="have recorded different steps"):
        tracker.step()
    dist.barrier()


def pipeline(rank: int, world: int) -> None:
    """Two stages on two ranks each: a drift in the second stage reaches the first rank."""
    stage = rank // 2
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        for p in layer.parameters():
            p.fill_(0.5)
    with pytracker.Tracker(
        [(f"stage{stage}.{name}", p) for name, p in layer.named_parameters()],
        every=EVERY,
        diagnosis=None,
        process_group=dist.group.WORLD,
        check_replicas=True,
    ) as tracker:
        for step in range(STEPS):
            for p in layer.parameters():
                p.grad = torch.full_like(p, 7.0 if rank == 3 and step >= 5 else 1.0)
            tracker.step()
    if rank == 0:
        (finding,) = tracker.findings
        assert (finding.first_step, finding.numbers["rank"]) == (5, 3)
        assert set(finding.parameters) == {"stage1.weight", "stage1.bias"}

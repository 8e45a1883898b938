"""Cases of test_disagreement.py: layouts that cannot be told, and ranks that do not do the same."""

from __future__ import annotations

import time
import warnings

import pytest
import torch
import torch.distributed as dist
from hooks import waits_forbidden
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel
from waiting import train_two_more_steps

import pytracker
from pytracker.errors import InvalidValueError, LayoutError, RankMismatchError

PATIENCE = 20.0


def made(model, **keywords) -> pytracker.Tracker:
    return pytracker.Tracker(
        model, diagnosis=None, **{"every": 2, "rank_timeout": PATIENCE, "on_rank_fault": "raise", **keywords}
    )


def fill_gradients(model: nn.Module, value: float) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, value)


def sharded(size: int = 4) -> nn.Module:
    model = fully_shard(nn.Linear(size, size))
    model(torch.ones(1, size)).sum().backward()
    return model


def untold(rank: int, world: int) -> None:
    """Plain parameters of many ranks are refused unless DDP, or a group, says what they are."""
    whole = nn.Linear(3, 2)
    wrapped = DistributedDataParallel(nn.Linear(3, 2))
    half = DistributedDataParallel(nn.Linear(3, 2), process_group=dist.new_subgroups(1)[0])
    partly = nn.Sequential(DistributedDataParallel(nn.Linear(3, 3)), nn.Linear(3, 2))
    ignoring = nn.Linear(3, 2)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(ignoring, ["bias"])
    ignoring = DistributedDataParallel(ignoring)
    for model, name in (
        (whole, "'weight'"),
        (list(wrapped.named_parameters()), "'module.weight'"),
        (wrapped.module, "'weight'"),
        (half, "'weight'"),
        (partly, "'1.weight'"),
        (ignoring, "'bias'"),
    ):
        with pytest.raises(LayoutError, match=rf"{name} is a plain tensor on one of 2 ranks.*process_group="):
            made(model)
    for model in (whole, wrapped):  # frozen parameters have no gradient to be told of
        model.requires_grad_(False)
    made(nn.Sequential(whole, wrapped)).close()


def alone(rank: int, world: int) -> None:
    """A rank that trains alone says so by a group of its own, and is the first of it."""
    model = nn.Linear(3, 2)
    group = dist.new_group([rank], use_local_synchronization=True)
    with made(model, process_group=group) as tracker:
        for _ in range(3 + rank):
            fill_gradients(model, 1.0 + rank)
            tracker.step()
    assert tracker.history["grad_norm"][:] == [pytest.approx(8**0.5 * (1 + rank))] * (3 + rank)


def no_copies(rank: int, world: int) -> None:
    """Different parameters of one name are found by their weights, or else at the first drain; nothing is recorded."""
    torch.manual_seed(rank)
    with pytest.raises(RankMismatchError, match=r"parameter 'weight' differs between the ranks.*Give other names"):
        made(nn.Linear(3, 2), process_group=dist.group.WORLD)
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    tracker = made(model, process_group=dist.group.WORLD)
    fill_gradients(model, 1.0 + rank)
    tracker.step()
    with pytest.raises(
        RankMismatchError, match=r"the gradient of 'weight' differs between the ranks.*at step 0.*names"
    ):
        step_and_close(tracker)
    assert "grad_norm" not in tracker.history


def no_copies_on_other_meshes(rank: int, world: int) -> None:
    """Shards of a home-made tensor parallelism, of one name each, spread by FSDP2 over meshes of their own."""
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("tensor", "data"))
    torch.manual_seed(0)
    model = fully_shard(nn.Linear(4, 4), mesh=mesh["data"])
    tracker = made(model)
    for parameter in model.parameters():
        local = torch.full_like(parameter.to_local(), 1.0 + rank // 2)
        parameter.grad = DTensor.from_local(local, parameter.device_mesh, parameter.placements)
    tracker.step()
    with pytest.raises(RankMismatchError, match=r"the gradient of 'weight' differs between the ranks"):
        step_and_close(tracker)
    assert "grad_norm" not in tracker.history


def drifted(rank: int, world: int) -> None:
    """Copies that leave each other later are no reason to end a training: a warning, once."""
    model = nn.Linear(3, 2)
    with torch.no_grad():
        model.weight.fill_(1.0)
        model.bias.fill_(1.0)
    with warnings.catch_warnings(record=True) as caught, made(model, process_group=dist.group.WORLD) as tracker:
        warnings.simplefilter("always")
        for step in range(8):
            fill_gradients(model, 1.0 + (rank if step > 4 else 0))
            tracker.step()
    told = [str(warning.message) for warning in caught if "check_replicas" in str(warning.message)]
    if rank == 0:
        assert len(told) == 1
        assert "the gradient of 'weight' differs between the ranks that have one of that name, at step 5" in told[0]
        assert len(tracker.history["grad_norm"]) == 8


def members(rank: int, world: int) -> None:
    """Whoever shares a parameter must take part, and track it."""
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("stage", "data"))
    model = fully_shard(nn.Linear(4, 4), mesh=mesh["data"])
    with pytest.raises(LayoutError, match=r"'weight' is spread over ranks \[.*leaves out \[.*leave process_group away"):
        made(model, process_group=mesh.get_group("stage"))
    flat = init_device_mesh("cpu", (world,))
    pieces = {name: DTensor.from_local(torch.ones(2, 2), flat, [Shard(0)], run_check=False) for name in "ab"}
    mine = [(name, nn.Parameter(piece)) for name, piece in pieces.items() if rank != 1 or name == "a"]
    with pytest.raises(RankMismatchError, match=r"'b' is spread over 4 ranks, rank 0 the first.*3 of these track it"):
        made(mine)
    plain_or_not = pieces["a"] if rank else torch.ones(2 * world, 2)
    with pytest.raises(
        RankMismatchError, match=r"'a' is float32 \[8, 2\] on ranks \[0\], .*spread over ranks, on ranks \[1, 2, 3\]"
    ):
        made([("a", nn.Parameter(plain_or_not))], process_group=dist.group.WORLD)


def settings(rank: int, world: int) -> None:
    """Arguments that set the size or number of collectives are the same on every rank, whatever is asked for."""
    model = DistributedDataParallel(nn.Linear(4, 4))
    noise = pytracker.GradientNoiseScale(model, 4)
    for keywords in ({"noise_scale": noise}, {"check_replicas": True}, {"process_group": dist.group.WORLD}):
        with pytest.raises(RankMismatchError, match=r"different `every`: 3 on ranks \[0\], 4 on ranks \[1"):
            made(model, every=3 + rank, **keywords)
        with pytest.raises(RankMismatchError, match=r"different `weights_every`: None on ranks \[0\], 5 on ranks \[1"):
            made(model, weights_every=5 if rank else None, **keywords)
    for _ in range(3):
        with pytest.raises(
            RankMismatchError, match=r"different `check_replicas`: True on ranks \[0\], False on ranks \[1"
        ):
            made(sharded(), check_replicas=rank == 0)
    tracker = made(model, check_replicas=True)
    with pytest.raises(InvalidValueError, match="every cannot change"):
        tracker.every = 5
    tracker.close()


def steps(rank: int, world: int) -> None:
    """Other numbers of steps are told by rank, at once, and no number is recorded: before, at and after a drain."""
    for first, second in ((3, 4), (4, 3), (4, 5), (9, 4)):
        tracker = made(sharded(64), every=4)
        for _ in range(second if rank else first):
            tracker.step()
        with pytest.raises(
            RankMismatchError, match=rf"different numbers of steps: {first} on ranks \[0\], {second} on ranks \[1"
        ):
            tracker.close()
        assert len(tracker.history.get("grad_norm", ())) == (4 if rank == 0 and min(first, second) >= 4 else 0)
        dist.barrier()


def one_epoch(rank: int, world: int) -> None:
    """One rank alone comes to epoch, the others go on and close."""
    tracker = made(sharded(), every=2)
    for _ in range(5 if rank else 3):
        tracker.step()
    with pytest.raises(RankMismatchError, match=r"different numbers of steps: 3 on ranks \[0\], 5 on ranks \[1"):
        tracker.close() if rank else tracker.epoch()
    if rank == 0:
        assert tracker.history["grad_norm"].steps.tolist() == [0, 1]  # these every rank had recorded
    dist.barrier()


def other_steps(rank: int, world: int) -> None:
    """As many steps, but not the same: a checkpoint that was loaded on one rank only."""
    for noise in (False, True):
        model = DistributedDataParallel(nn.Linear(4, 4)) if noise else sharded()
        keywords = {"noise_scale": pytracker.GradientNoiseScale(model, 4)} if noise else {}
        tracker = made(model, **keywords)
        if rank:
            tracker._steps = 100
        model(torch.ones(1, 4)).sum().backward()
        tracker.step()
        with pytest.raises(RankMismatchError, match=r"at drain 1 the ranks have recorded different steps, (0|100) to"):
            train_two_more_steps(tracker) if rank == 0 else step_and_close(tracker)  # the first finds it, and says so
        assert noise or "grad_norm" not in tracker.history  # under DDP every rank has whole rows
        dist.barrier()


def told_while_they_meet(rank: int, world: int) -> None:
    """Ranks that wait in close for one that found the fault in a step find the same, and do not wait for it."""
    for _ in range(2):
        tracker = made(sharded(), rank_timeout=PATIENCE)
        if rank:
            tracker._steps = 100
        tracker.step()
        if rank == 0:
            time.sleep(0.3)  # the others are in close by now, or find the fault before: all the same
        with pytest.raises(RankMismatchError, match=r"at drain 1 the ranks have recorded different steps, (0|100) to"):
            train_two_more_steps(tracker) if rank == 0 else step_and_close(tracker)
    dist.barrier()


def step_and_close(tracker: pytracker.Tracker) -> None:
    tracker.step()
    tracker.close()


def again(rank: int, world: int) -> None:
    """What a failed tracker has left under way is not taken for that of the next."""
    model = sharded(8)
    for fault in (ZeroDivisionError, None):
        tracker = made(model, every=4, rank_timeout=20.0)
        for _ in range(3 if rank else 8):
            tracker.step()
        if fault and rank:
            with pytest.raises(fault), tracker:
                raise fault
        else:
            with pytest.raises(
                RankMismatchError, match=r"not all ranks came|was not merged|different numbers of steps"
            ):
                tracker.close()
        dist.barrier()
    with made(model, every=4, rank_timeout=20.0) as tracker:
        for _ in range(8):
            tracker.step()
    if rank == 0:
        assert tracker.history["grad_norm"][:] == [pytest.approx(72**0.5)] * 8


def copies_of_some(rank: int, world: int) -> None:
    """Ranks that have copies of different things with different others find each other."""
    names = ["ab", "ac", "bc"][rank]
    parameters = {name: nn.Parameter(torch.ones(4)) for name in names}
    with made(list(parameters.items()), check_replicas=True, process_group=dist.group.WORLD) as tracker:
        for step in range(6):
            for name, parameter in parameters.items():
                parameter.grad = torch.full_like(parameter, 2.0 if (rank, name) == (2, "c") and step > 2 else 1.0)
            tracker.step()
    if rank == 0:
        assert [(finding.parameters, finding.first_step) for finding in tracker.findings] == [(("c",), 3)]


def absent(rank: int, world: int) -> None:
    """A tracker that one rank makes alone waits as long as it was told to, and says for whom."""
    if rank == 0:
        with pytest.raises(RankMismatchError, match=r"came to make the tracker.*no answer from ranks \[1\]"):
            made(sharded_alone(), rank_timeout=2.0)
    else:
        sharded_alone()
    dist.barrier()


def sharded_alone() -> nn.Module:
    return fully_shard(nn.Linear(4, 4))


def raises_while_compared(rank: int, world: int) -> None:
    """Where copies are compared too, a rank that raises waits for nobody, and its rows are safe."""
    model = DistributedDataParallel(nn.Linear(4, 4))
    tracker = made(model, check_replicas=True)
    for _ in range(3):
        model(torch.ones(1, 4)).sum().backward()
        tracker.step()
    if rank == 0:
        with waits_forbidden(), pytest.raises(ZeroDivisionError), tracker:
            raise ZeroDivisionError
        assert len(tracker.history["grad_norm"]) == 3
    dist.barrier()


def late(rank: int, world: int) -> None:
    """A step does not wait for a rank that is several drains behind, and what comes in the end is exact."""
    model = sharded()
    with made(model) as tracker:
        if rank:
            dist.barrier()  # that all others enter after their last step
        with waits_forbidden():
            for _ in range(8):
                tracker.step()
        if not rank:
            dist.barrier()
    if rank == 0:
        assert tracker.history["grad_norm"][:] == [pytest.approx(20**0.5)] * 8

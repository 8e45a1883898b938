"""What this rank holds of each parameter, read from the parameters themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .columns import ABS_MAX, NANS, ZEROS
from .errors import LayoutError


@dataclass(frozen=True)
class Piece:
    """What this rank holds of a parameter."""

    counts: bool  # this rank's piece is added; False on the replicas of a rank that adds the same
    replicated: bool  # every rank that has the name has the whole gradient
    ranks: tuple[int, ...] = ()  # those that share a sharded parameter; another such set holds a copy of it


def piece_of(name: str, parameter: Tensor) -> Piece:
    """Read from a parameter what this rank holds of it.

    Raises:
        LayoutError: it is a DTensor whose placement says neither whole nor shard.
    """
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is None:
        return Piece(counts=True, replicated=True)
    coordinate = mesh.get_coordinate()
    counts = coordinate is not None
    for dimension, placement in enumerate(parameter.placements):  # type: ignore[attr-defined]
        if placement.is_partial():
            raise LayoutError(
                f"parameter {name!r} is a DTensor with placement {placement}: a partial sum has no moments of its own; "
                "redistribute it to Shard or Replicate before it is tracked"
            )
        if placement.is_replicate() and counts:
            counts = coordinate[dimension] == 0
    return Piece(counts=counts, replicated=False, ranks=tuple(mesh.mesh.flatten().tolist()))


def is_sharded(plan: Any) -> bool:
    """Tell whether any parameter of a plan is a DTensor that lies on more than one rank."""
    return plan.has_subclasses and any(hasattr(p, "device_mesh") and p.device_mesh.size() > 1 for p in plan.parameters)


def merge_over_meshes(names: list[str], parameters: list[Tensor], tensors: Tensor) -> Tensor:
    """Merge the moments [T, 6] of local pieces over the device meshes of the parameters; waits as collectives do.

    Every rank of a mesh must call it. Plain parameters are taken as they are: each rank has all of them.

    Raises:
        LayoutError: a parameter is a partial sum.
    """
    merged = tensors.clone()
    meshes: dict[Any, list[int]] = {}
    for index, parameter in enumerate(parameters):
        if hasattr(parameter, "device_mesh"):
            meshes.setdefault(parameter.device_mesh, []).append(index)
    for mesh, members in meshes.items():
        counting = torch.tensor([piece_of(names[i], parameters[i]).counts for i in members], device=tensors.device)
        local = tensors[members]
        present = ~local[:, ZEROS].isnan() & counting
        sums = torch.where(present[:, None], local, torch.zeros_like(local))
        maxima = sums[:, ABS_MAX].nan_to_num(nan=0.0, posinf=float("inf"))
        pieces = present.to(sums.dtype)
        sums = torch.cat([sums, pieces[:, None]], dim=1)
        for dimension in range(mesh.ndim):
            dist.all_reduce(sums, dist.ReduceOp.SUM, group=mesh.get_group(dimension))
            dist.all_reduce(maxima, dist.ReduceOp.MAX, group=mesh.get_group(dimension))
        nan = torch.full_like(maxima, float("nan"))
        whole = sums[:, :-1].clone()
        whole[:, ABS_MAX] = torch.where(whole[:, NANS] > 0, nan, maxima)
        merged[members] = torch.where(sums[:, -1:] > 0, whole, nan[:, None])
    return merged

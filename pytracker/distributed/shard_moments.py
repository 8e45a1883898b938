"""Moments of sharded parameters, merged over the ranks at once: what one call wants to know of the gradients now."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..columns import ABS_MAX, NANS, ZEROS
from ..core import LocalParameter
from .ranks import group_named


def merge_shards(parameters: list[LocalParameter], tensors: Tensor) -> Tensor:
    """Merge the moments [T, 6] of local pieces over the ranks that hold the others; waits as collectives do.

    Every rank must call it. Plain parameters are taken as they are: each rank has all of them.
    """
    merged = tensors.clone()
    alike: dict[Any, list[int]] = defaultdict(list)
    for index, each in enumerate(parameters):
        if each.groups:
            alike[each.groups].append(index)
    for groups, members in alike.items():
        counting = torch.tensor([parameters[i].shard.is_counted for i in members], device=tensors.device)
        local = tensors[members]
        present = ~local[:, ZEROS].isnan() & counting
        sums = torch.where(present[:, None], local, torch.zeros_like(local))
        maxima = sums[:, ABS_MAX].nan_to_num(nan=0.0, posinf=float("inf"))
        sums = torch.cat([sums, present.to(sums.dtype)[:, None]], dim=1)
        for group in map(group_named, groups):
            dist.all_reduce(sums, dist.ReduceOp.SUM, group=group)
            dist.all_reduce(maxima, dist.ReduceOp.MAX, group=group)
        nan = torch.full_like(maxima, float("nan"))
        whole = sums[:, :-1].clone()
        whole[:, ABS_MAX] = torch.where(whole[:, NANS] > 0, nan, maxima)
        merged[members] = torch.where(sums[:, -1:] > 0, whole, nan[:, None])
    return merged

"""Merges the moments of sharded parameters over the ranks immediately, for calls that need them now."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..core import ParameterLayout
from ..moments import join, split
from .ranks import group_named


def merge_shards(parameters: Sequence[ParameterLayout], tensors: Tensor) -> Tensor:
    """Merge the moments [T, 6] of local pieces over the ranks that hold the others; waits as collectives do.

    Every rank must call it. Plain parameters are taken as they are: each rank has all of them.
    """
    merged = tensors.clone()
    alike: dict[Any, list[int]] = defaultdict(list)
    for index, each in enumerate(parameters):
        if each.groups:
            alike[each.groups].append(index)
    for groups, members in alike.items():
        sums, maxima = split(tensors[members], torch.ones((), dtype=torch.bool, device=tensors.device))
        for group in map(group_named, groups):
            dist.all_reduce(sums, dist.ReduceOp.SUM, group=group)
            dist.all_reduce(maxima, dist.ReduceOp.MAX, group=group)
        merged[members] = join(sums, maxima)[0]
    return merged

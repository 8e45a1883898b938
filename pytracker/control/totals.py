"""Computes the norm of all gradients on the device, over several devices and over the ranks that hold shards."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..collectives import group_named
from ..columns import ABS_MAX, COLUMNS, NANS, SUM_SQ, TOTALS
from ..core import ParameterLayout, root
from ..moments import is_missing


class TotalNorm:
    """Takes the norm of all gradients from the rows of one step, with the training's own groups, and never waits.

    Shards are added up by one small all-reduce for each group over which some are spread; with a process group whose
    ranks have different parameters, by one over that group. All ranks must call it alike.

    Args:
        parameters: as this rank holds them.
        members: for each device the indices of its parameters, in the order of its rows.
        process_group: the ranks over which plain parameters are spread; copies of a name are counted once. Finding out
            who has copies is one exchange, and waits.
    """

    def __init__(
        self, parameters: Sequence[ParameterLayout], members: Sequence[Sequence[int]], process_group: Any = None
    ) -> None:
        self._members, self._count = members, len(parameters)
        self._names: list[tuple[str, ...]] = []  # of the groups, of each set of parameters that has the same
        alike: dict[tuple[str, ...], list[int]] = defaultdict(list)
        for index, each in enumerate(parameters):
            alike[() if process_group is not None else each.groups].append(index)
        self._alike = dict(alike)
        self._process_group = process_group
        self._shares: Tensor | None = None if process_group is None else _shares(parameters, process_group)

    @property
    def is_local(self) -> bool:
        """Whether the totals of the row are all there is to know."""
        return len(self._members) == 1 and self._shares is None and not any(self._alike)

    def norm(self, rows: Sequence[Tensor], order: float) -> Tensor:
        """Return the norm of order 2 or inf, float64 of one element on the first device.

        Args:
            rows: what this step's reduction gave on each device.
            order: 2.0 or inf.
        """
        device = rows[0].device
        if self._shares is None and len(self._alike) == 1:  # all are spread alike: the totals will do
            totals = torch.stack([row[:TOTALS].to(device) for row in rows])
            sums, maxima, nans = totals[:, SUM_SQ].sum(), totals[:, ABS_MAX].amax(), totals[:, NANS].sum()
            (groups,) = self._alike
            return self._reduced([groups], sums[None], maxima[None], nans[None], order)
        width = len(COLUMNS)
        parts = zip(rows, self._members, strict=True)
        tensors = torch.cat(
            [row[TOTALS : TOTALS + len(own) * width].reshape(-1, width).to(device) for row, own in parts]
        )
        tensors = torch.where(is_missing(tensors)[:, None], 0.0, tensors)
        place = {index: at for at, index in enumerate(i for own in self._members for i in own)}
        sum_sq = tensors[:, SUM_SQ]
        if self._shares is not None:
            sum_sq = sum_sq * self._shares.to(device)[list(place)]
        sets = [[place[i] for i in members] for members in self._alike.values()]
        sums = torch.stack([sum_sq[members].sum() for members in sets])
        maxima = torch.stack([tensors[members, ABS_MAX].amax() for members in sets])
        nans = torch.stack([tensors[members, NANS].sum() for members in sets])
        return self._reduced(list(self._alike), sums, maxima, nans, order)

    def _reduced(self, sets: list[tuple[str, ...]], sums: Tensor, maxima: Tensor, nans: Tensor, order: float) -> Tensor:
        """Merge what each set of parameters has over its groups, and then the sets."""
        if math.isinf(order):
            maxima = self._over_ranks(sets, torch.nan_to_num(maxima, nan=0.0, posinf=math.inf), dist.ReduceOp.MAX)
            nans = self._over_ranks(sets, nans, dist.ReduceOp.SUM)
            return torch.where(nans.sum() > 0, math.nan, maxima.amax()).reshape(1)
        return root(self._over_ranks(sets, sums, dist.ReduceOp.SUM).sum()).reshape(1)

    def _over_ranks(self, sets: list[tuple[str, ...]], values: Tensor, operation: Any) -> Tensor:
        if self._process_group is not None:
            values = values.clone()
            dist.all_reduce(values, operation, group=self._process_group)
            return values
        for name in dict.fromkeys(name for names in sets for name in names):
            which = [index for index, names in enumerate(sets) if name in names]
            part = values[which]
            dist.all_reduce(part, operation, group=group_named(name))
            values = values.clone()
            values[which] = part
        return values


def _shares(parameters: Sequence[ParameterLayout], process_group: Any) -> Tensor:
    """Return by how much each piece counts, float64 [T]: 1 / the ranks of the group that have the same piece."""
    pieces = [(each.name, _place(each)) for each in parameters]
    of_ranks: list[Any] = [None] * dist.get_world_size(process_group)
    dist.all_gather_object(of_ranks, pieces, group=process_group)
    holders = Counter(piece for of_rank in of_ranks for piece in of_rank)
    return torch.tensor([1 / holders[piece] for piece in pieces], dtype=torch.float64, device="cpu")


def _place(each: ParameterLayout) -> int:
    """Return which piece of a parameter this rank has: the first of its ranks that has the same; -1: all of it."""
    shard = each.shard
    return shard.shard_ranks.index(min(shard.replica_ranks)) if shard.shard_ranks and shard.replica_ranks else -1

"""Computes the norm of all gradients on the device, over several devices and over the ranks that hold shards."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..collectives import group_named
from ..columns import ABS_MAX, COLUMNS, NANS, SUM_SQ, TOTALS
from ..core import ParameterLayout
from ..moments import is_missing
from ..reference import root


@dataclass(frozen=True)
class _Places:
    """What is picked from the rows of one step, on one device."""

    shares: Tensor | None  # [T], by how much each piece counts
    sets: list[Tensor]  # of each set of parameters that are spread alike, where their moments are
    of_group: dict[str, Tensor]  # of each group, which of the sets are spread over it


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
        alike: dict[tuple[str, ...], list[int]] = defaultdict(list)
        for index, each in enumerate(parameters):
            alike[() if process_group is not None else each.groups].append(index)
        self._alike = dict(alike)
        self._process_group = process_group
        self._shares: Tensor | None = None if process_group is None else _shares(parameters, process_group)
        self._places: dict[torch.device, _Places] = {}  # each made once: to copy an index on each step would wait

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
            return self._reduced(sums[None], maxima[None], nans[None], order)
        places = self._places_on(device)
        width = len(COLUMNS)
        parts = zip(rows, self._members, strict=True)
        tensors = torch.cat(
            [row[TOTALS : TOTALS + len(own) * width].reshape(-1, width).to(device) for row, own in parts]
        )
        tensors = torch.where(is_missing(tensors)[:, None], 0.0, tensors)
        sum_sq = tensors[:, SUM_SQ]
        if places.shares is not None:
            sum_sq = sum_sq * places.shares
        sums = torch.stack([sum_sq[members].sum() for members in places.sets])
        maxima = torch.stack([tensors[members, ABS_MAX].amax() for members in places.sets])
        nans = torch.stack([tensors[members, NANS].sum() for members in places.sets])
        return self._reduced(sums, maxima, nans, order)

    def _places_on(self, device: torch.device) -> _Places:
        if device not in self._places:
            place = {index: at for at, index in enumerate(i for own in self._members for i in own)}
            sets = [[place[i] for i in members] for members in self._alike.values()]
            names = dict.fromkeys(name for groups in self._alike for name in groups)
            of_group = {name: [at for at, groups in enumerate(self._alike) if name in groups] for name in names}
            self._places[device] = _Places(
                None if self._shares is None else self._shares[list(place)].to(device),
                [torch.tensor(members, device=device) for members in sets],
                {name: torch.tensor(which, device=device) for name, which in of_group.items()},
            )
        return self._places[device]

    def _reduced(self, sums: Tensor, maxima: Tensor, nans: Tensor, order: float) -> Tensor:
        """Merge what each set of parameters has over its groups, and then the sets."""
        if math.isinf(order):
            maxima = self._over_ranks(torch.nan_to_num(maxima, nan=0.0, posinf=math.inf), dist.ReduceOp.MAX)
            nans = self._over_ranks(nans, dist.ReduceOp.SUM)
            return torch.where(nans.sum() > 0, math.nan, maxima.amax()).reshape(1)
        return root(self._over_ranks(sums, dist.ReduceOp.SUM).sum()).reshape(1)

    def _over_ranks(self, values: Tensor, operation: Any) -> Tensor:
        if self._process_group is not None:
            values = values.clone()
            dist.all_reduce(values, operation, group=self._process_group)
            return values
        for name, which in self._places_on(values.device).of_group.items():
            part = values[which]
            dist.all_reduce(part, operation, group=group_named(name))
            values = values.index_copy(0, which, part)
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

"""The norm of all gradients, where parameters are spread in different ways."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from pytracker.columns import TOTALS
from pytracker.control.totals import TotalNorm
from pytracker.core import ParameterLayout

SIZES = (3, 5, 2)


@pytest.fixture
def group() -> Iterator[str]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD.group_name
    dist.destroy_process_group()


class Calls(TorchDispatchMode):
    """Lists the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def row_of(gradients: list[torch.Tensor | None]) -> torch.Tensor:
    missing = torch.full((6,), math.nan, dtype=torch.float64)
    rows = [
        missing if g is None else torch.stack([g.sum(), g.square().sum(), g.abs().max(), *g.new_zeros(3)])
        for g in gradients
    ]
    return torch.cat([torch.zeros(TOTALS, dtype=torch.float64), *rows])


@pytest.mark.parametrize("order", [2.0, math.inf])
def test_the_norm_of_sets_that_are_spread_differently_takes_no_index_from_the_host_but_once(group, order):
    layouts = [ParameterLayout(f"p{i}", (n,), groups=(group,) if i == 1 else ()) for i, n in enumerate(SIZES)]
    total = TotalNorm(layouts, [[0, 1, 2]])
    generator = torch.Generator().manual_seed(0)
    for step in range(3):
        gradients = [torch.randn(n, dtype=torch.float64, generator=generator) for n in SIZES]
        given = [None if step == 2 and i == 0 else gradient for i, gradient in enumerate(gradients)]
        row = row_of(given)
        with Calls() as calls:
            norm = total.norm([row], order)
        there = torch.cat([gradient for gradient in given if gradient is not None])
        torch.testing.assert_close(norm, torch.linalg.vector_norm(there, order).reshape(1))
        if step:
            assert not {"aten::lift_fresh", "aten::_to_copy", "aten::copy_"} & set(calls.names)

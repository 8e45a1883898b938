"""Cases of test_levels.py: more levels than so few ranks need."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import pytracker
from pytracker.collectives import levels
from pytracker.errors import RankMismatchError


def two_levels(rank: int, world: int, way: str) -> None:
    """Six ranks in groups of two, and of those in two levels: the norms are exact, and a rank that differs is named."""
    with mock.patch.multiple(levels, WIDEST_SINGLE=2, _HOST=2, _WIDTH=2, _GATHERED=0 if way == "in_rings" else 2**17):
        assert levels.widths(6) == [2, 2, 2]
        torch.manual_seed(0)
        model = fully_shard(nn.Linear(13, 7).double())
        norms = []
        with pytracker.Tracker(model, every=3, diagnosis=None) as tracker:
            for step in range(10):
                model(torch.full((2, 13), 1.0 + step + rank, dtype=torch.float64)).square().sum().backward()
                norms.append(sum(p.grad.full_tensor().square().sum().item() for p in model.parameters()) ** 0.5)
                tracker.step(loss=step)
                model.zero_grad()
        assert ("grad_norm" in tracker.history) == (rank == 0)
        assert tracker.history["loss"][:] == list(range(10))
        if rank == 0:
            np.testing.assert_allclose(tracker.history["grad_norm"][:], norms, rtol=1e-13)
        with pytest.raises(
            RankMismatchError, match=r"different `every`: 3 on ranks \[0, 1, 2, 4, 5\], 4 on ranks \[3\]"
        ):
            pytracker.Tracker(model, every=4 if rank == 3 else 3, diagnosis=None)
        dist.barrier()

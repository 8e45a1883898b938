"""Which rank of a job this process is."""

from __future__ import annotations

import os
import sys


def rank_here() -> int:
    """Return this process's rank, as torch.distributed or the launcher's RANK and WORLD_SIZE say; 0 without them."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return int(distributed.get_rank())
    rank, world = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    return int(rank) if rank.isdecimal() and world.isdecimal() and int(world) > 1 else 0
